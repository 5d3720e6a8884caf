"""Write ``report.html``: what was run on what, which claims hold, and every number behind them, in one file.

The page is made from the files of a results folder alone. ``results.json`` must be there; whatever else is missing is
said in a sentence where it would have stood. Verdicts are computed from the records: a model is ahead or behind only if
an interval says so.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainlm.errors import BrainLMError, DataError, StoreError
from brainlm.store import Store
from eval import figures
from eval.figures import Estimate, Look, Panel, minus
from eval.results import FILE_NAME, Score, read_scores

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report_template.html.j2")
HEADLINE_RATIO = 0.75  # the paper's mask ratio in training
FEW_SUBJECTS = 20  # below this a percentile bootstrap over subjects is usually too narrow
ABOVE_OPTIMUM = 0.01  # the optimum is exact up to the centring of the series, see eval.baselines.optimum

BASELINE_NAMES = {
    "mean": "mean",
    "interpolation": "linear interpolation",
    "gaussian": "Gaussian conditional (per timepoint)",
    "gaussian adapted": "Gaussian conditional (adapted to the subject)",
    "gaussian kronecker": "Gaussian conditional (space × time)",
    "autoregression": "autoregression (per parcel)",
}
KIND_TAGS = {"baseline": "baseline", "control": "control", "untrained": "untrained", "optimum": "bound", "brainlm": ""}
FOLD_NAMES = {"random": "random", "mirrored": "mirrored pairs together", "blocked": "spatially blocked"}
CENTRING_NAMES = {
    "recording": "each parcel centred on the whole recording (the paper; the hidden values take part in that mean)",
    "visible": "each parcel centred on its visible values only (leak-free)",
}
CONDITION_ORDER = {"random": 0, "recording": 0, "visible": 1, "group": 1}


@dataclass(frozen=True, kw_only=True)
class MetricText:
    """What a metric is called and how a caption defines it."""

    name: str
    definition: str
    higher_is_better: bool = True


METRICS = {
    "r2": MetricText(
        name="R²",
        definition="R² = 1 − ΣSSE / ΣSST over all scored values, each in units of its own recording's and parcel's "
        "standard deviation; SST is about the recording-and-parcel mean, so a constant guess scores 0. Never clipped.",
    ),
    "r2_pooled_contract_units": MetricText(
        name="R², pooled (the paper's definition)",
        definition="R² = 1 − ΣSSE / ΣSST in contract units, (x − median) / IQR of the group; SST is about the mean of all "
        "scored values, so loud recordings weigh more. Never clipped.",
    ),
    "pearson_r": MetricText(
        name="Pearson r",
        definition="Correlation of prediction and truth over all scored values, in units of recording-and-parcel "
        "standard deviations; 0 for a constant prediction.",
    ),
    "mse": MetricText(
        name="Mean squared error",
        definition="Mean squared error in squared recording-and-parcel standard deviations; lower is better.",
        higher_is_better=False,
    ),
    "mae": MetricText(
        name="Mean absolute error",
        definition="Mean absolute error in recording-and-parcel standard deviations; lower is better.",
        higher_is_better=False,
    ),
    "mse_contract_units": MetricText(
        name="Mean squared error, contract units",
        definition="Mean squared error in contract units, (x − median) / IQR of the group; lower is better.",
        higher_is_better=False,
    ),
    "mae_contract_units": MetricText(
        name="Mean absolute error, contract units",
        definition="Mean absolute error in contract units, (x − median) / IQR of the group; lower is better.",
        higher_is_better=False,
    ),
    "accuracy": MetricText(name="Accuracy", definition="Share of test parcels whose network is named correctly."),
    "balanced_accuracy": MetricText(
        name="Balanced accuracy", definition="Mean over networks of the share of their parcels named correctly."
    ),
}

# BrainLM (ICLR 2024), tables 1, 3 and 4: other data (UK Biobank), shown for orientation.
PAPER_RECONSTRUCTION = {0.2: 0.402, 0.5: 0.389, 0.75: 0.343}
PAPER_FORECASTING = {"r2": 0.086, "pearson_r": 0.280}
PAPER_FORECASTING_HORIZON = 20
PAPER_NETWORKS = {"attention": 0.588, "raw series": 0.392}

Tone = Literal["ahead", "behind", "open"]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """A results folder as read.

    ``scores`` belong to one data set, split and version of each task; ``left_out`` counts the others.
    """

    store: Store
    scores: list[Score]
    all_scores: list[Score]
    left_out: int
    run: dict[str, Any]

    @cached_property
    def labels(self) -> dict[str, str]:
        """Display name of every model, each once."""
        kinds = {score.model: score.model_kind for score in self.all_scores}
        untrained = [model for model, kind in kinds.items() if kind == "untrained"]
        labels = {}
        for model, kind in kinds.items():
            if kind == "optimum":
                labels[model] = "exact optimum (Kalman)"
            elif kind == "untrained" and len(untrained) == 1:
                labels[model] = "untrained network"
            else:
                labels[model] = BASELINE_NAMES.get(model.strip().lower().replace("_", " "), model)
        counts = Counter(labels.values())
        return {m: label if counts[label] == 1 else f"{label} ({m})" for m, label in labels.items()}

    @property
    def models(self) -> list[str]:
        """Names of the checkpoints."""
        return list(dict.fromkeys(s.model for s in self.scores if s.model_kind == "brainlm"))

    @property
    def is_simulated(self) -> bool:
        return any(score.model_kind == "optimum" for score in self.all_scores)

    @property
    def dataset(self) -> dict[str, Any]:
        tree = self.run.get("dataset")
        return tree if isinstance(tree, dict) else {}

    @property
    def tr_s(self) -> float | None:
        value = self.dataset.get("tr_s")
        return float(value) if figures.is_number(value) else None  # type: ignore[arg-type]

    @property
    def level_text(self) -> str:
        intervals = _dig(self.run, "config", "intervals", "level")
        return percent(float(intervals)) if figures.is_number(intervals) else percent(0.95)

    def find(self, task: str, metric: str, **condition: object) -> list[Score]:
        """Return the scores of a task whose conditions include `condition`."""
        return [
            s
            for s in self.scores
            if s.task == task
            and s.metric == metric
            and all(s.condition.get(name) == value for name, value in condition.items())
        ]

    def task_scores(self, task: str) -> list[Score]:
        return [score for score in self.scores if score.task == task]

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each model is drawn, the same in every figure."""
        looks: dict[str, Look] = {}
        num_models = num_others = 0
        for score in self.all_scores:
            if score.model in looks:
                continue
            label, kind = self.labels[score.model], score.model_kind
            if kind == "brainlm":
                colour = figures.SERIES[0] if num_models == 0 else figures.SERIES[5 - num_models % 2]
                looks[score.model] = Look(label=label, colour=colour, marker="oDs^v"[num_models % 5])
                num_models += 1
            elif kind == "optimum":
                looks[score.model] = Look(label=label, colour=figures.INK, marker="D", dashed=True)
            elif kind in ("untrained", "control"):
                looks[score.model] = Look(label=label, colour=figures.MUTED, marker="s", dashed=kind == "untrained")
            else:
                shades = [c for i, c in enumerate(figures.SERIES) if i not in (0, 4, 5)]
                looks[score.model] = Look(label=label, colour=shades[num_others % len(shades)])
                num_others += 1
        return looks


