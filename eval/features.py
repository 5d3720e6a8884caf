"""Parcel by feature matrices of one recording: attention, functional connectivity, raw series.

Connectivity and raw series leave censored timepoints out. A network, which needs whole windows, is fed values there
that are interpolated between visible kept ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import refill_censored
from brainlm.ordering import even_starts
from brainlm.scaling import recording_mean, scale
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.masks import random_mask
from eval.models import Network


class RecordingWindows(NamedTuple):
    """Windows of one recording in the units of the series: starts, (N, P, W), scored parcels (P,), kept (N, W)."""

    starts: list[int]
    windows: NDArray[np.float32]
    scored_P: BoolArray
    kept: BoolArray

    @property
    def measured(self) -> NDArray[np.float32]:
        """All windows one after another without what is censored, shape (P, number of kept timepoints)."""
        return np.concatenate([window[:, kept] for window, kept in zip(self.windows, self.kept)], axis=1)


def recording_windows(cohort: Cohort, index: int, max_windows: int) -> RecordingWindows:
    """Return the windows of one recording."""
    bold, _, scored_P, kept_T = cohort.series(index)
    starts = even_starts(len(bold), cohort.window_len, max_windows)
    windows = np.stack([bold[s : s + cohort.window_len].T for s in starts])
    return RecordingWindows(starts, windows, scored_P, np.stack([kept_T[s : s + cohort.window_len] for s in starts]))


def functional_connectivity(series: NDArray[np.float32]) -> FloatArray:
    """Return Pearson correlation between parcels over time, (P, N) -> (P, P); 0 for constant parcels."""
    x = standardised(series.astype(np.float64))
    return x @ x.T


def standardised(rows: FloatArray) -> FloatArray:
    """Centre rows and divide them by their norm, so that products of rows are correlations; constant rows become 0."""
    x = rows - rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    out: FloatArray = np.where(norm > 1e-12 * np.abs(rows).max(initial=1e-300), x / np.where(norm > 0, norm, 1.0), 0.0)
    return out


def without_self(matrix: FloatArray) -> FloatArray:
    """Replace the diagonal by the mean of the rest of its row: what a parcel has with itself tells no network."""
    out = matrix.copy()
    np.fill_diagonal(out, 0.0)
    np.fill_diagonal(out, out.sum(axis=1) / (len(out) - 1))
    return out


def attention(
    network: Network,
    cohort: Cohort,
    index: int,
    *,
    parts: tuple[str, ...],
    layer: int,
    mask_ratio: float,
    num_masks: int,
    max_windows: int,
    seed: int,
    batch_size: int,
    permute_series: bool = False,
) -> dict[str, FloatArray]:
    """Return attention from parcel to parcel, averaged over windows and masks, for the encoder and the decoder.

    Parameters
    ----------
    permute_series : bool
        Give each position the series of another parcel: a control in which position stays and signal goes.

    Returns
    -------
    dict of ndarray, shape (P, P)
        Rows are NaN where a parcel is missing or was never a query.
    """
    starts, windows, scored_P, kept = recording_windows(cohort, index, max_windows)
    recording_id = cohort.entry(index).recording_id
    if permute_series:
        here = np.flatnonzero(scored_P)
        key = int.from_bytes(recording_id.encode(), "little")
        order = np.random.default_rng([seed, *_words(key)]).permutation(here)
        windows = windows.copy()
        windows[:, here] = windows[:, order]
    windows_z = scale(windows.swapaxes(1, 2), network.contract).swapaxes(1, 2)
    windows_z = np.where(scored_P[:, None], windows_z, np.float32(0.0))
    mean_z = recording_mean(network.contract)
    jobs = []
    for number in range(num_masks):
        for i, start in enumerate(starts):
            ref = WindowRef(cohort.split, index, recording_id, start)
            jobs.append((i, random_mask(cohort, scored_P, mask_ratio, seed + number, ref)))
    total = {part: np.zeros((cohort.num_parcels,) * 2) for part in parts}
    counts = {part: np.zeros(cohort.num_parcels) for part in parts}
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        fed = windows_z[[i for i, _ in batch]]
        masks = np.stack([mask for _, mask in batch])
        for window_z, mask, (i, _) in zip(fed, masks, batch):
            refill_censored(window_z, ~mask.reshape(cohort.num_parcels, -1), kept[i], mean_z)
        present = np.repeat(scored_P[None], len(batch), axis=0)
        for part in parts:
            for weights in network.parcel_attention(
                fed, masks, present, part, layer, kept[[i for i, _ in batch]]
            ).astype(np.float64):
                rows = np.isfinite(weights).all(axis=1) & scored_P
                total[part][rows] += weights[rows]
                counts[part] += rows
    return {part: total[part] / np.where(counts[part] > 0, counts[part], np.nan)[:, None] for part in parts}


def _words(number: int) -> list[int]:
    words = []
    while number:
        words.append(number & 0xFFFFFFFF)
        number >>= 32
    return words or [0]
