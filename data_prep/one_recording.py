"""The work on one recording, done by one worker: read, parcellate, clean, resample, judge, stage.

::

    <out>/staging/<hash of settings and atlas>/<recording_id>.npz     bold (T, P), coverage (P,), keep_mask (T,)
                                               <recording_id>.json    its row, written last: a staged recording has both

A refused recording has its row alone, so that it is not read again either.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError, StoreError
from brainlm.store import Store, sha256_of_file
from data_prep.atlas_image import AtlasImage
from data_prep.clean import clean_and_count
from data_prep.confounds import read_confounds
from data_prep.input_files import file_stamp
from data_prep.local_input import local_input
from data_prep.process_memory import give_back_memory
from data_prep.quality import quality_row, refusal
from data_prep.read_recording import read_recording
from data_prep.read_series import missing_columns
from data_prep.resample import is_same_tr, num_resampled, resample
from data_prep.settings import CheckSettings, CleanSettings, Orientation
from data_prep.source_entry import SourceEntry
from data_prep.text_series import MAX_VALUES

logger = logging.getLogger(__name__)
MAX_TIMEPOINTS = 50_000  # ten hours at 0.72 s; resampling takes 2 KB for each
Row = dict[str, Any]

# What only the recording's own bytes decide; other refusals may go when a sidecar or a program is put in place.
LASTING_REFUSALS = ("coverage", "censoring", "length", "quality")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every recording, and where the results are staged. ``target_tr_s`` None keeps each one's TR."""

    atlas: AtlasImage
    clean: CleanSettings
    checks: CheckSettings
    orientation: Orientation
    target_tr_s: float | None
    window_len: int
    staging: Store