def read_results(results_folder: str) -> Results:
    """Read a results folder.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it holds no score.
    """
    store = Store(results_folder)
    if not store.exists(FILE_NAME):
        raise DataError(
            f"{results_folder} holds no {FILE_NAME}: run python eval/run.py --config eval/configs/<name>.yaml "
            f"out={results_folder} first"
        )
    everything = [_clean(score) for score in read_scores(store)]
    if not everything:
        raise DataError(f"{store.url_of(FILE_NAME)} holds no score: run eval/run.py with at least one task")
    place = Counter((s.dataset, s.dataset_hash, s.split) for s in everything).most_common(1)[0][0]
    newest: dict[str, int] = {}
    for score in everything:
        newest[score.task] = max(newest.get(score.task, 0), score.version)
    scores = [
        s for s in everything if (s.dataset, s.dataset_hash, s.split) == place and s.version == newest[s.task]
    ]
    run = store.read_json("run.json") if store.exists("run.json") else {}
    return Results(
        store=store,
        scores=scores,
        all_scores=everything,
        left_out=len(everything) - len(scores),
        run=clean_tree(run) if isinstance(run, dict) else {},
    )


SUBJECT_ID = re.compile(r"\b(?:sub|subject|participant)-[A-Za-z0-9]+(?:_[A-Za-z]+-[A-Za-z0-9]+)*(?:_bold)?")


def without_ids(text: str) -> str:
    """Replace BIDS names of subjects and recordings: a report is mailed round."""
    return SUBJECT_ID.sub("(recording)", text)


def clean_tree(tree: Any) -> Any:
    """Return a nested mapping without subject ids and without what is nobody's business (keys of hashes, lists of people)."""
    if isinstance(tree, dict):
        return {
            without_ids(str(k)): clean_tree(v)
            for k, v in tree.items()
            if not re.search(r"secret|password|subject_key", str(k), re.IGNORECASE)
            and not (re.search(r"subjects|recording_ids|participants", str(k)) and isinstance(v, list))
        }
    if isinstance(tree, list):
        return [clean_tree(item) for item in tree]
    return without_ids(tree) if isinstance(tree, str) else tree


def _clean(score: Score) -> Score:
    from dataclasses import replace

    condition = {k: without_ids(v) if isinstance(v, str) else v for k, v in score.condition.items()}
    return replace(score, notes=tuple(without_ids(note) for note in score.notes), condition=condition)


def _dig(tree: Any, *path: str) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


# ---------------------------------------------------------------- words


def percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}\N{NO-BREAK SPACE}%"


def interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{minus(low)}, {minus(high)}]"


def number(score: Score) -> str:
    """Return ``0.630 [0.600, 0.660]``."""
    interval = interval_text(score.ci_low, score.ci_high)
    return f"{minus(score.value)} {interval}" if interval else f"{minus(score.value)} (no interval)"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---------------------------------------------------------------- verdicts


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one score is above another, and how that is known."""

    tone: Tone
    word: str
    reason: str


def compare(ours: Score, theirs: Score, paired: Score | None = None) -> Verdict:
    """Judge whether `ours` is above `theirs` (higher is better).

    Parameters
    ----------
    paired : Score, optional
        Difference ours - theirs with its interval from the same subjects; it decides where there is one. Otherwise
        the two intervals must not overlap, which is the stricter rule.
    """
    overlap = _overlap(ours, theirs)
    if paired is not None and paired.ci_low is not None and paired.ci_high is not None:
        difference = f"difference on the same subjects {'+' if paired.value > 0 else ''}{number(paired)}"
        if paired.ci_low > 0 or paired.ci_high < 0:
            although = ", although the two intervals overlap" if overlap else ""
            word: Tone = "ahead" if paired.ci_low > 0 else "behind"
            return Verdict(tone=word, word=word, reason=difference + although)
        return Verdict(tone="open", word="no clear difference", reason=f"{difference}, which includes 0")
    if overlap is None:
        side = "above" if ours.value > theirs.value else "below" if ours.value < theirs.value else "level"
        reason = f"the value lies {side}, but without intervals nothing follows from that"
        return Verdict(tone="open", word="not judged", reason=reason)
    if overlap:
        return Verdict(tone="open", word="no clear difference", reason="the intervals overlap")
    word = "ahead" if ours.value > theirs.value else "behind"
    return Verdict(tone=word, word=word, reason="the intervals do not overlap")


def _overlap(a: Score, b: Score) -> bool | None:
    if a.ci_low is None or a.ci_high is None or b.ci_low is None or b.ci_high is None:
        return None
    return a.ci_low <= b.ci_high and b.ci_low <= a.ci_high


def paired_difference(results: Results, ours: Score, theirs: Score) -> Score | None:
    """Return the stored paired difference of two scores, if `theirs` is the reference that it was computed against."""
    for score in results.find(ours.task, f"{ours.metric}_minus_reference", **ours.condition):
        if score.model == ours.model and score.condition.get("reference") == theirs.model:
            return score
    return None


def strongest(scores: Iterable[Score]) -> Score | None:
    return max(scores, key=lambda score: score.value, default=None)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the summary."""

    topic: str
    verdict: Verdict
    text: str


def make_claims(results: Results) -> list[Claim]:
    claims = []
    for model in results.models:
        for make in (_reconstruction_claim, _training_claim, _forecasting_claim, _networks_claim):
            claim = make(results, model)
            if claim is not None:
                claims.append(claim)
    return claims


def _of(scores: Iterable[Score], model: str) -> Score | None:
    return next((score for score in scores if score.model == model), None)


def _among(scores: Iterable[Score], *kinds: str) -> list[Score]:
    return [score for score in scores if score.model_kind in kinds]


def _held_out(score: Score) -> str:
    seen = any("trained on" in note or "seen" in note for note in score.notes)
    held_out = "held-out " if score.split in ("val", "test") and not seen else ""
    return counted(score.num_subjects, f"{held_out}subject")


def _sentence(results: Results, ours: Score, theirs: Score, what: str) -> tuple[Verdict, str]:
    verdict = compare(ours, theirs, paired_difference(results, ours, theirs))
    label = results.labels[ours.model]
    start = {
        "ahead": f"{label} is ahead",
        "behind": f"{label} is behind",
        "no clear difference": "No clear difference",
        "not judged": "Not judged",
    }[verdict.word]
    return verdict, f"{what}: {results.labels[theirs.model]}, {number(theirs)}. {start}: {verdict.reason}."


def reconstruction_base(results: Results) -> dict[str, object]:
    """Return the conditions of the main reconstruction table, without the mask ratio."""
    groups = _groups(results.find("reconstruction", "r2"), "mask_ratio")
    return dict(groups[0]) if groups else {}


