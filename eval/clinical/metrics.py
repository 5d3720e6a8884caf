"""Scores of out-of-fold predictions under weights, so that a bootstrap over people is one weighting after the other.

Every metric takes the rows of one repeat and weights (B, N), and gives (B,): NaN where it is not defined. What compares
rows with one another (correlations, areas under curves) does so within folds alone: between folds answers are of
different models, and pooling them is biased below chance where folds are small (Airola et al. 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NUM_BINS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Predictions of one repeat: every tested recording once.

    Parameters
    ----------
    fold : ndarray, shape (N,), int64
    truth : ndarray, shape (N,), float64
        In units of the column, or the number of the class.
    predicted : ndarray, shape (N,) or (N, classes), float64
        In units of the column, or probabilities.
    truth_t, predicted_t : ndarray, shape (N,), float64
        In units of the target's transform; of a regression alone.
    """

    fold: IntArray
    truth: FloatArray
    predicted: FloatArray
    truth_t: FloatArray | None = None
    predicted_t: FloatArray | None = None

    def folds(self) -> Iterator[IntArray]:
        """Yield the rows of each fold."""
        for number in np.unique(self.fold):
            yield np.flatnonzero(self.fold == number)


RowMetric = Callable[[Rows, FloatArray], FloatArray]


def r2(rows: Rows, weights: FloatArray) -> FloatArray:
    """1 - SSE / SST, SST about the mean of all tested values."""
    sse = weights @ np.square(rows.predicted - rows.truth)
    centred = rows.truth - rows.truth.mean()  # what is summed stays small
    sst = weights @ np.square(centred) - np.square(weights @ centred) / weights.sum(axis=1)
    return _ratio(sst - sse, sst)


def pearson_r(rows: Rows, weights: FloatArray) -> FloatArray:
    """Correlation within folds: values and predictions about their fold's means."""
    tt, pp, tp = _within(rows, weights)
    return _ratio(tp, np.sqrt(tt * pp))


def calibration_slope(rows: Rows, weights: FloatArray) -> FloatArray:
    """Slope of values on predictions within folds: 1 = as far apart as predicted, below 1 = predictions too extreme."""
    _, pp, tp = _within(rows, weights)
    return _ratio(tp, pp)


def mae(rows: Rows, weights: FloatArray) -> FloatArray:
    """Mean absolute error, units of the column."""
    return _ratio(weights @ np.abs(rows.predicted - rows.truth), weights.sum(axis=1))


def mse_transformed(rows: Rows, weights: FloatArray) -> FloatArray:
    """Mean squared error in units of the transform, which is fitted on the training rows: the paper's."""
    assert rows.truth_t is not None
    assert rows.predicted_t is not None
    return _ratio(weights @ np.square(rows.predicted_t - rows.truth_t), weights.sum(axis=1))


def auc(rows: Rows, weights: FloatArray) -> FloatArray:
    """Share of pairs of a fold, one of the class and one of the others, that are put in the right order; ties half.

    Of two classes that of the second one; of more the mean over classes, each against all others.
    """
    num = rows.predicted.shape[1]
    found = []
    for c in range(num) if num > 2 else (1,):
        right, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for part in rows.folds():
            more_right, more_pairs = _ordered(rows.truth[part] == c, rows.predicted[part, c], weights[:, part])
            right, pairs = right + more_right, pairs + more_pairs
        found.append(_ratio(right, pairs))
    return _mean_of_known(found)


def balanced_accuracy(rows: Rows, weights: FloatArray) -> FloatArray:
    """Mean over the classes of the share that is recognised."""
    right = rows.predicted.argmax(axis=1) == rows.truth
    found = []
    for c in range(rows.predicted.shape[1]):
        here = rows.truth == c
        found.append(_ratio(weights @ (right & here), weights @ here.astype(np.float64)))
    return _mean_of_known(found)


def brier(rows: Rows, weights: FloatArray) -> FloatArray:
    """Sum over classes of the squared distance of probability and fact, mean over rows (Brier 1950): 0 is perfect."""
    return _ratio(weights @ np.square(rows.predicted - _one_hot(rows)).sum(axis=1), weights.sum(axis=1))


def calibration_error(rows: Rows, weights: FloatArray) -> FloatArray:
    """Distance of probability and frequency in ten equal bins, weighted by their size (Naeini et al. 2015).

    Of two classes that of the second one; of more the mean over classes.
    """
    facts, num = _one_hot(rows), rows.predicted.shape[1]
    found = []
    for c in range(num) if num > 2 else (1,):
        distance = np.zeros(len(weights))
        bins = bin_of(rows.predicted[:, c])
        for number in np.unique(bins):
            here = bins == number
            distance += np.abs(weights[:, here] @ (rows.predicted[here, c] - facts[here, c]))
        found.append(_ratio(distance, weights.sum(axis=1)))
    return _mean_of_known(found)


def bin_of(probability: FloatArray) -> IntArray:
    """Return the number of the bin of each probability."""
    return np.clip((probability * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)


REGRESSION: dict[str, RowMetric] = {
    "r2": r2,
    "pearson_r": pearson_r,
    "mae": mae,
    "mse_transformed": mse_transformed,
    "calibration_slope": calibration_slope,
}
CLASSIFICATION: dict[str, RowMetric] = {
    "auc": auc,
    "balanced_accuracy": balanced_accuracy,
    "brier": brier,
    "calibration_error": calibration_error,
}


def _within(rows: Rows, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return weighted sums within folds: squares of values, squares of predictions, products."""
    tt, pp, tp = (np.zeros(len(weights)) for _ in range(3))
    for part in rows.folds():
        w = weights[:, part]
        n = np.maximum(w.sum(axis=1), 1e-300)
        t, p = rows.truth[part] - rows.truth[part].mean(), rows.predicted[part] - rows.predicted[part].mean()
        st, sp = w @ t, w @ p
        tt += w @ np.square(t) - st * st / n
        pp += w @ np.square(p) - sp * sp / n
        tp += w @ (t * p) - st * sp / n
    scale = np.square(rows.predicted).sum()
    return np.maximum(tt, 0), np.where(pp > 1e-12 * scale, pp, 0.0), tp


def _ordered(positive: NDArray[np.bool_], score: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the weight of pairs in the right order, and of all pairs."""
    order = np.argsort(score, kind="stable")
    ranked, w = score[order], weights[:, order]
    negative = np.where(positive[order], 0.0, w)
    below = np.concatenate([np.zeros((len(w), 1)), np.cumsum(negative, axis=1)], axis=1)
    first, last = np.searchsorted(ranked, ranked, side="left"), np.searchsorted(ranked, ranked, side="right")
    half_ties = (below[:, first] + below[:, last]) / 2
    of_positive = np.where(positive[order], w, 0.0)
    return (of_positive * half_ties).sum(axis=1), of_positive.sum(axis=1) * negative.sum(axis=1)


def _one_hot(rows: Rows) -> FloatArray:
    return (rows.truth[:, None] == np.arange(rows.predicted.shape[1])).astype(np.float64)


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    defined = below > 0
    return np.where(defined, above / np.where(defined, below, 1.0), np.nan)


def _mean_of_known(found: list[FloatArray]) -> FloatArray:
    stacked = np.stack(found)
    known = np.isfinite(stacked)
    return _ratio(np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0).astype(np.float64))
