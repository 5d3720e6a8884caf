"""What a score was made of, kept so that it can be computed again for other draws of the same people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from brainlm.intervals import FloatArray, Metric
from eval.clinical.answers import Answers
from eval.clinical.metrics import RowMetric

TRUTH_SUMS = ("n", "yy")  # number and squares of the values asked for: no model changes them


class Resampled(Protocol):
    """The units that a score was made of (families, subjects or parcels) and how they make it."""

    @property
    def units(self) -> list[str]:
        """Names of what is resampled."""

    def replicates(self, units: Sequence[str], counts: FloatArray) -> FloatArray:
        """Return the score for each draw: ``counts`` (B, units) says how often each of ``units`` is in it."""

    def asked_for(self, units: Sequence[str]) -> Mapping[str, FloatArray]:
        """Return what was asked of each unit, by name, each (units,): no model changes it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreSums:
    """A row of sums for each unit, and the metric that takes them."""

    frame: pd.DataFrame
    metric: Metric

    @property
    def units(self) -> list[str]:
        return list(self.frame.index)

    def replicates(self, units: Sequence[str], counts: FloatArray) -> FloatArray:
        frame = self.frame.loc[list(units)]
        resampled = counts @ frame.to_numpy(np.float64)
        return self.metric({str(name): resampled[:, column] for column, name in enumerate(frame.columns)})

    def asked_for(self, units: Sequence[str]) -> Mapping[str, FloatArray]:
        frame = self.frame.loc[list(units)]
        return {name: frame[name].to_numpy(np.float64) for name in TRUTH_SUMS if name in frame.columns}


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreAnswers:
    """Out-of-fold answers of the clinical task, and the metric that takes them."""

    answers: Answers
    metric: RowMetric

    @property
    def units(self) -> list[str]:
        return self.answers.groups

    def replicates(self, units: Sequence[str], counts: FloatArray) -> FloatArray:
        place = {unit: column for column, unit in enumerate(units)}
        return self.answers.weighted(self.metric, counts[:, [place[group] for group in self.answers.groups]])

    def asked_for(self, units: Sequence[str]) -> Mapping[str, FloatArray]:
        of_group = self.answers.frame.groupby("group")["truth"].agg(["size", "sum"])
        num_repeats = len(self.answers.repeats)
        return {name: of_group[name].loc[list(units)].to_numpy(np.float64) / num_repeats for name in ("size", "sum")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Minus:
    """A difference of two scores of the same units."""

    own: Resampled
    reference: Resampled

    @property
    def units(self) -> list[str]:
        known = set(self.reference.units)
        return [unit for unit in self.own.units if unit in known]

    def replicates(self, units: Sequence[str], counts: FloatArray) -> FloatArray:
        return self.own.replicates(units, counts) - self.reference.replicates(units, counts)

    def asked_for(self, units: Sequence[str]) -> Mapping[str, FloatArray]:
        return self.own.asked_for(units)


def score_of(made_of: Resampled) -> float:
    """Return the score itself: every unit once."""
    units = made_of.units
    return float(made_of.replicates(units, np.ones((1, len(units))))[0])
