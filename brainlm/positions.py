"""Where a token is: Fourier features of parcel coordinates (mm) and of time (seconds), and the code made from them.

Dimension letters: `R` rows of the token grid (parcels, or groups of parcels), `K` patches in time, `F` features,
`L` = R * K tokens, `D` width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SPACE_MM = (320.0, 160.0, 80.0, 40.0)  # wavelengths; the brain is about 180 mm long, parcels about 15 mm wide
NUM_SPACE = 3 + 6 * len(SPACE_MM)
TIME_S = (20.0, 2000.0)  # shortest and longest wavelength, spaced geometrically
NUM_TIME = 16


def space_features(coords_mm: Tensor) -> Tensor:
    """Return Fourier features of coordinates in mm: (..., 3) -> (..., NUM_SPACE), float32, magnitudes near 1."""
    coords = coords_mm.float()
    angle = (2 * torch.pi * coords[..., :, None] / coords.new_tensor(SPACE_MM)).flatten(-2)
    return torch.cat([coords / 100, angle.sin(), angle.cos()], dim=-1)


def time_features(times_s: Tensor) -> Tensor:
    """Return Fourier features of times in seconds: (..., K) -> (..., K, 2 * NUM_TIME), float32."""
    shortest, longest = (math.log(seconds) for seconds in TIME_S)
    periods = torch.linspace(shortest, longest, NUM_TIME, device=times_s.device).exp()
    phase = 2 * torch.pi * times_s.float()[..., None] / periods
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class TokenPosition(nn.Module):
    """The code of a token's place: parcel coordinates (mm), time (seconds), and optionally a learned code of its row.

    Positions in mm and seconds, not in index, let one model read another atlas, length or TR. The features are computed
    once in float32: in bfloat16, 300 s would already be wrong by a second.
    """

    def __init__(self, width: int, num_rows: int | None) -> None:
        super().__init__()
        self.space = nn.Linear(NUM_SPACE, width)
        self.time = nn.Linear(2 * NUM_TIME, width)
        self.parcel = None if num_rows is None else nn.Embedding(num_rows, width)

    def forward(self, space: Tensor, time: Tensor) -> Tensor:
        """Return the code of every token, row-major.

        Parameters
        ----------
        space : Tensor, shape (R, F) or (B, R, F)
        time : Tensor, shape (K, F) or (B, K, F)

        Returns
        -------
        Tensor, shape (L, D), or (B, L, D) if either differs between the windows of the batch
        """
        dtype = self.space.weight.dtype
        code_RD = self.space(space.to(dtype))
        if self.parcel is not None:
            code_RD = code_RD + self.parcel.weight
        return (code_RD[..., :, None, :] + self.time(time.to(dtype))[..., None, :, :]).flatten(-3, -2)