def headline_ratio(results: Results) -> float | None:
    ratios = {float(s.condition["mask_ratio"]) for s in results.find("reconstruction", "r2") if "mask_ratio" in s.condition}
    return min(ratios, key=lambda ratio: (abs(ratio - HEADLINE_RATIO), ratio), default=None)


def _reconstruction_claim(results: Results, model: str) -> Claim | None:
    base, ratio = reconstruction_base(results), headline_ratio(results)
    here = results.find("reconstruction", "r2", **base, mask_ratio=ratio)
    ours, best = _of(here, model), strongest(_among(here, "baseline"))
    if ours is None or ratio is None:
        return None
    label = results.labels[model]
    parts = [f"{label} reaches R² {number(ours)} with {percent(ratio)} of the tokens hidden ({_held_out(ours)})."]
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = _sentence(results, ours, best, "Strongest baseline")
        parts.append(sentence)
    optimum = strongest(_among(here, "optimum"))
    if optimum is not None:
        share = f", of which {label} reaches {percent(round(ours.value / optimum.value, 2))}"
        parts.append(f"Exact optimum (Kalman): {number(optimum)}{share if min(ours.value, optimum.value) > 0 else ''}.")
    others = []
    for other in sorted({s.condition.get("mask_ratio") for s in results.find("reconstruction", "r2", **base)} - {ratio}):  # type: ignore[type-var]
        at = results.find("reconstruction", "r2", **base, mask_ratio=other)
        mine, rival = _of(at, model), strongest(_among(at, "baseline"))
        if mine is not None and rival is not None:
            word = compare(mine, rival, paired_difference(results, mine, rival)).word
            others.append(f"{word} at {percent(float(other))}")  # type: ignore[arg-type]
    if others:
        parts.append(f"Other mask ratios, each against its strongest baseline: {listed(others)}.")
    if base.get("centring") == "recording":
        free = results.find("reconstruction", "r2", **{**base, "centring": "visible"}, mask_ratio=ratio)
        mine, rival = _of(free, model), strongest(_among(free, "baseline"))
        if mine is not None:
            against = ""
            if rival is not None:
                word = compare(mine, rival, paired_difference(results, mine, rival)).word
                against = f" against {number(rival)} of the strongest baseline, {results.labels[rival.model]}: {word}"
            parts.append(f"Centred on visible values only (leak-free): {number(mine)}{against}.")
    return Claim(topic="Reconstruction", verdict=verdict, text=" ".join(parts))


def _training_claim(results: Results, model: str) -> Claim | None:
    here = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=headline_ratio(results))
    ours, theirs = _of(here, model), _untrained_like(here, model)
    if ours is None or theirs is None:
        return None
    verdict, sentence = _sentence(results, ours, theirs, "The same network without training")
    return Claim(topic="Does training help?", verdict=verdict, text=f"{results.labels[model]}: {number(ours)}. {sentence}")


def _untrained_like(scores: Sequence[Score], model: str) -> Score | None:
    untrained = _among(scores, "untrained")
    named = [score for score in untrained if model in score.model]
    return named[0] if named else untrained[0] if len(untrained) == 1 else None


def _forecasting_claim(results: Results, model: str) -> Claim | None:
    everything = results.find("forecasting", "r2")
    groups = _groups(everything, "horizon")
    horizons = sorted({int(s.condition["horizon"]) for s in everything if "horizon" in s.condition})
    if not groups or not horizons:
        return None
    parts, verdict = [], None
    for horizon in horizons:
        here = results.find("forecasting", "r2", **groups[0], horizon=horizon)
        ours, best = _of(here, model), strongest(_among(here, "baseline"))
        if ours is None:
            continue
        seconds = f" ({horizon * results.tr_s:g} s)" if results.tr_s else ""
        parts.append(
            f"Over the next {horizon} timepoints{seconds}, {results.labels[model]} reaches R² {number(ours)} "
            f"({_held_out(ours)})."
        )
        if best is not None:
            found, sentence = _sentence(results, ours, best, "Strongest baseline")
            verdict = verdict or found
            parts.append(sentence)
        optimum = strongest(_among(here, "optimum"))
        if optimum is not None:
            parts.append(f"Exact optimum (Kalman): {number(optimum)}.")
    if not parts:
        return None
    return Claim(
        topic="Forecasting",
        verdict=verdict or Verdict(tone="open", word="not judged", reason=""),
        text=" ".join(parts),
    )


def _networks_claim(results: Results, model: str) -> Claim | None:
    level = _network_level(results)
    kinds = [k for k in ("blocked", "mirrored", "random") if results.find("networks", "accuracy", level=level, folds=k)]
    if not kinds:
        return None
    hardest = kinds[0]
    here = results.find("networks", "accuracy", level=level, folds=hardest)
    mine = [s for s in here if s.model == model]
    ours = next((s for s in mine if s.condition.get("part") == "encoder"), mine[0] if mine else None)
    best = strongest(s for s in here if s.model_kind in ("baseline", "control", "untrained"))
    if ours is None:
        return None
    part = f" ({ours.condition['part']})" if "part" in ours.condition else ""
    parts = [
        f"Attention of {results.labels[model]}{part} names the network of a parcel with accuracy {number(ours)}, "
        f"{FOLD_NAMES[hardest]} folds ({_held_out(ours)})."
    ]
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = _sentence(results, ours, best, "Strongest of all other features and controls")
        parts.append(sentence)
    place = _position_alone(here)
    if place is not None:
        text = f"Position alone reaches {number(place)}"
        if "random" in kinds[1:]:
            easy = results.find("networks", "accuracy", level=level, folds="random")
            position = _position_alone(easy)
            attention = next((s for s in easy if s.model == model and s.condition.get("part") == ours.condition.get("part")), None)
            if position is not None and attention is not None:
                text += (
                    f"; with random folds, the paper's, position alone reaches {number(position)} "
                    f"and attention {number(attention)}"
                )
        parts.append(text + ".")
    return Claim(topic="Functional networks", verdict=verdict, text=" ".join(parts))


def _network_level(results: Results) -> str:
    levels = {str(s.condition.get("level", "")) for s in results.find("networks", "accuracy")}
    return "recording" if "recording" in levels or not levels else sorted(levels)[0]


def _position_alone(scores: Iterable[Score]) -> Score | None:
    return strongest(s for s in scores if s.model.startswith("coordinates"))


def lead(results: Results) -> str:
    """Say in two sentences what was run on what."""
    first = results.scores[0]
    subjects = max(s.num_subjects for s in results.scores)
    recordings = max(s.num_recordings for s in results.scores)
    tasks = listed(list(dict.fromkeys(s.task for s in results.scores)))
    simulated = ", which is simulated," if results.is_simulated else ""
    models = [results.labels[m] for m in results.models]
    who = listed(models) if models else "No checkpoint, only baselines"
    was = "were" if len(models) > 1 else "was"
    return (
        f"{who} {was} scored on {tasks}, using {counted(subjects, 'subject')} ({counted(recordings, 'recording')}) of the "
        f"{first.split} split of the data set {first.dataset}{simulated} beside "
        f"{counted(len({s.model for s in results.scores if s.model_kind != 'brainlm'}), 'baseline or control')}."
    ).replace("baseline or controls", "baselines and controls")


