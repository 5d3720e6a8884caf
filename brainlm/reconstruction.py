"""Whole windows rebuilt from complementary masks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from brainlm.errors import ConfigError
from brainlm.masking import complementary_masks, mask_generator
from brainlm.windows import Windows

STALE_DECODER = "fine_tuned_encoder"
"""In the manifest: what the encoder was fine-tuned to predict. The decoder does not belong to it any more."""


def check_decoder(manifest: dict[str, Any]) -> None:
    """Raise `ConfigError` if the encoder was fine-tuned and the decoder was not."""
    if (learned := manifest.get(STALE_DECODER)) is not None:
        raise ConfigError(
            f"this encoder was fine-tuned to predict {', '.join(learned)}, and its decoder was not: reconstruct and "
            "forecast with the checkpoint that fine-tuning began from"
        )


class Reconstructs(Protocol):
    """A model that predicts hidden values: of ours, or a published one."""

    def reconstruct(self, windows: Windows, mask: Tensor, /) -> Tensor: ...

    def hidden_values(self, mask: Tensor, /) -> Tensor: ...


def reconstruct_whole(
    model: Reconstructs, windows: Windows, attendable_BL: Tensor, num_parts: int = 4, seed: int = 0
) -> Tensor:
    """Rebuild every value of windows while it is hidden: tokens are divided at random, and hidden one part at a time.

    Parameters
    ----------
    attendable_BL : Tensor, shape (B, L), bool
        Tokens of the model that carry signal.
    num_parts : int
        The model sees ``1 - 1 / num_parts`` of these tokens each time.
    seed : int
        Of the division.

    Returns
    -------
    Tensor, shape (B, P, W), float32
        NaN for missing parcels.
    """
    num_tokens = attendable_BL.shape[1]
    if not 2 <= num_parts <= num_tokens:
        raise ConfigError(f"num_parts: expected 2 to {num_tokens}, the number of tokens, found {num_parts}")
    out = windows.values.new_full(windows.values.shape, float("nan"), dtype=torch.float32)
    for mask_BL in complementary_masks(attendable_BL, num_parts, mask_generator(seed)):
        out = torch.where(model.hidden_values(mask_BL), model.reconstruct(windows, mask_BL), out)
    return out
