"""Where do maps of two groups differ? Permutations inside exchangeability blocks, with covariates.

The model is Y = x b + Z c + e, x one column (a group or a score), Z covariates and a constant for each block. Residuals
of Y on Z are exchanged within blocks and the t value of b is computed anew (Freedman and Lane 1983; Winkler et al.
2014, NeuroImage 92, Sec. 2), so that p does not lean on normal or equal errors. Rows must be exchangeable within a
block when there is no effect: recordings of one subject for a condition (blocks = subjects), subjects of one site for a
group (blocks = sites).

Dimension letters: `N` rows, `P` parcels, `C` covariates, `K` permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError

FloatArray = NDArray[np.float64]
_CONTRAST = 0xC7
CHUNK = 256  # permutations at a time
RANK = 1e-9  # of its length: what is left of x beside the covariates must be more


@dataclass(frozen=True, kw_only=True, eq=False)
class Contrast:
    """A contrast in every parcel, each of shape (P,), float64; NaN for parcels with missing values or without variance.

    Parameters
    ----------
    effect : ndarray
        b: difference between the groups, or change for a unit of the score, units of the map.
    t : ndarray
        Its t value.
    p : ndarray
        Two-sided, by permutation, this parcel alone.
    q : ndarray
        p corrected for all parcels by false discovery rate (Benjamini and Hochberg 1995).
    p_max : ndarray
        p corrected for all parcels by the largest of each permutation: family-wise.
    num_permutations : int
    """

    effect: FloatArray
    t: FloatArray
    p: FloatArray
    q: FloatArray
    p_max: FloatArray
    num_permutations: int


def contrast(
    maps: NDArray[np.floating],
    x: Sequence[float] | NDArray[np.floating],
    *,
    covariates: NDArray[np.floating] | None = None,
    blocks: Sequence[object] | None = None,
    num_permutations: int = 5000,
    seed: int = 0,
) -> Contrast:
    """Test for a difference of maps in every parcel.

    Parameters
    ----------
    maps : ndarray, shape (N, P)
        One row a recording or subject. Rows of one subject are not exchangeable with those of others: average them
        first, or make subjects the blocks.
    x : array-like, shape (N,)
        1 and 0 for two groups, or a score.
    covariates : ndarray, shape (N, C), optional
        Motion, age and the like.
    blocks : sequence, optional
        Rows are exchanged within a block alone, and each block has a mean of its own; None = all are one block.
    num_permutations : int
        The data as they are count as one more, so that p is never 0.

    Raises
    ------
    DataError
        If sizes differ, x or covariates are not finite, or nothing is left to be tested: x is constant within every
        block, or the covariates tell all of it.
    """
    Y, column = np.asarray(maps, dtype=np.float64), np.asarray(x, dtype=np.float64)
    if Y.ndim != 2 or column.shape != (len(Y),):
        raise DataError(f"contrast: expected maps (N, P) and x (N,), found {Y.shape} and {column.shape}")
    N, P = Y.shape
    Z = np.zeros((N, 0)) if covariates is None else np.asarray(covariates, dtype=np.float64)
    if Z.ndim != 2 or len(Z) != N:
        raise DataError(f"contrast: expected covariates (N, C) for {N} rows, found {Z.shape}")
    if not (np.isfinite(column).all() and np.isfinite(Z).all()):
        raise DataError("contrast: x and covariates must be finite: leave out rows whose values are missing")
    if num_permutations < 1:
        raise DataError(f"contrast: num_permutations must be at least 1, found {num_permutations}")
    members = _members(blocks, N)
    if not any(np.ptp(column[rows]) > 0 for rows in members):
        raise DataError(
            "contrast: x is the same for all rows of each block, so that nothing can be exchanged: are the blocks "
            "finer than the groups (subjects, for a difference between subjects)?"
        )
    total = float(np.square(column - column.mean()).sum())
    column, Z, centred = (_within_blocks(values, members) for values in (column[:, None], Z, Y))
    Q = _basis(Z)
    left = (column - Q @ (Q.T @ column))[:, 0]
    if float(left @ left) <= RANK**2 * total:
        raise DataError("contrast: the covariates tell all of x, nothing is left to be tested")
    df = N - len(members) - Q.shape[1] - 1
    if df < 1:
        raise DataError(
            f"contrast: {N} rows, {len(members)} blocks and {Q.shape[1]} covariates: no degree of freedom is left"
        )
    residual = centred - Q @ (Q.T @ centred)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(Y).all(axis=0) & (np.square(residual).sum(axis=0) > RANK**2 * np.square(Y).sum(axis=0))
    e = residual[:, usable]
    norm = float(left @ left)

    def t_values(order: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Return b and t, (K, parcels), of residuals taken in these orders, (K, N)."""
        inverse = np.argsort(order, axis=1)  # left . e[order] = left[inverse] . e
        b = left[inverse] @ e / norm
        of_covariates = np.square(np.einsum("kcn,np->kcp", Q.T[:, inverse].transpose(1, 0, 2), e)).sum(axis=1)
        rest = np.maximum(np.square(e).sum(axis=0) - of_covariates - b * b * norm, 0.0)
        with np.errstate(divide="ignore"):
            return b, b * np.sqrt(norm * df / np.where(rest > 0, rest, np.finfo(np.float64).tiny))

    effect, t = (values[0] for values in t_values(np.arange(N)[None]))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_CONTRAST, seed, N])))
    reached, largest = np.zeros(len(t)), np.zeros(len(t))
    size = np.abs(t) * (1 - 1e-9)  # equal arrangements count as equal, whatever rounding makes of them
    for first in range(0, num_permutations, CHUNK):
        orders = np.stack([_order(members, N, rng) for _ in range(min(CHUNK, num_permutations - first))])
        found = np.abs(t_values(orders)[1])
        reached += (found >= size).sum(axis=0)
        if found.shape[1]:
            largest += (found.max(axis=1, keepdims=True) >= size).sum(axis=0)
    p, p_max = (1 + reached) / (1 + num_permutations), (1 + largest) / (1 + num_permutations)

    def whole(values: FloatArray) -> FloatArray:
        out = np.full(P, np.nan)
        out[usable] = values
        return out

    return Contrast(
        effect=whole(effect),
        t=whole(t),
        p=whole(p),
        q=whole(false_discovery_rate(p)),
        p_max=whole(p_max),
        num_permutations=num_permutations,
    )


