"""From tables of sums to scores: with intervals, and compared with the reference baseline.

Sums of a method add up over whatever is resampled (subjects, families, parcels), so that the bootstrap and the exchange
test are matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.intervals import bootstrap_counts, bootstrap_difference, bootstrap_interval, metric_value
from brainlm.significance import holm, paired_p_value
from eval.models import MethodSpec
from eval.results import Score, StatisticsFrom
from eval.task import Grouping, ScoreContext, Task, UnitOutput

Key = tuple[int, tuple[Any, ...]]
"""A grouping of a task by number, and the values of its conditions."""


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
            common = common_fields(task, spec, sums, context)
            counts = bootstrap_counts(len(sums.frame), context.num_bootstrap, context.seed)
            for metric_name, metric in sums.grouping.metrics.items():
                low, high = bootstrap_interval(sums.by_name, metric, counts, context.level)
                value = metric_value(sums.by_name, metric)
                scores.append(score_of(common, metric_name, value, low, high, sums.condition))
            theirs = tables.get(reference, {}).get(sums.bare)
            if theirs is not None and name != reference and list(theirs.frame.index) == list(sums.frame.index):
                metric_name, metric = next(iter(sums.grouping.metrics.items()))
                low, high = bootstrap_difference(sums.by_name, theirs.by_name, metric, counts, context.level)
                p_value = paired_p_value(sums.by_name, theirs.by_name, metric, context.num_exchanges, context.seed)
                condition = {**sums.condition, "reference": reference}
                difference = sums.value() - theirs.value()
                compared = score_of(common, f"{metric_name}_minus_reference", difference, low, high, condition)
                scores.append(replace(compared, p_value=_or_none(p_value)))
    return corrected(scores)


def common_fields(task: Task, spec: MethodSpec, sums: Sums, context: ScoreContext) -> dict[str, Any]:
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


def score_of(
    common: dict[str, Any], metric: str, value: float, low: float, high: float, condition: dict[str, Any]
) -> Score:
    ends = {"ci_low": _or_none(low), "ci_high": _or_none(high), "condition": dict(condition)}
    return Score(metric=metric, value=value, **common | ends)


def corrected(scores: list[Score]) -> list[Score]:
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
