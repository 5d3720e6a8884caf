"""Choose confounds and censored timepoints from a table in fMRIPrep's format.

Columns of the named strategies are chosen by `nilearn.interfaces.fmriprep.load_confounds`; the table may have any name.

===========  ================================================================================================
strategy     regressors, source
===========  ================================================================================================
6P           translations and rotations
24P          these, their first differences, and the squares of all (Friston et al. 1996, Magnetic Resonance in
             Medicine 35; with differences in place of lags, as fMRIPrep writes them: Satterthwaite et al. 2013,
             NeuroImage 64)
aCompCor     24P, all components that fMRIPrep kept of the combined mask (half of its variance), and the cosines
             that fMRIPrep took out before it computed them (Behzadi et al. 2007, NeuroImage 37; Muschelli et al.
             2014, NeuroImage 96)
ICA-AROMA    white matter and cerebrospinal fluid, on images that ICA-AROMA has denoised (Pruim et al. 2015,
             NeuroImage 112)
===========  ================================================================================================
"""

from __future__ import annotations

import gzip
import io
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.local_input import check_sidecar_size
from data_prep.settings import CleanSettings, ScrubSettings
from data_prep.text_series import MAX_VALUES

HEAD_RADIUS_MM = 50.0  # Power et al. 2012, NeuroImage 59: rotations as arcs on a sphere of this radius
MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
EXPANSIONS = ("", "_derivative1", "_power2", "_derivative1_power2")
TISSUE_COLUMNS = ("csf", "white_matter")
# What nilearn is shown of a table: hundreds of other columns would be parsed twice, and one of them in camel case
# would make it refuse the table.
READ_BY_NILEARN = ("trans_", "rot_", "cosine", "a_comp_cor_", "csf", "white_matter", "global_signal")
NON_STEADY_STATE = "non_steady_state_outlier"
MAX_LISTED = 8
MAX_TABLE_BYTES = 64 * 1024**2  # 1200 timepoints of 2000 columns in 20 characters take 48 MB

# Strategy -> components and options of `load_confounds`.
NILEARN_STRATEGIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "none": ((), {}),
    "6P": (("motion",), {"motion": "basic"}),
    "24P": (("motion",), {"motion": "full"}),
    "aCompCor": (
        ("motion", "high_pass", "compcor"),
        {"motion": "full", "compcor": "anat_combined", "n_compcor": "all"},
    ),
    "ICA-AROMA": (("wm_csf", "ica_aroma"), {"wm_csf": "basic", "ica_aroma": "full"}),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Confounds:
    """What the confounds table says about one recording. T counts the timepoints of the file, dummy scans included.

    Attributes
    ----------
    regressors : ndarray, shape (T, K), float64, or None
        As in the table, neither centred nor scaled; finite wherever `keep_mask` is True.
    names : tuple of str
        Columns of `regressors`.
    keep_mask : ndarray, shape (T,), bool
        True = kept. False at dummy scans and at censored timepoints.
    num_dummy_scans : int
        Timepoints to drop at the start.
    mean_fd_mm : float or None
        Mean framewise displacement over all timepoints but the first, which has none.
    fd_mm : ndarray, shape (T,), float64, or None
        NaN at the first timepoint.
    """

    regressors: NDArray[np.float64] | None
    names: tuple[str, ...]
    keep_mask: NDArray[np.bool_]
    num_dummy_scans: int
    mean_fd_mm: float | None
    fd_mm: NDArray[np.float64] | None


