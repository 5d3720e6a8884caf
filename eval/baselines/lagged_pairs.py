"""Pairs of values a few timepoints apart, from which autoregressions are fitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from eval.cohort import Cohort, FloatArray


class LaggedPairs(NamedTuple):
    """All pairs of one recording that are `lag` timepoints apart: ``later`` and ``earlier`` (pairs, P).

    Values are in units of the recording's and parcel's SD, 0 where the parcel is missing or the timepoint is censored.
    The sum of products is to be divided by ``divisor``: (T - lag) / T times the mean over the pairs of which both are
    kept. Without censoring that is biased towards 0, so that what is fitted is stable.
    """

    lag: int
    later: FloatArray
    earlier: FloatArray
    divisor: float


def lagged_pairs(cohort: Cohort, longest: int) -> Iterator[LaggedPairs]:
    """Yield the pairs of every train recording, lag by lag up to `longest`; lags without kept pairs are left out."""
    for index in cohort.recordings("train"):
        bold, sd_P, scored_P, kept_T = cohort.series(index, "train")
        y = np.where(scored_P, bold / np.where(sd_P > 0, sd_P, 1.0), 0.0)
        y[~kept_T] = 0.0
        T = len(y)
        for lag in range(min(longest, T - 1) + 1):
            num_pairs = int((kept_T[lag:] & kept_T[: T - lag]).sum())
            if num_pairs:
                yield LaggedPairs(lag, y[lag:], y[: T - lag], num_pairs * T / (T - lag))
