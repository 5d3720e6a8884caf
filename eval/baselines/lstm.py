"""LSTM over all parcels at once, which predicts the next timepoint and then goes on from its own predictions.

The paper's Table 3 has an LSTM without details; two layers, and a hidden size that is chosen on validation, are ours.
It is trained on the future that is scored and, besides, on the next timepoint at every observed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainlm.fitting import FitSettings
from brainlm.input_contract import InputContract
from eval.baselines.forecast_windows import Pairs
from eval.baselines.forecaster import TorchForecaster, future_loss

LAYERS = 2
DROPOUT = 0.1


class LSTM(TorchForecaster):
    """See the module."""

    name = "LSTM"

    def __init__(
        self, contract: InputContract, horizon: int, settings: FitSettings, hidden_sizes: Sequence[int]
    ) -> None:
        super().__init__(contract, horizon, settings)
        self.hidden_sizes = tuple(hidden_sizes)

    def candidates(self) -> Sequence[int]:
        return self.hidden_sizes

    def build(self, candidate: int, num_parcels: int, observed_len: int) -> nn.Module:
        return Recurrent(num_parcels, candidate, self.horizon)

    def loss(self, module: Any, pairs: Pairs, step: int) -> Tensor:
        past = torch.from_numpy(pairs.past)
        observed, future = module.run(past)
        factor = torch.from_numpy(pairs.factor)[:, :, None]
        next_one = ((observed - past[:, :, 1:]) * factor).square().mean()
        return future_loss(future, pairs) + next_one


class Recurrent(nn.Module):
    """LSTM and a linear output that begins at 0."""

    def __init__(self, num_parcels: int, hidden_size: int, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.lstm = nn.LSTM(num_parcels, hidden_size, LAYERS, batch_first=True, dropout=DROPOUT)
        self.output = nn.Linear(hidden_size, num_parcels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def run(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions of the observed timepoints but the first (B, P, T - 1), and of the future (B, P, H)."""
        hidden, state = self.lstm(past.transpose(1, 2))
        predicted = self.output(hidden)
        steps = [predicted[:, -1:]]
        while len(steps) < self.horizon:
            hidden, state = self.lstm(steps[-1], state)
            steps.append(self.output(hidden))
        return predicted[:, :-1].transpose(1, 2), torch.cat(steps, dim=1).transpose(1, 2)

    def forward(self, past: Tensor) -> Tensor:
        return self.run(past)[1]