def read_confounds(path: Path | None, clean: CleanSettings, num_timepoints: int, *, denoised: str = "") -> Confounds:
    """Read the confounds of one recording, and decide which of its timepoints are kept.

    Timepoints marked as non-steady state that are not dropped as dummy scans are censored as soon as confounds are
    regressed out or `clean.scrub` is set: as in nilearn, they take part in no fit. With nothing asked for, nothing is
    censored.

    Parameters
    ----------
    path : path or None
        Local table (.tsv, or .csv) in fMRIPrep's format, its JSON sidecar (for aCompCor) beside it under the same
        stem. None: there is no table.
    num_timepoints : int
        Timepoints of the recording's file.
    denoised : str
        How the recording is denoised already (``FIX``, ``ICA-AROMA``), "" = not at all.

    Raises
    ------
    DataError
        If confounds would be regressed out of a recording that is denoised already (only ICA-AROMA's own second step
        may be); if table, columns, rows, sidecar or values are missing; if nothing would be left.
    """
    _check_not_denoised(clean, denoised)
    if path is None:
        if clean.needs_confounds or clean.dummy_scans == "auto":
            raise DataError(
                f"there is no confounds table, and {_needs(clean)} asks for one: add the table (for series, "
                "source.columns.confounds) or set this to its default"
            )
        table = pd.DataFrame(index=range(num_timepoints))
    else:
        table = _read_table(path, num_timepoints)
    fd_mm = framewise_displacement(table)
    keep, num_dummy_scans = _kept(table, fd_mm, clean)
    frame = _chosen(table, path, clean)
    regressors = None
    if frame is not None:
        regressors = frame.to_numpy(dtype=np.float64, copy=True)
        gaps = ~np.isfinite(regressors)
        if len(regressors) > 1:  # a difference has no first value; it takes the second, as in nilearn
            regressors[0, gaps[0]] = regressors[1, gaps[0]]
        gaps = ~np.isfinite(regressors[keep]).all(axis=0)
        if gaps.any():
            names = _listed([name for name, gap in zip(frame.columns, gaps) if gap])
            raise DataError(
                f"confounds with missing values after the first row, at timepoints that are kept: {names}; expected a "
                "number in every row (is the table complete?)"
            )
    return Confounds(
        regressors=regressors,
        names=() if frame is None else tuple(frame.columns),
        keep_mask=keep,
        num_dummy_scans=num_dummy_scans,
        mean_fd_mm=_mean(fd_mm),
        fd_mm=fd_mm,
    )


