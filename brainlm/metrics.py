"""Scores of predictions, with intervals over groups of people. Nothing is clipped; what is not defined is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainlm.intervals import bootstrap_counts

FloatArray = NDArray[np.float64]


class Score(NamedTuple):
    """A score with its interval. NaN where it is not defined."""

    value: float
    low: float
    high: float
    num: int
    """Predictions that it is over."""
    num_groups: int
    """Families, else subjects: what intervals resample."""

    def record(self) -> dict[str, float | int | None]:
        """Return it for JSON, where what is not defined is null."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        plain = {name: value if math.isfinite(value) else None for name, value in found.items()}
        return {**plain, "num_recordings": self.num, "num_groups": self.num_groups}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def r2(truth: FloatArray, predicted: FloatArray) -> float:
    """Return 1 - SSE / SST, SST about the mean of `truth`."""
    sst = float(np.square(truth - truth.mean()).sum()) if len(truth) else 0.0
    return 1 - float(np.square(predicted - truth).sum()) / sst if sst > 0 else float("nan")


def pearson_r(truth: FloatArray, predicted: FloatArray) -> float:
    """Return the correlation."""
    if len(truth) < 2:
        return float("nan")
    a, b = truth - truth.mean(), predicted - predicted.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def mse(truth: FloatArray, predicted: FloatArray) -> float:
    """Return the mean squared error."""
    return float(np.square(predicted - truth).mean()) if len(truth) else float("nan")


def mae(truth: FloatArray, predicted: FloatArray) -> float:
    """Return the mean absolute error."""
    return float(np.abs(predicted - truth).mean()) if len(truth) else float("nan")


def auc(is_positive: NDArray[np.bool_], score: FloatArray) -> float:
    """Return the area under the ROC curve: how often a positive one scores above a negative one; ties count half."""
    positive, negative = score[is_positive], np.sort(score[~is_positive])
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    below = np.searchsorted(negative, positive, side="left") + np.searchsorted(negative, positive, side="right")
    return float(below.mean() / (2 * len(negative)))


def macro_auc(classes: NDArray[np.int64], probabilities_NC: FloatArray) -> float:
    """Return the mean over classes of the area under the ROC curve of each against all others.

    Of two classes it is the area of the second one. Classes that nobody has, or everybody, are left out.
    """
    num = probabilities_NC.shape[1]
    found = [auc(classes == c, probabilities_NC[:, c]) for c in (range(num) if num > 2 else (1,))]
    found = [value for value in found if np.isfinite(value)]
    return float(np.mean(found)) if found else float("nan")


def balanced_accuracy(classes: NDArray[np.int64], probabilities_NC: FloatArray) -> float:
    """Return the mean over the classes that are there of the share that is recognised."""
    right = probabilities_NC.argmax(axis=1) == classes
    there = np.unique(classes)
    return float(np.mean([right[classes == c].mean() for c in there])) if len(there) else float("nan")


def accuracy(classes: NDArray[np.int64], probabilities_NC: FloatArray) -> float:
    """Return the share that is recognised."""
    return float((probabilities_NC.argmax(axis=1) == classes).mean()) if len(classes) else float("nan")


def with_interval(
    metric: Callable[..., float],
    truth: NDArray[np.float64] | NDArray[np.int64],
    predicted: FloatArray,
    groups: Sequence[str],
    num_bootstrap: int = 1000,
    level: float = 0.95,
) -> Score:
    """Return a metric with its percentile interval when groups are drawn with replacement.

    Parameters
    ----------
    metric : callable
        Takes truth and predictions of the same rows.
    groups : sequence of str
        The group of each row. Draws depend on the number of groups alone, so that two models that are scored on the
        same groups are resampled together.
    """
    value = metric(truth, predicted)
    names, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        return Score(value, float("nan"), float("nan"), len(truth), len(names))
    rows_of = [np.flatnonzero(group_of == number) for number in range(len(names))]
    drawn = []
    for counts in bootstrap_counts(len(names), num_bootstrap, 0).astype(np.int64):
        rows = np.concatenate([np.tile(rows_of[number], counts[number]) for number in np.flatnonzero(counts)])
        drawn.append(metric(truth[rows], predicted[rows]))
    found = np.array(drawn)[np.isfinite(drawn)]
    if not len(found):
        return Score(value, float("nan"), float("nan"), len(truth), len(names))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Score(value, float(low), float(high), len(truth), len(names))
