"""What a benchmark is: named work units that leave tables of sums behind, and scores made from those tables.

A unit is (task, method). It writes ``<out>/subjects/<task>--<method>--<hash>.parquet``, one row a recording and
condition; the hash covers the task's version and settings, the data and the method, so a second run computes only what
is missing or has changed, and bootstrap settings can change for free.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import StoreError
from brainlm.intervals import Metric, bootstrap_counts, bootstrap_difference, bootstrap_interval, metric_value
from brainlm.store import Store
from eval.cohort import Cohort
from eval.models import MethodSpec
from eval.results import Score, StatisticsFrom

FOLDER = "subjects"
Parts = dict[tuple[int, tuple[Any, ...]], dict[str, pd.DataFrame]]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a unit runs; nothing here may change a score."""

    batch_size: int = 8
    device: str = "cpu"
    untrained_seed: int = 0


@dataclass(frozen=True, eq=False)
class UnitOutput:
    """What a unit leaves behind.

    ``table`` holds sums, one row a recording (or parcel) and condition; ``parcels`` sums per parcel; ``examples``
    arrays for figures.
    """

    table: pd.DataFrame
    parcels: pd.DataFrame | None = None
    examples: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How a task's table becomes scores: which columns are conditions, and which one is resampled.

    ``not_in_reference`` are conditions that the reference baseline does not have (it holds "" there).
    """

    conditions: tuple[str, ...]
    unit: str = "group"
    metrics: Mapping[str, Metric]
    not_in_reference: tuple[str, ...] = ()


class Task(Protocol):
    """One benchmark."""

    name: str
    version: int

    def hashed_settings(self) -> dict[str, Any]:
        """Return all settings that change the numbers."""

    def why_not(self, cohort: Cohort) -> str:
        """Say what the data set lacks for this task, "" if nothing."""

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        """List the methods that need no checkpoint."""

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        """List what else must be run with a network, e.g. on permuted input."""

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        """Score one method."""

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        """Divide the tables of all methods into parts that are resampled alike."""

    def reference(self) -> str:
        """Name the baseline, fixed in advance, that every method is compared with ("" = none)."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work, small and plain."""

    task: str
    spec: MethodSpec
    key: str

    @property
    def stem(self) -> str:
        return f"{FOLDER}/{self.task}--{re.sub(r'[^A-Za-z0-9_.]+', '-', self.spec.name).strip('-')}--{self.key}"

    @property
    def label(self) -> str:
        return f"{self.task}: {self.spec.name}"


def is_done(store: Store, unit: Unit) -> bool:
    return store.exists(f"{unit.stem}.parquet")


def write_output(store: Store, unit: Unit, output: UnitOutput) -> None:
    """Write a unit's files, each atomically, the table last: a unit with a table is complete."""
    if output.parcels is not None:
        store.write_bytes(f"{unit.stem}.parcels.parquet", to_parquet(output.parcels))
    if output.examples:
        store.write_bytes(f"{unit.stem}.examples.npz", to_npz(output.examples))
    store.write_bytes(f"{unit.stem}.parquet", to_parquet(output.table))


def read_output(store: Store, unit: Unit) -> UnitOutput:
    """Read what `write_output` left.

    Raises
    ------
    StoreError
        If a file is damaged, naming the files to remove.
    """
    parcels = examples = None
    try:
        if store.exists(f"{unit.stem}.parcels.parquet"):
            parcels = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.parcels.parquet")))
        if store.exists(f"{unit.stem}.examples.npz"):
            with np.load(io.BytesIO(store.read_bytes(f"{unit.stem}.examples.npz")), allow_pickle=False) as archive:
                examples = {name: archive[name] for name in archive.files}
        table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.parquet")))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        files = f"{store.url_of(unit.stem)}.*"
        raise StoreError(f"{files} is damaged; remove these files and run again: {error}") from error
    return UnitOutput(table=table, parcels=parcels, examples=examples or {})


def to_parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def to_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class ScoreContext:
    """What scores of one run share."""

    dataset: str
    dataset_hash: str
    split: str
    num_bootstrap: int
    seed: int
    level: float
    notes: tuple[str, ...] = ()


