"""Numbers that tell a clean recording from a noisy one. They are reported, and decide nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _standardise(bold: NDArray[np.float32]) -> NDArray[np.float64]:
    centred = bold.astype(np.float64) - bold.mean(axis=0, dtype=np.float64)
    return np.asarray(centred / centred.std(axis=0))


def dvars_z(bold: NDArray[np.float32]) -> float:
    """Return the mean, over time, of the RMS change between timepoints across z-scored parcels.

    As DVARS (Power et al. 2012), over parcels. White noise gives the root of 2, slow series less.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Parcels with signal only.
    """
    steps = np.diff(_standardise(bold), axis=0)
    return float(np.sqrt((steps**2).mean(axis=1)).mean())


def lag1_autocorrelation(bold: NDArray[np.float32]) -> float:
    """Return the median over parcels of the correlation between neighbouring timepoints."""
    z = _standardise(bold)
    return float(np.median((z[1:] * z[:-1]).sum(axis=0) / (z**2).sum(axis=0)))
