"""k nearest neighbours on a distance matrix, and ways to divide parcels into folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eval.cohort import FloatArray

IntArray = NDArray[np.int64]
FoldKind = Literal["random", "mirrored", "blocked"]
FOLD_KINDS: tuple[FoldKind, ...] = get_args(FoldKind)


def vote(distance: FloatArray, labels: IntArray, num_classes: int, neighbours: Sequence[int]) -> IntArray:
    """Predict a label by majority among the nearest, for several numbers of neighbours at once.

    Parameters
    ----------
    distance : ndarray, shape (N, M)
        From parcels to be labelled to labelled ones; infinite = not a neighbour.
    labels : ndarray, shape (M,)
    neighbours : sequence of int
        Numbers of neighbours; at most M are used. Ties go to the class whose members are nearer.

    Returns
    -------
    ndarray, shape (len(neighbours), N)
    """
    most = min(max(neighbours), distance.shape[1])
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :most]
    weight = 1 + 1e-6 / (1 + np.arange(most))  # settles ties and nothing else
    valid = np.isfinite(np.take_along_axis(distance, nearest, axis=1))
    one_hot = (labels[nearest][:, :, None] == np.arange(num_classes)) * (weight * valid)[:, :, None]
    votes = one_hot.cumsum(axis=1)  # (N, most, classes)
    return np.stack([votes[:, min(k, most) - 1].argmax(axis=1) for k in neighbours])


def classify(
    distance: FloatArray, labels: IntArray, folds: IntArray, num_classes: int, neighbours: Sequence[int]
) -> IntArray:
    """Label every parcel from the parcels of the other folds.

    Where several numbers of neighbours are given, the one with the best leave-one-out accuracy among the training
    parcels is taken (the smaller on a tie), fold by fold.

    Parameters
    ----------
    distance : ndarray, shape (N, N)
    labels, folds : ndarray, shape (N,)

    Returns
    -------
    ndarray, shape (N,)
        Predicted labels.
    """
    predicted = np.zeros(len(labels), dtype=np.int64)
    for fold in np.unique(folds):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        chosen = neighbours[0]
        if len(neighbours) > 1:
            within = distance[np.ix_(train, train)].copy()
            np.fill_diagonal(within, np.inf)
            hits = (vote(within, labels[train], num_classes, neighbours) == labels[train]).mean(axis=1)
            chosen = neighbours[int(np.argmax(hits))]
        predicted[test] = vote(distance[np.ix_(test, train)], labels[train], num_classes, [chosen])[0]
    return predicted


def majority(labels: IntArray, folds: IntArray) -> IntArray:
    """Label every parcel with the commonest class of the other folds."""
    predicted = np.zeros(len(labels), dtype=np.int64)
    for fold in np.unique(folds):
        predicted[folds == fold] = np.bincount(labels[folds != fold]).argmax()
    return predicted


def make_folds(kind: FoldKind, coords_mm: NDArray[np.float32], num_folds: int, num_blocks: int, seed: int) -> IntArray:
    """Divide parcels into folds, shape (N,).

    Parameters
    ----------
    kind : {"random", "mirrored", "blocked"}
        ``random``: any parcel anywhere. ``mirrored``: a parcel and the one nearest to its mirror image (-x, y, z) are
        kept together. ``blocked``: parcels that lie together (k-means on coordinates) are kept together.
    """
    rng = np.random.default_rng([0xF0, seed, FOLD_KINDS.index(kind)])
    coords = coords_mm.astype(np.float64)
    if kind == "random":
        groups = np.arange(len(coords))
    elif kind == "mirrored":
        mirrored = coords * (-1, 1, 1)
        partner = ((coords[None] - mirrored[:, None]) ** 2).sum(-1).argmin(axis=1)
        groups = np.arange(len(coords))
        for _ in range(len(coords)):  # spread the smallest member number until nothing changes
            before = groups.copy()
            np.minimum.at(groups, partner, before)
            groups = np.minimum(groups, groups[partner])
            if (groups == before).all():
                break
    else:
        from sklearn.cluster import KMeans

        blocks = min(num_blocks, len(coords))
        groups = KMeans(blocks, n_init=4, random_state=seed).fit(coords).labels_.astype(np.int64)
    numbers, sizes = np.unique(groups, return_counts=True)
    order = rng.permutation(len(numbers))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros(num_folds)
    fold_of = {}
    for i in order:  # the largest group first, each into the emptiest fold
        fold = int(filled.argmin())
        fold_of[int(numbers[i])] = fold
        filled[fold] += sizes[i]
    return np.array([fold_of[int(group)] for group in groups], dtype=np.int64)
