"""A results folder as a comparison reads it: scores, what was run, and what each score was made of."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from brainlm.errors import DataError, StoreError
from brainlm.store import Store
from eval.clinical.answers import answers_by_condition, plain_condition
from eval.make_scores import sums_by_condition
from eval.models import MethodSpec
from eval.planning import make_task
from eval.resampled import Minus, Resampled, ScoreAnswers, ScoreSums, score_of
from eval.results import FILE_NAME, ConditionValue, Score, read_scores
from eval.settings import TASKS, EvalSettings
from eval.task import FOLDER, UnitOutput, together

RUN = "run.json"
MINUS_REFERENCE = "_minus_reference"
UNIT_KEYS = {"name", "kind", "model_hash", "task", "file"}
Condition = frozenset[tuple[str, ConditionValue]]
Outputs = Sequence[tuple[MethodSpec, UnitOutput]]


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeOf:
    """What the scores of a model under one condition were made of, by metric.

    ``not_in_reference`` are conditions that the reference baseline does not have.
    """

    metrics: Mapping[str, Resampled]
    not_in_reference: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ResultsFolder:
    """What ``eval/run.py`` left in a folder; ``run`` is empty where there is no ``run.json``."""

    store: Store
    scores: tuple[Score, ...]
    run: Mapping[str, Any]
    _tasks: dict[str, dict[tuple[Condition, str], MadeOf]] = field(default_factory=dict)

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

    def made_of(self, score: Score) -> Resampled | str:
        """Return what a score was made of, or say why that is not known.

        Raises
        ------
        StoreError
            If a table is damaged.
        """
        if not self.run:
            return f"{self.store.url_of(RUN)} is not there, which says where the tables are"
        if score.task not in TASKS:
            return f"the task {score.task} is not known to this version"
        tables = self._tables(score.task)
        condition = {name: value for name, value in score.condition.items() if name != "reference"}
        own = tables.get((frozenset(condition.items()), score.model))
        if own is None:
            return f"no table of {score.model} in {self.store.url_of(FOLDER)}"
        name = score.metric.removesuffix(MINUS_REFERENCE)
        if name not in own.metrics:
            return f"the metric {name} is not known to this version"
        found: Resampled = own.metrics[name]
        if score.metric.endswith(MINUS_REFERENCE):
            bare = {name: value for name, value in condition.items() if name not in own.not_in_reference}
            theirs = tables.get((frozenset(bare.items()), str(score.condition.get("reference"))))
            if theirs is None:
                return f"no table of the reference in {self.store.url_of(FOLDER)}"
            found = Minus(own=found, reference=theirs.metrics[name])
        value = score_of(found)
        if not math.isclose(value, score.value, rel_tol=1e-9, abs_tol=1e-9):
            return f"the tables in {self.store.url_of(FOLDER)} give {value:.6g}, {FILE_NAME} says {score.value:.6g}"
        return found

    @cached_property
    def _stored(self) -> set[str]:
        return {f"{FOLDER}/{name}" for name in self.store.names(FOLDER)}

    def _tables(self, task: str) -> dict[tuple[Condition, str], MadeOf]:
        """Return what scores were made of, by condition and model."""
        if task not in self._tasks:
            outputs = together(
                [
                    (MethodSpec(name=unit["name"], kind=unit["kind"], model_hash=unit["model_hash"]), self._read(unit))
                    for unit in self.run.get("units", [])
                    if unit["task"] == task and unit["file"] in self._stored
                ]
            )
            found = _answers(outputs) if task == "clinical" else _sums(task, outputs)
            self._tasks[task] = {(frozenset(condition.items()), model): made for condition, model, made in found}
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
            f"{store.url_of(FILE_NAME)} holds scores of several data sets or splits: give the folder of one, below it"
        )
    run = store.read_json(RUN) if store.exists(RUN) else {}
    units = run.get("units", []) if isinstance(run, dict) else None
    if not isinstance(units, list) or not all(isinstance(unit, dict) and set(unit) >= UNIT_KEYS for unit in units):
        raise DataError(f"{store.url_of(RUN)} is not what eval/run.py writes: run it again with out={store.url}")
    return ResultsFolder(store=store, scores=tuple(scores), run=run)


def _sums(task: str, outputs: Outputs) -> Iterator[tuple[dict[str, ConditionValue], str, MadeOf]]:
    made = make_task(task, EvalSettings(dataset="any", out=""))  # no setting changes how a table is divided
    for spec, output in outputs:
        for sums in sums_by_condition(made, output.table).values():
            grouping, frame = sums.grouping, sums.frame
            by = {name: ScoreSums(frame=frame, metric=metric) for name, metric in grouping.metrics.items()}
            yield sums.condition, spec.name, MadeOf(metrics=by, not_in_reference=grouping.not_in_reference)


def _answers(outputs: Outputs) -> Iterator[tuple[dict[str, ConditionValue], str, MadeOf]]:
    for spec, output in outputs:
        for condition, answers in answers_by_condition(output.table):
            by = {name: ScoreAnswers(answers=answers, metric=metric) for name, metric in answers.metrics.items()}
            yield plain_condition(condition), spec.name, MadeOf(metrics=by, not_in_reference=("readout",))
