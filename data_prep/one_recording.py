"""The work on one recording, done by one worker: read, parcellate, clean, resample, judge, stage.

::

    <out>/staging/<hash of settings and atlas>/<recording_id>.npz     bold (T, P), coverage (P,)
                                               <recording_id>.json    its row, written last: a staged recording has both
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError, StoreError
from brainlm.store import Store, sha256_of_file
from data_prep.atlas_image import AtlasImage
from data_prep.clean import clean, mean_fd_mm, read_confounds, select_confounds
from data_prep.parcellate import LONGEST_TR_S, parcellate
from data_prep.quality import dvars_z, lag1_autocorrelation
from data_prep.read_series import missing_columns, read_series
from data_prep.resample import is_same_tr, resample
from data_prep.settings import CheckSettings, CleanSettings, Orientation
from data_prep.source_entry import IMAGE_SUFFIXES, SourceEntry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every recording, and where the results are staged."""

    atlas: AtlasImage
    clean: CleanSettings
    checks: CheckSettings
    orientation: Orientation
    target_tr_s: float | None
    window_len: int
    staging: Store


class _Refused(Exception):
    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


def prepare_recording(recipe: Recipe, entry: SourceEntry) -> dict[str, Any]:
    """Stage one recording, or say why not; bad data never raises.

    Returns
    -------
    dict
        A row of ``recordings.parquet`` with ``status`` prepared, or ``status`` refused with ``stage`` and ``reason``.

    Raises
    ------
    StoreError
        If the result cannot be written.
    """
    stamp = _stamp(entry)
    staged = _staged_row(recipe.staging, entry.recording_id, stamp)
    if staged is not None:
        return staged
    try:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        with threadpool_limits(1):  # the order of sums, and so the last bit, must not depend on the number of threads
            bold, coverage, row = _prepare(recipe, entry)
    except _Refused as refusal:
        return _refused(entry, refusal.stage, str(refusal))
    except StoreError:
        raise
    except Exception as error:  # one strange file must not end the work on all others; it is counted as refused
        logger.exception("%s: unexpected error", entry.recording_id)
        return _refused(entry, "internal", f"internal: {type(error).__name__}: {error}")
    buffer = io.BytesIO()
    np.savez(buffer, bold=bold, coverage=coverage)
    recipe.staging.write_bytes(f"{entry.recording_id}.npz", buffer.getvalue())
    recipe.staging.write_json(f"{entry.recording_id}.json", {"stamp": stamp, "row": row})
    return row


