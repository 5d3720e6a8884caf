"""The model card: README.md of a checkpoint, with the front matter that the Hugging Face hub reads.

Made from the model, its input contract and the manifest of its training run, the same text each time. Of the manifest
only the fields named here are printed, each only if it has the form that it should have: nothing else that a manifest
may hold, paths and ids of subjects among it, can come in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from brainlm.input_contract import InputContract
from brainlm.train_subjects import TrainSubjects

if TYPE_CHECKING:
    from brainlm.model import BrainLM

FILE_NAME = "README.md"
NOT_RECORDED = "not recorded"
CHANGED_FROM = "changed_from_weights_sha256"  # in the manifest of weights that were changed after their training run

HASH = r"[0-9a-f]{64}"
COMMIT = r"([0-9a-f]{40}|[0-9a-f]{64})(\+changes)?"
VERSION = r"\d+\.\d[\w.+-]{0,40}"
NAME = r"\w[\w .+-]{0,99}"  # no slash: a path is not a name
WORD = r"[a-z][a-z0-9_]{0,19}"
BIDS_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
WORDS = re.compile(r"([^\W_]+)")
LONGEST_ID = 4  # words, as in NDAR_INV_00A1
FEWEST_DIGITS = 5  # a shorter number is a number far more often than an id: "up to 12 s", "26 recordings"
MARKUP = re.compile(r"[^\w .,:;()%+/='-]")
PACKAGES = ("brainlm", "python", "torch", "numpy", "deepspeed", "safetensors")

FRONT_MATTER = """\
---
library_name: brainlm
pipeline_tag: feature-extraction
license: other
license_name: to-be-filled-in
tags:
- brainlm
- fmri
- neuroscience
- time-series
- masked-autoencoder
---
"""

USE = """\
```python
from brainlm import BrainLM

model = BrainLM.from_pretrained("PATH_OR_HUB_ID")
model.contract  # what it must be fed: parcels and order, TR, filter, median and IQR

# bold: (timepoints, parcels), cleaned as the contract says; centred and scaled inside
embedding = model.embed(bold, tr_s=model.contract.tr_s)
embedding.pooled  # one vector a window: mean over tokens; embedding.cls is the CLS token
```
"""

LIMITS = """\
* Research software. It is no medical device and says nothing about the health of a person.
* Feed it what the table above says. The wrong scale, parcel order or TR gives numbers that look sound and mean nothing.
* Only hidden patches were trained: a reconstruction is NaN wherever a value was visible.
* A score on people it was trained on says nothing about others. `train_subjects.json` holds keyed hashes of their ids
  (`brainlm.checkpoint.seen_subjects`); the key lies beside them, so ids that can be guessed are not secret.
