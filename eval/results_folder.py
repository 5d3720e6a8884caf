"""A results folder as a comparison reads it: scores, what was run, and the sums that each score was made of."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from brainlm.errors import DataError, StoreError
from brainlm.intervals import FloatArray, Metric, metric_value
from brainlm.store import Store
from eval.make_scores import sums_by_condition
from eval.models import MethodSpec
from eval.planning import make_task
from eval.results import FILE_NAME, ConditionValue, Score, read_scores
from eval.settings import TASKS, EvalSettings
from eval.task import FOLDER, Grouping, UnitOutput

RUN = "run.json"
MINUS_REFERENCE = "_minus_reference"
OWN, REFERENCE = "own ", "reference "  # before the names of sums where a score is a difference
UNIT_KEYS = {"name", "kind", "model_hash", "task", "file"}
Condition = frozenset[tuple[str, ConditionValue]]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreSums:
    """What a score was made of: a row of sums for each resampled unit, and the metric that takes them."""

    frame: pd.DataFrame
    metric: Metric

    def arrays(self, units: pd.Index | None = None) -> dict[str, FloatArray]:
        """Return the sums by name, in the order of `units`."""
        frame = self.frame if units is None else self.frame.loc[units]
        return {str(name): frame[name].to_numpy("float64") for name in frame.columns}


@dataclass(frozen=True, kw_only=True, eq=False)
class ResultsFolder:
    """What ``eval/run.py`` left in a folder; ``run`` is empty where there is no ``run.json``."""

    store: Store
    scores: tuple[Score, ...]
    run: Mapping[str, Any]
    _tasks: dict[str, dict[tuple[Condition, str], tuple[Grouping, pd.DataFrame]]] = field(default_factory=dict)

    @property
    def dataset_hash(self) -> str:
        return self.scores[0].dataset_hash

    @property
    def split(self) -> str:
        """What was scored, in words: tasks may be of other people."""
        return " and ".join(dict.fromkeys(score.split for score in self.scores))

    @property
    def splits(self) -> dict[str, str]:
        """Split by task."""
        return {score.task: score.split for score in self.scores}

    @property
    def models(self) -> dict[str, str]:
        """Kind by name."""
        return {score.model: score.model_kind for score in self.scores}

    def sums_of(self, score: Score) -> ScoreSums | str:
        """Return what a score was made of, or say why that is not known.

        Raises
        ------
        StoreError
            If a table is damaged.
        """
        if not self.run:
            return f"{self.store.url_of(RUN)} is not there, which says where the sums are"
        if score.task not in TASKS:
            return f"the task {score.task} is not known to this version"
        tables = self._tables(score.task)
        condition = {name: value for name, value in score.condition.items() if name != "reference"}
        found = tables.get((frozenset(condition.items()), score.model))
        if found is None:
            return f"no table of sums of {score.model} in {self.store.url_of(FOLDER)}"
        grouping, frame = found
        name = score.metric.removesuffix(MINUS_REFERENCE)
        if name not in grouping.metrics:
            return f"the metric {name} is not known to this version"
        metric = grouping.metrics[name]
        if score.metric.endswith(MINUS_REFERENCE):
            bare = {name: value for name, value in condition.items() if name not in grouping.not_in_reference}
            theirs = tables.get((frozenset(bare.items()), str(score.condition.get("reference"))))
            if theirs is None:
                return f"no table of sums of the reference in {self.store.url_of(FOLDER)}"
            frame = pd.concat([frame.add_prefix(OWN), theirs[1].add_prefix(REFERENCE)], axis=1, join="inner")
            metric = _minus_reference(metric)
        sums = ScoreSums(frame=frame, metric=metric)
        value = metric_value(sums.arrays(), metric)
        if not math.isclose(value, score.value, rel_tol=1e-9, abs_tol=1e-9):
            return f"the sums in {self.store.url_of(FOLDER)} give {value:.6g}, {FILE_NAME} says {score.value:.6g}"
        return sums

    @cached_property
    def _stored(self) -> set[str]:
        return {f"{FOLDER}/{name}" for name in self.store.names(FOLDER)}

    def _tables(self, task: str) -> dict[tuple[Condition, str], tuple[Grouping, pd.DataFrame]]:
        """Return grouping and sums per resampled unit, by condition and model."""
        if task not in self._tasks:
            outputs = [
                (MethodSpec(name=unit["name"], kind=unit["kind"], model_hash=unit["model_hash"]), self._read(unit))
                for unit in self.run.get("units", [])
                if unit["task"] == task and unit["file"] in self._stored
            ]
            made = make_task(task, EvalSettings(dataset="", out=""))  # no setting changes how a table is divided
            self._tasks[task] = {
                (frozenset(sums.condition.items()), spec.name): (sums.grouping, sums.frame)
                for spec, output in outputs
                for sums in sums_by_condition(made, output.table).values()
            }
        return self._tasks[task]

    def _read(self, unit: Mapping[str, Any]) -> UnitOutput:
        try:
            return UnitOutput(table=pd.read_parquet(io.BytesIO(self.store.read_bytes(unit["file"]))))
        except (ValueError, EOFError) as error:  # pyarrow's errors are ValueErrors
            raise StoreError(
                f"{self.store.url_of(unit['file'])} is damaged; remove it and run eval/run.py again: {error}"
            ) from error


def read_results_folder(url: str) -> ResultsFolder:
    """Read what ``eval/run.py`` wrote.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it is not the scores of one data set, and of one split a task.
    StoreError
        If a file cannot be read.
    """
    store = Store(url)
    scores = read_scores(store)
    if not scores:
        raise DataError(f"{store.url_of(FILE_NAME)} holds no score: run eval/run.py with at least one task")
    of_task = {(score.dataset_hash, score.task, score.split) for score in scores}
    if len({score.dataset_hash for score in scores}) > 1 or len({task for _, task, _ in of_task}) < len(of_task):
        raise DataError(
            f"{store.url_of(FILE_NAME)} holds scores of several data sets or splits, which one run never has"
        )
    run = store.read_json(RUN) if store.exists(RUN) else {}
    units = run.get("units", []) if isinstance(run, dict) else None
    if not isinstance(units, list) or not all(isinstance(unit, dict) and set(unit) >= UNIT_KEYS for unit in units):
        raise DataError(f"{store.url_of(RUN)} is not what eval/run.py writes: run it again with out={store.url}")
    return ResultsFolder(store=store, scores=tuple(scores), run=run)


def _minus_reference(metric: Metric) -> Metric:
    def difference(sums: Mapping[str, FloatArray]) -> FloatArray:
        own, reference = (
            {name.removeprefix(prefix): values for name, values in sums.items() if name.startswith(prefix)}
            for prefix in (OWN, REFERENCE)
        )
        return metric(own) - metric(reference)

    return difference
