"""The archive ``recordings.zarr`` (Zarr v3, sharded): every prepared series, neither centred nor scaled.

::

    bold        (sum of T, P) float32   after cleaning and resampling, in source units; NaN where a parcel is missing
    keep_mask   (sum of T,)   bool      True = timepoint kept
    coverage    (N, P)        float32   0 = the parcel is missing from the recording

Rows of ``bold`` and ``keep_mask`` begin at ``first_row`` of ``recordings.parquet``; row i of ``coverage`` is its row i.
A stored object (a Zarr shard) is written by one task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.work import Workers

FOLDER = "recordings.zarr"
CHUNK_ROWS = 256  # about one recording
SHARD_ROWS = 64 * CHUNK_ROWS
CHUNK_RECORDINGS = 1024


def zarr_root(out: Store) -> Any:
    """Return the Zarr store of a data set, for ``zarr.open_group``."""
    from zarr.storage import FsspecStore, LocalStore

    if out.is_local:
        return LocalStore(out.path(FOLDER))
    return FsspecStore.from_url(out.url_of(FOLDER))


def write_archive(out: Store, staging: Store, rows: Sequence[dict[str, Any]], num_parcels: int, run: Workers) -> None:
    """Write all recordings, in the order of `rows`, which carry ``first_row`` and ``num_timepoints``."""
    import zarr

    total = sum(row["num_timepoints"] for row in rows)
    group = zarr.open_group(zarr_root(out), mode="w", zarr_format=3)
    shard_rows = min(SHARD_ROWS, -(-total // CHUNK_ROWS) * CHUNK_ROWS)
    group.create_array(
        "bold",
        shape=(total, num_parcels),
        dtype="float32",
        chunks=(CHUNK_ROWS, num_parcels),
        shards=(shard_rows, num_parcels),
        fill_value=float("nan"),
        dimension_names=("time", "parcel"),
    )
    keep_mask = group.create_array(
        "keep_mask", shape=(total,), dtype="bool", chunks=(SHARD_ROWS,), fill_value=False, dimension_names=("time",)
    )
    keep_mask[:] = np.ones(total, dtype=bool)
    group.create_array(
        "coverage",
        shape=(len(rows), num_parcels),
        dtype="float32",
        chunks=(CHUNK_RECORDINGS, num_parcels),
        fill_value=0.0,
        dimension_names=("recording", "parcel"),
    )
    tasks = []
    for start in range(0, total, shard_rows):
        stop = min(start + shard_rows, total)
        inside = [
            (row["recording_id"], row["first_row"])
            for row in rows
            if row["first_row"] < stop and row["first_row"] + row["num_timepoints"] > start
        ]
        tasks.append((out, staging, inside, start, stop, num_parcels))
    run.run(_write_bold, tasks, "archive")
    run.run(
        _write_coverage,
        [
            (out, staging, [row["recording_id"] for row in rows[start : start + CHUNK_RECORDINGS]], start)
            for start in range(0, len(rows), CHUNK_RECORDINGS)
        ],
        "coverage",
    )


def _write_bold(
    out: Store, staging: Store, recordings: list[tuple[str, int]], start: int, stop: int, num_parcels: int
) -> None:
    import zarr

    block = np.full((stop - start, num_parcels), np.nan, dtype=np.float32)
    for recording_id, first_row in recordings:
        bold, _ = load_staged(staging, recording_id)
        begin, end = max(first_row, start), min(first_row + len(bold), stop)
        block[begin - start : end - start] = bold[begin - first_row : end - first_row]
    zarr.open_group(zarr_root(out), mode="r+")["bold"][start:stop] = block


def _write_coverage(out: Store, staging: Store, ids: list[str], start: int) -> None:
    import zarr

    block = np.stack([load_staged(staging, recording_id)[1] for recording_id in ids])
    zarr.open_group(zarr_root(out), mode="r+")["coverage"][start : start + len(ids)] = block
