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
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import StoreError
from brainlm.intervals import Metric, bootstrap_counts, bootstrap_difference, bootstrap_interval, metric_value
from brainlm.significance import holm, paired_p_value
from brainlm.store import Store
from eval.cohort import Cohort
from eval.models import MethodSpec
from eval.results import Score, StatisticsFrom

FOLDER = "subjects"
Key = tuple[int, tuple[Any, ...]]
"""A grouping of a task by number, and the values of its conditions."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a unit runs; nothing here may change a score."""

    batch_size: int = 8
    device: str = "cpu"
    untrained_seed: int = 0


@dataclass(frozen=True, eq=False)
class UnitOutput:
    """What a unit leaves behind.

    ``table`` holds sums, one row a recording (or parcel) and condition; ``validation`` the same of validation
    recordings, where the task chooses its reference baseline by them; ``parcels`` sums per parcel; ``examples`` arrays
    for figures.
    """

    table: pd.DataFrame
    validation: pd.DataFrame | None = None
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
    """One benchmark. What is not said below has a default that fits a simple one."""

    name: str
    version: int

    def hashed_settings(self) -> dict[str, Any]:
        """Return all settings that change the numbers."""
        return {}

    def why_not(self, cohort: Cohort) -> str:
        """Say what the data set lacks for this task, "" if nothing."""
        return ""

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        """List the methods that need no checkpoint."""

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        """List what else must be run with a network, e.g. on permuted input."""
        return []

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        """Score one method."""

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        """Divide the tables of all methods into parts that are resampled alike."""

    def reference(self) -> str:
        """Name the baseline that every method is compared with: ``auto`` = the best on validation, "" = none."""
        return ""


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
    for name, frame in (("parcels", output.parcels), ("validation", output.validation)):
        if frame is not None:
            store.write_bytes(f"{unit.stem}.{name}.parquet", to_parquet(frame))
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
    examples = None
    more: dict[str, pd.DataFrame] = {}
    try:
        for name in ("parcels", "validation"):
            if store.exists(f"{unit.stem}.{name}.parquet"):
                more[name] = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.{name}.parquet")))
        if store.exists(f"{unit.stem}.examples.npz"):
            with np.load(io.BytesIO(store.read_bytes(f"{unit.stem}.examples.npz")), allow_pickle=False) as archive:
                examples = {name: archive[name] for name in archive.files}
        table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{unit.stem}.parquet")))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        files = f"{store.url_of(unit.stem)}.*"
        raise StoreError(f"{files} is damaged; remove these files and run again: {error}") from error
    return UnitOutput(table=table, examples=examples or {}, **more)


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
    num_exchanges: int
    seed: int
    level: float
    notes: tuple[str, ...] = ()


