"""Where a perturbation changes the brain: by parcel, by network, and left against right.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `N` pairs of mirrored parcels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainlm.atlas import Atlas
from brainlm.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]
MIRROR_MM = 10.0  # parcels whose mirror images are further apart are no pair


class MirroredPairs(NamedTuple):
    """Columns of the left and the right parcel of each pair, (N,) int64."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]


def change_by_parcel(
    change: NDArray[np.floating], present: NDArray[np.bool_], kept: NDArray[np.bool_] | None = None
) -> FloatArray:
    """Return mean |x~ - x| over kept timepoints (paper, Figs. 6 and 7).

    Parameters
    ----------
    change : ndarray, shape (B, P, W)
        Contract units, `brainlm.perturbation.Perturbed.change`.
    present : ndarray, shape (B, P), bool
    kept : ndarray, shape (B, W), bool, optional

    Returns
    -------
    ndarray, shape (B, P), float64
        NaN for parcels that are missing, and where no timepoint is kept.
    """
    size = np.abs(np.asarray(change, dtype=np.float64))
    weight = np.ones((size.shape[0], size.shape[2])) if kept is None else np.asarray(kept, dtype=np.float64)
    total = np.einsum("bpw,bw->bp", size, weight)
    num = np.broadcast_to(weight.sum(axis=1)[:, None], total.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(present) & (num > 0), total / num, np.nan)


def change_by_network(by_parcel: FloatArray, networks: Sequence[str]) -> dict[str, FloatArray]:
    """Return the mean over the parcels of each network, (B,) each; parcels without a network ("") are left out.

    Raises
    ------
    DataError
        If there are not as many names as parcels, or no parcel has a network.
    """
    if len(networks) != by_parcel.shape[1]:
        raise DataError(f"{by_parcel.shape[1]} parcels and {len(networks)} names of networks")
    names = sorted(set(networks) - {""})
    if not names:
        raise DataError("no parcel has a network: see atlas.network_column and atlas.network_pattern")
    found = {}
    for name in names:
        columns = by_parcel[:, [i for i, network in enumerate(networks) if network == name]]
        known = np.isfinite(columns)
        num = known.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found[name] = np.where(num > 0, np.where(known, columns, 0.0).sum(axis=1) / num, np.nan)
    return found


def mirrored_pairs(atlas: Atlas, within_mm: float = MIRROR_MM) -> MirroredPairs:
    """Find parcels that are each other's mirror image: each the nearest to the other's (-x, y, z), at most so far away.

    Raises
    ------
    ConfigError
        If there are none.
    """
    coords = atlas.coords_mm.astype(np.float64)
    left, right = np.flatnonzero(coords[:, 0] < 0), np.flatnonzero(coords[:, 0] > 0)
    if left.size and right.size:
        mirrored = coords[left] * (-1, 1, 1)
        distance = np.sqrt(np.square(mirrored[:, None] - coords[right][None]).sum(axis=2))
        of_left, of_right = distance.argmin(axis=1), distance.argmin(axis=0)
        number = np.arange(len(left))
        good = (of_right[of_left] == number) & (distance[number, of_left] <= within_mm)
        if good.any():
            return MirroredPairs(left[good].astype(np.int64), right[of_left[good]].astype(np.int64))
    raise ConfigError(f"atlas {atlas.name}: no two parcels are each other's mirror image within {within_mm:g} mm")


def asymmetry(by_parcel: FloatArray, pairs: MirroredPairs) -> FloatArray:
    """Return (left - right) / (left + right) of each pair, (B, N): 1 = left alone, -1 = right alone."""
    left, right = by_parcel[:, pairs.left], by_parcel[:, pairs.right]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left + right > 0, (left - right) / (left + right), np.nan)
