"""The order of training windows: a pure function of (recording lengths, seed, epoch), never of ranks or workers.

Exact resume follows: the position in an epoch is one number. A rank takes its part of each global batch with
`rank_part`, so 1, 2 or 64 ranks see the same global batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError

_ORDER, _EVAL = 0x0D, 0xE7  # keep the random streams of different uses apart


def window_order(
    num_timepoints: NDArray[np.int64], window_len: int, windows_per_recording: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return the windows of one epoch, in the order in which they are trained on.

    Parameters
    ----------
    num_timepoints : ndarray, shape (N,)
        Length of every recording.
    window_len : int
        Timepoints per window.
    windows_per_recording : int
        Windows drawn from each recording in an epoch, their starts uniform and independent (paper, Sec. 4.1).

    Returns
    -------
    ndarray, shape (N * windows_per_recording, 2), int64
        Recording index and first timepoint of each window.
    """
    lengths = np.asarray(num_timepoints, dtype=np.int64)
    if lengths.size == 0:
        raise DataError("no recordings to draw windows from")
    if (lengths < window_len).any():
        raise DataError(
            f"recording {int(np.argmin(lengths))} has {lengths.min()} timepoints, a window needs {window_len}"
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_ORDER, seed, epoch])))
    recordings = np.repeat(np.arange(lengths.size), windows_per_recording)
    starts = rng.integers(0, lengths[recordings] - window_len + 1)
    order = rng.permutation(recordings.size)
    return np.stack([recordings[order], starts[order]], axis=1)


def rank_part(batch: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the rows of a global batch that one rank trains on: a contiguous, equal part."""
    if len(batch) % world_size:
        raise DataError(f"a global batch of {len(batch)} windows cannot be divided among {world_size} ranks")
    share = len(batch) // world_size
    return batch[rank * share : (rank + 1) * share]


def even_starts(num_timepoints: int, window_len: int, max_windows: int) -> list[int]:
    """Return starts of at most `max_windows` windows that do not overlap, spread evenly over a recording.

    The order and number depend on the length alone, so scores are reproducible.
    """
    if num_timepoints < window_len:
        raise DataError(f"a recording of {num_timepoints} timepoints is shorter than a window of {window_len}")
    count = min(max_windows, num_timepoints // window_len)
    slack = num_timepoints - count * window_len
    return [i * window_len + (slack * (2 * i + 1)) // (2 * count) for i in range(count)]