def load_staged(staging: Store, recording_id: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ``bold`` (T, P), NaN in missing parcels, and ``coverage`` (P,), 0 there."""
    with np.load(io.BytesIO(staging.read_bytes(f"{recording_id}.npz")), allow_pickle=False) as arrays:
        return arrays["bold"], arrays["coverage"]


def _prepare(recipe: Recipe, entry: SourceEntry) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, Any]]:
    if entry.refusal:
        raise _Refused("source", entry.refusal)
    with _stage("read"):
        bold, coverage, tr_s = _read(recipe, entry)
        _check_tr(tr_s, entry)
    missing = (coverage <= 0) | missing_columns(bold)
    _check_missing(missing, recipe.checks)
    as_read = series_sha256(np.where(missing, np.float32(np.nan), bold))
    bold = np.where(missing, np.float32(0.0), bold)
    fd_mm = entry.mean_fd_mm
    with _stage("clean"):
        confounds = None
        if entry.confounds:
            table = read_confounds(entry.confounds)
            measured = mean_fd_mm(table)
            fd_mm = fd_mm if measured is None else measured
            if recipe.clean.confounds is not None:
                confounds = select_confounds(table, recipe.clean.confounds, len(bold))
        elif recipe.clean.confounds is not None:
            raise DataError("there is no confounds table, and clean.confounds asks for one")
        bold = clean(bold, recipe.clean, tr_s, confounds)
    target_tr_s = recipe.target_tr_s or tr_s
    resampled = not is_same_tr(tr_s, target_tr_s)
    with _stage("resample"):
        if resampled:
            bold = resample(bold, tr_s, target_tr_s)
    if len(bold) < recipe.window_len:
        after = f" after resampling from {tr_s:g} to {target_tr_s:g} s" if resampled else ""
        raise _Refused("length", f"too short: {len(bold)} timepoints{after}, a window needs {recipe.window_len}")
    missing |= missing_columns(bold)
    _check_missing(missing, recipe.checks)
    coverage = np.where(missing, np.float32(0.0), coverage)
    bold = np.where(missing, np.float32(np.nan), bold)
    row = {
        **{name: getattr(entry, name) for name in ("recording_id", "subject", "session", "task", "run")},
        "site": entry.site,
        "family": entry.family,
        "space": entry.space,
        "tr_s": float(target_tr_s),
        "source_tr_s": float(tr_s),
        "resampled": resampled,
        "num_timepoints": len(bold),
        "mean_fd_mm": fd_mm,
        "dvars_z": dvars_z(bold[:, ~missing]),
        "lag1_autocorrelation": lag1_autocorrelation(bold[:, ~missing]),
        "num_missing_parcels": int(missing.sum()),
        "missing_parcels": np.flatnonzero(missing).tolist(),
        "source": entry.source,
        "source_sha256": sha256_of_file(entry.file),
        "confounds_sha256": sha256_of_file(entry.confounds) if entry.confounds else "",
        "series_sha256": as_read,
        "sha256": series_sha256(bold),
        "status": "prepared",
    }
    return bold, coverage, row


def _read(recipe: Recipe, entry: SourceEntry) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    atlas = recipe.atlas.atlas
    if Path(entry.file).name.endswith(IMAGE_SUFFIXES):
        with _stage("parcellate"):
            found = parcellate(
                entry.file,
                recipe.atlas,
                space=entry.space,
                tr_s=entry.tr_s,
                tr_from=entry.tr_from,
                checks=recipe.checks,
            )
        return found.bold, found.coverage, found.tr_s
    bold = read_series(entry.file, atlas.num_parcels, recipe.orientation)
    if entry.tr_s is None:
        raise DataError("no repetition time: set source.columns.tr_s or source.tr_s")
    coverage = np.where(missing_columns(bold), np.float32(0.0), np.float32(1.0))
    return bold, coverage, entry.tr_s


def _check_tr(tr_s: float, entry: SourceEntry) -> None:
    """Refuse what cannot be seconds between volumes, wherever it was read; seconds and milliseconds are mixed up."""
    origin = entry.tr_from if entry.tr_s is not None else "the image's header"
    if not 0 < tr_s <= LONGEST_TR_S:
        hint = "; are these milliseconds?" if tr_s > LONGEST_TR_S else ""
        raise DataError(
            f"the repetition time must be above 0 s and at most {LONGEST_TR_S:g} s, found {tr_s:g} s by {origin}{hint}"
        )


class _stage:
    """Turn a `DataError` inside the block into a refusal at this stage."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, DataError):
            raise _Refused(self.name, str(error)) from error


def _check_missing(missing: NDArray[np.bool_], checks: CheckSettings) -> None:
    if missing.all() or 1.0 - missing.mean() < checks.min_parcels:
        raise _Refused(
            "coverage",
            f"{(~missing).sum()} of {missing.size} parcels have signal (not missing, constant or NaN), "
            f"expected at least {checks.min_parcels:.0%}",
        )


def series_sha256(bold: NDArray[np.float32]) -> str:
    """Return the hash of shape and values; NaN must be the one that numpy writes."""
    return hashlib.sha256(repr(bold.shape).encode() + np.ascontiguousarray(bold, dtype="<f4").tobytes()).hexdigest()


def _refused(entry: SourceEntry, stage: str, reason: str) -> dict[str, Any]:
    return {
        "recording_id": entry.recording_id,
        "source": entry.source,
        "stage": stage,
        "reason": reason,
        "status": "refused",
    }


def _stamp(entry: SourceEntry) -> str:
    """Identify the input of one recording: staged work is used again only for the same entry and unchanged files."""
    files = [Path(name).stat() for name in (entry.file, entry.confounds) if name and Path(name).is_file()]
    tree = {"entry": asdict(entry), "files": [[stat.st_size, stat.st_mtime_ns] for stat in files]}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _staged_row(staging: Store, recording_id: str, stamp: str) -> dict[str, Any] | None:
    name = f"{recording_id}.json"
    if not staging.exists(name):
        return None
    found = staging.read_json(name)
    row: dict[str, Any] = found["row"]
    return row if found["stamp"] == stamp else None