def caveats(results: Results) -> list[str]:
    """Say what a reader of the summary must keep in mind."""
    found = []
    if results.is_simulated:
        found.append(
            "The data are simulated. The exact optimum is therefore known, and nothing here is evidence about real brains."
        )
    subjects = max(s.num_subjects for s in results.scores)
    if subjects < 2:
        found.append("There is one subject: no interval can be given, and nothing can be said about other people.")
    elif subjects < FEW_SUBJECTS:
        found.append(
            f"{counted(subjects, 'subject')} are few: intervals from a bootstrap over so few people are usually too narrow."
        )
    found.append(
        f"Intervals are {results.level_text} percentile bootstraps over subjects, not corrected for the number of "
        "comparisons. The strongest baseline is the one that scored best on these same subjects, which favours the baselines."
    )
    if results.models and any(s.task == "reconstruction" for s in results.scores):
        found.append(
            "The paper's numbers (grey rows) come from other data and are there for orientation, not for comparison."
        )
    for task in ("reconstruction", "forecasting"):
        for optimum in _among(results.find(task, "r2"), "optimum"):
            for score in _among(results.find(task, "r2", **optimum.condition), "brainlm", "baseline"):
                if score.value > optimum.value + ABOVE_OPTIMUM:
                    found.append(
                        f"{results.labels[score.model]} scores above the exact optimum in {task} ({minus(score.value)} against "
                        f"{minus(optimum.value)}). That is impossible without a leak or a fault: find it before using any number."
                    )
    notes = {note for s in results.scores if s.model_kind == "brainlm" for note in s.notes if "over parcels" not in note}
    found += sorted(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in notes)
    for what, place in (("warning", "warnings"), ("flag", "flags")):
        count = len(_as_list(results.dataset.get(place)))
        if count:
            found.append(f"The data set carries {counted(count, what)}, listed in section 8.")
    if results.left_out:
        found.append(
            f"{counted(results.left_out, 'record')} of another data set, split or task version are listed in section 8 only."
        )
    return found


