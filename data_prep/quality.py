"""Numbers that tell a clean recording from a noisy one, and the rules by which `checks` refuses some.

All are taken over kept timepoints; the step across a censored gap is no step. Mean framewise displacement comes from
the confounds (`data_prep.confounds`), the temporal signal-to-noise ratio from the volumes (`data_prep.parcellate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.settings import CheckSettings

COLUMNS_AT_ONCE = 64  # bounds the copies in double precision, whatever the length of the recording


def quality_row(
    bold: NDArray[np.float32], coverage: NDArray[np.float32], keep_mask: NDArray[np.bool_], tr_s: float
) -> dict[str, Any]:
    """Return the quality columns of ``recordings.parquet`` that follow from the prepared series.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        After cleaning and resampling, in any units; NaN in missing parcels. Values at censored timepoints have no
        influence.
    coverage : ndarray, shape (P,), float32
        Fraction of each parcel's voxels with signal.
    keep_mask : ndarray, shape (T,), bool
        True = timepoint kept.
    tr_s : float

    Returns
    -------
    dict
        ``num_kept``; ``duration_s``, the kept timepoints in seconds; ``mean_coverage`` over all parcels, missing ones
        included; ``num_missing_parcels``; ``dvars_z`` and ``lag1_autocorrelation``, which are None where no two kept
        timepoints are neighbours or no parcel varies.
    """
    missing = np.isnan(bold).all(axis=0)
    present = bold[:, ~missing] if missing.any() else bold
    num_kept = int(np.count_nonzero(keep_mask))
    return {
        "num_kept": num_kept,
        "duration_s": num_kept * float(tr_s),
        "dvars_z": _or_none(dvars_z(present, keep_mask)),
        "lag1_autocorrelation": _or_none(lag1_autocorrelation(present, keep_mask)),
        "mean_coverage": float(coverage.mean(dtype=np.float64)),
        "num_missing_parcels": int(missing.sum()),
    }


def dvars_z(bold: NDArray[np.float32], keep_mask: NDArray[np.bool_] | None = None) -> float:
    """Return the mean, over time, of the RMS change between timepoints across z-scored parcels.

    As DVARS (Power et al. 2012, NeuroImage 59), over parcels instead of voxels and in standard deviations, so that
    series of any units compare. White noise gives the root of 2, slow series less; movement raises it.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Parcels with signal only; constant ones are left out.
    keep_mask : ndarray, shape (T,), bool, optional
        True = kept. Only steps between neighbours that are both kept count.

    Returns
    -------
    float
        NaN where there is no such step, or no parcel varies.
    """
    pairs = _neighbours(bold, keep_mask)
    squares, count = np.zeros(int(pairs.sum())), 0
    for z, _ in _standardised(bold, keep_mask):
        steps = np.diff(z, axis=0)[pairs]
        squares += np.square(steps, out=steps).sum(axis=1)
        count += z.shape[1]
    return float(np.sqrt(squares / count).mean()) if count and squares.size else math.nan


def lag1_autocorrelation(bold: NDArray[np.float32], keep_mask: NDArray[np.bool_] | None = None) -> float:
    """Return the median over parcels of the correlation between neighbouring timepoints.

    The usual estimate (Box and Jenkins), the sum of lagged products over the sum of squares. Where timepoints are
    censored, the sum runs over the neighbours that are both kept, and is scaled to the number there would be without
    gaps. Parameters and NaN as in `dvars_z`.
    """
    pairs = _neighbours(bold, keep_mask)
    if not pairs.any():
        return math.nan
    found = []
    for z, kept in _standardised(bold, keep_mask):
        lagged = (z[1:] * z[:-1])[pairs].sum(axis=0) * ((len(kept) - 1) / pairs.sum())
        found.append(lagged / (kept**2).sum(axis=0))
    values = np.concatenate(found) if found else np.zeros(0)
    return float(np.median(values)) if values.size else math.nan


def refusal(row: Mapping[str, Any], checks: CheckSettings) -> str:
    """Return why a recording is refused by the inclusion rules, "" if it is not.

    Parameters
    ----------
    row : mapping
        ``num_timepoints``, ``num_kept``, ``duration_s``, ``mean_fd_mm`` and ``tsnr`` (None or NaN = unknown).
    checks : CheckSettings
        ``min_tsnr`` judges images alone: parcel series have no voxels to measure it on, and pass (their ``tsnr`` stays
        empty in the table). An unknown mean framewise displacement is refused where there is a maximum.

    Returns
    -------
    str
        All broken rules, each with value, limit and the setting's name.
    """
    broken = []
    share = row["num_kept"] / row["num_timepoints"]
    if share < checks.min_kept:
        broken.append(
            f"{row['num_kept']} of {row['num_timepoints']} timepoints kept ({share:.1%}), below {checks.min_kept:.1%} "
            "(checks.min_kept)"
        )
    if checks.min_duration_s is not None and row["duration_s"] < checks.min_duration_s:
        broken.append(
            f"{row['duration_s']:g} s of kept time, below {checks.min_duration_s:g} s (checks.min_duration_s)"
        )
    if checks.max_mean_fd_mm is not None:
        limit = f"{checks.max_mean_fd_mm:g} mm (checks.max_mean_fd_mm)"
        if _unknown(row["mean_fd_mm"]):
            broken.append(f"mean framewise displacement unknown, it must be known to be at most {limit}")
        elif row["mean_fd_mm"] > checks.max_mean_fd_mm:
            broken.append(f"mean framewise displacement {row['mean_fd_mm']:.4g} mm, above {limit}")
    if checks.min_tsnr is not None and not _unknown(row["tsnr"]) and row["tsnr"] < checks.min_tsnr:
        broken.append(f"temporal signal-to-noise ratio {row['tsnr']:.4g}, below {checks.min_tsnr:g} (checks.min_tsnr)")
    return "; ".join(broken)


def _neighbours(bold: NDArray[np.float32], keep_mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Return shape (T - 1,): True where a timepoint and the next are both kept."""
    if keep_mask is None:
        return np.ones(max(len(bold) - 1, 0), dtype=bool)
    return keep_mask[1:] & keep_mask[:-1]


def _standardised(
    bold: NDArray[np.float32], keep_mask: NDArray[np.bool_] | None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Give blocks of varying columns, z-scored with the mean and deviation of kept timepoints: all rows, kept rows."""
    for first in range(0, bold.shape[1], COLUMNS_AT_ONCE):
        block = bold[:, first : first + COLUMNS_AT_ONCE].astype(np.float64)
        kept = block if keep_mask is None else block[keep_mask]
        if len(kept) == 0:
            return
        mean, deviation = kept.mean(axis=0), kept.std(axis=0)
        varies = deviation > 0
        z = block if varies.all() else block[:, varies]
        del block, kept
        z -= mean[varies]
        z /= deviation[varies]
        if keep_mask is not None:
            z[~keep_mask] = 0.0  # whatever stands there, NaN too, stays out of the sums
        yield z, z if keep_mask is None else z[keep_mask]


def _unknown(value: Any) -> bool:
    return value is None or math.isnan(value)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
