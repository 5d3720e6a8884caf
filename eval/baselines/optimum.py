"""The best that can be done on simulated data: the conditional mean under the system it was drawn from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from brainlm.dataset import Dataset
from brainlm.errors import DataError
from brainlm.state_space import TRUTH_FILE, LinearStateSpace, SimulatedTruth, load_truth
from eval.baselines.simple import Baseline
from eval.cohort import BoolArray, FloatArray, WindowRef
from eval.models import Predictions
from eval.scoring import expand_mask

MEAN_UNKNOWN = "optimum, mean unknown"
OFFSET_VARIANCE = 4.0  # of the unknown mean, in units of the parcel's variance without noise: wide
OFFSET_KEEPS = 1 - 1e-9  # per timepoint: a constant, to a system that must be stable


def read_truth(dataset: Dataset) -> SimulatedTruth | None:
    """Return what was planted in a simulated data set, None where it is not simulated."""
    name = f"truth/{TRUTH_FILE}"
    return load_truth(dataset.store.read_bytes(name)) if dataset.store.exists(name) else None


def why_no_optimum(dataset: Dataset, truth: SimulatedTruth | None) -> str:
    """Say why the planted system does not describe the prepared series, "" if it does."""
    if truth is None:
        return "not simulated"
    contract = dataset.contract
    if truth.parcels != contract.atlas.parcel_names:
        return "the truth has other parcels than the data set"
    if abs(truth.tr_s - contract.tr_s) > 1e-3:
        return f"series were resampled from TR {truth.tr_s:g} s to {contract.tr_s:g} s"
    if contract.high_pass_hz is not None or contract.low_pass_hz is not None:
        return "series were filtered"
    return ""


class _MeanUnknown(SimulatedTruth):
    """A truth whose systems have an unknown constant in each parcel, among their states."""

    def system(self, recording_id: str) -> tuple[LinearStateSpace, FloatArray | None]:
        known, inputs = super().system(recording_id)
        P = known.num_parcels
        offset_var = OFFSET_VARIANCE * np.diag(known.loading @ known.stationary_cov @ known.loading.T).clip(min=1e-12)
        system = LinearStateSpace(
            transition=block_diag(known.transition, OFFSET_KEEPS * np.eye(P)),
            process_cov=block_diag(known.process_cov, (1 - OFFSET_KEEPS**2) * np.diag(offset_var)),
            loading=np.concatenate([known.loading, np.eye(P)], axis=1),
            noise_var=known.noise_var,
        )
        return system, None if inputs is None else np.pad(inputs, ((0, 0), (0, P)))


class Optimum(Baseline):
    """Exact Kalman smoother of each recording's own system, given the measurements of this window alone.

    Parameters
    ----------
    mean_known : bool
        False: the mean of each parcel is unknown and estimated along with the state, from what is visible. That is the
        best for methods which are given series that were centred on a part of themselves.

    Notes
    -----
    The truth is relative to the process's mean, the series are centred on the recording's: the difference is part of
    neither the model nor the score, and makes this bound very slightly lower than the exact one.
    """

    def __init__(self, dataset: Dataset, mean_known: bool = True) -> None:
        super().__init__(dataset.contract)
        truth = read_truth(dataset)
        if truth is None or (reason := why_no_optimum(dataset, truth)):
            raise DataError(
                f"{dataset.name}: the optimal predictor is not known ({reason if truth else 'not simulated'})"
            )
        self.truth = truth if mean_known else _MeanUnknown(facts=truth.facts, arrays=truth.arrays)

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        _, P, W = windows_z.shape
        usable = self.contract.usable
        iqr = np.where(usable, self.contract.iqr, 1.0).astype(np.float64)
        visible = ~expand_mask(mask, P, W) & present[:, :, None]
        out: FloatArray = np.zeros(windows_z.shape)
        for b, ref in enumerate(refs):
            system, inputs = self.truth.system(ref.recording_id)
            until = ref.start + W  # the system starts at the recording's first timepoint, where inputs count from
            if inputs is not None and len(inputs) < until:
                raise DataError(
                    f"{ref.recording_id}: the truth has {len(inputs)} timepoints, the window ends at {until}"
                )
            bold, observed = np.zeros((until, P)), np.zeros((until, P), dtype=bool)
            observed[ref.start :] = visible[b].T & self.kept(ref, W)[:, None]
            bold[ref.start :] = (windows_z[b].T.astype(np.float64) - self.zero_z) * iqr
            expected = system.smooth(bold, observed, None if inputs is None else inputs[:until])
            out[b] = (expected[ref.start :] / iqr + self.zero_z).T
        return out
