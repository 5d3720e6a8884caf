"""The forward question: what does a model expect elsewhere after some parcels are pushed?

The end of a window is hidden, and forecast twice: as it is, and with an amount added to chosen parcels at the last
visible timepoints. The difference is the model's impulse response. Of a linear system it is known exactly
(`brainlm.state_space`).

Dimension letters: `B` windows, `P` parcels, `H` timepoints of the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.errors import ConfigError
from brainlm.reading import evaluating
from brainlm.reconstruction import check_decoder
from brainlm.windows import Windows, as_windows

if TYPE_CHECKING:
    from brainlm.model import BrainLM


def forward_response(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    parcels: Sequence[int],
    *,
    amplitude: float = 1.0,
    num_timepoints: int = 1,
    horizon_patches: int = 1,
    batch_size: int = 8,
) -> Tensor:
    """Return the change of the forecast, for each unit that is added.

    Parameters
    ----------
    windows : Windows, or Tensor or ndarray of shape (B, P, W)
        Contract units.
    parcels : sequence of int
        Columns that are pushed, all by the same amount. Where one is missing, or its time censored, nothing is added.
    amplitude : float
        What is added, contract units. A model is not linear: compare several.
    num_timepoints : int
        How many of the last visible timepoints it is added to.
    horizon_patches : int
        Patches at the end of the window that are hidden and forecast.

    Returns
    -------
    Tensor, shape (B, P, H), float32
        Forecast with the push minus forecast without it, over `amplitude`; NaN for missing parcels.

    Raises
    ------
    ConfigError
        If parcels, timepoints or patches are not those of the windows, or the amplitude is 0.
    """
    check_decoder(model.manifest)
    found = as_windows(windows)
    P, W = found.values.shape[1:]
    patch_len = model.config.patch_len
    num_patches = W // patch_len
    seen_len = W - horizon_patches * patch_len
    if not parcels or not all(0 <= parcel < P for parcel in parcels):
        raise ConfigError(f"forward response: parcels are numbered from 0 to {P - 1}, found {list(parcels)}")
    if not 0 < horizon_patches < num_patches or not 0 < num_timepoints <= seen_len:
        raise ConfigError(
            f"forward response: of {num_patches} patches of {patch_len} timepoints 1 to {num_patches - 1} can be "
            f"hidden, and at most the timepoints before them be pushed; found {horizon_patches} and {num_timepoints}"
        )
    if amplitude == 0 or batch_size < 1:
        raise ConfigError("forward response: amplitude must not be 0, batch_size at least 1")
    parts = []
    with evaluating(model) as device:
        for first in range(0, len(found), batch_size):
            batch = found[first : first + batch_size].to(device)
            num_rows = model.token_grid(batch).num_rows
            future = torch.arange(num_patches, device=device) >= num_patches - horizon_patches
            mask = future.repeat(num_rows).expand(len(batch), -1)
            grid, _ = model.seen(batch, mask)
            seen = replace(grid.windows, as_is=True)
            push = torch.zeros_like(seen.values)
            push[:, list(parcels), seen_len - num_timepoints : seen_len] = amplitude
            push = push.masked_fill(~(seen.present[:, :, None] & seen.kept[:, None, :]), 0.0)
            pushed = replace(seen, values=seen.values + push)
            change = model.reconstruct(pushed, mask) - model.reconstruct(seen, mask)
            parts.append((change[:, :, seen_len:] / amplitude).cpu())
    return torch.cat(parts)
