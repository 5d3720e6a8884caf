"""A results folder as a report reads it: scores, names of models, no subject ids; and how numbers are put in words."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from brainlm.store import Store
from eval import figures
from eval.figures import Look, minus
from eval.results import FILE_NAME, Score, read_scores

BASELINE_NAMES = {
    "mean": "mean",
    "interpolation": "linear interpolation",
    "gaussian": "Gaussian conditional (per timepoint)",
    "gaussian space x time": "Gaussian conditional (space x time)",
    "gaussian adapted": "Gaussian conditional (adapted to the subject)",
    "gaussian kronecker": "Gaussian conditional (space × time)",
    "autoregression": "autoregression (per parcel)",
}
HEADLINE_RATIO = 0.75  # the paper's mask ratio in training
FOLD_NAMES = {"random": "random", "mirrored": "mirrored pairs together", "blocked": "spatially blocked"}
FOLD_PHRASES = {
    "random": "with random folds",
    "mirrored": "with mirrored pairs in one fold",
    "blocked": "with spatially blocked folds",
}
CONDITION_ORDER = {"random": 0, "recording": 0, "visible": 1, "group": 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """A results folder as read.

    ``scores`` belong to one data set, and to one split and version of each task; ``left_out`` counts the others.
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
                labels[model] = "exact optimum (Kalman)" + model.removeprefix("optimum")
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
        intervals = dig(self.run, "config", "intervals", "level")
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

    @cached_property
    def common_notes(self) -> set[str]:
        """Notes that every score carries: the summary says them once."""
        return set.intersection(*(set(score.notes) for score in self.scores))

    def why_absent(self, task: str) -> str:
        reason = dig(self.run, "skipped_tasks", task)
        return f"This task was not run: {reason or 'results.json holds no record of it'}."

    def task_scores(self, task: str) -> list[Score]:
        return [score for score in self.scores if score.task == task]

    def table(self, name: str) -> pd.DataFrame | None:
        """Return a parquet file of the folder, its text without subject ids; None if it is not there."""
        if name not in self._tables:
            self._tables[name] = self._read_table(name)
        return self._tables[name]

    @cached_property
    def _tables(self) -> dict[str, pd.DataFrame | None]:
        return {}

    def _read_table(self, name: str) -> pd.DataFrame | None:
        if not self.store.exists(name):
            return None
        frame = pd.read_parquet(io.BytesIO(self.store.read_bytes(name)))
        for column in frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]:
            frame[column] = frame[column].fillna("").astype(str).map(without_ids)
        return frame

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each model is drawn, the same in every figure."""
        looks: dict[str, Look] = {}
        tasks: dict[str, set[str]] = {}
        for score in self.all_scores:
            tasks.setdefault(score.model, set()).add(score.task)
        kinds = {score.model: score.model_kind for score in self.all_scores}
        models = [model for model, kind in kinds.items() if kind == "brainlm"]
        for model, kind in kinds.items():
            label = self.labels[model]
            if kind == "brainlm":
                place = models.index(model)
                colour = figures.MODEL_COLOURS[place % len(figures.MODEL_COLOURS)]
                looks[model] = Look(label=label, colour=colour, marker="oDs^v"[place % 5])
            elif kind == "optimum":
                looks[model] = Look(label=label, colour=figures.INK, marker="D", dashed=True)
            elif kind in ("untrained", "control"):
                looks[model] = Look(label=label, colour=figures.MUTED, marker="s", dashed=kind == "untrained")
            else:  # a colour that no other baseline of the same task has
                taken = [looks[m].colour for m in looks if kinds[m] == "baseline" and tasks[m] & tasks[model]]
                colour = min(figures.BASELINE_COLOURS, key=taken.count)
                again = taken.count(colour)  # then told apart by marker and line
                looks[model] = Look(label=label, colour=colour, marker="oPvX"[min(again, 3)], dashed=again % 2 == 1)
        return looks


def read_results(results_folder: str) -> Results:
    """Read a results folder.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it holds no score.
    """
    store = Store(results_folder)
    everything = [_clean(score) for score in read_scores(store)]
    if not everything:
        raise DataError(f"{store.url_of(FILE_NAME)} holds no score: run eval/run.py with at least one task")
    place = Counter((s.dataset, s.dataset_hash) for s in everything).most_common(1)[0][0]
    newest: dict[str, int] = {}
    splits: dict[str, Counter[str]] = {}
    for score in everything:
        newest[score.task] = max(newest.get(score.task, 0), score.version)
        if (score.dataset, score.dataset_hash) == place:
            splits.setdefault(score.task, Counter())[score.split] += 1
    split = {task: found.most_common(1)[0][0] for task, found in splits.items()}
    scores = [
        s
        for s in everything
        if (s.dataset, s.dataset_hash) == place and s.split == split[s.task] and s.version == newest[s.task]
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
    """Return a nested mapping without subject ids, keys of hashes and lists of people."""
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
    condition = {k: without_ids(v) if isinstance(v, str) else v for k, v in score.condition.items()}
    return replace(score, notes=tuple(without_ids(note) for note in score.notes), condition=condition)


def dig(tree: Any, *path: str) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def as_list(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def of_model(scores: Iterable[Score], model: str) -> Score | None:
    return next((score for score in scores if score.model == model), None)


def among(scores: Iterable[Score], *kinds: str) -> list[Score]:
    return [score for score in scores if score.model_kind in kinds]


def strongest(scores: Iterable[Score]) -> Score | None:
    return max(scores, key=lambda score: score.value, default=None)


def condition_groups(scores: Iterable[Score], *without: str) -> list[dict[str, object]]:
    """Return the distinct conditions left when some are taken out, the usual ones first."""
    found = {tuple((k, v) for k, v in s.condition.items() if k not in (*without, "reference")): None for s in scores}
    return [
        dict(items) for items in sorted(found, key=lambda items: [CONDITION_ORDER.get(str(v), 0) for _, v in items])
    ]


def reconstruction_base(results: Results) -> dict[str, object]:
    """Return the conditions of the main reconstruction table, without the mask ratio."""
    groups = condition_groups(results.find("reconstruction", "r2"), "mask_ratio")
    return dict(groups[0]) if groups else {}


def headline_ratio(results: Results) -> float | None:
    ratios = {
        float(s.condition["mask_ratio"]) for s in results.find("reconstruction", "r2") if "mask_ratio" in s.condition
    }
    return min(ratios, key=lambda ratio: (abs(ratio - HEADLINE_RATIO), ratio), default=None)


def network_level(results: Results) -> str:
    levels = {str(s.condition.get("level", "")) for s in results.find("networks", "accuracy")}
    return "recording" if "recording" in levels or not levels else sorted(levels)[0]


def position_alone(scores: Iterable[Score]) -> Score | None:
    return strongest(s for s in scores if s.model.startswith("coordinates"))


def column_key(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    known = list(FOLD_NAMES)
    return (1, float(known.index(value) if value in known else len(known)), str(value))


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
    named = listed([bound for bound in bounds if bound])
    return f"Temporal filter: {named}. Filtered series can be forecast in part from the filter alone."
