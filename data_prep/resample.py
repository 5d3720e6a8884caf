"""Put series on another TR: one linear operator in time, the same for every parcel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError

SAME_TR = 1e-3  # relative: below this, headers and sidecars merely round differently
CUTOFF = 0.9  # of the lower Nyquist frequency
NUM_LOBES = 8  # of the sinc on each side
KAISER_BETA = 6.0  # about -60 dB in the stop band


def is_same_tr(a_s: float, b_s: float) -> bool:
    return abs(a_s - b_s) <= SAME_TR * b_s


def num_resampled(num_timepoints: int, tr_s: float, target_tr_s: float) -> int:
    """Return how many timepoints fit: the last one is not after the last that was measured."""
    return int(np.floor((num_timepoints - 1) * tr_s / target_tr_s + 1e-9)) + 1


def resampling_operator(num_timepoints: int, tr_s: float, target_tr_s: float) -> NDArray[np.float64]:
    """Return the operator, shape (T', T), from samples every `tr_s` to samples every `target_tr_s`, both from time 0.

    A Kaiser-windowed sinc, low-pass below both Nyquist frequencies. Rows sum to 1, so that constants stay constant;
    near the ends the kernel is cut and normalised again, so nothing is invented outside of the recording.
    """
    times_s = np.arange(num_resampled(num_timepoints, tr_s, target_tr_s)) * target_tr_s
    cutoff_hz = CUTOFF * 0.5 / max(tr_s, target_tr_s)
    half_width_s = NUM_LOBES / (2.0 * cutoff_hz)
    distance_s = times_s[:, None] - np.arange(num_timepoints)[None, :] * tr_s
    inside = np.abs(distance_s) < half_width_s
    window = np.zeros_like(distance_s)
    window[inside] = np.i0(KAISER_BETA * np.sqrt(1.0 - (distance_s[inside] / half_width_s) ** 2))
    kernel = np.sinc(2.0 * cutoff_hz * distance_s) * window
    return np.asarray(kernel / kernel.sum(axis=1, keepdims=True))


def resample(bold: NDArray[np.float32], tr_s: float, target_tr_s: float) -> NDArray[np.float32]:
    """Return series at another TR.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Finite. Not modified.

    Returns
    -------
    ndarray, shape (T', P), float32
    """
    if len(bold) < 2:
        raise DataError(f"{len(bold)} timepoints cannot be resampled")
    operator = resampling_operator(len(bold), tr_s, target_tr_s)
    mean = bold.mean(axis=0, dtype=np.float64)  # small numbers keep their digits
    return np.asarray(operator @ (bold - mean) + mean, dtype=np.float32)


def future_s(tr_s: float, target_tr_s: float) -> float:
    """Return how many seconds ahead a resampled timepoint reaches."""
    return NUM_LOBES * max(tr_s, target_tr_s) / CUTOFF
