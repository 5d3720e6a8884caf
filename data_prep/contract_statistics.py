"""Median and IQR of every parcel over all train recordings, exact, in bounded memory.

The series are turned round on storage: each task writes the columns of some recordings one after another, then each
task reads a few parcels of all of them. Twice the data is moved, whatever the number of parcels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import StoreError
from brainlm.scaling import centre, robust_statistics
from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.work import Workers

COPIES = 6  # of a block in float32, while quantiles are computed


def compute_statistics(
    staging: Store, rows: Sequence[dict[str, Any]], num_parcels: int, memory_mb: int, run: Workers
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return which parcels are covered, and their median and IQR, over centred series.

    Parameters
    ----------
    rows : sequence of mapping
        The train recordings. A recording counts for no parcel that it misses.

    Returns
    -------
    covered, median, iqr : ndarray, shape (P,)
        Median and IQR are 0 where no recording covers the parcel.
    """
    budget = memory_mb * 1024**2 // (4 * COPIES)
    groups = _group(rows, max(1, budget // num_parcels))
    tasks = [
        (staging, f"columns-{number:05d}.f32", [row["recording_id"] for row in group])
        for number, group in enumerate(groups)
    ]
    lengths = run.run(_write_columns, tasks, "statistics, columns")
    files = [(task[1], int(length)) for task, length in zip(tasks, lengths)]
    block = max(1, min(num_parcels, budget // sum(length for _, length in files)))
    starts = range(0, num_parcels, block)
    parts = run.run(
        _block_statistics,
        [(staging, files, start, min(start + block, num_parcels)) for start in starts],
        "statistics, parcels",
    )
    covered, median, iqr = (np.concatenate([part[i] for part in parts]) for i in range(3))
    for name, _ in files:
        staging.remove(name)
    return covered, median, iqr


def _group(rows: Sequence[dict[str, Any]], max_timepoints: int) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    size = 0
    for row in rows:
        if not groups or size + row["num_timepoints"] > max_timepoints:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += row["num_timepoints"]
    return groups


def _write_columns(staging: Store, name: str, ids: list[str]) -> int:
    """Write centred series as (P, sum of T), NaN where a parcel is missing; return the sum of T."""
    columns = np.concatenate([centre(load_staged(staging, recording_id)[0]).T for recording_id in ids], axis=1)
    staging.write_bytes(name, np.ascontiguousarray(columns, dtype="<f4").tobytes())
    return int(columns.shape[1])


def _block_statistics(
    staging: Store, files: list[tuple[str, int]], start: int, stop: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    parts = []
    for name, length in files:
        try:
            data = staging.fs.cat_file(staging.path(name), start=start * length * 4, end=stop * length * 4)
        except OSError as error:
            raise StoreError(f"cannot read {staging.url_of(name)}: {error}") from error
        parts.append(np.frombuffer(data, dtype="<f4").reshape(stop - start, length))
    block = np.concatenate(parts, axis=1)
    covered = np.zeros(stop - start, dtype=bool)
    median, iqr = np.zeros(stop - start, dtype=np.float32), np.zeros(stop - start, dtype=np.float32)
    for i, series in enumerate(block):
        present = series[np.isfinite(series)]
        if present.size:
            covered[i] = True
            median[i : i + 1], iqr[i : i + 1] = robust_statistics(present[:, None])
    return covered, median, iqr
