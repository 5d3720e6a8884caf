"""Censored timepoints: ranges on disk, masks in memory, and what stands in for them.

A censored timepoint was kept out of every fit (motion, for instance); True in ``keep_mask`` = kept. What a series holds
there was interpolated from kept neighbours by the preparation: finite, so that a window can be fed, but no measurement.
It is never scored. It is not fed as it is either: a visible value that was interpolated from hidden neighbours would
give these away, so that `refill_censored` interpolates again, between values that are visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ranges = tuple[tuple[int, int], ...]


def censored_ranges(keep_mask: NDArray[np.bool_]) -> Ranges:
    """Return the ranges [start, stop) of timepoints that are not kept, in order; `keep_mask` has shape (T,)."""
    steps = np.diff(np.concatenate([[1], keep_mask.astype(np.int8), [1]]))
    return tuple((int(a), int(b)) for a, b in zip(np.flatnonzero(steps < 0), np.flatnonzero(steps > 0)))


def kept_timepoints(ranges: Sequence[tuple[int, int]], num_timepoints: int) -> NDArray[np.bool_]:
    """Return ``keep_mask (T,)``: the inverse of `censored_ranges`."""
    kept = np.ones(num_timepoints, dtype=bool)
    for start, stop in ranges:
        kept[start:stop] = False
    return kept


def refill_censored(
    window_PW: NDArray[Any],
    visible_PK: NDArray[np.bool_],
    kept_W: NDArray[np.bool_],
    empty_P: NDArray[np.float32] | float = 0.0,
) -> None:
    """Replace visible values at censored timepoints, in place.

    Each becomes the linear interpolation in time between its parcel's nearest visible kept values, held at the ends.
    Neither hidden values nor what was stored at censored timepoints has any influence.

    Parameters
    ----------
    window_PW : ndarray, shape (P, W), floating
        One window, in any units.
    visible_PK : ndarray, shape (P, K), bool
        Patches that are visible; the others are left as they are.
    kept_W : ndarray, shape (W,), bool
        False = censored.
    empty_P : ndarray, shape (P,), or float
        The recording's mean, in the units of the window: for parcels without any visible kept value.
    """
    censored = np.flatnonzero(~kept_W)
    if len(censored) == 0:
        return
    W, K = len(kept_W), visible_PK.shape[1]
    patch_len, time = W // K, np.arange(W)
    patch = censored // patch_len
    # Within its own patch, which is visible, the neighbours of a timepoint are the same for all parcels ...
    last = np.maximum.accumulate(np.where(kept_W, time, -1).reshape(K, patch_len), axis=1)
    first = np.minimum.accumulate(np.where(kept_W, time, W).reshape(K, patch_len)[:, ::-1], axis=1)[:, ::-1]
    # ... beyond it they depend on which patches a parcel shows.
    before = np.maximum.accumulate(np.where(visible_PK, last[:, -1], -1), axis=1)
    after = np.minimum.accumulate(np.where(visible_PK, first[:, 0], W)[:, ::-1], axis=1)[:, ::-1]
    before = np.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    after = np.pad(after[:, 1:], ((0, 0), (0, 1)), constant_values=W)
    left = np.maximum(before[:, patch], last.reshape(-1)[censored])  # (P, number of censored timepoints)
    right = np.minimum(after[:, patch], first.reshape(-1)[censored])
    no_left, no_right = left < 0, right == W
    at = np.where(no_left, right, left), np.where(no_right, left, right)
    low, high = (np.take_along_axis(window_PW, np.clip(index, 0, W - 1), axis=1) for index in at)
    share = ((censored - left) / np.maximum(right - left, 1)).astype(window_PW.dtype)
    value = np.where(no_left, high, np.where(no_right, low, low + (high - low) * share))
    value = np.where(no_left & no_right, np.reshape(empty_P, (-1, 1)), value)
    window_PW[:, censored] = np.where(visible_PK[:, patch], value, window_PW[:, censored])