def framewise_displacement(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return framewise displacement in mm, shape (T,), the first NaN: the table's column, else from motion.

    Translations are in mm and rotations in radians, as fMRIPrep writes them.
    """
    if "framewise_displacement" in table.columns:
        values = pd.to_numeric(table["framewise_displacement"], errors="coerce").to_numpy(dtype=np.float64, copy=True)
        values[:1] = np.nan
        return values
    if set(MOTION_COLUMNS) <= set(table.columns):
        motion = table[list(MOTION_COLUMNS)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        steps = np.abs(np.diff(motion, axis=0))
        values = steps[:, :3].sum(axis=1) + HEAD_RADIUS_MM * steps[:, 3:].sum(axis=1)
        return np.concatenate([[np.nan], values])
    return None


def drop_short_segments(keep_mask: NDArray[np.bool_], min_segment: int) -> NDArray[np.bool_]:
    """Censor segments of fewer than `min_segment` kept timepoints too, also at both ends (Power et al. 2014).

    A recording without censored timepoints stays as it is, however short. The input is not modified.
    """
    keep = keep_mask.copy()
    if keep.all():
        return keep
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    for start, stop in zip(edges[::2], edges[1::2]):
        if stop - start < min_segment:
            keep[start:stop] = False
    return keep


def is_aroma(denoised: str) -> bool:
    """Whether a recording is marked as denoised by ICA-AROMA (``ICA-AROMA``, ``smoothAROMAnonaggr``)."""
    return "aroma" in denoised.casefold()


def _check_not_denoised(clean: CleanSettings, denoised: str) -> None:
    aroma = clean.strategy == "ICA-AROMA"
    if aroma and clean.confounds is not None:
        raise DataError(
            "clean.strategy ICA-AROMA regresses white matter and CSF out of images that are denoised already; "
            "clean.confounds would clean them twice: set it to null"
        )
    if aroma and not is_aroma(denoised):
        raise DataError(
            "clean.strategy ICA-AROMA is the second step on images that ICA-AROMA has denoised "
            f"(desc-smoothAROMAnonaggr); this recording is marked as {denoised or 'not denoised'}: choose those images "
            "(source.bids.desc, or source.denoised: ICA-AROMA where names do not say it), or another strategy"
        )
    if denoised and clean.denoises and not aroma:
        raise DataError(
            f"the recording is denoised already ({denoised}), and {_needs(clean)} would clean it twice: set "
            "clean.strategy: none, clean.global_signal: false and clean.confounds: null"
            + (", or clean.strategy: ICA-AROMA for its second step" if is_aroma(denoised) else "")
        )


def _needs(clean: CleanSettings) -> str:
    asked = {
        f"clean.strategy {clean.strategy}": clean.strategy != "none",
        "clean.global_signal": clean.global_signal,
        "clean.confounds": clean.confounds is not None,
        "clean.scrub": clean.scrub is not None,
        "clean.dummy_scans auto": clean.dummy_scans == "auto",
    }
    return next(name for name, is_asked in asked.items() if is_asked)


def _read_table(path: Path, num_timepoints: int) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"there is no confounds table {path.name}")
    separator = "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"
    try:
        data = _read_text(path)
        num_columns = 1 + max((line.count(separator.encode()) for line in io.BytesIO(data)), default=0)
        if num_columns * num_timepoints > MAX_VALUES:
            raise DataError(f"{path.name} has {num_columns} columns: too many for a table of confounds")
        table = pd.read_csv(io.BytesIO(data), sep=separator, nrows=num_timepoints + 1)
    except (ValueError, OSError, EOFError, zlib.error) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"cannot read the confounds {path.name}: {error}") from error
    if len(table) != num_timepoints:
        rows = f"{len(table)} rows" if len(table) < num_timepoints else f"more than {num_timepoints} rows"
        raise DataError(
            f"{path.name} has {rows} of confounds, the recording {num_timepoints} timepoints: is it the "
            "table of another run, or were timepoints cut off one of the two?"
        )
    return table


def _read_text(path: Path) -> bytes:
    """Return the bytes of a table, unpacked where its name ends in ``.gz``, and never more than it can need."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data: bytes = file.read(MAX_TABLE_BYTES + 1)
    if len(data) > MAX_TABLE_BYTES:
        raise DataError(f"{path.name} is longer than {MAX_TABLE_BYTES} bytes: no table of confounds")
    return data


def _kept(
    table: pd.DataFrame, fd_mm: NDArray[np.float64] | None, clean: CleanSettings
) -> tuple[NDArray[np.bool_], int]:
    """Return the mask of kept timepoints, shape (T,), and the number of dummy scans."""
    columns = [name for name in table.columns if name.startswith(NON_STEADY_STATE)]
    unsteady = (_numbers(table, columns) != 0).any(axis=1)
    if isinstance(clean.dummy_scans, int):
        num_dummy_scans = clean.dummy_scans
    else:
        num_dummy_scans = len(table) if unsteady.all() else int(np.argmin(unsteady))
    if num_dummy_scans >= len(table):
        raise DataError(f"{num_dummy_scans} dummy scans leave nothing of {len(table)} timepoints")
    keep = np.ones(len(table), dtype=bool)
    if clean.denoises or clean.scrub is not None:
        keep &= ~unsteady
    if clean.scrub is not None:
        keep &= ~_moved(table, fd_mm, clean.scrub)
        keep[num_dummy_scans:] = drop_short_segments(keep[num_dummy_scans:], clean.scrub.min_segment)
    keep[:num_dummy_scans] = False
    if not keep.any():
        raise DataError(
            f"all {len(table) - num_dummy_scans} timepoints after {num_dummy_scans} dummy scans are censored: the "
            "recording moves too much for clean.scrub"
        )
    return keep, num_dummy_scans


def _moved(table: pd.DataFrame, fd_mm: NDArray[np.float64] | None, scrub: ScrubSettings) -> NDArray[np.bool_]:
    """Return the timepoints beyond a threshold, as nilearn's ``scrub`` does; the first has neither FD nor DVARS."""
    if fd_mm is None:
        raise DataError(
            "clean.scrub needs the column framewise_displacement, or the six motion columns "
            f"({', '.join(MOTION_COLUMNS)}); the confounds have neither: set clean.scrub to null"
        )
    measures = [("framewise_displacement", fd_mm, scrub.fd_mm)]
    if scrub.std_dvars is not None:
        if "std_dvars" not in table.columns:
            raise DataError(
                "the confounds have no column 'std_dvars', which clean.scrub.std_dvars looks at: set it to null to "
                "censor by displacement alone"
            )
        measures.append(("std_dvars", _numbers(table, ["std_dvars"])[:, 0], scrub.std_dvars))
    moved = np.zeros(len(table), dtype=bool)
    for name, values, limit in measures:
        gaps = np.flatnonzero(~np.isfinite(values[1:])) + 1
        if gaps.size:
            raise DataError(
                f"{name} has no value at {gaps.size} timepoints after the first (such as {gaps[0]}), so that "
                "clean.scrub cannot tell whether the head moved there"
            )
        moved[1:] |= values[1:] > limit
    return moved


def _chosen(table: pd.DataFrame, path: Path | None, clean: CleanSettings) -> pd.DataFrame | None:
    """Return the confounds to regress out, or None if there are none."""
    if path is None or not clean.denoises:
        return None
    frames = []
    if clean.strategy != "none" or clean.global_signal:
        frames.append(_by_name(table, path, clean))
    taken = set() if not frames else set(frames[0].columns)
    further = [name for name in dict.fromkeys(clean.confounds or ()) if name not in taken]
    if further:
        _check_columns(table, further, "clean.confounds")
        frames.append(pd.DataFrame(_numbers(table, further), columns=further))
    return pd.concat(frames, axis=1)


def _by_name(table: pd.DataFrame, path: Path, clean: CleanSettings) -> pd.DataFrame:
    """Return the columns of a named strategy, chosen by nilearn."""
    strategy = f"clean.strategy {clean.strategy}"
    components, options = NILEARN_STRATEGIES[clean.strategy]
    sidecar = path.with_suffix(".json")
    if options.get("motion"):
        suffixes = EXPANSIONS if options["motion"] == "full" else EXPANSIONS[:1]
        _check_columns(table, [name + suffix for suffix in suffixes for name in MOTION_COLUMNS], strategy)
    if "wm_csf" in components:
        _check_columns(table, list(TISSUE_COLUMNS), strategy)
    if "compcor" in components:
        if not any(str(name).startswith("cosine") for name in table.columns):
            raise DataError(
                f"{strategy}: the confounds have no cosine columns; the components were computed after these were "
                "taken out, so both must be regressed out together. Use the table that fMRIPrep wrote"
            )
        if not sidecar.is_file():
            raise DataError(
                f"{strategy} needs the file {sidecar.name} beside the confounds, which says which components belong "
                "to which mask: copy it from fMRIPrep's folder (1.4 or later), or choose another strategy"
            )
    if sidecar.is_file():
        check_sidecar_size(sidecar.name, sidecar.stat().st_size)
    if clean.global_signal:
        _check_columns(table, ["global_signal"], "clean.global_signal")
        components, options = (*components, "global_signal"), {**options, "global_signal": "basic"}
    columns = [name for name in table.columns if str(name).startswith(READ_BY_NILEARN)]
    shown = pd.DataFrame(_numbers(table, columns), columns=columns)
    image = "sub-x_task-x_desc-preproc_bold.nii.gz"
    if "ica_aroma" in components:
        image = "sub-x_task-x_space-MNI152NLin6Asym_desc-smoothAROMAnonaggr_bold.nii.gz"
    from nilearn.interfaces.fmriprep import load_confounds

    with _folder() as folder:
        named = Path(folder) / "sub-x_task-x_desc-confounds_timeseries.tsv"
        shown.to_csv(named, sep="\t", index=False, na_rep="n/a")
        if sidecar.is_file():
            named.with_suffix(".json").write_bytes(sidecar.read_bytes())
        try:
            # The image is only a name by which nilearn finds the table.
            frame, _ = load_confounds(str(Path(folder) / image), strategy=components, demean=False, **options)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{strategy}: {path.name} and its JSON file do not fit together, or columns are missing ({error}): use "
                "both as fMRIPrep wrote them, or choose another strategy"
            ) from error
    return frame


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder without "tsv" in its path, in all of which nilearn replaces these letters to find the sidecar."""
    if "tsv" in tempfile.gettempdir():
        raise DataError(f"nilearn cannot work in a temporary folder with tsv in its name: {tempfile.gettempdir()}")
    while "tsv" in (folder := tempfile.TemporaryDirectory(prefix="confounds_")).name:
        folder.cleanup()
    return folder


def _check_columns(table: pd.DataFrame, names: list[str], who: str) -> None:
    absent = [name for name in names if name not in table.columns]
    if absent:
        raise DataError(
            f"the confounds have no column {_listed(absent)}, which {who} needs: use a table from fMRIPrep that has "
            "them, or choose other confounds"
        )


def _numbers(table: pd.DataFrame, names: list[str]) -> NDArray[np.float64]:
    """Return columns, shape (T, K); missing values are NaN."""
    try:
        return table[names].apply(pd.to_numeric).to_numpy(dtype=np.float64, copy=True)
    except (ValueError, TypeError) as error:
        raise DataError(f"the confounds are not all numbers: {error}") from error


def _mean(fd_mm: NDArray[np.float64] | None) -> float | None:
    if fd_mm is None or len(fd_mm) < 2 or not np.isfinite(fd_mm[1:]).all():
        return None
    return float(fd_mm[1:].mean())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(repr, names[:MAX_LISTED])) + more
