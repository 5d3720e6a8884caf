"""The archive ``recordings.zarr`` (Zarr v3, sharded): every prepared series, neither centred nor scaled.

::

    bold        (rows, P)    float32   after cleaning and resampling, in source units; NaN where a parcel is missing,
                                       interpolated where a timepoint is censored
    keep_mask   (rows,)      bool      True = timepoint kept
    coverage    (places, P)  float32   fraction of each parcel's voxels with signal

Rows of ``bold`` and ``keep_mask`` begin at ``first_row`` of ``recordings.parquet``; the row of ``coverage`` is its
``archive_row``. What is added later begins at a new stored object, so that nothing written is written again; rows in
between, and those of withdrawn subjects, hold NaN and False. A stored object (a Zarr shard) is written by one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.stored_table import Table
from data_prep.work import Tasks, Workers

FOLDER = "recordings.zarr"
ARCHIVE_COLUMNS = ["recording_id", "first_row", "archive_row", "num_timepoints"]
CHUNK_ROWS = 256  # about one recording
SHARD_ROWS = 64 * CHUNK_ROWS
CHUNK_RECORDINGS = 1024


def zarr_root(out: Store) -> Any:
    """Return the Zarr store of a data set, for ``zarr.open_group``."""
    from data_prep.zarr_files import ZarrFiles  # imports zarr

    return ZarrFiles(out.sub(FOLDER))


def read_archived(out: Store, first_row: int, num_timepoints: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return ``bold (T, P)`` and ``keep_mask (T,)`` of one recording."""
    import zarr

    group = zarr.open_group(zarr_root(out), mode="r")
    rows = slice(first_row, first_row + num_timepoints)
    return np.asarray(group["bold"][rows]), np.asarray(group["keep_mask"][rows])


def mean_coverage(out: Store, table: Table) -> NDArray[np.float32]:
    """Return the mean over recordings of each parcel's coverage: shape (P,); one block of rows in memory."""
    import zarr

    coverage = zarr.open_group(zarr_root(out), mode="r")["coverage"]
    places = np.sort(table["archive_row"].to_numpy())
    total = np.zeros(coverage.shape[1])
    for start in range(0, coverage.shape[0], CHUNK_RECORDINGS):
        block = np.asarray(coverage[start : start + CHUNK_RECORDINGS])
        inside = places[(places >= start) & (places < start + CHUNK_RECORDINGS)] - start
        total += block[inside].sum(axis=0, dtype=np.float64)
    return np.asarray(total / max(len(places), 1), dtype=np.float32)


def next_places(out: Store, held: pd.DataFrame | None) -> tuple[int, int]:
    """Return the first row of ``bold`` and of ``coverage`` where new recordings may go."""
    if held is None:
        return 0, 0
    import zarr

    shard_rows = zarr.open_group(zarr_root(out), mode="r")["bold"].shards[0]
    used_rows = int((held["first_row"] + held["num_timepoints"]).max()) if len(held) else 0
    used_places = int(held["archive_row"].max()) + 1 if len(held) else 0
    return _round_up(used_rows, shard_rows), _round_up(used_places, CHUNK_RECORDINGS)


