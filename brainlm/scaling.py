"""Centring and robust scaling: the one place where model input is put into contract units.

The published code computed ``x - median / IQR``, which scales nothing. Here ``(x - median) / IQR`` is written once, and
tested with known numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.input_contract import InputContract


def centre(bold: NDArray[np.float32], keep_mask: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Subtract each parcel's mean over kept timepoints.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Not modified.
    keep_mask : ndarray, shape (T,), bool, optional
        True = timepoint kept; the mean is over these.

    Returns
    -------
    ndarray, shape (T, P), float32
    """
    kept = bold if keep_mask is None else bold[keep_mask]
    if len(kept) == 0:
        raise DataError("no kept timepoints to centre on")
    mean = kept.mean(axis=0, dtype=np.float64)
    del kept  # as large as the series
    centred = np.empty(bold.shape, dtype=np.float32)
    return np.subtract(bold, mean, out=centred, casting="same_kind")  # in double precision, a piece at a time


def scale(centred: NDArray[np.float32], contract: InputContract) -> NDArray[np.float32]:
    """Put centred series into contract units, ``(x - median) / IQR`` per parcel.

    Parameters
    ----------
    centred : ndarray, shape (..., P), float32
        Centred per parcel, in the units of the series. Not modified.

    Returns
    -------
    ndarray, same shape, float32
        Parcels that are not `InputContract.usable` are 0; they must also be masked out.
    """
    if centred.shape[-1] != contract.atlas.num_parcels:
        raise DataError(f"{centred.shape[-1]} columns, the contract has {contract.atlas.num_parcels} parcels")
    usable = contract.usable
    scaled = (centred - contract.median) / np.where(usable, contract.iqr, 1.0).astype(np.float32)
    return np.where(usable, scaled, np.float32(0.0)).astype(np.float32, copy=False)


def unscale(scaled: NDArray[np.float32], contract: InputContract) -> NDArray[np.float32]:
    """Undo `scale` for usable parcels; the others become 0. Last axis is parcels."""
    usable = contract.usable
    return np.where(usable, scaled * contract.iqr + contract.median, np.float32(0.0)).astype(np.float32, copy=False)


def recording_mean(contract: InputContract) -> NDArray[np.float32]:
    """Return what a recording's own mean, 0 after centring, is in contract units: shape (P,), -median / IQR."""
    return scale(np.zeros(contract.atlas.num_parcels, dtype=np.float32), contract)


def robust_statistics(centred: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return exact per-parcel median and interquartile range (75th minus 25th percentile, linear interpolation).

    Parameters
    ----------
    centred : ndarray, shape (N, P)
        All kept timepoints of all train recordings; NaN entries are left out.
    """
    low, median, high = np.nanpercentile(centred.astype(np.float64), (25, 50, 75), axis=0)
    return median.astype(np.float32), (high - low).astype(np.float32)