def unit_sums(frame: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Add up a table's sums per resampled unit, in the order in which units first appear."""
    numeric = frame.select_dtypes("number").columns
    return frame.groupby(unit, sort=False)[list(numeric)].sum()


def split_outputs(
    task: Task, outputs: Sequence[tuple[MethodSpec, UnitOutput]]
) -> tuple[Parts, dict[int, Grouping], dict[tuple[int, tuple[Any, ...], str], tuple[int, int]]]:
    """Divide the tables of all methods of one task by grouping and condition.

    Returns
    -------
    parts : dict
        Sums per resampled unit, by number of the grouping and values of its conditions, then by method.
    groupings : dict
        By number.
    counted : dict
        Numbers of subjects and recordings, by number of the grouping, values of its conditions, and method.
    """
    parts: Parts = {}
    groupings: dict[int, Grouping] = {}
    counted: dict[tuple[int, tuple[Any, ...], str], tuple[int, int]] = {}
    for spec, output in outputs:
        for number, (frame, grouping) in enumerate(task.groupings(output.table)):
            groupings[number] = grouping
            for key, rows in frame.groupby(list(grouping.conditions), sort=False):
                values = tuple(key)
                sums = unit_sums(rows.drop(columns=list(grouping.conditions)), grouping.unit)
                parts.setdefault((number, values), {})[spec.name] = sums
                counted[number, values, spec.name] = _num_distinct(rows)
    return parts, groupings, counted


def condition_of(grouping: Grouping, values: Sequence[Any]) -> dict[str, str | int | float]:
    """Return the condition of a score by name; what a method does not have ("") is left out."""
    return {name: _plain(value) for name, value in zip(grouping.conditions, values) if value != ""}


def make_scores(task: Task, outputs: Sequence[tuple[MethodSpec, UnitOutput]], context: ScoreContext) -> list[Score]:
    """Turn the tables of all methods of one task into scores with intervals.

    Every method is also compared with the task's reference baseline under the same condition: metric
    ``<first metric>_minus_reference``, paired by resampled unit.
    """
    scores: list[Score] = []
    specs = {spec.name: spec for spec, _ in outputs}
    parts, groupings, counted = split_outputs(task, outputs)
    for (number, values), by_method in parts.items():
        grouping = groupings[number]
        condition = condition_of(grouping, values)
        bare = tuple("" if c in grouping.not_in_reference else v for c, v in zip(grouping.conditions, values))
        reference = parts.get((number, bare), {}).get(task.reference())
        for name, unit_frame in by_method.items():
            spec = specs[name]
            per_unit = _columns(unit_frame)
            counts = bootstrap_counts(len(unit_frame), context.num_bootstrap, context.seed)
            num_subjects, num_recordings = counted[number, values, name]
            statistics_from: StatisticsFrom = "checkpoint" if spec.checkpoint else "cohort"
            common: dict[str, Any] = {
                "task": task.name,
                "version": task.version,
                "dataset": context.dataset,
                "dataset_hash": context.dataset_hash,
                "split": context.split,
                "model": spec.name,
                "model_kind": spec.kind,
                "model_hash": spec.model_hash,
                "num_subjects": num_subjects,
                "num_recordings": num_recordings,
                "statistics_from": statistics_from,
            }
            notes = spec.notes + context.notes
            if grouping.unit != "group":
                notes += (f"interval over {grouping.unit}s, not over subjects",)
            elif len(unit_frame) < num_subjects:
                notes += ("subjects of one family are resampled together",)
            if len(unit_frame) < 2:
                notes += ("nothing to resample: no interval",)
            for metric_name, metric in grouping.metrics.items():
                low, high = bootstrap_interval(per_unit, metric, counts, context.level)
                scores.append(
                    Score(
                        metric=metric_name,
                        value=metric_value(per_unit, metric),
                        ci_low=_or_none(low),
                        ci_high=_or_none(high),
                        condition=dict(condition),
                        notes=notes,
                        **common,
                    )
                )
            if reference is not None and name != task.reference() and list(reference.index) == list(unit_frame.index):
                metric_name, metric = next(iter(grouping.metrics.items()))
                theirs = _columns(reference)
                low, high = bootstrap_difference(per_unit, theirs, metric, counts, context.level)
                scores.append(
                    Score(
                        metric=f"{metric_name}_minus_reference",
                        value=metric_value(per_unit, metric) - metric_value(theirs, metric),
                        ci_low=_or_none(low),
                        ci_high=_or_none(high),
                        condition={**condition, "reference": task.reference()},
                        notes=notes,
                        **common,
                    )
                )
    return scores


def _columns(frame: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    return {str(name): frame[name].to_numpy(np.float64) for name in frame.columns}


def _num_distinct(rows: pd.DataFrame) -> tuple[int, int]:
    if "num_subjects" in rows.columns:  # group level: a row is a parcel, averaged over recordings
        return int(rows["num_subjects"].iloc[0]), int(rows["num_recordings"].iloc[0])
    return int(rows["subject"].nunique()), int(rows["recording"].nunique())


def _plain(value: Any) -> str | int | float:
    if isinstance(value, np.generic):
        value = value.item()
    assert isinstance(value, str | int | float)
    return value


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
