"""Remove trends, frequencies and confounds from parcel series, in the one order that keeps them removed.

`nilearn.signal.clean` fixes the order: detrend, filter, and then regress confounds that went through the same trend
removal and filter, so that no step brings back what an earlier one took out (Lindquist, Geuter, Wager and Caffo 2019,
"Modular preprocessing pipelines can reintroduce artifacts into fMRI data", Human Brain Mapping 40).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.settings import CleanSettings

HEAD_RADIUS_MM = 50.0  # Power et al. 2012, NeuroImage 59: rotations as arcs on a sphere of this radius
MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


def read_confounds(path: str | Path) -> pd.DataFrame:
    """Read a confounds table (.tsv, .csv); ``n/a`` becomes NaN."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no confounds table {path.name}")
    try:
        return pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t")
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read the confounds {path.name}: {error}") from error


def select_confounds(table: pd.DataFrame, names: tuple[str, ...], num_timepoints: int) -> NDArray[np.float64]:
    """Return chosen confounds, shape (T, K).

    Derivatives have no first value (``n/a``); it takes the second, as in nilearn's `load_confounds`.

    Raises
    ------
    DataError
        If a column is absent or has other gaps, or the number of rows is not the number of timepoints.
    """
    absent = [name for name in names if name not in table.columns]
    if absent:
        raise DataError(f"the confounds have no column {', '.join(map(repr, absent))}")
    if len(table) != num_timepoints:
        raise DataError(f"{len(table)} rows of confounds, {num_timepoints} timepoints")
    try:
        confounds = table[list(names)].to_numpy(dtype=np.float64, copy=True)
    except ValueError as error:
        raise DataError(f"the confounds are not all numbers: {error}") from error
    if num_timepoints > 1:
        first = ~np.isfinite(confounds[0])
        confounds[0, first] = confounds[1, first]
    gaps = [names[i] for i in np.flatnonzero(~np.isfinite(confounds).all(axis=0))]
    if gaps:
        raise DataError(f"confounds with missing values after the first row: {', '.join(gaps)}")
    return confounds


def clean(
    bold: NDArray[np.float32], settings: CleanSettings, tr_s: float, confounds: NDArray[np.float64] | None
) -> NDArray[np.float32]:
    """Return cleaned series around their original means.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        Finite. Not modified.
    confounds : ndarray, shape (T, K), or None
        Not modified.

    Returns
    -------
    ndarray, shape (T, P), float32
        In the units of the input; each parcel keeps its mean.
    """
    filtered = settings.high_pass_hz is not None or settings.low_pass_hz is not None
    if confounds is None and not settings.detrend and not filtered:
        return bold
    nyquist_hz = 0.5 / tr_s
    for name in ("high_pass_hz", "low_pass_hz"):
        if (value := getattr(settings, name)) is not None and value >= nyquist_hz:
            raise DataError(f"{name} {value:g} is not below the Nyquist frequency {nyquist_hz:g} Hz of TR {tr_s:g} s")
    if confounds is not None and confounds.shape[1] + 2 >= len(bold):
        raise DataError(f"{confounds.shape[1]} confounds leave nothing of {len(bold)} timepoints")
    from nilearn.signal import clean as nilearn_clean

    mean = bold.mean(axis=0, dtype=np.float64)
    cleaned = nilearn_clean(
        bold.astype(np.float64) - mean,
        detrend=settings.detrend,
        standardize=None,
        standardize_confounds=True,
        confounds=None if confounds is None else confounds.copy(),
        filter="butterworth" if filtered else False,
        high_pass=settings.high_pass_hz,
        low_pass=settings.low_pass_hz,
        t_r=tr_s,
    )
    cleaned = cleaned - cleaned.mean(axis=0) + mean
    return cleaned.astype(np.float32)


def mean_fd_mm(table: pd.DataFrame) -> float | None:
    """Return mean framewise displacement in mm: the table's own column, else from its six motion parameters.

    Translations are in mm and rotations in radians, as fMRIPrep writes them; the first volume has no displacement.
    """
    if "framewise_displacement" in table.columns:
        values = pd.to_numeric(table["framewise_displacement"], errors="coerce").to_numpy(dtype=np.float64)[1:]
    elif set(MOTION_COLUMNS) <= set(table.columns):
        motion = table[list(MOTION_COLUMNS)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        steps = np.abs(np.diff(motion, axis=0))
        values = steps[:, :3].sum(axis=1) + HEAD_RADIUS_MM * steps[:, 3:].sum(axis=1)
    else:
        return None
    return float(values.mean()) if values.size and np.isfinite(values).all() else None


def leak_flags(settings: CleanSettings) -> list[str]:
    """List how the cleaning lets a timepoint depend on later ones."""
    flags = []
    if settings.high_pass_hz is not None or settings.low_pass_hz is not None:
        flags.append("the temporal filter is zero-phase: each timepoint depends on later ones")
    if settings.confounds is not None:
        flags.append("confounds were regressed over the whole run: each timepoint depends on later ones")
    if settings.detrend:
        flags.append("trends were fitted over the whole run: each timepoint depends on later ones")
    return flags
