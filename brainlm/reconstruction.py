"""Windows as a trained model's `reconstruct` takes them, and whole windows rebuilt from complementary masks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.errors import ConfigError, DataError
from brainlm.masking import complementary_masks, mask_generator
from brainlm.tokens import parcel_mask
from brainlm.windows import Windows

if TYPE_CHECKING:
    from brainlm.model import BrainLM


def as_windows(
    windows: Windows | Tensor | NDArray[Any], present_BP: Tensor | None = None, kept_BW: Tensor | None = None
) -> Windows:
    """Return Windows from values (P, W) or (B, P, W) in contract units."""
    if isinstance(windows, Windows):
        if present_BP is not None or kept_BW is not None:
            raise ConfigError("present and kept are part of Windows: give them there")
        return windows
    values = torch.from_numpy(np.array(windows, dtype=np.float32)) if isinstance(windows, np.ndarray) else windows
    return Windows.of(values[None] if values.ndim == 2 else values, present_BP, kept_BW)


def refilled(model: BrainLM, windows: Windows, mask_BL: Tensor) -> Windows:
    """Return the windows as they look under a mask: no value at a censored timepoint tells of hidden values.

    Parcels with visible values that are not finite become missing.
    """
    grid = model.token_grid(windows)
    if tuple(mask_BL.shape) != (size := (len(windows), grid.num_tokens)):
        raise DataError(f"mask of shape {tuple(mask_BL.shape)}, these windows have tokens of shape {size}")
    ignored = grid.hidden_values(mask_BL) | ~windows.kept[:, None, :]
    present = windows.present & (windows.values.isfinite() | ignored).all(dim=2)
    if bool(windows.kept.all()):
        return windows.with_present(present)
    values, kept = windows.values.cpu().numpy().copy(), windows.kept.cpu().numpy()
    for window, mask_L, kept_W in zip(values, mask_BL.cpu(), kept):
        groups = None if grid.groups is None else grid.groups.cpu()
        refill_censored(window, ~parcel_mask(mask_L, len(window), groups).numpy(), kept_W)
    return replace(windows, values=torch.from_numpy(values).to(windows.values.device), present=present)


def reconstruct_whole(model: BrainLM, windows: Windows, num_parts: int = 4, seed: int = 0) -> Tensor:
    """Rebuild every value of windows while it is hidden: tokens are divided at random, and hidden one part at a time.

    Parameters
    ----------
    num_parts : int
        The model sees ``1 - 1 / num_parts`` of the tokens each time.
    seed : int
        Of the division, which is the same for every window.

    Returns
    -------
    Tensor, shape (B, P, W), float32
        NaN for missing parcels, among them those with a kept value that is not finite.
    """
    B = len(windows)
    grid = model.token_grid(windows)
    if not 2 <= num_parts <= grid.num_tokens:
        raise ConfigError(f"num_parts: expected 2 to {grid.num_tokens}, the number of tokens, found {num_parts}")
    measured = (windows.values.isfinite() | ~windows.kept[:, None, :]).all(dim=2)
    windows = windows.with_present(windows.present & measured)
    out = windows.values.new_full(windows.values.shape, float("nan"), dtype=torch.float32)
    for mask_L in complementary_masks(grid.num_rows, grid.num_patches, num_parts, mask_generator(seed)):
        mask_BL = mask_L.to(out.device).expand(B, -1)
        predicted = model.reconstruct(windows, mask_BL)
        out = torch.where(grid.hidden_values(mask_BL), predicted, out)
    return out
