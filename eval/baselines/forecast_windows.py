"""Windows as trained forecasters see them: an observed part, and the future that is to be predicted from it.

Every parcel is in units of the mean and standard deviation of its observed part, which are all that a forecaster may
know of its scale. Errors are converted to the task's units, the standard deviation of recording and parcel: training
and choosing minimise what is scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import refill_censored
from brainlm.dataset import Split
from brainlm.errors import DataError
from brainlm.ordering import even_starts
from eval.cohort import BoolArray, Cohort, FloatArray

_BATCH = 0xF0


@dataclass(frozen=True, eq=False)
class Pairs:
    """A batch of windows, float32.

    Parameters
    ----------
    past : ndarray, shape (B, P, T)
        Observed part, mean 0 and SD 1 over kept timepoints; 0 for parcels that are missing.
    future : ndarray, shape (B, P, H)
        In the same units.
    factor : ndarray, shape (B, P)
        Turns these units into those of the score.
    counted : ndarray, shape (B, P, H), bool
        Future values that are scored: present and kept.
    """

    past: NDArray[np.float32]
    future: NDArray[np.float32]
    factor: NDArray[np.float32]
    counted: BoolArray

    def squared_error(self, predicted: NDArray[np.float32]) -> float:
        """Return the sum of squared errors of predictions (B, P, H), in the units of the score."""
        error = (predicted - self.future) * self.factor[:, :, None]
        return float((np.where(self.counted, error, 0.0).astype(np.float64) ** 2).sum())


def standardise(past: FloatArray, kept: BoolArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return an observed part (..., P, T) in units of its own mean and SD over kept timepoints, and these (..., P, 1).

    A parcel that does not vary keeps its units.
    """
    count = np.maximum(kept.sum(-1, keepdims=True), 1)
    mean = np.where(kept, past, 0.0).sum(-1, keepdims=True) / count
    sd = np.sqrt((np.where(kept, past - mean, 0.0) ** 2).sum(-1, keepdims=True) / count)
    sd = np.where(sd > 1e-6 * np.abs(past).max(initial=0.0), sd, 1.0)
    return (past - mean) / sd, mean, sd


class ForecastWindows:
    """Windows of one split, read one batch at a time.

    Parameters
    ----------
    split : str
    horizon : int
        Timepoints at the end of a window that are to be predicted.
    max_recordings : int, optional
        Recordings that `batches` goes through, spread evenly over the split.
    """

    def __init__(self, cohort: Cohort, split: Split, horizon: int, max_recordings: int | None = None) -> None:
        self.cohort, self.split, self.horizon = cohort, split, horizon
        self.recordings = cohort.recordings(split)
        if not self.recordings:
            raise DataError(
                f"{cohort.dataset.name}: forecasters are trained on train and tuned on val recordings of at least "
                f"{cohort.window_len} timepoints; {split!r} has none"
            )
        wanted = min(max_recordings or len(self.recordings), len(self.recordings))
        self._chosen = [self.recordings[i * len(self.recordings) // wanted] for i in range(wanted)]

    @property
    def num_parcels(self) -> int:
        return self.cohort.num_parcels

    @property
    def observed_len(self) -> int:
        return self.cohort.window_len - self.horizon

    def draw(self, step: int, size: int, seed: int) -> Pairs:
        """Draw recordings and starts at random: a function of the arguments alone."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_BATCH, seed, step])))
        chosen = rng.choice(self.recordings, size=size)
        lengths = np.array([self.cohort.entry(int(i), self.split).num_timepoints for i in chosen])
        starts = rng.integers(0, lengths - self.cohort.window_len + 1)
        return self._pairs([(int(index), int(start)) for index, start in zip(chosen, starts)])

    def batches(self, size: int) -> Iterator[Pairs]:
        """Yield one window of each chosen recording."""
        W = self.cohort.window_len
        where = [(i, even_starts(self.cohort.entry(i, self.split).num_timepoints, W, 1)[0]) for i in self._chosen]
        for begin in range(0, len(where), size):
            yield self._pairs(where[begin : begin + size])

    def _pairs(self, where: list[tuple[int, int]]) -> Pairs:
        W, observed = self.cohort.window_len, self.observed_len
        past, future, factor, counted = [], [], [], []
        for index, start in where:
            series = self.cohort.series(index, self.split)
            rows = slice(start, start + W)
            bold = np.ascontiguousarray(series.bold[rows].T).astype(np.float64)
            kept, here = series.kept_T[rows], series.scored_P
            first = bold[:, :observed]
            refill_censored(first, np.ones((len(first), 1), dtype=bool), kept[:observed])
            if not kept[:observed].any():
                here = np.zeros_like(here)
            standard, mean, sd = standardise(first, kept[:observed])
            past.append(np.where(here[:, None], standard, 0.0))
            future.append(np.where(here[:, None], (bold[:, observed:] - mean) / sd, 0.0))
            factor.append(np.where(here, sd[:, 0] / np.where(series.sd_P > 0, series.sd_P, 1.0), 0.0))
            counted.append(here[:, None] & kept[None, observed:])
        return Pairs(
            past=np.stack(past).astype(np.float32),
            future=np.stack(future).astype(np.float32),
            factor=np.stack(factor).astype(np.float32),
            counted=np.stack(counted),
        )