def _as_list(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


# ---------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True)
class Cell:
    value: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    label: str
    cells: list[Cell]
    tag: str = ""
    kind: str = ""
    marks: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells with their caption; ``marks`` explain the letters at rows."""

    title: str
    caption: str
    columns: list[str]
    rows: list[Row]
    head: str = "Model"
    marks: list[tuple[str, str]] = field(default_factory=list)


def _groups(scores: Iterable[Score], *without: str) -> list[dict[str, object]]:
    """Return the distinct conditions left when some are taken out, the usual ones first."""
    found = {
        tuple((k, v) for k, v in s.condition.items() if k not in (*without, "reference")): None for s in scores
    }
    return [dict(items) for items in sorted(found, key=lambda items: [CONDITION_ORDER.get(str(v), 0) for _, v in items])]


def make_table(
    results: Results,
    scores: Sequence[Score],
    *,
    column: str,
    column_text: Callable[[Any], str],
    title: str,
    caption: str,
    row_conditions: tuple[str, ...] = (),
    higher_is_better: bool = True,
    mark_best: bool = True,
    paper: Mapping[str, Mapping[Any, float]] | None = None,
) -> Table:
    """Lay scores out: models down, one condition across.

    Rows come in the order checkpoints, untrained, baselines (best first), controls, optimum, the paper's.

    Parameters
    ----------
    column : str
        Condition across.
    row_conditions : tuple of str
        Conditions that make a row of their own.
    paper : mapping, optional
        Label to value by column, for grey rows.
    """
    columns = sorted({s.condition[column] for s in scores if column in s.condition}, key=_column_key)
    rows: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        rows.setdefault((score.model, *(str(score.condition.get(c, "")) for c in row_conditions)), []).append(score)
    sign = -1.0 if higher_is_better else 1.0
    order = ("brainlm", "untrained", "baseline", "control", "optimum")
    ranked = sorted(
        rows.items(),
        key=lambda item: (
            order.index(item[1][0].model_kind),
            sign * float(np.mean([s.value for s in item[1]])) if item[1][0].model_kind not in ("brainlm", "untrained") else 0,
        ),
    )
    best: dict[Any, float] = {}
    for value in columns:
        real = [s.value for s in _among(scores, "brainlm", "baseline") if s.condition.get(column) == value]
        if real and mark_best:
            best[value] = max(real) if higher_is_better else min(real)
    shared = set.intersection(*(set(s.notes) for s in scores)) if scores else set()
    letters: dict[str, str] = {}
    made = []
    for (model, *conditions), group in ranked:
        notes = dict.fromkeys(note for s in group for note in s.notes if note not in shared)
        marks = "".join(letters.setdefault(note, chr(ord("a") + len(letters) % 26)) for note in notes)
        cells = []
        for value in columns:
            score = next((s for s in group if s.condition.get(column) == value), None)
            if score is None:
                cells.append(Cell())
                continue
            is_best = value in best and score.model_kind in ("brainlm", "baseline") and score.value == best[value]
            cells.append(
                Cell(value=minus(score.value), interval=interval_text(score.ci_low, score.ci_high), best=is_best)
            )
        kind = group[0].model_kind
        extra = ", ".join(c for c in conditions if c)
        label = results.labels[model] + (f", {extra}" if extra else "")
        made.append(Row(label=label, cells=cells, tag=KIND_TAGS[kind], kind=kind, marks=marks))
    for label, values in (paper or {}).items():
        cells = [Cell(value=minus(values[c]) if c in values else "") for c in columns]
        if any(cell.value for cell in cells):
            made.append(Row(label=label, cells=cells, tag="other data", kind="paper"))
    explained = [(letter, note) for note, letter in letters.items()]
    explained += [("", f"All rows: {note}") for note in sorted(shared)]
    return Table(
        title=title, caption=caption, columns=[column_text(c) for c in columns], rows=made, marks=explained
    )


def _column_key(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    known = list(FOLD_NAMES)
    return (1, float(known.index(value) if value in known else len(known)), str(value))


def _n_text(scores: Sequence[Score]) -> str:
    subjects = sorted({s.num_subjects for s in scores})
    recordings = sorted({s.num_recordings for s in scores})
    if len(subjects) == 1 and len(recordings) == 1:
        return f"n = {counted(subjects[0], 'subject')}, {counted(recordings[0], 'recording')}."
    return f"n = {subjects[0]} to {subjects[-1]} subjects."


def _caption(results: Results, scores: Sequence[Score], metric: MetricText, *more: str) -> str:
    interval = f"Brackets: {results.level_text} bootstrap interval." if any(s.ci_low is not None for s in scores) else ""
    best = "Bold: best among checkpoints and baselines." if len(scores) > 1 else ""
    return " ".join(part for part in (metric.definition, *more, _n_text(scores), interval, best) if part)


def _other_conditions(group: Mapping[str, object], *without: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in group.items() if k not in without)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as the page shows it."""

    svg: str
    caption: str


@dataclass(kw_only=True)
class Section:
    """One numbered part of the page; ``more_*`` are folded away."""

    title: str
    anchor: str
    absent: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more_drawings: list[Drawing] = field(default_factory=list)
    more_tables: list[Table] = field(default_factory=list)
    more_title: str = "Further metrics"


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Saves a figure into ``figures/`` and returns it for the page."""

    store: Store

    def show(self, figure: Any, name: str, label: str, caption: str) -> Drawing:
        svg = figures.to_svg(figure)
        self.store.write_bytes(f"figures/{name}.svg", svg)
        self.store.write_bytes(f"figures/{name}.png", figures.to_png(figure))
        return Drawing(svg=figures.inline_svg(svg, name, label), caption=caption)


def _estimate(score: Score) -> Estimate:
    return Estimate(value=score.value, low=score.ci_low, high=score.ci_high)


# ---------------------------------------------------------------- sections


def training_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Training", anchor="training")
    if not results.models:
        section.absent.append("No checkpoint was scored, so there are no training curves.")
        return section
    runs: dict[str, list[dict[str, Any]]] = {}
    for info in results.run.get("checkpoints") or []:
        rows = training_log(str(info.get("path") or info.get("folder") or ""))
        if rows:
            name = str(info.get("name", "checkpoint"))
            runs[name] = rows
            rates = [row["windows_per_s"] for row in rows if figures.is_number(row.get("windows_per_s"))]
            last = max((row["step"] for row in rows if figures.is_number(row.get("step"))), default=None)
            facts = [f"{name}: {counted(int(last), 'optimizer step')} logged" if last is not None else name]
            if rates:
                facts.append(f"median speed {float(np.median(rates)):.3g} windows/s")
            section.paragraphs.append(", ".join(facts) + ".")
    if not runs:
        section.absent.append("No metrics.jsonl was found beside the checkpoint, so there are no training curves.")
        return section
    colours = {run: figures.SERIES[i % len(figures.SERIES)] for i, run in enumerate(runs)}
    figure = figures.draw_training(runs, colours)
    if figure is None:
        section.absent.append("metrics.jsonl holds none of loss, val_r2, lr and grad_norm, so there are no training curves.")
        return section
    section.drawings.append(
        artist.show(
            figure,
            "training",
            "Training curves",
            "Training curves. Pale: as logged; strong: running median. Loss is over hidden values in contract units; "
            "validation R² is in units of recording-and-parcel standard deviations, on subjects of the val split.",
        )
    )
    return section


def training_log(checkpoint: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the training run that a checkpoint belongs to, [] if there are none.

    A half-written last line, as a killed job leaves it, is passed over.
    """
    match = re.fullmatch(r"(.+)/checkpoints/[^/]+/?", checkpoint)
    if not match:
        return []
    try:
        store = Store(match[1])
        text = store.read_bytes("metrics.jsonl").decode(errors="replace") if store.exists("metrics.jsonl") else ""
    except StoreError as error:
        log.warning("training curves are left out: %s", error)
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def reconstruction_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Reconstruction of hidden tokens", anchor="reconstruction")
    scores = results.task_scores("reconstruction")
    if not scores:
        section.absent.append("Reconstruction was not run: results.json holds no record of it.")
        return section
    base = reconstruction_base(results)
    main = results.find("reconstruction", "r2", **base)
    ratios = sorted({float(s.condition["mask_ratio"]) for s in main if "mask_ratio" in s.condition})
    if main:
        panels = [
            Panel(
                title=f"{percent(ratio)} hidden",
                estimates={s.model: _estimate(s) for s in main if s.condition.get("mask_ratio") == ratio},
            )
            for ratio in ratios
        ]
        figure = figures.draw_intervals(panels, _ordered_looks(results, main), "R² of hidden values")
        section.drawings.append(
            artist.show(
                figure,
                "reconstruction",
                "R² of every method at every mask ratio, with intervals",
                f"R² of hidden values with {results.level_text} intervals; "
                f"{CENTRING_NAMES.get(str(base.get('centring')), 'as in the table below')}. "
                "An arrow stands for a value far below zero.",
            )
        )
    for metric in dict.fromkeys(s.metric for s in scores):
        text = _metric_text(metric)
        for group in _groups([s for s in scores if s.metric == metric], "mask_ratio"):
            here = [
                s
                for s in scores
                if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())
            ]
            centring = str(group.get("centring", ""))
            kind = str(group.get("mask", "random"))
            hidden = "" if kind == "random" else f", hidden: {kind}"
            extra = _other_conditions(group, "centring", "mask")
            is_plain = metric in ("r2", "r2_pooled_contract_units") and centring in ("recording", "")
            table = make_table(
                results,
                here,
                column="mask_ratio",
                column_text=lambda ratio: f"{percent(ratio)} hidden",
                title=f"{text.name}{', leak-free centring' if centring == 'visible' else ''}{hidden}{', ' + extra if extra else ''}",
                caption=_caption(
                    results,
                    here,
                    text,
                    f"{CENTRING_NAMES[centring][0].upper()}{CENTRING_NAMES[centring][1:]}." if centring in CENTRING_NAMES else "",
                    "Only hidden values are scored; every method sees the same masks.",
                    "Grey: BrainLM on UK Biobank as printed in the paper, pooled definition." if is_plain else "",
                ),
                higher_is_better=text.higher_is_better,
                mark_best="_minus_reference" not in metric,
                paper={"BrainLM, paper (UK Biobank)": PAPER_RECONSTRUCTION} if is_plain and kind == "random" else None,
            )
            first = metric == "r2" or (metric == "r2_pooled_contract_units" and group == base)
            (section.tables if first else section.more_tables).append(table)
    return section


def _metric_text(metric: str) -> MetricText:
    if metric.endswith("_minus_reference"):
        base = _metric_text(metric.removesuffix("_minus_reference"))
        return MetricText(
            name=f"{base.name}: paired difference from the reference baseline",
            definition=f"Difference of {base.name} from the reference baseline, which was fixed in advance; both are "
            "resampled together, by subject. An interval that includes 0 shows no difference.",
        )
    return METRICS.get(metric, MetricText(name=metric, definition=f"{metric}, as the task defines it."))


def _ordered_looks(results: Results, scores: Sequence[Score]) -> dict[str, Look]:
    order = ("brainlm", "untrained", "baseline", "control", "optimum")
    mean: dict[str, list[float]] = {}
    for score in scores:
        mean.setdefault(score.model, []).append(score.value)
    kinds = {s.model: s.model_kind for s in scores}
    ranked = sorted(mean, key=lambda m: (order.index(kinds[m]), -float(np.mean(mean[m])) if kinds[m] != "brainlm" else 0))
    return {model: results.looks[model] for model in ranked}


