"""Conditional mean of hidden values given all visible ones of the window, under a Gaussian in space and time.

The covariance is that of a separable process and white noise that is private to each parcel, (S - nu diag(S)) x T +
nu diag(S) x I: S (P, P) the group's covariance of parcels at one time, T (W, W) the correlation in time, stationary.
Both are of the train split; T at a lag is what fits the covariances between different parcels at that lag best, as a
multiple of S (least squares), so that private noise has no part in it. The equations of the visible entries are solved
by conjugate gradients, so that no matrix of all entries is ever formed. Values at censored timepoints are neither used
nor counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainlm.input_contract import InputContract
from eval.baselines.gaussian import Gaussian
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.models import Predictions
from eval.scoring import expand_mask

TOLERANCE = 1e-3  # of the residual's norm: predictions change by less than 1e-3 of their SD
MAX_ITERATIONS = 200
LEAST_NOISE = 0.01  # of the variance: keeps the equations solvable


class SpaceTimeGaussian(Gaussian):
    """Gaussian conditional mean with a space x time covariance.

    Parameters
    ----------
    shrinkages : sequence of float
        Candidate weights of the diagonal of S; chosen on ``val`` by the errors of the Gaussian per timepoint.
    noises : sequence of float
        Candidate shares nu of private white noise in the variance; chosen on ``val``.
    """

    def __init__(
        self,
        contract: InputContract,
        shrinkages: Sequence[float],
        noises: Sequence[float],
        num_tuning_windows: int = 8,
    ) -> None:
        super().__init__(contract, shrinkages, (), num_tuning_windows)
        self.noises = tuple(noises)
        self.noise = 0.0
        self.noise_P: FloatArray | None = None
        self.process_cov: FloatArray = np.zeros((0, 0))
        self.in_time: FloatArray = np.zeros((0, 0))

    def fit(self, cohort: Cohort) -> None:
        super().fit(cohort)
        self.in_time = self._correlation_in_time(cohort)
        errors = {}
        for noise in self.noises:
            self.set_noise(noise)
            errors[noise] = self._tuning_error(cohort) if len(self.noises) > 1 else 0.0
        self.set_noise(min(errors, key=lambda noise: (errors[noise], noise)))

    def set_noise(self, share: float) -> None:
        """Divide S into process and noise; what of the process would not be positive semidefinite is left out."""
        sd = np.sqrt(np.diag(self.covariance))
        values, vectors = np.linalg.eigh(self.covariance / np.outer(sd, sd) - share * np.eye(len(sd)))
        correlated = (vectors * np.clip(values, 0, None)) @ vectors.T
        self.noise = share
        self.process_cov = correlated * np.outer(sd, sd)
        self.noise_P = sd**2 * np.maximum(1 - np.diag(correlated), LEAST_NOISE)

    def _correlation_in_time(self, cohort: Cohort) -> FloatArray:
        """Return T (W, W), by lag over pairs of kept timepoints of all train recordings."""
        W = cohort.window_len
        iqr = np.where(self.contract.usable, self.contract.iqr, 1.0)
        between = self.covariance - np.diag(np.diag(self.covariance))
        sums, counts = np.zeros(W), np.zeros(W)
        for index in cohort.recordings("train"):
            series = cohort.series(index, "train")
            kept = series.kept_T.astype(np.float64)
            x = np.where(series.scored_P, series.bold / iqr, 0.0) * kept[:, None]
            x /= np.sqrt((x[series.kept_T][:, series.scored_P] ** 2).mean())  # every recording counts alike
            num, lags = 2 * len(x), min(W, len(x))
            spectrum = (np.fft.rfft(x, num, axis=0).conj() * np.fft.rfft(x @ between, num, axis=0)).sum(axis=1)
            sums[:lags] += np.fft.irfft(spectrum, num)[:lags]
            counts[:lags] += np.round(np.fft.irfft(np.abs(np.fft.rfft(kept, num)) ** 2, num)[:lags])
        by_lag = np.divide(sums, counts, out=np.zeros(W), where=counts > 0)
        by_lag = by_lag / by_lag[0] if by_lag[0] > 0 else np.eye(1, W)[0]
        values, vectors = np.linalg.eigh(by_lag[np.abs(np.subtract.outer(np.arange(W), np.arange(W)))])
        positive: FloatArray = (vectors * np.clip(values, 0, None)) @ vectors.T  # estimates by lag need not be
        return positive

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        if self.noise_P is None:  # S is being chosen
            return super().reconstruct(windows_z, mask, present, refs)
        B, P, W = windows_z.shape
        x = windows_z.astype(np.float64) - self.zero_z[:, None]
        hidden = expand_mask(mask, P, W)
        kept = np.stack([self.kept(ref, W) for ref in refs])
        seen = ~hidden & present[:, :, None] & kept[:, None, :]
        for b in range(B):
            filled = self._conditional_mean(np.where(seen[b], x[b], 0.0), seen[b])
            x[b] = np.where(hidden[b] & present[b][:, None], filled, x[b])
        return x + self.zero_z[:, None]

    def _conditional_mean(self, x_PW: FloatArray, seen_PW: BoolArray) -> FloatArray:
        """Return the mean of the separable process (P, W), given the entries that are seen; others of `x_PW` are 0."""
        assert self.noise_P is not None
        noise, variance = self.noise_P[:, None], np.diag(self.covariance)[:, None]

        def process(v: FloatArray) -> FloatArray:
            out: FloatArray = self.process_cov @ v @ self.in_time
            return out

        solution = np.zeros_like(x_PW)
        residual = x_PW.copy()
        scaled = residual / variance  # the diagonal of the equations
        direction, product = scaled.copy(), float((residual * scaled).sum())
        enough = TOLERANCE**2 * float((x_PW**2).sum())
        for _ in range(MAX_ITERATIONS):
            if float((residual**2).sum()) <= enough:
                break
            image = np.where(seen_PW, process(direction) + noise * direction, 0.0)
            step = product / float((direction * image).sum())
            solution += step * direction
            residual -= step * image
            scaled = residual / variance
            product, before = float((residual * scaled).sum()), product
            direction = scaled + product / before * direction
        return process(solution)