def false_discovery_rate(p: FloatArray) -> FloatArray:
    """Return the smallest rate at which each p value would be among the discoveries (Benjamini and Hochberg 1995)."""
    order = np.argsort(p, kind="stable")
    ranked = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return q


def _members(blocks: Sequence[object] | None, num_rows: int) -> list[NDArray[np.int64]]:
    """Return the rows of each block."""
    if blocks is None:
        return [np.arange(num_rows)]
    if len(blocks) != num_rows:
        raise DataError(f"contrast: {num_rows} rows and {len(blocks)} names of blocks")
    rows: dict[object, list[int]] = {}
    for row, block in enumerate(blocks):
        rows.setdefault(block, []).append(row)
    return [np.array(found, dtype=np.int64) for found in rows.values()]


def _within_blocks(values: FloatArray, members: list[NDArray[np.int64]]) -> FloatArray:
    """Take the mean of each block off its rows: the same as a constant for each block in the model."""
    out = values.copy()
    for rows in members:
        out[rows] -= out[rows].mean(axis=0)
    return out


def _order(members: list[NDArray[np.int64]], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    order = np.arange(num_rows)
    for rows in members:
        order[rows] = rng.permutation(rows)
    return order


def _basis(Z: FloatArray) -> FloatArray:
    """Return orthonormal columns that span those of Z."""
    if not Z.shape[1]:
        return Z
    scaled = Z / np.maximum(np.linalg.norm(Z, axis=0), np.finfo(np.float64).tiny)
    left, size, _ = np.linalg.svd(scaled, full_matrices=False)
    return left[:, size > RANK * max(float(size[0]), RANK)]