def examples_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Sample reconstructions", anchor="examples", more_title="More windows")
    if not results.store.exists("examples.npz"):
        section.absent.append("No sample windows were kept (examples.npz is not there).")
        return section
    with np.load(io.BytesIO(results.store.read_bytes("examples.npz")), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if not {"truth_z", "mask"} <= set(arrays) or arrays["truth_z"].ndim != 3 or len(arrays["truth_z"]) == 0:
        section.absent.append("examples.npz holds no windows.")
        return section
    truth, mask = arrays["truth_z"], arrays["mask"].astype(bool)
    num_windows, num_parcels, window_len = truth.shape
    patch_len = int(arrays["patch_len"]) if "patch_len" in arrays else window_len * num_parcels // mask.shape[1]
    hidden = np.repeat(mask.reshape(num_windows, num_parcels, -1), patch_len, axis=2)
    tr_s = float(arrays["tr_s"]) if "tr_s" in arrays else results.tr_s or 1.0
    predictions = _match_predictions(results, arrays)
    if not predictions:
        section.absent.append("examples.npz holds no predictions.")
        return section
    parcels = np.atleast_1d(arrays["parcels"]).astype(int) if "parcels" in arrays else np.arange(num_parcels)
    names = _parcel_names(arrays, num_parcels, parcels)
    for window in range(num_windows):
        wanted = [p for p in parcels if np.isfinite(truth[window, p]).all() and hidden[window, p].any()]
        wanted = wanted[:MAX_PARCELS] if (MAX_PARCELS := figures.MAX_EXAMPLE_PARCELS) else wanted
        if not wanted:
            continue
        figure = figures.draw_example(
            truth[window],
            {model: prediction[window] for model, prediction in predictions.items()},
            hidden[window],
            [int(p) for p in wanted],
            [names[int(p)] for p in wanted],
            results.looks,
            tr_s,
            patch_len,
        )
        ratio = f" {percent(round(float(arrays['mask_ratio']), 3))} of the tokens are hidden." if "mask_ratio" in arrays else ""
        drawing = artist.show(
            figure,
            f"example-{window + 1}",
            f"Measured and predicted series of {len(wanted)} parcels, window {window + 1}",
            f"Window {window + 1} of {num_windows}.{ratio} Series in units of the recording's own standard deviation; predictions "
            f"are drawn only where values were hidden, patch by patch ({patch_len} timepoints, {patch_len * tr_s:g} s).",
        )
        (section.drawings if not section.drawings else section.more_drawings).append(drawing)
    return section


def _match_predictions(results: Results, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return predictions worth drawing by model: checkpoints, and the strongest baseline that is there."""
    simple = {_simple(model): model for model in results.looks}
    found = {}
    for name, array in arrays.items():
        model = simple.get(_simple(name.removeprefix("prediction_")))
        if name.startswith("prediction_") and model is not None:
            found[model] = array
    kinds = {s.model: s.model_kind for s in results.all_scores}
    ratio = headline_ratio(results)
    here = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=ratio)
    best = strongest(s for s in _among(here, "baseline") if s.model in found)
    chosen = [m for m in results.models if m in found][:2] + ([best.model] if best else [])
    chosen += [m for m in found if kinds[m] == "optimum"]
    return {model: found[model] for model in chosen or list(found)[:2]}


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _parcel_names(arrays: Mapping[str, Any], num_parcels: int, parcels: np.ndarray) -> dict[int, str]:
    names = {int(p): f"parcel {int(p)}" for p in range(num_parcels)}
    given = [without_ids(str(n)) for n in np.atleast_1d(arrays["names"])] if "names" in arrays else []
    if len(given) == num_parcels:
        names.update(enumerate(given))
    elif len(given) == len(parcels):
        names.update({int(p): name for p, name in zip(parcels, given)})
    return {p: name if len(name) <= 22 else name[:21] + "…" for p, name in names.items()}


def brain_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Where in the brain", anchor="brain")
    if not results.store.exists("parcels.parquet"):
        section.absent.append("No scores by parcel were kept (parcels.parquet is not there), so there is no brain picture.")
        return section
    import pandas as pd

    frame = pd.read_parquet(io.BytesIO(results.store.read_bytes("parcels.parquet")))
    frame = frame[np.isfinite(frame["r2"].to_numpy(np.float64))]
    if frame.empty:
        section.absent.append("parcels.parquet holds no finite score.")
        return section
    present = list(dict.fromkeys(frame["model"]))
    model = next((m for m in results.models if m in present), present[0])
    ratios = np.array(sorted(set(frame.loc[frame["model"] == model, "mask_ratio"])), dtype=np.float64)
    ratio = float(ratios[np.argmin(np.abs(ratios - HEADLINE_RATIO))])
    here = frame[np.isclose(frame["mask_ratio"].to_numpy(np.float64), ratio)]
    ours = here[here["model"] == model].set_index("parcel").sort_index()
    label = results.labels.get(model, str(model))
    values = ours["r2"].to_numpy(np.float64)
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    try:
        coords_mm = _coords(ours)
        drawings = [
            artist.show(
                figures.draw_brain(values, coords_mm, label="R²"),
                "brain-r2",
                f"R² of {label} by parcel on a glass brain",
                f"R² of {label} by parcel, {percent(ratio)} hidden, {len(ours)} parcels: median {minus(middle)}, "
                f"from {minus(low)} (10th percentile) to {minus(high)} (90th).",
            )
        ]
        scored = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=ratio)
        rival = strongest(s for s in _among(scored, "baseline") if s.model in present)
        if rival is not None and rival.model != model:
            theirs = here[here["model"] == rival.model].set_index("parcel")["r2"]
            difference = (ours["r2"] - theirs).dropna()
            if len(difference):
                gap = difference.to_numpy(np.float64)
                drawings.append(
                    artist.show(
                        figures.draw_brain(
                            gap,
                            _coords(ours.loc[difference.index]),
                            label="difference of R²",
                            limit=max(float(np.quantile(np.abs(gap), 0.98)), 1e-3),
                        ),
                        "brain-difference",
                        f"Difference of R² by parcel between {label} and {results.labels[rival.model]}",
                        f"R² of {label} minus R² of {results.labels[rival.model]}, the strongest baseline; red: {label} is "
                        f"better. It is in {percent(float(round((gap > 0).mean(), 2)))} of the parcels.",
                    )
                )
        networks = [str(n) if n is not None and n == n else "" for n in ours["network"]] if "network" in ours else []
        if len(set(networks) - {""}) > 1:
            named = np.array([bool(n) for n in networks])
            drawings.append(
                artist.show(
                    figures.draw_networks([n for n in networks if n], coords_mm[named]),
                    "brain-networks",
                    "Functional network of every parcel on a glass brain",
                    "Functional networks of the atlas, for orientation.",
                )
            )
            section.tables.append(_by_network(ours, networks, label, ratio))
        section.drawings = drawings
    except ImportError as error:
        section.absent.append(f"The brain pictures need nilearn ({error}): pip install \"brainlm[eval]\".")
    return section


def _coords(frame: Any) -> Any:
    return frame[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64)


def _by_network(ours: Any, networks: Sequence[str], label: str, ratio: float) -> Table:
    values = ours["r2"].to_numpy(np.float64)
    rows = []
    for name in sorted(set(networks) - {""}):
        inside = values[[n == name for n in networks]]
        cells = [Cell(value=str(len(inside))), *(Cell(value=minus(q)) for q in np.quantile(inside, [0.5, 0, 1]))]
        rows.append(Row(label=name, cells=cells))
    return Table(
        title="R² by network",
        caption=f"R² of {label} by parcel, {percent(ratio)} hidden, summarised by network (same definition as the first "
        "table of section 2, summed over recordings for each parcel).",
        columns=["Parcels", "Median", "Lowest", "Highest"],
        rows=rows,
        head="Network",
    )


def filter_text(results: Results) -> str:
    """Say in a caption how the series were filtered in time."""
    tree = results.dataset
    inner = tree.get("filter")
    if isinstance(inner, dict):
        tree = inner
    elif isinstance(inner, str) and inner:
        return f"Temporal filter: {inner}."
    if "high_pass_hz" not in tree and "low_pass_hz" not in tree:
        return "Temporal filter: not recorded."
    high, low = tree.get("high_pass_hz"), tree.get("low_pass_hz")
    if not high and not low:
        return "Temporal filter: none (unfiltered series)."
    bounds = [f"high-pass {high:g} Hz" if high else "", f"low-pass {low:g} Hz" if low else ""]
    return (
        f"Temporal filter: {listed([b for b in bounds if b])}. Filtered series can be forecast in part from the filter alone."
    )


def forecasting_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Forecasting", anchor="forecasting")
    scores = results.task_scores("forecasting")
    if not scores:
        section.absent.append("Forecasting was not run: results.json holds no record of it.")
        return section
    drawn = _forecast_drawing(results, artist)
    if drawn is None:
        section.absent.append("No scores by step were kept (forecast_curves.parquet is not there), so there is no curve.")
    else:
        section.drawings.append(drawn)
    for metric in dict.fromkeys(s.metric for s in scores):
        text = _metric_text(metric)
        for group in _groups([s for s in scores if s.metric == metric], "horizon"):
            here = [s for s in scores if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())]
            paper = {}
            if metric in PAPER_FORECASTING:
                paper["BrainLM fine-tuned, paper (UK Biobank)"] = {PAPER_FORECASTING_HORIZON: PAPER_FORECASTING[metric]}
            extra = _other_conditions(group)
            table = make_table(
                results,
                here,
                column="horizon",
                column_text=lambda h: f"next {h} timepoints" + (f" ({h * results.tr_s:g} s)" if results.tr_s else ""),
                title=text.name + (f", {extra}" if extra else ""),
                caption=_caption(
                    results,
                    here,
                    text,
                    "Each parcel is centred on the observed part of its window; all steps up to the horizon count alike.",
                    filter_text(results),
                    "Checkpoints are scored as pretrained, not fine-tuned. Grey: the paper's fine-tuned model, pooled "
                    "definition." if paper else "",
                ),
                higher_is_better=text.higher_is_better,
                mark_best="_minus_reference" not in metric,
                paper=paper,
            )
            (section.tables if metric == "r2" else section.more_tables).append(table)
    return section


def _forecast_drawing(results: Results, artist: Artist) -> Drawing | None:
    if not results.store.exists("forecast_curves.parquet"):
        return None
    import pandas as pd

    frame = pd.read_parquet(io.BytesIO(results.store.read_bytes("forecast_curves.parquet")))
    horizon = ""
    if "horizon" in frame.columns and frame["horizon"].nunique() > 1:
        longest = frame["horizon"].max()
        frame = frame[frame["horizon"] == longest]
        horizon = f" Windows with {int(longest)} hidden timepoints."
    curves = {}
    order = [m for m in results.looks if m in set(frame["model"])]
    kinds = {s.model: s.model_kind for s in results.all_scores}
    for model in order:
        if kinds[model] == "control":
            continue
        rows = frame[frame["model"] == model].sort_values("step")
        step = rows["step"].to_numpy(np.float64) * (results.tr_s or 1.0)
        curves[model] = [step] + [
            rows[name].to_numpy(np.float64) if name in rows else np.full(len(rows), np.nan)
            for name in ("r2", "ci_low", "ci_high")
        ]
    if not curves:
        return None
    axis = "seconds ahead" if results.tr_s else "timepoints ahead"
    return artist.show(
        figures.draw_forecast(curves, results.looks, axis),
        "forecast",
        "R² of every method against the time ahead",
        f"R² of each step ahead with {results.level_text} intervals (bands).{horizon} {filter_text(results)}",
    )


def networks_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Functional networks", anchor="networks", more_title="Further tables")
    scores = results.task_scores("networks")
    if not scores:
        section.absent.append("Networks were not run: results.json holds no record of them.")
        return section
    level = _network_level(results)
    main = results.find("networks", "accuracy", level=level) or results.find("networks", "accuracy")
    kinds = sorted({s.condition.get("folds", "") for s in main}, key=_column_key)
    if main:
        looks: dict[str, Look] = {}
        for score in sorted(main, key=lambda s: list(_ordered_looks(results, main)).index(s.model)):
            look, part = results.looks[score.model], score.condition.get("part", "")
            if score.model != "majority class":
                label = look.label + (f", {part}" if part else "")
                looks[f"{score.model}/{part}"] = Look(
                    label=label, colour=look.colour, marker=look.marker, dashed=look.dashed
                )
        panels = []
        for kind in kinds:
            here = [s for s in main if s.condition.get("folds", "") == kind]
            majority = _of(here, "majority class")
            panels.append(
                Panel(
                    title=FOLD_NAMES.get(str(kind), str(kind)),
                    estimates={
                        f"{s.model}/{s.condition.get('part', '')}": _estimate(s) for s in here if s.model != "majority class"
                    },
                    lines={"majority": majority.value} if majority is not None else {},
                )
            )
        section.drawings.append(
            artist.show(
                figures.draw_intervals(panels, looks, "accuracy"),
                "networks",
                "Accuracy of every feature, by kind of folds",
                f"Accuracy with {results.level_text} intervals, by kind of folds. Dashed: always naming the largest network. "
                + _position_text(results, main),
            )
        )
    for metric in dict.fromkeys(s.metric for s in scores):
        text = _metric_text(metric)
        for group in _groups([s for s in scores if s.metric == metric], "folds", "part"):
            here = [s for s in scores if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())]
            at = str(group.get("level", ""))
            where = {
                "recording": "Classified within each recording; interval over subjects.",
                "group": "Features averaged over recordings first; interval over parcels.",
            }.get(at, "")
            is_main = at == level and metric in ("accuracy", "balanced_accuracy")
            paper = None
            if metric == "accuracy" and at == "recording":
                paper = {f"{name}, paper (UK Biobank)": {"random": value} for name, value in PAPER_NETWORKS.items()}
            extra = _other_conditions(group, "level")
            section_tables = section.tables if is_main else section.more_tables
            section_tables.append(
                make_table(
                    results,
                    here,
                    column="folds",
                    column_text=lambda kind: FOLD_NAMES.get(str(kind), str(kind)),
                    title=text.name + (", by recording" if at == "recording" else ", group average" if at == "group" else "")
                    + (f", {extra}" if extra else ""),
                    caption=_caption(
                        results,
                        here,
                        text,
                        "k nearest neighbours, k chosen on the training parcels of each fold.",
                        where,
                        _position_text(results, here) if "minus" not in metric else "",
                    ),
                    row_conditions=("part",),
                    mark_best="_minus_reference" not in metric,
                    paper=paper,
                )
            )
            table = section_tables[-1]
            section_tables[-1] = Table(
                title=table.title, caption=table.caption, columns=table.columns, rows=table.rows, marks=table.marks,
                head="Feature",
            )  # fmt: skip
    return section


def _position_text(results: Results, scores: Sequence[Score]) -> str:
    parts = []
    for kind in sorted({s.condition.get("folds", "") for s in scores}, key=_column_key):
        place = _position_alone(s for s in scores if s.condition.get("folds", "") == kind)
        if place is not None:
            parts.append(f"{minus(place.value)} in {FOLD_NAMES.get(str(kind), str(kind))} folds")
    if not parts:
        return "No control by position alone was run."
    return f"Position alone (coordinates, the better of the two) reaches {listed(parts)}: only what lies above that is signal."


# ---------------------------------------------------------------- provenance


def provenance(results: Results) -> dict[str, Any]:
    """Return the facts of section 8: pairs for tables, lists, and texts to fold away."""
    run, dataset = results.run, results.dataset
    first = results.scores[0]
    data = [("Name", first.dataset), ("Content hash", first.dataset_hash), ("Split scored", first.split)]
    data += [("Subjects, recordings scored", _n_text(results.scores).removeprefix("n = ").rstrip("."))]
    counts = dataset.get("counts")
    if isinstance(counts, dict):
        rows = []
        for split, entry in counts.items():
            what = ", ".join(f"{v} {k}" for k, v in entry.items()) if isinstance(entry, dict) else str(entry)
            rows.append(f"{split}: {what}")
        data.append(("Splits", "; ".join(rows)))
    atlas = dataset.get("atlas")
    if atlas:
        named = atlas if not isinstance(atlas, dict) else ", ".join(f"{k} {_short(v)}" for k, v in atlas.items())
        data.append(("Atlas", str(named)))
    if results.tr_s is not None:
        data.append(("TR", f"{results.tr_s:g} s"))
    data.append(("Temporal filter", filter_text(results).removeprefix("Temporal filter: ").rstrip(".")))
    sources = sorted({s.statistics_from for s in results.scores})
    data.append(("Median and IQR of the model input", f"from the {listed(sources)} (column in the table of all records)"))
    known = {"name", "content_hash", "counts", "atlas", "tr_s", "filter", "high_pass_hz", "low_pass_hz", "flags", "warnings"}
    data += [(k.replace("_", " "), _plain(v)) for k, v in dataset.items() if k not in known and not isinstance(v, dict)]
    checkpoints = []
    for info in run.get("checkpoints") or []:
        manifest = info.get("manifest") if isinstance(info.get("manifest"), dict) else {}
        pairs = [("Path", str(info.get("path") or info.get("folder") or "not recorded"))]
        if info.get("weights_sha256"):
            pairs.append(("Weights, sha256", str(info["weights_sha256"])))
        if figures.is_number(info.get("num_parameters")):
            pairs.append(("Parameters", counted(int(info["num_parameters"]), "").strip()))
        pairs += [(k.replace("_", " "), _plain(v)) for k, v in manifest.items() if not isinstance(v, dict | list)]
        if isinstance(manifest.get("versions"), dict):
            pairs.append(("Versions at training", _plain(manifest["versions"])))
        if isinstance(info.get("config"), dict):
            pairs.append(("Configuration", _plain(info["config"])))
        checkpoints.append((str(info.get("name", "checkpoint")), pairs))
    how = []
    for name in ("command", "git_commit", "commit", "started", "finished"):
        if run.get(name):
            value = run[name]
            how.append((name.replace("_", " ").capitalize(), " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    if run.get("versions"):
        how.append(("Versions", _plain(run["versions"])))
    durations = next((run[name] for name in ("durations", "durations_s", "duration_s") if run.get(name)), None)
    seconds = durations if isinstance(durations, dict) else {"total": durations} if durations is not None else {}
    return {
        "absent": [] if run else ["run.json is not there: only what the scores themselves carry is known."],
        "data": data,
        "flags": _as_list(dataset.get("flags")),
        "warnings": _as_list(dataset.get("warnings")),
        "checkpoints": checkpoints,
        "how": how,
        "durations": [(k, f"{v:.1f} s" if figures.is_number(v) else _plain(v)) for k, v in seconds.items()],
        "config": _yaml(run["config"]) if isinstance(run.get("config"), dict) else "",
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = _plain(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _yaml(tree: Any) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, width=110, allow_unicode=True)


def record_rows(results: Results) -> list[list[str]]:
    """Return every record as a line of text cells, for the table at the end."""
    return [
        [
            f"{s.task} v{s.version}",
            results.labels[s.model],
            s.model_kind,
            s.metric,
            minus(s.value),
            interval_text(s.ci_low, s.ci_high),
            f"{s.num_subjects} / {s.num_recordings}",
            ", ".join(f"{k} {v}" for k, v in s.condition.items()),
            s.statistics_from,
            s.model_hash[:12],
            f"{s.dataset} {s.dataset_hash[:8]} {s.split}",
        ]
        for s in results.all_scores
    ]


RECORD_COLUMNS = ["Task", "Model", "Kind", "Metric", "Value", "Interval", "Subjects / rec.", "Condition", "Statistics", "Model hash", "Data"]


# ---------------------------------------------------------------- page


def write_report(results_folder: str) -> None:
    """Write ``report.html`` and the files in ``figures/`` of a results folder.

    Parameters
    ----------
    results_folder : str
        Any fsspec URL; what `eval/run.py` wrote.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it is not a list of scores.
    """
    import jinja2
    from markupsafe import Markup

    results = read_results(results_folder)
    artist = Artist(store=results.store)
    with figures.quiet_drawing():
        sections = [
            make(results, artist)
            for make in (
                training_section,
                reconstruction_section,
                examples_section,
                brain_section,
                forecasting_section,
                networks_section,
            )
        ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["svg"] = Markup  # made by eval.figures, which escapes what it is given
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=f"{listed([results.labels[m] for m in results.models]) if results.models else 'Baselines'} on {results.scores[0].dataset}",
        lead=lead(results),
        simulated=results.is_simulated,
        claims=make_claims(results),
        no_claims="" if results.models else "No checkpoint was scored, so there is nothing to claim about a model.",
        caveats=caveats(results),
        sections=sections,
        facts=provenance(results),
        record_columns=RECORD_COLUMNS,
        records=record_rows(results),
        level=results.level_text,
    )
    results.store.write_bytes(REPORT_NAME, page.encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write report.html from the files of a results folder.")
    parser.add_argument("results_folder", help="folder or URL that eval/run.py wrote")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_report(args.results_folder)
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Store(args.results_folder).url_of(REPORT_NAME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
