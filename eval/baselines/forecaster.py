"""What forecasters share: they read the observed part of a window, and continue it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainlm.fitting import FitSettings, Fitted, fit_best
from brainlm.input_contract import InputContract
from eval.baselines.forecast_windows import ForecastWindows, Pairs, standardise
from eval.baselines.simple import Baseline
from eval.cohort import BoolArray, Cohort, FloatArray, WindowRef
from eval.models import Predictions
from eval.scoring import expand_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

NUM_TUNING = 200
"""Validation recordings that choices look at, at most; one window each."""


class Forecaster(Baseline, ABC):
    """A baseline of the task ``forecasting``: `learn` from windows, then `forecast`.

    Parameters
    ----------
    horizon : int
        Timepoints to predict.
    """

    name = ""
    version = 1

    def __init__(self, contract: InputContract, horizon: int) -> None:
        super().__init__(contract)
        self.horizon = horizon

    def fit(self, cohort: Cohort) -> None:
        super().fit(cohort)
        train = ForecastWindows(cohort, "train", self.horizon)
        self.learn(train, ForecastWindows(cohort, "val", self.horizon, max_recordings=NUM_TUNING))

    @abstractmethod
    def learn(self, train: ForecastWindows, val: ForecastWindows) -> None:
        """Learn from ``train``, choose on ``val``."""

    @abstractmethod
    def forecast(self, past: FloatArray) -> NDArray[Any]:
        """Continue observed parts.

        Parameters
        ----------
        past : ndarray, shape (B, P, T)
            In units of each parcel's own mean and SD; 0 for missing parcels.

        Returns
        -------
        ndarray, shape (B, P, horizon)
            In the same units: 0 is the mean.
        """

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: BoolArray, present: BoolArray, refs: list[WindowRef]
    ) -> Predictions:
        B, P, W = windows_z.shape
        observed = W - self.horizon
        hidden = expand_mask(mask, P, W) & present[:, :, None]
        assert not hidden[:, :, :observed].any(), "a forecaster is asked for the end of a window"
        past = windows_z[:, :, :observed].astype(np.float64) - self.zero_z[:, None]
        kept = np.stack([self.kept(ref, W)[:observed] for ref in refs])[:, None, :]
        standard, mean, sd = standardise(past, kept)
        standard = np.where(present[:, :, None], standard, 0.0)
        out: FloatArray = np.zeros((B, P, W))
        for b in range(B):  # one at a time: no result depends on what else is in a batch
            out[b, :, observed:] = self.forecast(standard[b : b + 1])[0].astype(np.float64) * sd[b] + mean[b]
        return out + self.zero_z[:, None]


class TorchForecaster(Forecaster):
    """A forecaster that is a network, fitted by `brainlm.fitting`.

    Its output layer begins at 0, so it begins as the mean, and stays there if nothing better is found on validation.
    """

    def __init__(self, contract: InputContract, horizon: int, settings: FitSettings) -> None:
        super().__init__(contract, horizon)
        self.settings = settings
        self.module: nn.Module | None = None
        self.fitted: Fitted | None = None

    def candidates(self) -> Sequence[Any]:
        """List sizes to choose from on validation."""
        return [None]

    @abstractmethod
    def build(self, candidate: Any, num_parcels: int, observed_len: int) -> nn.Module:
        """Return a module from (B, P, T) to (B, P, horizon)."""

    def loss(self, module: Any, pairs: Pairs, step: int) -> Tensor:
        """Return the loss of a batch: the mean squared error in units of the score."""
        return future_loss(module(_tensor(pairs.past)), pairs)

    def learn(self, train: ForecastWindows, val: ForecastWindows) -> None:
        size, seed = self.settings.batch_size, self.settings.seed
        held_out = list(val.batches(size))

        def error(module: nn.Module) -> float:
            total = sum(pairs.squared_error(module(_tensor(pairs.past)).numpy()) for pairs in held_out)
            return total / max(1, sum(int(pairs.counted.sum()) for pairs in held_out))

        self.module, self.fitted = fit_best(
            self.candidates(),
            lambda candidate: self.build(candidate, train.num_parcels, train.observed_len),
            lambda module: lambda step: self.loss(module, train.draw(step, size, seed), step),
            lambda module: lambda: error(module),
            self.settings,
        )

    def forecast(self, past: FloatArray) -> NDArray[Any]:
        import torch

        assert self.module is not None, "fit comes first"
        with torch.inference_mode():
            out: NDArray[Any] = self.module(_tensor(past.astype(np.float32))).numpy()
        return out


def future_loss(predicted: Tensor, pairs: Pairs) -> Tensor:
    """Return the mean squared error of predictions (B, P, H) in units of the score."""
    error = (predicted - _tensor(pairs.future)) * _tensor(pairs.factor)[:, :, None]
    counted = _tensor(pairs.counted)
    return (error.square() * counted).sum() / counted.sum().clamp(min=1)


def _tensor(array: NDArray[Any]) -> Tensor:
    import torch

    return torch.from_numpy(array)
