"""Latent ODE: a variational autoencoder whose latent trajectory is a learned flow.

Rubanova, Chen & Duvenaud, *Latent Ordinary Differential Equations for Irregularly-Sampled Time Series* (NeurIPS 2019).
An ODE-RNN reads the last timepoints backwards in time (Euler steps between them, as in their code) and gives the
distribution of the state at the first of them; the flow from there passes through the observed timepoints into the
future. The loss is the squared error over both, and the KL divergence from a standard normal, whose weight warms up.
Forecasts begin at the mean of the distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eval.baselines.forecast_windows import Pairs
from eval.baselines.forecaster import TorchForecaster, future_loss
from eval.baselines.neural_ode import STATE, WIDTH, Field, solve

CONTEXT = 40
KL_WARMUP = 0.99  # as in their code: the weight is 1 - KL_WARMUP ** step
VARIANCE = 0.5  # of the observation noise, in units of the observed part's variance


class LatentODE(TorchForecaster):
    """See the module."""

    name = "Latent ODE"

    def build(self, candidate: Any, num_parcels: int, observed_len: int) -> nn.Module:
        return LatentFlow(num_parcels, min(CONTEXT, observed_len), self.horizon)

    def loss(self, module: Any, pairs: Pairs, step: int) -> Tensor:
        past = torch.from_numpy(pairs.past)[:, :, -module.context :]
        mean, log_var = module.encode(past)
        state = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        rebuilt, future = module.decode(state)
        factor = torch.from_numpy(pairs.factor)[:, :, None]
        observed = ((rebuilt - past) * factor).square().mean()
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        num_values = past.shape[1] * (module.context + module.horizon)
        weight = (1 - KL_WARMUP**step) * 2 * VARIANCE / num_values
        return future_loss(future, pairs) + observed + weight * divergence


class LatentFlow(nn.Module):
    """Recognition network, flow, and a linear output that begins at 0."""

    def __init__(self, num_parcels: int, context: int, horizon: int) -> None:
        super().__init__()
        self.context, self.horizon = context, horizon
        self.back = Field(WIDTH, WIDTH)
        self.cell = nn.GRUCell(num_parcels, WIDTH)
        self.distribution = nn.Linear(WIDTH, 2 * STATE)
        self.field = Field(STATE, WIDTH)
        self.output = nn.Linear(STATE, num_parcels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def encode(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the variance of the state at the first of these timepoints, (B, D) each."""
        hidden = past.new_zeros(len(past), WIDTH)
        for step in range(past.shape[2] - 1, -1, -1):
            hidden = self.cell(past[:, :, step], hidden - self.back(past.new_zeros(()), hidden))
        mean, log_var = self.distribution(hidden).chunk(2, dim=1)
        return mean, log_var.clamp(-10, 10)

    def decode(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the observed part (B, P, context) and the future (B, P, H) of the flow from this state."""
        times = torch.arange(self.context + self.horizon, dtype=state.dtype, device=state.device)
        values = self.output(solve(self.field, state, times)).permute(1, 2, 0)
        return values[:, :, : self.context], values[:, :, self.context :]

    def forward(self, past: Tensor) -> Tensor:
        return self.decode(self.encode(past[:, :, -self.context :])[0])[1]