def write_archive(out: Store, staging: Store, table: pd.DataFrame, num_parcels: int, run: Workers) -> None:
    """Write all recordings of `table`, which has `ARCHIVE_COLUMNS`."""
    first, last = int(table["first_row"].iloc[0]), int((table["first_row"] + table["num_timepoints"]).iloc[-1])
    first_place, num_places = int(table["archive_row"].iloc[0]), int(table["archive_row"].iloc[-1]) + 1
    shard_rows = _make_arrays(out, last, num_places, num_parcels, new=first == 0)
    ids = table["recording_id"]
    starts = table["first_row"].to_numpy()
    stops = starts + table["num_timepoints"].to_numpy()

    def of_object(number: int) -> tuple[Any, ...]:
        start = first + number * shard_rows
        stop = min(start + shard_rows, last)
        inside = slice(np.searchsorted(stops, start, side="right"), np.searchsorted(starts, stop, side="left"))
        recordings = list(zip(ids.iloc[inside].tolist(), starts[inside].tolist()))
        return out, staging, recordings, start, stop, num_parcels

    def of_places(number: int) -> tuple[Any, ...]:
        begin = number * CHUNK_RECORDINGS
        return out, staging, ids.iloc[begin : begin + CHUNK_RECORDINGS].tolist(), first_place + begin

    for _ in run.stream(_write_bold, Tasks(-(-(last - first) // shard_rows), of_object), "archive"):
        pass
    for _ in run.stream(_write_coverage, Tasks(-(-len(ids) // CHUNK_RECORDINGS), of_places), "coverage"):
        pass


def trim_archive(out: Store, table: pd.DataFrame) -> None:
    """Cut off what lies after the last recording of `table`: rows that a stopped addition has written."""
    import zarr

    group = zarr.open_group(zarr_root(out), mode="r+")
    num_rows = int((table["first_row"] + table["num_timepoints"]).max())
    num_places = int(table["archive_row"].max()) + 1
    for name, length in (("bold", num_rows), ("keep_mask", num_rows), ("coverage", num_places)):
        if group[name].shape[0] > length:
            group[name].resize((length, *group[name].shape[1:]))


def erase_recordings(out: Store, table: pd.DataFrame) -> None:
    """Overwrite the rows of the recordings in `table`: NaN, not kept, coverage 0."""
    import zarr

    group = zarr.open_group(zarr_root(out), mode="r+")
    for first_row, length, place in zip(table["first_row"], table["num_timepoints"], table["archive_row"]):
        group["bold"][first_row : first_row + length] = np.nan
        group["keep_mask"][first_row : first_row + length] = False
        group["coverage"][place : place + 1] = 0.0


def _make_arrays(out: Store, num_rows: int, num_places: int, num_parcels: int, new: bool) -> int:
    """Create the arrays or let them grow; return the rows of one stored object of ``bold``."""
    import zarr

    if not new:
        group = zarr.open_group(zarr_root(out), mode="r+")
        group["bold"].resize((num_rows, num_parcels))
        group["keep_mask"].resize((num_rows,))
        group["coverage"].resize((num_places, num_parcels))
        return int(group["bold"].shards[0])
    group = zarr.open_group(zarr_root(out), mode="w", zarr_format=3)
    shard_rows = min(SHARD_ROWS, _round_up(num_rows, CHUNK_ROWS))
    group.create_array(
        "bold",
        shape=(num_rows, num_parcels),
        dtype="float32",
        chunks=(CHUNK_ROWS, num_parcels),
        shards=(shard_rows, num_parcels),
        fill_value=float("nan"),
        dimension_names=("time", "parcel"),
    )
    group.create_array(
        "keep_mask", shape=(num_rows,), dtype="bool", chunks=(shard_rows,), fill_value=False, dimension_names=("time",)
    )
    group.create_array(
        "coverage",
        shape=(num_places, num_parcels),
        dtype="float32",
        chunks=(CHUNK_RECORDINGS, num_parcels),
        fill_value=0.0,
        dimension_names=("recording", "parcel"),
    )
    return shard_rows


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _write_bold(
    out: Store, staging: Store, recordings: Sequence[tuple[str, int]], start: int, stop: int, num_parcels: int
) -> None:
    import zarr

    bold = np.full((stop - start, num_parcels), np.nan, dtype=np.float32)
    keep_mask = np.zeros(stop - start, dtype=bool)
    for recording_id, first_row in recordings:
        staged = load_staged(staging, recording_id)
        begin, end = max(first_row, start), min(first_row + len(staged.bold), stop)
        bold[begin - start : end - start] = staged.bold[begin - first_row : end - first_row]
        keep_mask[begin - start : end - start] = staged.keep_mask[begin - first_row : end - first_row]
        del staged  # as large as what Zarr needs
    group = zarr.open_group(zarr_root(out), mode="r+")
    group["bold"][start:stop] = bold
    group["keep_mask"][start:stop] = keep_mask


def _write_coverage(out: Store, staging: Store, ids: Sequence[str], start: int) -> None:
    import zarr

    block = np.stack([load_staged(staging, recording_id).coverage for recording_id in ids])
    zarr.open_group(zarr_root(out), mode="r+")["coverage"][start : start + len(ids)] = block
