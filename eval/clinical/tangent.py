"""Functional connectivity in the tangent space of covariances (Varoquaux et al. 2010, MICCAI; nilearn)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.clinical.coordinates import GramCoordinates
from eval.clinical.problem import FloatArray, IntArray


def covariance(series_TP: NDArray[np.floating]) -> FloatArray:
    """Return the covariance of parcels, shrunk after Ledoit and Wolf (2004): never singular."""
    from sklearn.covariance import ledoit_wolf

    return np.asarray(ledoit_wolf(np.asarray(series_TP, dtype=np.float64), assume_centered=False)[0])


def tangent_coordinates(covariances: NDArray[np.floating], train: IntArray, test: IntArray) -> GramCoordinates:
    """Return the tangent vectors of a fold's rows as their inner products.

    The point at which the space is laid is the geometric mean of the training rows alone. All folds within these share
    it: it knows no targets.

    Parameters
    ----------
    covariances : ndarray, shape (rows, P, P), floating
        Of all rows; those of neither `train` nor `test` are not read.
    """
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import EmpiricalCovariance

    # nilearn takes series. These have exactly the covariances that are given, and as many rows as there are parcels.
    estimator: Any = EmpiricalCovariance(assume_centered=True)
    measure = ConnectivityMeasure(
        cov_estimator=estimator, kind="tangent", vectorize=True, discard_diagonal=False, standardize=False
    )
    measure.fit([_series(covariances[row]) for row in train])
    rows = np.concatenate([train, test])
    vectors = measure.transform([_series(covariances[row]) for row in rows])
    gram = np.zeros((len(covariances), len(covariances)))
    gram[np.ix_(rows, rows)] = vectors @ vectors.T
    return GramCoordinates(gram)


def _series(covariance_PP: NDArray[np.floating]) -> FloatArray:
    matrix = np.asarray(covariance_PP, dtype=np.float64)
    return np.sqrt(len(matrix)) * np.linalg.cholesky(matrix).T
