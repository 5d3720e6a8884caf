"""Ridge-VAR: a vector autoregression of principal components, with a ridge penalty; all of it chosen on ``val``.

Components are those of the train split's covariance; the autoregression of any number of components and any order
follows from the covariances at lags, which are added up once, recording by recording. Pairs of timepoints count of
which both are kept. Forecasts are iterated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.input_contract import InputContract
from eval.baselines.forecast_windows import ForecastWindows
from eval.baselines.forecaster import Forecaster
from eval.baselines.lagged_pairs import lagged_pairs
from eval.cohort import Cohort, FloatArray

BATCH = 16


class RidgeVAR(Forecaster):
    """See the module.

    Parameters
    ----------
    components, orders : sequence of int
        Candidates.
    penalties : sequence of float
        Candidates, as fractions of the mean variance of the components that are used.
    """

    name = "ridge VAR"

    def __init__(
        self,
        contract: InputContract,
        horizon: int,
        components: Sequence[int],
        orders: Sequence[int],
        penalties: Sequence[float],
    ) -> None:
        super().__init__(contract, horizon)
        self.components, self.orders, self.penalties = tuple(components), tuple(orders), tuple(penalties)
        self.chosen: tuple[int, int, float] | None = None
        self.basis: FloatArray = np.zeros((0, 0))
        self.coefficients: FloatArray = np.zeros((0, 0, 0))

    def learn(self, train: ForecastWindows, val: ForecastWindows) -> None:
        lagged = lagged_covariances(train.cohort, max(self.orders))
        variances, vectors = np.linalg.eigh(lagged[0])
        basis = vectors[:, ::-1]
        num_useful = int((variances > 1e-9 * variances[-1]).sum())
        components = sorted({min(number, num_useful) for number in self.components})
        largest = components[-1]
        projected = np.stack([basis[:, :largest].T @ matrix @ basis[:, :largest] for matrix in lagged])
        held_out = list(val.batches(BATCH))
        errors: dict[tuple[int, int, float], float] = {}
        for number, order, penalty in product(components, self.orders, self.penalties):
            self.basis = basis[:, :number]
            self.coefficients = fit_var(projected[:, :number, :number], order, penalty)
            with np.errstate(over="ignore", invalid="ignore"):  # an unstable candidate is not chosen
                error = sum(p.squared_error(self.forecast(p.past.astype(np.float64))) for p in held_out)
            errors[number, order, penalty] = error if np.isfinite(error) else np.inf
        self.chosen = min(errors, key=lambda candidate: (errors[candidate], candidate))
        number, order, penalty = self.chosen
        self.basis = basis[:, :number]
        self.coefficients = fit_var(projected[:, :number, :number], order, penalty)

    def forecast(self, past: FloatArray) -> NDArray[Any]:
        order = len(self.coefficients)
        recent = [past[:, :, -lag] @ self.basis for lag in range(1, min(order, past.shape[2]) + 1)]  # newest first
        recent += [np.zeros_like(recent[0])] * (order - len(recent))
        out = []
        for _ in range(self.horizon):
            value = sum(state @ matrix.T for state, matrix in zip(recent, self.coefficients))
            out.append(value @ self.basis.T)
            recent = [np.asarray(value), *recent[:-1]]
        return np.stack(out, axis=2)


def lagged_covariances(cohort: Cohort, longest: int) -> FloatArray:
    """Return mean products of all parcels with all parcels earlier, lag by lag, of the train split.

    Returns
    -------
    ndarray, shape (longest + 1, P, P)
        ``[k, i, j]``: parcel i with parcel j k timepoints before, in units of each recording's and parcel's SD. Every
        recording has the same weight.
    """
    P = cohort.num_parcels
    total = np.zeros((longest + 1, P, P))
    for pairs in lagged_pairs(cohort, longest):
        total[pairs.lag] += pairs.later.T @ pairs.earlier / pairs.divisor
    return total / max(1, len(cohort.recordings("train")))


def fit_var(lagged: FloatArray, order: int, penalty: float) -> FloatArray:
    """Solve the Yule-Walker equations of a vector autoregression, with a ridge penalty.

    Parameters
    ----------
    lagged : ndarray, shape (>= order + 1, K, K)
        Covariances with earlier values, as of `lagged_covariances`.

    Returns
    -------
    ndarray, shape (order, K, K)
        What each value adds to the next one, the most recent value first.
    """
    K = lagged.shape[1]
    matrix = np.zeros((order * K, order * K))
    for i in range(order):
        for j in range(order):
            lag = j - i  # of the value i + 1 before with the value j + 1 before
            block = lagged[lag] if lag >= 0 else lagged[-lag].T
            matrix[i * K : (i + 1) * K, j * K : (j + 1) * K] = block
    right = np.concatenate([lagged[lag] for lag in range(1, order + 1)], axis=1)  # (K, order * K)
    ridge = penalty * max(float(np.trace(lagged[0])) / K, 1e-300)
    solved = np.linalg.solve(matrix + ridge * np.eye(order * K), right.T).T
    out: FloatArray = solved.reshape(K, order, K).transpose(1, 0, 2)
    return out