def unit_sums(frame: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Add up a table's sums per resampled unit, in the order in which units first appear."""
    numeric = frame.select_dtypes("number").columns
    return frame.groupby(unit, sort=False)[list(numeric)].sum()


@dataclass(frozen=True, eq=False)
class Sums:
    """The sums of one method under one condition, one row a resampled unit (subject, family or parcel).

    ``bare`` is the key of the same condition for a reference baseline, which knows fewer conditions.
    """

    frame: pd.DataFrame
    grouping: Grouping
    condition: dict[str, str | int | float]
    bare: Key
    num_subjects: int
    num_recordings: int

    @property
    def by_name(self) -> dict[str, NDArray[np.float64]]:
        return {str(name): self.frame[name].to_numpy(np.float64) for name in self.frame.columns}

    def value(self) -> float:
        """Return the first metric over all units."""
        return metric_value(self.by_name, next(iter(self.grouping.metrics.values())))


def sums_by_condition(task: Task, table: pd.DataFrame) -> dict[Key, Sums]:
    """Add up one method's table for each of the task's groupings and conditions."""
    found: dict[Key, Sums] = {}
    for number, (frame, grouping) in enumerate(task.groupings(table)):
        names = grouping.conditions
        for key, rows in frame.groupby(list(names), sort=False):
            values = tuple(key)
            num_subjects, num_recordings = _num_distinct(rows)
            found[number, values] = Sums(
                frame=unit_sums(rows.drop(columns=list(names)), grouping.unit),
                grouping=grouping,
                condition={name: _plain(value) for name, value in zip(names, values) if value != ""},
                bare=(number, tuple("" if c in grouping.not_in_reference else v for c, v in zip(names, values))),
                num_subjects=num_subjects,
                num_recordings=num_recordings,
            )
    return found


def make_scores(
    task: Task, outputs: Sequence[tuple[MethodSpec, UnitOutput]], context: ScoreContext, reference: str
) -> list[Score]:
    """Turn the tables of all methods of one task into scores with intervals.

    Every method is also compared with the baseline `reference` ("" = none) under the same condition: metric
    ``<first metric>_minus_reference``, paired by resampled unit, with its p value. P values are corrected for all
    comparisons of the task (Holm).
    """
    scores: list[Score] = []
    tables = {spec.name: sums_by_condition(task, output.table) for spec, output in outputs}
    specs = {spec.name: spec for spec, _ in outputs}
    for key in dict.fromkeys(key for table in tables.values() for key in table):
        for name in (name for name, table in tables.items() if key in table):
            sums = tables[name][key]
            spec = specs[name]
            common = _common(task, spec, sums, context)
            counts = bootstrap_counts(len(sums.frame), context.num_bootstrap, context.seed)
            for metric_name, metric in sums.grouping.metrics.items():
                low, high = bootstrap_interval(sums.by_name, metric, counts, context.level)
                value = metric_value(sums.by_name, metric)
                scores.append(_score(common, metric_name, value, low, high, sums.condition))
            theirs = tables.get(reference, {}).get(sums.bare)
            if theirs is not None and name != reference and list(theirs.frame.index) == list(sums.frame.index):
                metric_name, metric = next(iter(sums.grouping.metrics.items()))
                low, high = bootstrap_difference(sums.by_name, theirs.by_name, metric, counts, context.level)
                p_value = paired_p_value(sums.by_name, theirs.by_name, metric, context.num_exchanges, context.seed)
                condition = {**sums.condition, "reference": reference}
                difference = sums.value() - theirs.value()
                compared = _score(common, f"{metric_name}_minus_reference", difference, low, high, condition)
                scores.append(replace(compared, p_value=_or_none(p_value)))
    return _corrected(scores)


def _common(task: Task, spec: MethodSpec, sums: Sums, context: ScoreContext) -> dict[str, Any]:
    notes = spec.notes + context.notes
    unit, num_units = sums.grouping.unit, len(sums.frame)
    if unit != "group":
        notes += (f"interval over {unit}s, not over subjects",)
    elif num_units < sums.num_subjects:
        notes += ("subjects of one family are resampled together",)
    if num_units < 2:
        notes += ("nothing to resample: no interval",)
    statistics_from: StatisticsFrom = "checkpoint" if spec.checkpoint and spec.scaled_by == "checkpoint" else "cohort"
    return {
        "task": task.name,
        "version": task.version,
        "dataset": context.dataset,
        "dataset_hash": context.dataset_hash,
        "split": context.split,
        "model": spec.name,
        "model_kind": spec.kind,
        "model_hash": spec.model_hash,
        "num_subjects": sums.num_subjects,
        "num_recordings": sums.num_recordings,
        "statistics_from": statistics_from,
        "notes": notes,
    }


def _score(
    common: dict[str, Any], metric: str, value: float, low: float, high: float, condition: dict[str, Any]
) -> Score:
    ends = {"ci_low": _or_none(low), "ci_high": _or_none(high), "condition": dict(condition)}
    return Score(metric=metric, value=value, **common | ends)


def _corrected(scores: list[Score]) -> list[Score]:
    tested = [number for number, score in enumerate(scores) if score.p_value is not None]
    corrected = dict(zip(tested, holm([scores[number].p_value or 0.0 for number in tested])))
    return [
        replace(score, p_corrected=corrected[number]) if number in corrected else score
        for number, score in enumerate(scores)
    ]


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
