"""Conditional mean of hidden parcels given visible ones at the same timepoint, under a Gaussian.

The bar for reconstruction: nearly all that can be known of a hidden value is in other parcels at the same time. The
covariance is the group's. The adapted form mixes in the window's own, estimated from its visible values alone by rounds
of expectation and maximisation (Dempster et al. 1977, with the group's covariance as prior): the stronger one on real
data. Censored timepoints enter neither covariance; a value at a kept timepoint is predicted from that timepoint alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brainlm.input_contract import InputContract
from eval.baselines.simple import Baseline
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.masks import random_mask
from eval.models import Predictions
from eval.scoring import predict_windows, window_sums

TUNING_MASK_RATIO = 0.5
ROUNDS = 2
CACHED_PATTERNS = 64
JITTER = 1e-6  # of the mean variance: below any real noise floor, above rounding


def conditional_weights(covariance: FloatArray, visible: NDArray[np.int64], hidden: NDArray[np.int64]) -> FloatArray:
    """Return A (hidden, visible) with E[x_hidden | x_visible] = A x_visible for a zero-mean Gaussian."""
    from scipy.linalg import cho_factor, cho_solve

    factor = cho_factor(covariance[np.ix_(visible, visible)], lower=True, check_finite=False)
    out: FloatArray = cho_solve(factor, covariance[np.ix_(visible, hidden)], check_finite=False).T
    return out


def group_covariance(cohort: Cohort, contract: InputContract) -> FloatArray:
    """Average covariance of the train split in contract units, shape (P, P); 0 where a parcel has no data.

    Every recording counts alike: its kept values are divided by their root mean square first. Parcels missing from some
    recordings are averaged over those that have them; the result is made positive semidefinite.
    """
    P = cohort.num_parcels
    total, counts = np.zeros((P, P)), np.zeros((P, P))
    iqr = np.where(contract.usable, contract.iqr, 1.0)
    for index in cohort.recordings("train"):
        series = cohort.series(index, "train")
        scored_P = series.scored_P
        x = np.where(scored_P, series.measured / iqr, 0.0)
        x /= np.sqrt((x[:, scored_P] ** 2).mean(dtype=np.float64))
        total += (x.T.astype(np.float64) @ x) / len(x)
        counts += np.outer(scored_P, scored_P)
    covariance = total / np.maximum(counts, 1)
    if counts.max() > 0 and (counts[counts > 0] < counts.max()).any():
        values, vectors = np.linalg.eigh(covariance)
        covariance = (vectors * np.clip(values, 0, None)) @ vectors.T
    return covariance


class Gaussian(Baseline):
    """Gaussian conditional mean per timepoint.

    Parameters
    ----------
    shrinkages : sequence of float
        Candidate weights of the diagonal; chosen on ``val``.
    own_weights : sequence of float
        Candidate weights of the window's own covariance; chosen on ``val``. Empty = the group's alone.
    num_tuning_windows : int
    """

    def __init__(
        self,
        contract: InputContract,
        shrinkages: Sequence[float],
        own_weights: Sequence[float] = (),
        num_tuning_windows: int = 8,
    ) -> None:
        super().__init__(contract)
        self.shrinkages, self.own_weights = tuple(shrinkages), tuple(own_weights)
        self.num_tuning_windows = num_tuning_windows
        self.covariance: FloatArray = np.zeros((0, 0))
        self.own_weight = 0.0
        self.shrinkage = self.shrinkages[0]
        self._weights: OrderedDict[bytes, FloatArray] = OrderedDict()

    def fit(self, cohort: Cohort) -> None:
        super().fit(cohort)
        group = group_covariance(cohort, self.contract)
        variance = np.where(np.diag(group) > 0, np.diag(group), 1.0)
        group = group + np.diag(np.where(np.diag(group) > 0, 0.0, 1.0) + JITTER * variance.mean())

        def shrunk(alpha: float) -> FloatArray:
            return (1 - alpha) * group + alpha * np.diag(np.diag(group))

        errors = {}
        for alpha in self.shrinkages:
            self.set_covariance(shrunk(alpha))
            errors[alpha] = self._tuning_error(cohort) if len(self.shrinkages) > 1 else 0.0
        self.shrinkage = min(errors, key=lambda alpha: (errors[alpha], alpha))
        self.set_covariance(shrunk(self.shrinkage))
        errors = {}
        for weight in self.own_weights:
            self.own_weight = weight
            errors[weight] = self._tuning_error(cohort) if len(self.own_weights) > 1 else 0.0
        self.own_weight = min(errors, key=lambda weight: (errors[weight], weight)) if errors else 0.0

    def set_covariance(self, covariance: FloatArray) -> None:
        self.covariance = covariance
        self._weights.clear()

    def _tuning_error(self, cohort: Cohort) -> float:
        total = 0.0
        windows = cohort.windows(1, "val", self.num_tuning_windows)

        def draw(window: object) -> BoolArray:
            ref = window.ref  # type: ignore[attr-defined]
            here = window.scored_P  # type: ignore[attr-defined]
            return random_mask(cohort, here, TUNING_MASK_RATIO, 0, ref)

        for _, item in predict_windows(self, cohort, windows, draw, ("recording",), 1):
            total += float(window_sums(item)["sse"])
        return total

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        B, P, W = windows_z.shape
        K = mask.shape[1] // P
        x = (windows_z.astype(np.float64) - self.zero_z[:, None]).reshape(B, P, K, W // K)
        visible = ~mask.reshape(B, P, K) & present[:, :, None]
        wanted = mask.reshape(B, P, K) & present[:, :, None]
        x = np.where(visible[..., None], x, 0.0)
        out = x.copy()
        for b in range(B):
            for k in range(K):
                seen, hidden = np.flatnonzero(visible[b, :, k]), np.flatnonzero(wanted[b, :, k])
                if len(seen) and len(hidden):
                    out[b, hidden, k] = self._group_weights(seen, hidden) @ x[b, seen, k]
            if self.own_weight > 0:
                kept = self.kept(refs[b], W).reshape(K, -1)
                out[b] = self._adapted(x[b], out[b], visible[b], wanted[b], present[b], kept)
        return out.reshape(B, P, W) + self.zero_z[:, None]

    def _group_weights(self, seen: NDArray[np.int64], hidden: NDArray[np.int64]) -> FloatArray:
        key = seen.tobytes() + b"|" + hidden.tobytes()
        if key not in self._weights:
            self._weights[key] = conditional_weights(self.covariance, seen, hidden)
            if len(self._weights) > CACHED_PATTERNS:
                self._weights.popitem(last=False)
        return self._weights[key]

    def _adapted(
        self,
        x: FloatArray,
        filled: FloatArray,
        visible: BoolArray,
        wanted: BoolArray,
        present: BoolArray,
        kept: BoolArray,
    ) -> FloatArray:
        """Refill the hidden values of one window (P, K, patch_len) with a covariance that knows this window.

        It is estimated from the timepoints of `kept (K, patch_len)`.
        """
        P, K, _ = x.shape
        here = np.flatnonzero(present)
        shared = self.covariance
        measured = visible[:, :, None] & kept
        if not measured.any():
            return filled
        seen_variance = float((x[measured] ** 2).mean())
        group_variance = float(np.broadcast_to(np.diag(shared)[:, None, None], measured.shape)[measured].mean())
        shared = shared * max(seen_variance / group_variance, 1e-12)
        covariance = shared
        for _ in range(ROUNDS):
            own = np.zeros((P, P))
            for k in range(K):
                own += filled[:, k, kept[k]] @ filled[:, k, kept[k]].T
                seen, hidden = np.flatnonzero(visible[:, k]), np.flatnonzero(wanted[:, k])
                if len(hidden):
                    left = covariance[np.ix_(hidden, hidden)]
                    if len(seen):
                        A = conditional_weights(covariance, seen, hidden)
                        left = left - A @ covariance[np.ix_(seen, hidden)]
                    own[np.ix_(hidden, hidden)] += kept[k].sum() * left
            own /= kept.sum()
            covariance = shared.copy()
            block = np.ix_(here, here)
            covariance[block] = (1 - self.own_weight) * shared[block] + self.own_weight * own[block]
            filled = x.copy()
            for k in range(K):
                seen, hidden = np.flatnonzero(visible[:, k]), np.flatnonzero(wanted[:, k])
                if len(seen) and len(hidden):
                    filled[hidden, k] = conditional_weights(covariance, seen, hidden) @ x[seen, k]
        return filled