@dataclass(frozen=True, eq=False)
class Staged:
    """A prepared recording: ``bold (T, P)`` float32, NaN in missing parcels, ``coverage (P,)``, ``keep_mask (T,)``."""

    bold: NDArray[np.float32]
    coverage: NDArray[np.float32]
    keep_mask: NDArray[np.bool_]

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Shape (P,): True where the parcel carries no signal."""
        return np.asarray(np.isnan(self.bold[0]))


class _Refused(Exception):
    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


def prepare_recording(recipe: Recipe, entry: SourceEntry) -> Row:
    """Stage one recording, or say why not; bad data never raises.

    Returns
    -------
    dict
        A row of ``recordings.parquet`` with ``status`` prepared, or ``status`` refused with ``stage`` and ``reason``;
        ``reused`` is True where the work was done before.

    Raises
    ------
    StoreError
        If input or output storage fails: that is not the recording's fault, and the same command goes on later.
    """
    stamp = _stamp(entry)
    before = _staged_row(recipe, entry.recording_id, stamp)
    if before is not None:
        return before | {"reused": True}
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        with threadpool_limits(1):  # the order of sums, and so the last bit, must not depend on the number of threads
            staged, row = _prepare(recipe, entry)
    except _Refused as refused:
        row = refused_row(entry, refused.stage, str(refused))
        if refused.stage in LASTING_REFUSALS:
            _write_row(recipe, stamp, row)
        return row | {"reused": False}
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # one strange file must not end the work on all others; it is counted as refused
        logger.exception("%s: unexpected error", entry.recording_id)
        return refused_row(entry, "internal", f"internal: {type(error).__name__}: {error}") | {"reused": False}
    name = f"{entry.recording_id}.npz"
    with recipe.staging.new_file(name) as path, path.open("wb") as file:  # never whole in memory once more
        np.savez(file, bold=staged.bold, coverage=staged.coverage, keep_mask=staged.keep_mask)
    _write_row(recipe, stamp, row)
    return row | {"reused": False}


def load_staged(staging: Store, recording_id: str) -> Staged:
    """Return one staged recording."""
    try:
        with staging.local_copy(f"{recording_id}.npz") as path, np.load(path, allow_pickle=False) as arrays:
            return Staged(arrays["bold"], arrays["coverage"], arrays["keep_mask"])
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise StoreError(
            f"{staging.url_of(recording_id)}.npz is damaged ({error}): remove the staging folder and run again"
        ) from error


def _prepare(recipe: Recipe, entry: SourceEntry) -> tuple[Staged, Row]:
    if entry.refusal:
        raise _Refused("source", entry.refusal)
    with ExitStack() as inputs:
        with _stage("read"):
            file = inputs.enter_context(local_input(entry.file))
            reading = (recipe.orientation, recipe.checks, recipe.clean.mean_over)
            found = read_recording(file, entry, recipe.atlas, *reading)
        bold, coverage, tr_s, tsnr = found.bold, found.coverage, found.tr_s, found.tsnr
        del found  # it would keep the series as read, up to 40 MiB
        with _stage("confounds"):
            confounds_file = inputs.enter_context(local_input(entry.confounds)) if entry.confounds else None
            confounds = read_confounds(confounds_file, recipe.clean, len(bold), denoised=entry.denoised)
        source_sha256 = sha256_of_file(file)
        confounds_sha256 = "" if confounds_file is None else sha256_of_file(confounds_file)
    give_back_memory()
    _check_size(len(bold), bold.shape[1], "")
    missing = missing_columns(bold)
    num_constant = int((missing & np.isfinite(bold).all(axis=0)).sum())
    _check_missing(missing, recipe.checks)
    bold[:, missing] = np.nan  # in place: a copy of the longest recording takes 40 MiB
    as_read = series_sha256(bold)
    bold[:, missing] = 0.0
    first = confounds.num_dummy_scans
    bold, keep_mask = bold[first:], confounds.keep_mask[first:]
    regressors = None if confounds.regressors is None else confounds.regressors[first:]
    _check_kept(keep_mask, recipe.checks)
    with _stage("clean"):
        cleaning = (recipe.clean, tr_s, regressors, keep_mask)
        bold, num_degrees_of_freedom = clean_and_count(bold, *cleaning, overwrite=True)
    target_tr_s = recipe.target_tr_s or tr_s
    resampled = not is_same_tr(tr_s, target_tr_s)
    after = f" after resampling from {tr_s:g} to {target_tr_s:g} s" if resampled else ""
    with _stage("resample"):
        if resampled:
            _check_size(num_resampled(len(bold), tr_s, target_tr_s), bold.shape[1], after)
            bold, keep_mask = resample(bold, keep_mask, tr_s, target_tr_s)
    if len(bold) < recipe.window_len:
        raise _Refused("length", f"too short: {len(bold)} timepoints{after}, a window needs {recipe.window_len}")
    _check_kept(keep_mask, recipe.checks)
    missing |= missing_columns(bold if keep_mask.all() else bold[keep_mask])
    _check_missing(missing, recipe.checks)
    bold = np.ascontiguousarray(bold)
    bold[:, missing] = np.nan
    staged = Staged(bold, coverage, keep_mask)
    row = {
        **{name: getattr(entry, name) for name in ("recording_id", "subject", "session", "task", "run")},
        "site": entry.site,
        "family": entry.family,
        "space": entry.space,
        "denoised": entry.denoised,
        "tr_s": float(target_tr_s),
        "source_tr_s": float(tr_s),
        "resampled": resampled,
        "num_timepoints": len(bold),
        "num_dummy_scans": first,
        "num_degrees_of_freedom": num_degrees_of_freedom,
        "mean_fd_mm": entry.mean_fd_mm if confounds.mean_fd_mm is None else confounds.mean_fd_mm,
        "tsnr": tsnr,
        "num_constant_parcels": num_constant,
        **quality_row(staged.bold, coverage, keep_mask, float(target_tr_s)),
        "source": entry.source,
        "source_bytes": int(entry.file_stamp.partition(":")[0] or 0),
        "source_etag": entry.file_stamp.partition(":")[2] if "://" in entry.file else "",
        "source_sha256": source_sha256,
        "confounds_sha256": confounds_sha256,
        "series_sha256": as_read,
        "sha256": series_sha256(staged.bold),
        "status": "prepared",
    }
    if reason := refusal(row, recipe.checks):
        raise _Refused("quality", reason)
    return staged, row


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Turn a `DataError` inside the block into a refusal at this stage."""
    try:
        yield
    except DataError as error:
        raise _Refused(name, str(error)) from error


