"""AR(p) per parcel: the strongest simple forecaster of unfiltered series.

Censored timepoints are left out of the fit: an autocovariance is the mean product of the pairs of which both are kept
(Parzen 1963, "On spectral analysis with missing observations"). In the observed part of a window, which must be whole,
they are interpolated between observed kept values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import refill_censored
from brainlm.input_contract import InputContract
from eval.baselines.lagged_pairs import lagged_pairs
from eval.baselines.simple import Baseline
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.models import Predictions
from eval.scoring import expand_mask


def yule_walker(autocovariance: FloatArray, order: int) -> FloatArray:
    """Solve the Yule-Walker equations for every parcel.

    Parameters
    ----------
    autocovariance : ndarray, shape (P, >= order + 1)
        At lags 0, 1, ...; 0 at lag 0 means a parcel without data.

    Returns
    -------
    ndarray, shape (P, order)
        Coefficients of the previous values, the most recent first; 0 for parcels without data.
    """
    lags = np.abs(np.arange(order)[:, None] - np.arange(order))
    matrices = autocovariance[:, lags]  # (P, order, order)
    empty = autocovariance[:, 0] <= 0
    matrices = matrices + 1e-9 * np.maximum(autocovariance[:, :1, None], 1e-300) * np.eye(order)
    matrices[empty] = np.eye(order)
    right = np.where(empty[:, None], 0.0, autocovariance[:, 1 : order + 1])
    return np.linalg.solve(matrices, right[:, :, None])[:, :, 0].astype(np.float64, copy=False)


class Autoregressive(Baseline):
    """Yule-Walker fit per parcel on ``train``, every recording with the same weight; order chosen on ``val``.

    Forecasts the hidden end of a window; the mean is that of the observed part (see the centring of the task).

    Parameters
    ----------
    orders : sequence of int
        Candidates.
    horizon : int
        Timepoints ahead for which the order is chosen.
    """

    def __init__(self, contract: InputContract, orders: Sequence[int], horizon: int) -> None:
        super().__init__(contract)
        self.orders = sorted(orders)
        self.horizon = horizon
        self.order = self.orders[0]
        self.coefficients: FloatArray = np.zeros((contract.atlas.num_parcels, self.order))

    def fit(self, cohort: Cohort) -> None:
        longest = self.orders[-1]
        total = np.zeros((cohort.num_parcels, longest + 1))
        super().fit(cohort)
        for pairs in lagged_pairs(cohort, longest):
            total[:, pairs.lag] += (pairs.later * pairs.earlier).sum(axis=0) / pairs.divisor
        fits = {order: yule_walker(total, order) for order in self.orders}
        errors = dict.fromkeys(self.orders, 0.0)
        for window in cohort.windows(1, "val"):
            here, kept = window.scored_P, window.kept_W
            observed, hidden = kept[: -self.horizon], kept[-self.horizon :]
            if not observed.any():
                continue
            y = window.bold_PW[here].astype(np.float64) / window.sd_P[here, None]
            past, future = np.ascontiguousarray(y[:, : -self.horizon]), y[:, -self.horizon :]
            refill_censored(past, np.ones((len(past), 1), dtype=bool), observed)
            mean = past[:, observed].mean(axis=1, keepdims=True)
            for order, coefficients in fits.items():
                guess = forecast(past - mean, coefficients[here], self.horizon) + mean
                errors[order] += float(((guess - future)[:, hidden] ** 2).sum())
        self.order = min(errors, key=lambda order: (errors[order], order))
        self.coefficients = fits[self.order]

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        B, P, W = windows_z.shape
        hidden = expand_mask(mask, P, W)
        out: FloatArray = np.zeros(windows_z.shape)
        for b in range(B):
            observed = int((~hidden[b]).any(axis=0).sum())
            past = windows_z[b, :, :observed].astype(np.float64) - self.zero_z[:, None]
            out[b, :, observed:] = forecast(past, self.coefficients, W - observed)
        return out + self.zero_z[:, None]


def forecast(past: FloatArray, coefficients: FloatArray, horizon: int) -> FloatArray:
    """Continue series (P, T) for `horizon` timepoints with coefficients (P, order), the most recent value first."""
    order = coefficients.shape[1]
    state = past[:, : -order - 1 : -1]  # (P, order), newest first
    if state.shape[1] < order:
        state = np.pad(state, ((0, 0), (0, order - state.shape[1])))
    out = np.empty((len(past), horizon))
    for step in range(horizon):
        out[:, step] = (coefficients * state).sum(axis=1)
        state = np.concatenate([out[:, step : step + 1], state[:, :-1]], axis=1)
    return out
