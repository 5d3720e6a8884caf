"""DLinear: two linear maps from the past of a parcel to its future, one of its trend and one of the rest.

Zeng et al., *Are Transformers Effective for Time Series Forecasting?* (AAAI 2023): the trend is a moving average of 25
timepoints, ends repeated; the maps are shared by all parcels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.baselines.forecaster import TorchForecaster

KERNEL = 25


class DLinear(TorchForecaster):
    """See the module."""

    name = "DLinear"

    def build(self, candidate: Any, num_parcels: int, observed_len: int) -> nn.Module:
        return Maps(observed_len, self.horizon)


class Maps(nn.Module):
    """The two maps, both 0 at first."""

    def __init__(self, observed_len: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = (nn.Linear(observed_len, horizon, bias=False) for _ in range(2))
        for part in (self.trend, self.rest):
            nn.init.zeros_(part.weight)

    def forward(self, past: Tensor) -> Tensor:
        side = KERNEL // 2
        trend = F.avg_pool1d(F.pad(past, (side, side), mode="replicate"), KERNEL, stride=1)
        out: Tensor = self.trend(trend) + self.rest(past - trend)
        return torch.as_tensor(out)
