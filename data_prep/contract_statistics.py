"""Median and IQR of every parcel over all train recordings: exact, in bounded memory, by any workers in any order.

Workers count the digits of centred values (`data_prep.radix_quantiles`) in three passes over the staged recordings.
Counts are summed as they come, so this process holds one set of them, and a worker one set and one recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.scaling import centre
from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.radix_quantiles import NUM_PASSES, Pass, QuartileSearch
from data_prep.work import Workers

RECORDINGS_PER_TASK = 64  # at most; few tasks, because each sends its counts back
TASKS = 64  # at least, where there are enough recordings to give every worker some
PARCELS_AT_ONCE = 1024  # bounds the counts to 100 MB; finer atlases take three more passes for every 1024 parcels


def compute_statistics(
    staging: Store, ids: Sequence[str], num_parcels: int, run: Workers
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return which parcels are covered, and their median and IQR over all centred, kept timepoints.

    The result is that of `brainlm.scaling.robust_statistics` on the concatenated recordings, bit for bit, whatever the
    number of workers and the order of recordings.

    Parameters
    ----------
    ids : sequence of str
        The train recordings. A recording counts for no parcel that it misses; censored timepoints do not count.

    Returns
    -------
    covered, median, iqr : ndarray, shape (P,)
        Median and IQR (float32, in units of the series) are 0 where no recording covers the parcel.

    Raises
    ------
    DataError
        If there are no train recordings, or a staged recording has the wrong number of parcels, or a parcel that is
        neither missing nor finite at every kept timepoint.
    StoreError
        If a staged recording cannot be read.
    """
    if not ids:
        raise DataError("no train recordings to take statistics from: expected at least one; lower splits.val, .test")
    size = min(RECORDINGS_PER_TASK, max(1, len(ids) // TASKS))
    groups = [ids[first : first + size] for first in range(0, len(ids), size)]
    blocks = [(first, min(first + PARCELS_AT_ONCE, num_parcels)) for first in range(0, num_parcels, PARCELS_AT_ONCE)]
    passes = NUM_PASSES * len(blocks)
    num_values, quartiles = np.zeros(num_parcels, dtype=np.int64), np.zeros((num_parcels, 3))
    for number, (first, last) in enumerate(blocks):
        search = QuartileSearch(last - first)
        for step in range(NUM_PASSES):
            sought = run.share(search.next_pass)
            tasks = [(staging, group, num_parcels, first, sought) for group in groups]
            counts = search.next_pass.empty_counts()
            label = f"statistics, pass {number * NUM_PASSES + step + 1} of {passes}"
            for _, part in run.stream(_count_recordings, tasks, label):
                counts += part
            search.narrow(counts)
        num_values[first:last], quartiles[first:last] = search.num_values, search.quartiles()
    covered = num_values > 0
    low, median, high = np.where(covered[:, None], quartiles, 0.0).T
    return covered, median.astype(np.float32), (high - low).astype(np.float32)


def update(counts: NDArray[np.int64], sought: Pass, bold: NDArray[np.float32], keep_mask: NDArray[np.bool_]) -> None:
    """Add one recording to the counts of a pass.

    Parameters
    ----------
    counts : ndarray, shape (sought.num_rows, sought.num_digits)
        Changed in place.
    bold : ndarray, shape (T, P)
        As staged: uncentred, NaN in the columns of missing parcels. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = timepoint kept. A recording without any counts for nothing.
    """
    if not keep_mask.any():
        return
    with np.errstate(over="ignore", invalid="ignore"):  # told below, with the parcel
        centred = centre(bold, keep_mask)[keep_mask]
    missing = np.isnan(bold)[keep_mask].all(axis=0)
    broken = ~(missing | np.isfinite(centred).all(axis=0))
    if broken.any():
        raise DataError(
            f"expected every parcel to be finite at all kept timepoints or missing (NaN) at all, found both in column "
            f"{np.flatnonzero(broken)[0]} ({broken.sum()} columns in all); remove the staging folder and run again"
        )
    sought.add_counts(counts, centred, np.flatnonzero(~missing))


def _count_recordings(staging: Store, ids: Sequence[str], num_parcels: int, first: int, sought: Pass) -> NDArray[Any]:
    """Return the counts of some recordings, for parcels from `first` on."""
    counts = sought.empty_counts()
    for recording_id in ids:
        bold, keep_mask = _load(staging, recording_id, num_parcels)
        try:
            update(counts, sought, bold[:, first : first + sought.num_parcels], keep_mask)
        except DataError as error:
            raise DataError(f"staged recording {recording_id} ({staging.url}): {error}") from error
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))  # a quarter of the bytes or less to send back


def _load(staging: Store, recording_id: str, num_parcels: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    staged = load_staged(staging, recording_id)
    if staged.bold.ndim != 2 or staged.bold.shape[1] != num_parcels or staged.keep_mask.shape != staged.bold.shape[:1]:
        raise DataError(
            f"staged recording {recording_id} ({staging.url}): expected bold (T, {num_parcels}) and keep_mask (T,), "
            f"found {staged.bold.shape} and {staged.keep_mask.shape}; remove the staging folder and run again"
        )
    return staged.bold, staged.keep_mask
