"""Neural ODE: the last timepoints are mapped to a state, which a learned vector field carries into the future.

Chen et al., *Neural Ordinary Differential Equations* (NeurIPS 2018); solver dopri5 of torchdiffeq. One unit of time is
one timepoint. Sizes are ours: the paper's Table 3 has no details.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eval.baselines.forecaster import TorchForecaster

CONTEXT = 20
STATE = 32
WIDTH = 64
RTOL, ATOL = 1e-3, 1e-4


class NeuralODE(TorchForecaster):
    """See the module."""

    name = "Neural ODE"

    def build(self, candidate: Any, num_parcels: int, observed_len: int) -> nn.Module:
        return Flow(num_parcels, min(CONTEXT, observed_len), self.horizon)


class Field(nn.Module):
    """dz/dt as a small network of z, which does not depend on time."""

    def __init__(self, state: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(state, width), nn.Tanh(), nn.Linear(width, state))

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        out: Tensor = self.layers(state)
        return out


def solve(field: nn.Module, state: Tensor, times: Tensor) -> Tensor:
    """Return states (len(times), B, D) along the flow that begins at `state` at the first of `times`."""
    from torchdiffeq import odeint

    out: Tensor = odeint(field, state, times, rtol=RTOL, atol=ATOL, method="dopri5")
    return out


class Flow(nn.Module):
    """Encoder of the last timepoints, flow, and a linear output that begins at 0."""

    def __init__(self, num_parcels: int, context: int, horizon: int) -> None:
        super().__init__()
        self.context, self.horizon = context, horizon
        self.encoder = nn.Sequential(nn.Linear(num_parcels * context, WIDTH), nn.Tanh(), nn.Linear(WIDTH, STATE))
        self.field = Field(STATE, WIDTH)
        self.output = nn.Linear(STATE, num_parcels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, past: Tensor) -> Tensor:
        state = self.encoder(past[:, :, -self.context :].flatten(1))
        times = torch.arange(self.horizon + 1, dtype=past.dtype, device=past.device)
        predicted: Tensor = self.output(solve(self.field, state, times)[1:])
        return predicted.permute(1, 2, 0)
