"""The card says what the manifest and the contract say, is the same text each time, and names nobody."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from brainlm.checkpoint import save_checkpoint
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.model_card import FILE_NAME, NOT_RECORDED, model_card
from brainlm.testing import small_model
from brainlm.train_subjects import TrainSubjects

SHA256 = "ab" * 32
SUBJECTS = ["sub-NDARAA075", "sub-0051234", "NDARBB188", "patient-12", "51777"]
MANIFEST: dict[str, Any] = {
    "git_commit": "0123456789abcdef0123456789abcdef01234567+changes",
    "dataset": "abide cc200",
    "data_hash": "cd" * 32,
    "num_parameters": 4242,
    "world_size": 2,
    "versions": {"brainlm": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6", "deepspeed": ""},
    "step": 12000,
    "windows_seen": 768000,
    "val_r2": 0.45678,
    "best_val_r2": 0.46912,
    "peak_lr": 0.001,
    "num_warmup_steps": 100,
    "config": {
        "run": {"seed": 3, "out": "/home/me/runs/sub-0051234"},
        "data": {"dataset": "/data/sub-NDARAA075/dataset", "batch_size": 64},
        "masks": {"kind": "random", "ratios": [0.5, 0.75], "num_decoded": None},
        "optimizer": {"weight_decay": 0.05},
        "engine": {"precision": "bf16"},
        "validation": {"mask_ratio": 0.75},
    },
}


@pytest.fixture
def model(contract: InputContract) -> BrainLM:
    return small_model(replace(contract, num_statistics_recordings=26, flags=("the filter is zero-phase: future",)))


def card(model: BrainLM, manifest: dict[str, Any], subjects: list[str] | None = None) -> str:
    return model_card(model, manifest, SHA256, model.num_parameters, TrainSubjects.of(SHA256, subjects or []))


def rows(text: str) -> dict[str, str]:
    found = re.findall(r"^\| (.+?) \| (.*) \|$", text, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))


def named(text: str) -> list[str]:
    """Return the subjects that a text names, by any part of their id that is one word."""
    return [s for s in SUBJECTS if s.removeprefix("sub-") in text]


@pytest.mark.parametrize(
    ("kinds", "shown"), [(["random", "future"], "random, future"), ([], NOT_RECORDED), (["a b|c"], NOT_RECORDED)]
)
def test_several_kinds_of_masks_are_all_shown(model: BrainLM, kinds: list[str], shown: str) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["config"]["masks"]["kind"] = kinds
    assert rows(card(model, manifest))["masks"] == shown


def test_the_card_says_what_the_manifest_says(model: BrainLM) -> None:
    assert (
        rows(card(model, MANIFEST)).items()
        >= {
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "sha256 of the weights": f"`{SHA256}`",
            "data set": "abide cc200",
            "content hash of the data set": "cd" * 32,
            "steps": "12,000",
            "windows per step": "64",
            "windows seen": "768,000",
            "masks": "random",
            "mask ratios": "0.5, 0.75",
            "hidden tokens decoded per window": "all",
            "learning rate at its peak": "0.001",
            "precision": "bf16",
            "ranks": "2",
            "seed": "3",
            "R2 of these weights, validation subjects, mask ratio 0.75": "0.457",
            "best R2 during training, validation subjects, mask ratio 0.75": "0.469",
            "git commit": "0123456789abcdef0123456789abcdef01234567 with changes that were not committed",
            "version of torch": "2.13.0+cpu",
            "version of deepspeed": NOT_RECORDED,
            "version of safetensors": NOT_RECORDED,
        }.items()
    )


def test_the_card_says_what_the_model_must_be_fed(model: BrainLM) -> None:
    text = card(model, MANIFEST)
    found = rows(text)
    assert found["atlas"] == f"synthetic (`{model.contract.atlas.sha256}`)"
    assert found["parcels"] == "6, of which 6 are used"
    assert found["TR"] == "2 s"
    assert found["high-pass, low-pass filter"] == "none, none"
    assert found["units before scaling"] == "arbitrary (parcel-mean BOLD)"
    assert found["median and IQR over"] == "26 recordings"
    assert found["window"] == "20 timepoints, 40 s"
    assert found["patch"] == "5 timepoints, 10 s"
    assert found["tokens per window"] == "24"
    assert (found["width"], found["decoder"]) == ("32", "cross")
    assert "* the filter is zero-phase: future\n" in text


def test_what_is_missing_is_not_recorded(model: BrainLM) -> None:
    bare = replace(model.contract, num_statistics_recordings=0, flags=())
    text = card(small_model(bare), {})
    training = text.split("## How it was trained")[1].split("## How to use it")[0]
    values = [value for name, value in rows(training).items()]
    assert len(values) > 15
    assert set(values) == {NOT_RECORDED}
    assert rows(text)["median and IQR over"] == NOT_RECORDED
    assert "None recorded." in text


def test_the_front_matter_is_yaml_that_claims_no_license(model: BrainLM) -> None:
    _, front, rest = card(model, MANIFEST).split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "brainlm"
    assert found["pipeline_tag"] == "feature-extraction"
    assert (found["license"], found["license_name"]) == ("other", "to-be-filled-in")
    assert "fmri" in found["tags"]
    assert rest.startswith("\n# BrainLM")


def test_the_hub_s_own_parser_reads_the_card(model: BrainLM) -> None:
    client = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    data = client.ModelCard(card(model, MANIFEST)).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("brainlm", "other", "feature-extraction")


def test_the_text_is_the_same_each_time(model: BrainLM, contract: InputContract) -> None:
    shuffled = dict(reversed(list(MANIFEST.items())))
    assert card(model, MANIFEST) == card(model, copy.deepcopy(shuffled))
    assert card(model, MANIFEST, SUBJECTS) == card(model, MANIFEST, SUBJECTS[::-1])


def test_no_subject_comes_in_by_any_path_of_the_manifest(model: BrainLM) -> None:
    """Put ids, in all kinds of wrapping, at every place of the manifest that is read, and beside them."""
    wrapped: list[Any] = [f(s) for s in SUBJECTS for f in (str, "abide {}".format, "x/{}/y".format, "v-{}_z".format)]
    wrapped += [SUBJECTS, {s: s for s in SUBJECTS}, {"subjects": SUBJECTS, "kind": SUBJECTS[0]}]
    for path in leaves(MANIFEST):
        for value in wrapped:
            manifest = copy.deepcopy(MANIFEST)
            node: Any = manifest
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
            manifest["train_subjects"] = node["extra"] = SUBJECTS
            assert named(card(model, manifest, SUBJECTS)) == [], (path, value)


def test_no_subject_comes_in_by_the_contract(contract: InputContract) -> None:
    text = "of {}, abide-{} and {}/{}, ({})".format(*SUBJECTS)
    told = replace(
        contract,
        atlas=replace(contract.atlas, name=f"of {SUBJECTS[0]}", space=text),
        units=text,
        centring=text,
        statistics_from=text,
        cleaning={"strategy": text},
        flags=(text, "up to 12 s after it"),
    )
    found = card(small_model(told), MANIFEST, SUBJECTS)
    assert named(found) == []
    assert "* up to 12 s after it\n" in found


def test_a_saved_checkpoint_s_card_names_nobody(tmp_path: Path, model: BrainLM) -> None:
    save_checkpoint(str(tmp_path), model, MANIFEST | {"dataset": "study of NDARBB188"}, SUBJECTS)
    text = (tmp_path / FILE_NAME).read_text()
    assert named(text) == []
    assert "| data set | study of removed |" in text


@pytest.mark.parametrize(
    "value", [None, True, [], [1], {}, {"a": 1}, "", "x" * 1000, float("nan"), "a\n| b |\n# c", -1]
)
def test_odd_values_neither_break_the_card_nor_its_tables(model: BrainLM, value: Any) -> None:
    expected = rows(card(model, MANIFEST)).keys()
    for path in leaves(MANIFEST):
        manifest = copy.deepcopy(MANIFEST)
        node: Any = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        found = rows(card(model, manifest)).keys()
        assert len(found) == len(expected)
        assert len(found ^ expected) in (0, 4)  # the two rows of scores name the mask ratio


def test_markup_in_free_text_is_left_out(contract: InputContract) -> None:
    told = replace(contract, flags=("a | b\n# <script>alert(1)</script> `x` [l](http://x)",))
    text = card(small_model(told), {})
    assert "<" not in text.split("## How it was trained")[0].split("---\n", 2)[2]
    assert "* a b scriptalert(1)/script x l(http://x)\n" in text


def test_a_group_of_parcels_is_a_limit_that_is_named(contract: InputContract) -> None:
    model = small_model(contract)
    grouped = BrainLM(replace(model.config, patch_parcels=2, parcel_embedding=False), contract)
    text = card(grouped, MANIFEST)
    assert "A token is a group of up to 2 parcels" in text
    assert "learned code" not in text
    assert "learned code for each parcel" in card(model, MANIFEST)
    assert rows(text)["tokens per window"] == "12"


def test_the_code_in_the_card_runs(tmp_path: Path, model: BrainLM, rng: np.random.Generator) -> None:
    save_checkpoint(str(tmp_path), model, MANIFEST, SUBJECTS)
    code = re.findall(r"```python\n(.*?)```", (tmp_path / FILE_NAME).read_text(), re.DOTALL)
    assert len(code) == 1
    names: dict[str, Any] = {"bold": rng.normal(size=(50, 6)).astype(np.float32)}
    exec(code[0].replace("PATH_OR_HUB_ID", str(tmp_path)), names)
    assert names["embedding"].pooled.shape == (3, 32)
    assert names["embedding"].cls.shape == (3, 32)
