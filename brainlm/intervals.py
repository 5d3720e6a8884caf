"""Confidence intervals: percentile bootstrap over subjects of metrics that are functions of sums.

A metric such as R2 is a ratio of sums over all scored values. Each subject contributes its sums, so resampling subjects
is resampling rows of a small table, and the whole bootstrap is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Metric = Callable[[Mapping[str, FloatArray]], FloatArray]
"""Takes sums by name, each of any shape (...), and returns the metric of that shape."""

_BOOTSTRAP = 0xB0


@lru_cache(maxsize=8)
def bootstrap_counts(num_units: int, num_bootstrap: int, seed: int) -> FloatArray:
    """Return how often each unit is drawn in each replicate, shape (num_bootstrap, num_units).

    Depends on the arguments alone: two models scored on the same subjects get the same draws, which pairs them.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_BOOTSTRAP, seed, num_units])))
    drawn = rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_bootstrap).astype(np.float64)
    drawn.setflags(write=False)  # shared by all who ask for the same draws
    return drawn


def metric_value(sums: Mapping[str, FloatArray], metric: Metric) -> float:
    """Return the metric of all units together; `sums` holds one array of shape (units,) a name."""
    return float(metric({name: np.asarray(values, dtype=np.float64).sum() for name, values in sums.items()}))


def bootstrap_interval(
    sums: Mapping[str, FloatArray], metric: Metric, counts: FloatArray, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a metric under resampling of units.

    Parameters
    ----------
    sums : mapping
        One array of shape (units,) a name, in the same order of units.
    counts : ndarray, shape (replicates, units)
        From `bootstrap_counts`.

    Returns
    -------
    (low, high)
        NaN, NaN for fewer than two units: one subject says nothing about other subjects.
    """
    if counts.shape[1] < 2:
        return float("nan"), float("nan")
    return percentile_interval(_replicates(sums, metric, counts), level)


def bootstrap_difference(
    ours: Mapping[str, FloatArray],
    theirs: Mapping[str, FloatArray],
    metric: Metric,
    counts: FloatArray,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of metric(ours) - metric(theirs), both resampled together (paired by unit)."""
    difference = _replicates(ours, metric, counts) - _replicates(theirs, metric, counts)
    return percentile_interval(difference, level) if counts.shape[1] > 1 else (float("nan"), float("nan"))


def _replicates(sums: Mapping[str, FloatArray], metric: Metric, counts: FloatArray) -> FloatArray:
    resampled = counts @ np.stack([np.asarray(values, dtype=np.float64) for values in sums.values()], axis=1)
    return metric({name: resampled[:, column] for column, name in enumerate(sums)})


def percentile_interval(replicates: FloatArray, level: float = 0.95) -> tuple[float, float]:
    """Return the ends between which the middle `level` of the replicates lie; NaN, NaN where none is defined."""
    replicates = replicates[np.isfinite(replicates)]
    if len(replicates) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
