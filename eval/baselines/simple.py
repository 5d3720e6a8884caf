"""Baselines that learn nothing: the mean, interpolation in time, persistence.

Visible censored values come interpolated between visible kept ones (see `eval.cohort`), so that interpolation and
persistence give exactly what they would give without these timepoints.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from brainlm.input_contract import InputContract
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.models import Predictions
from eval.scoring import expand_mask


class Baseline:
    """A method in the data set's own units that needs no fit."""

    def __init__(self, contract: InputContract) -> None:
        self._contract = contract
        self._cohort: Cohort | None = None
        usable = contract.usable
        self.zero_z: FloatArray = np.where(usable, -contract.median / np.where(usable, contract.iqr, 1.0), 0.0)
        """Shape (P,): contract units of a value equal to the mean that the series were centred on."""

    @property
    def contract(self) -> InputContract:
        return self._contract

    def fit(self, cohort: Cohort) -> None:
        """Nothing to learn but which timepoints are censored."""
        self._cohort = cohort

    def kept(self, ref: WindowRef, window_len: int) -> BoolArray:
        """Return which timepoints of a window are kept, shape (W,); before `fit`, all."""
        return np.ones(window_len, dtype=bool) if self._cohort is None else self._cohort.kept(ref)


class Mean(Baseline):
    """Predict the mean that the window was centred on: of the recording, or of the visible values."""

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        out: FloatArray = np.broadcast_to(self.zero_z[:, None], windows_z.shape)
        return out


class Interpolation(Baseline):
    """Interpolate linearly in time between visible values, parcel by parcel; edges are held."""

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        B, P, W = windows_z.shape
        hidden = expand_mask(mask, P, W)
        out = np.repeat(np.repeat(self.zero_z[None, :, None], B, axis=0), W, axis=2)
        time = np.arange(W)
        for b, p in np.argwhere(present & hidden.any(-1) & ~hidden.all(-1)):
            seen = ~hidden[b, p]
            out[b, p] = np.interp(time, time[seen], windows_z[b, p, seen].astype(np.float64))
        return out


class Persistence(Baseline):
    """Repeat the last value that was seen before a hidden stretch (0 where none was)."""

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        _, P, W = windows_z.shape
        hidden = expand_mask(mask, P, W)
        last = np.maximum.accumulate(np.where(hidden, -1, np.arange(W)), axis=2)
        held = np.take_along_axis(windows_z.astype(np.float64), np.maximum(last, 0), axis=2)
        out: FloatArray = np.where(last >= 0, held, self.zero_z[None, :, None])
        return out
