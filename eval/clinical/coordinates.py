"""Principal coordinates of features within a fold: what every linear method needs, and no more.

Ridge and logistic regression give the same answers on the principal coordinates of the training rows, of which there
are at most as many as rows, however long the features are. A radial kernel sees test rows as projected on them. Mean,
scale and confounds are fitted on the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eval.clinical.problem import FloatArray, Problem

_EMPTY = 1e-10  # share of the largest variance below which a direction is rounding
BLOCK = 256


class Coordinates(Protocol):
    """Features as coordinates."""

    def of(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """Return coordinates of the training rows (N, r) and of the test rows (M, r).

        Columns are orthogonal over the training rows, have mean 0 there, and fall in variance.
        """


class GramCoordinates:
    """Features that are known by their inner products.

    Parameters
    ----------
    gram : ndarray, shape (rows, rows), float64
    """

    def __init__(self, gram: NDArray[np.floating]) -> None:
        self.gram = gram

    def of(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        train, test = problem.train, problem.test
        within = np.asarray(self.gram[np.ix_(train, train)], dtype=np.float64)
        across = np.asarray(self.gram[np.ix_(test, train)], dtype=np.float64)
        design, design_test, inverse = _design(problem)
        across = across - design_test @ (inverse @ within)
        across = across - (across @ inverse.T) @ design.T
        within = within - design @ (inverse @ within)
        within = within - (within @ inverse.T) @ design.T
        variances, vectors = _directions(within)
        root = np.sqrt(variances)
        return vectors * root, across @ (vectors / root)


class FeatureCoordinates:
    """Features as columns of numbers, each standardised over the training rows; what is missing (NaN) is their mean.

    Parameters
    ----------
    values : ndarray, shape (rows, D), floating
    """

    def __init__(self, values: NDArray[np.floating]) -> None:
        self.values = values

    def of(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        train, test = standardised(
            np.asarray(self.values[problem.train], dtype=np.float64),
            np.asarray(self.values[problem.test], dtype=np.float64),
        )
        design, design_test, inverse = _design(problem)
        coefficients = inverse @ train
        train, test = train - design @ coefficients, test - design_test @ coefficients
        if train.shape[1] >= len(train):
            variances, vectors = _directions(train @ train.T)
            root = np.sqrt(variances)
            return vectors * root, test @ (train.T @ (vectors / root))
        _, vectors = _directions(train.T @ train)
        return train @ vectors, test @ vectors


def standardised(train: FloatArray, test: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Put columns into units of their standard deviation over the training rows, about their mean there; NaN becomes 0.

    Columns that are constant over the training rows become 0.
    """
    known = np.isfinite(train)
    num = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, train, 0.0).sum(axis=0) / num
    sd = np.sqrt(np.where(known, np.square(train - mean), 0.0).sum(axis=0) / num)
    varies = sd > 1e-9 * np.maximum(np.abs(mean), 1e-300)
    found = [
        np.where(np.isfinite(rows) & varies, (rows - mean) / np.where(varies, sd, 1.0), 0.0) for rows in (train, test)
    ]
    return found[0], found[1]


def gram_of(rows: Callable[[int], NDArray[np.floating]], num: int) -> FloatArray:
    """Return the inner products of features that are read row by row, two blocks of rows in memory at a time."""
    gram = np.empty((num, num))
    for start, block in _blocks(rows, num, 0):
        for other_start, other in _blocks(rows, num, start):
            part = block @ other.T
            gram[start : start + len(block), other_start : other_start + len(other)] = part
            gram[other_start : other_start + len(other), start : start + len(block)] = part.T
    return gram


def _blocks(rows: Callable[[int], NDArray[np.floating]], num: int, first: int) -> Iterator[tuple[int, FloatArray]]:
    for start in range(first, num, BLOCK):
        yield start, np.stack([np.asarray(rows(i), dtype=np.float64) for i in range(start, min(start + BLOCK, num))])


def _design(problem: Problem) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the columns that are removed: 1 and the confounds, of training and test rows, and the pseudo-inverse."""
    ones, ones_test = np.ones((len(problem.train), 1)), np.ones((len(problem.test), 1))
    if problem.nuisance is None or problem.nuisance.shape[1] == 0:
        return ones, ones_test, ones.T / len(ones)
    train, test = standardised(problem.nuisance[problem.train], problem.nuisance[problem.test])
    design, design_test = np.hstack([ones, train]), np.hstack([ones_test, test])
    return design, design_test, np.linalg.pinv(design, rcond=1e-10)


def _directions(symmetric: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return eigenvalues that are not rounding, falling, and their vectors as columns; at least one."""
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = values > _EMPTY * max(values[0], 1e-300)
    if not keep.any():
        return np.ones(1), np.zeros((len(values), 1))
    return values[keep], vectors[:, keep]