* Nothing in this card says how it does on other scanners, sites, ages or diagnoses than those it was trained on.
"""


def model_card(
    model: BrainLM,
    manifest: dict[str, Any],
    weights_sha256: str,
    num_parameters: int,
    train_subjects: TrainSubjects | None = None,
) -> str:
    """Return the text of README.md.

    Parameters
    ----------
    manifest : mapping
        Of the training run, as `train/pretrain.py` writes it. What it lacks is "not recorded".
    train_subjects : TrainSubjects, optional
        Words of the contract and the manifest that name one of them are left out, as is whatever reads ``sub-<id>``.
        Ids of fewer than five digits cannot be told from numbers in running text, and are not looked for.
    """
    config, contract = model.config, model.contract
    tokens = model.num_rows * config.num_patches
    what = (
        "A masked autoencoder of brain activity. Parcel series of fMRI go in; vectors of "
        f"{config.width} numbers, one for each token and each window, come out, or the values of hidden patches. The "
        "training objective is the mean squared error of patches that were hidden from it."
    )
    sections = [
        FRONT_MATTER,
        f"# BrainLM, {num_parameters:,} parameters\n\n{what}\n",
        _table(
            "Size",
            [
                ("parameters", f"{num_parameters:,}"),
                ("tokens per window", f"{tokens:,}"),
                *((name.replace("_", " "), str(value)) for name, value in dataclasses.asdict(config).items()),
                ("sha256 of the weights", f"`{weights_sha256}`"),
            ],
        ),
        _table("What it must be fed", _input_rows(contract, train_subjects)),
        "After centring, each parcel is scaled by `(x - median) / IQR` of the group. These statistics, the parcels' "
        "names, order and coordinates and every choice of the preparation are in `input_contract.json`.\n",
        _flags(contract, train_subjects),
        _table("How it was trained", _training_rows(_Record(manifest, train_subjects))),
        f"## How to use it\n\n{USE}",
        f"## Limits\n\n{LIMITS}{_own_limits(model)}",
    ]
    return "\n".join(sections)


class _Record:
    """A manifest that is asked for one field at a time, and never gives more than one plain value of a known form."""

    def __init__(self, manifest: dict[str, Any], train_subjects: TrainSubjects | None) -> None:
        self.manifest = manifest
        self.train_subjects = train_subjects

    def find(self, path: str) -> Any:
        """Return what is at a dotted path, `...` if nothing is."""
        node: Any = self.manifest
        for key in path.split("."):
            node = node.get(key, ...) if isinstance(node, dict) else ...
        return node

    def text(self, path: str, form: str) -> str:
        value = self.find(path)
        if not isinstance(value, str) or re.fullmatch(form, value, re.ASCII) is None:
            return NOT_RECORDED
        return value if form in (HASH, COMMIT) else _plain(value, self.train_subjects)

    def texts(self, path: str, form: str) -> str:
        """Return one text, or several that are in a list."""
        values = self.find(path)
        if not isinstance(values, list | tuple):
            return self.text(path, form)
        if not values or not all(isinstance(v, str) and re.fullmatch(form, v, re.ASCII) for v in values):
            return NOT_RECORDED
        return ", ".join(_plain(value, self.train_subjects) for value in values)

    def number(self, path: str, form: str = "{:,}", null: str = NOT_RECORDED) -> str:
        value = self.find(path)
        if value is None:
            return null
        return form.format(value) if _is_number(value) else NOT_RECORDED

    def numbers(self, path: str) -> str:
        values = self.find(path)
        if not isinstance(values, list | tuple) or not values or not all(_is_number(value) for value in values):
            return NOT_RECORDED
        return ", ".join(f"{value:g}" for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(text: str, train_subjects: TrainSubjects | None) -> str:
    """Return free text on one line, without markup and without what names a subject."""
    text = BIDS_SUBJECT.sub("removed", text)
    text = " ".join(MARKUP.sub("", " ".join(text.split())).split())
    if train_subjects is None:
        return text
    pieces = WORDS.split(text)  # every second one is a word, those between are as written
    for length in range(LONGEST_ID, 0, -1):
        for start in range(1, len(pieces) - 2 * (length - 1), 2):
            stop = start + 2 * length - 1
            words = "".join(pieces[start:stop])
            if words.isdigit() and len(words) < FEWEST_DIGITS:
                continue
            if train_subjects.seen([words, f"sub-{words}"]):
                pieces[start:stop] = ["removed", *[""] * (stop - start - 1)]
    return "".join(pieces)


def _input_rows(contract: InputContract, train_subjects: TrainSubjects | None) -> list[tuple[str, str]]:
    atlas = contract.atlas
    name = _plain(atlas.name, train_subjects)
    space = _plain(atlas.space, train_subjects) or NOT_RECORDED
    band = (contract.high_pass_hz, contract.low_pass_hz)
    high, low = ("none" if value is None else f"{value:g} Hz" for value in band)
    count = contract.num_statistics_recordings
    return [
        ("atlas", name + (f" (`{atlas.sha256}`)" if re.fullmatch(HASH, atlas.sha256) else "")),
        ("space of the template", space),
        ("parcels", f"{atlas.num_parcels:,}, of which {int(contract.usable.sum()):,} are used"),
        ("TR", f"{contract.tr_s:g} s"),
        ("high-pass, low-pass filter", f"{high}, {low}"),
        ("units before scaling", _plain(contract.units, train_subjects) or NOT_RECORDED),
        ("centring", _plain(contract.centring, train_subjects) or NOT_RECORDED),
        ("median and IQR over", f"{count:,} recordings" if count else NOT_RECORDED),
        ("window", f"{contract.window_len} timepoints, {contract.window_len * contract.tr_s:g} s"),
        ("patch", f"{contract.patch_len} timepoints, {contract.patch_len * contract.tr_s:g} s"),
    ]


def _flags(contract: InputContract, train_subjects: TrainSubjects | None) -> str:
    lines = [f"* {_plain(flag, train_subjects)}\n" for flag in contract.flags] or ["None recorded.\n"]
    return "### What every score on these data must show\n\n" + "".join(lines)


def _training_rows(record: _Record) -> list[tuple[str, str]]:
    commit = record.text("git_commit", COMMIT)
    ratio = record.number("config.validation.mask_ratio", "{:g}")
    decoded = record.number("config.masks.num_decoded", null="all")
    rows = [
        ("data set", record.text("dataset", NAME)),
        ("content hash of the data set", record.text("data_hash", HASH)),
        ("steps", record.number("step")),
        ("windows per step", record.number("config.data.batch_size")),
        ("windows seen", record.number("windows_seen")),
        ("masks", record.texts("config.masks.kind", WORD)),
        ("mask ratios", record.numbers("config.masks.ratios")),
        ("hidden tokens decoded per window", decoded),
        ("learning rate at its peak", record.number("peak_lr", "{:g}")),
        ("weight decay", record.number("config.optimizer.weight_decay", "{:g}")),
        ("warm-up steps", record.number("num_warmup_steps")),
        ("precision", record.text("config.engine.precision", WORD)),
        ("ranks", record.number("world_size")),
        ("seed", record.number("config.run.seed", "{}")),
        (f"R2 of these weights, validation subjects, mask ratio {ratio}", record.number("val_r2", "{:.3f}")),
        (f"best R2 during training, validation subjects, mask ratio {ratio}", record.number("best_val_r2", "{:.3f}")),
        ("git commit", commit.replace("+changes", " with changes that were not committed")),
        *((f"version of {name}", record.text(f"versions.{name}", VERSION)) for name in PACKAGES),
    ]
    if record.find(CHANGED_FROM) is not ...:
        changed = f"after this training, which ended with weights of sha256 {record.text(CHANGED_FROM, HASH)}"
        rows.append(("the weights were changed", changed))
    return rows


def _own_limits(model: BrainLM) -> str:
    """Return limits that follow from the sizes."""
    lines = []
    if model.config.parcel_embedding:
        lines.append("It holds a learned code for each parcel of its atlas, and cannot be fed parcels of another one.")
    if model.config.patch_parcels > 1:
        lines.append(
            f"A token is a group of up to {model.config.patch_parcels} parcels: nothing can be said of a single one."
        )
    return "".join(f"* {line}\n" for line in lines)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{lines}"
