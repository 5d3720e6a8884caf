"""Put series on another TR: one linear operator in time, the same for every parcel.

The kernel is a sinc under a Kaiser window (Kaiser 1974; Oppenheim and Schafer, Discrete-Time Signal Processing, 7.5),
low-pass below both Nyquist frequencies. With the lower of these as 1: up to 0.65 amplitudes are kept within 0.1 %;
what would alias to a frequency below 0.85 is at least 59 dB down (a thousandth); between the two lies the transition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from brainlm.errors import DataError
from data_prep.clean import fill_censored

SAME_TR = 1e-3  # relative: below this, headers and sidecars merely round differently
CUTOFF = 0.9  # of the lower Nyquist frequency
NUM_LOBES = 8  # of the sinc on each side
KAISER_BETA = 6.0  # about -63 dB in the stop band
BLOCK_VALUES = 2**19  # values worked on at a time: 4 MiB
SAME_TIME = 1e-6  # of a TR: times that differ by less are equal


def is_same_tr(a_s: float, b_s: float) -> bool:
    return abs(a_s - b_s) <= SAME_TR * b_s


def num_resampled(num_timepoints: int, tr_s: float, target_tr_s: float) -> int:
    """Return how many timepoints fit: the last one is not after the last that was measured."""
    return int(np.floor((num_timepoints - 1) * tr_s / target_tr_s + 1e-9)) + 1


def resampling_operator(num_timepoints: int, tr_s: float, target_tr_s: float) -> csr_array:
    """Return the operator, sparse (T', T), from samples every `tr_s` to samples every `target_tr_s`, both from time 0.

    Rows sum to 1, so that constants stay constant; near the ends the kernel is cut and normalised again, so nothing is
    invented outside of the recording.
    """
    cutoff_hz = CUTOFF * 0.5 / max(tr_s, target_tr_s)
    half_width_s = NUM_LOBES / (2.0 * cutoff_hz)
    near, distance_s = _neighbours(num_timepoints, tr_s, target_tr_s, half_width_s)
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(1.0 - (distance_s / half_width_s) ** 2, 0.0)))
    kernel = np.sinc(2.0 * cutoff_hz * distance_s) * window
    kernel[(np.abs(distance_s) >= half_width_s) | (near < 0) | (near >= num_timepoints)] = 0.0
    kernel /= kernel.sum(axis=1, keepdims=True)
    used = kernel != 0.0
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return csr_array((kernel[used], near[used], starts), shape=(len(near), num_timepoints))


def resample(
    bold: NDArray[np.float32], keep_mask: NDArray[np.bool_], tr_s: float, target_tr_s: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return series and mask at another TR.

    A timepoint is kept if all timepoints of the input that are nearer to it than the longer of the two TRs are kept:
    those under the main lobe of the kernel. Censored ones are interpolated between kept ones first (as `clean` leaves
    them), so that what they held has no influence on any timepoint.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Finite at kept timepoints. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = kept.

    Returns
    -------
    bold : ndarray, shape (T', P), float32
    keep_mask : ndarray, shape (T',), bool
    """
    if len(bold) < 2:
        raise DataError(f"{len(bold)} timepoints cannot be resampled")
    operator = resampling_operator(len(bold), tr_s, target_tr_s)
    resampled = np.empty((operator.shape[0], bold.shape[1]), dtype=np.float32)
    size = max(1, BLOCK_VALUES // max(operator.shape))
    for start in range(0, bold.shape[1], size):
        columns = slice(start, start + size)
        filled = fill_censored(bold[:, columns], keep_mask)
        block = np.array(filled, dtype=np.float64, order="C")
        mean = block.mean(axis=0)  # small numbers keep their digits
        resampled[:, columns] = operator @ (block - mean) + mean
    return resampled, resample_mask(keep_mask, tr_s, target_tr_s)


def resample_mask(keep_mask: NDArray[np.bool_], tr_s: float, target_tr_s: float) -> NDArray[np.bool_]:
    """Return the mask at another TR, shape (T',); see `resample`."""
    reach_s = max(tr_s, target_tr_s)
    near, distance_s = _neighbours(len(keep_mask), tr_s, target_tr_s, reach_s)
    counts = (np.abs(distance_s) < reach_s - SAME_TIME * tr_s) & (near >= 0) & (near < len(keep_mask))
    return np.asarray((keep_mask[np.clip(near, 0, len(keep_mask) - 1)] | ~counts).all(axis=1))


def future_s(tr_s: float, target_tr_s: float) -> float:
    """Return how many seconds ahead a resampled timepoint reaches."""
    return NUM_LOBES * max(tr_s, target_tr_s) / CUTOFF


def _neighbours(
    num_timepoints: int, tr_s: float, target_tr_s: float, reach_s: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers of the source timepoints around each target, and how much later the target is, (T', W).

    Numbers may lie outside of the recording.
    """
    times_s = np.arange(num_resampled(num_timepoints, tr_s, target_tr_s)) * target_tr_s
    reach = int(np.ceil(reach_s / tr_s))
    near = np.floor(times_s / tr_s).astype(np.int64)[:, None] + np.arange(-reach, reach + 2)
    return near, times_s[:, None] - near * tr_s