def _check_size(num_timepoints: int, num_parcels: int, after: str) -> None:
    if num_timepoints > MAX_TIMEPOINTS or num_timepoints * num_parcels > MAX_VALUES:
        raise _Refused(
            "length",
            f"too long: {num_timepoints} timepoints of {num_parcels} parcels{after}; at most {MAX_TIMEPOINTS} "
            f"timepoints, and {MAX_VALUES} values, fit the memory of a worker: divide the recording into runs"
            + (", or choose a longer target_tr_s" if after else ""),
        )


def _check_missing(missing: NDArray[np.bool_], checks: CheckSettings) -> None:
    if missing.all() or 1.0 - missing.mean() < checks.min_parcels:
        raise _Refused(
            "coverage",
            f"{(~missing).sum()} of {missing.size} parcels have signal (not missing, constant or NaN), "
            f"expected at least {checks.min_parcels:.0%}",
        )


def _check_kept(keep_mask: NDArray[np.bool_], checks: CheckSettings) -> None:
    if keep_mask.sum() < 2 or keep_mask.mean() < checks.min_kept:
        raise _Refused(
            "censoring",
            f"{keep_mask.sum()} of {keep_mask.size} timepoints are kept, expected at least {checks.min_kept:.0%} "
            "(checks.min_kept)",
        )


def series_sha256(bold: NDArray[np.float32]) -> str:
    """Return the hash of shape and values; NaN must be the one that numpy writes."""
    digest = hashlib.sha256(repr(bold.shape).encode())
    digest.update(np.ascontiguousarray(bold, dtype="<f4").reshape(-1).data)  # hashlib takes one dimension, uncopied
    return digest.hexdigest()


def refused_row(entry: SourceEntry, stage: str, reason: str) -> Row:
    """Return the row of a recording that cannot be used."""
    return {
        "recording_id": entry.recording_id,
        "subject": entry.subject,
        "source": entry.source,
        "stage": stage,
        "reason": reason,
        "status": "refused",
    }


def _stamp(entry: SourceEntry) -> str:
    """Identify the input of one recording: staged work is used again only for the same entry and unchanged files."""
    sidecar = file_stamp(f"{entry.confounds.removesuffix('.tsv')}.json") if entry.confounds.endswith(".tsv") else ""
    return hashlib.sha256(json.dumps([asdict(entry), sidecar], sort_keys=True).encode()).hexdigest()


def _write_row(recipe: Recipe, stamp: str, row: Row) -> None:
    recipe.staging.write_json(
        f"{row['recording_id']}.json", {"stamp": stamp, "target_tr_s": recipe.target_tr_s, "row": row}
    )


def _staged_row(recipe: Recipe, recording_id: str, stamp: str) -> Row | None:
    """Return the row of finished work that serves this recipe: same input, same outcome of the resampling.

    While no TR is asked for, any outcome serves: the recording's own TR is what counts (`prepare` asks again).
    """
    name = f"{recording_id}.json"
    if not recipe.staging.exists(name):
        return None
    found = recipe.staging.read_json(name)
    row: Row = found["row"]
    if found["stamp"] != stamp:
        return None
    if found["target_tr_s"] == recipe.target_tr_s:
        return row
    if row["status"] == "refused":
        return None
    if recipe.target_tr_s is None and row["resampled"]:
        return row
    wanted = recipe.target_tr_s or row["source_tr_s"]
    if row["resampled"] or not is_same_tr(row["source_tr_s"], wanted):
        return None
    return row | {"tr_s": float(wanted), "duration_s": row["num_kept"] * float(wanted)}
