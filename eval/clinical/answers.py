"""Out-of-fold answers of one method under one condition, as metrics read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.intervals import bootstrap_counts, percentile_interval
from eval.clinical.fold_work import PROBABILITY
from eval.clinical.metrics import CLASSIFICATION, REGRESSION, FloatArray, RowMetric, Rows, auc

CONDITIONS = ("target", "readout", "folds", "confounds")
CHUNK = 200  # replicates weighed at a time
Condition = tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class Answers:
    """All answers of one method to one target, by one kind of folds.

    Parameters
    ----------
    frame : DataFrame
        One row a repeat and tested recording.
    """

    frame: pd.DataFrame

    @cached_property
    def is_regression(self) -> bool:
        return bool(self.frame["kind"].iloc[0] == "regression")

    @property
    def metrics(self) -> dict[str, RowMetric]:
        """The first one is what methods are compared by."""
        return REGRESSION if self.is_regression else CLASSIFICATION

    @property
    def first_metric(self) -> str:
        return next(iter(self.metrics))

    @cached_property
    def classes(self) -> list[str]:
        """Classes in the order of their numbers; of a regression none."""
        if self.is_regression:
            return []
        columns = [str(name) for name in self.frame.columns if str(name).startswith(PROBABILITY)]
        return sorted(name.removeprefix(PROBABILITY) for name in columns if self.frame[name].notna().any())

    @cached_property
    def groups(self) -> list[str]:
        """What is resampled: families, else subjects."""
        return sorted(self.frame["group"].unique())

    @cached_property
    def rows(self) -> set[tuple[int, str]]:
        """Which recordings were tested in which repeat."""
        return set(zip(self.frame["repeat"], self.frame["recording"], strict=True))

    @property
    def num_folds(self) -> int:
        return len(self.frame[["repeat", "fold"]].drop_duplicates())

    @cached_property
    def repeats(self) -> list[tuple[Rows, NDArray[np.integer[Any]]]]:
        """The rows of each repeat, and the number of the group of each."""
        number = {group: i for i, group in enumerate(self.groups)}
        found = []
        for _, frame in self.frame.groupby("repeat", sort=True):
            found.append((self._rows(frame), frame["group"].map(number).to_numpy(np.int64)))
        return found

    @cached_property
    def probabilities(self) -> FloatArray:
        return self._probabilities(self.frame)

    def only(self, here: NDArray[np.bool_]) -> Answers:
        """Return some of the rows."""
        return Answers(self.frame[here])

    def value(self, metric: RowMetric) -> float:
        """Return a metric, the mean over repeats."""
        return float(self._mean(metric, np.ones((1, len(self.groups))))[0])

    def replicates(self, metric: RowMetric, num_bootstrap: int, seed: int) -> FloatArray:
        """Return a metric for each draw of groups with replacement, the same draw in all repeats."""
        return self.weighted(metric, bootstrap_counts(len(self.groups), num_bootstrap, seed))

    def weighted(self, metric: RowMetric, counts: FloatArray) -> FloatArray:
        """Return a metric for each draw, (B,): `counts` (B, groups) says how often each of `groups` is in it."""
        return np.concatenate(
            [self._mean(metric, counts[start : start + CHUNK]) for start in range(0, len(counts), CHUNK)]
        )

    @cached_property
    def by_fold(self) -> pd.DataFrame:
        """Return the first metric in each fold: ``repeat``, ``fold``, ``value`` (NaN where not defined), ``weight``.

        Of a regression 1 - MSE / variance of all tested values. The mean with the weights, which are tested rows, or
        pairs of a classification of two, is the score of the repeat.
        """
        found: list[dict[str, Any]] = []
        for (repeat, fold), frame in self.frame.groupby(["repeat", "fold"], sort=True):
            rows = self._rows(frame)
            if self.is_regression:
                variance = float(self.frame.loc[self.frame["repeat"] == repeat, "truth"].var(ddof=0))
                mse = float(np.square(rows.predicted - rows.truth).mean())
                value = 1 - mse / variance if variance > 0 else np.nan
            else:
                value = float(auc(rows, np.ones((1, len(frame))))[0])
            weight = len(frame)
            if len(self.classes) == 2:
                weight = int((rows.truth == 0).sum() * (rows.truth == 1).sum())
            found.append({"repeat": repeat, "fold": fold, "value": value, "weight": weight})
        return pd.DataFrame(found)

    def _mean(self, metric: RowMetric, counts: FloatArray) -> FloatArray:
        return np.mean([metric(rows, counts[:, group]) for rows, group in self.repeats], axis=0)

    def _rows(self, frame: pd.DataFrame) -> Rows:
        fold = pd.factorize(frame["fold"], sort=True)[0].astype(np.int64)
        truth = frame["truth"].to_numpy(np.float64)
        if not self.is_regression:
            return Rows(fold=fold, truth=truth, predicted=self._probabilities(frame))
        predicted, truth_t, predicted_t = (
            frame[name].to_numpy(np.float64) for name in ("predicted", "truth_t", "predicted_t")
        )
        return Rows(fold=fold, truth=truth, predicted=predicted, truth_t=truth_t, predicted_t=predicted_t)

    def _probabilities(self, frame: pd.DataFrame) -> FloatArray:
        return frame[[f"{PROBABILITY}{label}" for label in self.classes]].to_numpy(np.float64)


def answers_by_condition(table: pd.DataFrame) -> Iterator[tuple[Condition, Answers]]:
    """Divide the table of a method."""
    if len(table):
        for key, frame in table.groupby(list(CONDITIONS), sort=False):
            yield tuple(str(value) for value in key), Answers(frame.reset_index(drop=True))  # type: ignore[misc]


def plain_condition(condition: Condition) -> dict[str, str | int | float]:
    """Return a condition by name, without what is empty."""
    return {name: value for name, value in zip(CONDITIONS, condition, strict=True) if value}


def interval(replicates: FloatArray, num_groups: int, level: float) -> tuple[float | None, float | None]:
    """Return the percentile interval; None for fewer than two groups, or where nothing is defined."""
    low, high = percentile_interval(replicates, level)
    return (None, None) if num_groups < 2 or not np.isfinite(low) else (low, high)
