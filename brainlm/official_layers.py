"""What the two families of published models share: outputs, shuffling of tokens, attention.

Attribute names are those of the published state dicts; see `brainlm.official_13m` and `brainlm.official_vitmae`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainlm.errors import DataError
from brainlm.layers import attend
from brainlm.tokens import gather_tokens


class OfficialOutput(NamedTuple):
    """What a published pretraining model returns: the published fields, without the tuple inside ``logits``.

    ``loss`` scalar, NaN if nothing is scored; ``mask`` 1 = hidden and scored; ``ids_restore (B, L)`` place of each
    token in the shuffled order; ``latent (B, 1 + V, D)`` CLS first, then visible tokens in shuffled order.
    ``logits`` and ``mask``: (B, P, patches, values) and (B, P, patches) in the 13M family, (B, P, W) in the others.
    """

    loss: Tensor
    logits: Tensor
    mask: Tensor
    ids_restore: Tensor
    latent: Tensor


class Encoded(NamedTuple):
    """``latent (B, 1 + V, D)``, CLS first; ``mask (B, L)`` float, 1 = hidden; ``ids_restore (B, L)`` int64."""

    latent: Tensor
    mask: Tensor
    ids_restore: Tensor


def shuffle_tokens(noise_BL: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return kept token numbers (B, V) in ascending noise, the mask (B, L) with 1 = hidden, and ids_restore (B, L).

    The sort is not stable, as in the published code: with equal noise (predict modes) ids_restore shows it, and
    nothing else does.
    """
    ids_shuffle_BL = torch.argsort(noise_BL, dim=1)
    ids_restore_BL = torch.argsort(ids_shuffle_BL, dim=1)
    mask_BL = (ids_restore_BL >= num_keep).to(torch.float32)
    return ids_shuffle_BL[:, :num_keep], mask_BL, ids_restore_BL


def noise_of_mask(hidden_BL: Tensor) -> tuple[Tensor, int]:
    """Return noise (B, L), int64, that hides exactly these tokens and keeps the others in order, and their number.

    No two values are equal, so the order is the same everywhere. Equally many tokens must be visible in every window:
    see `by_num_visible`.
    """
    L = hidden_BL.shape[1]
    order_BL = torch.arange(L, device=hidden_BL.device) + L * hidden_BL
    return order_BL, int((~hidden_BL[:1]).sum())


def by_num_visible(hidden_BL: Tensor) -> Iterator[Tensor]:
    """Divide windows into groups with equally many visible tokens: yields their numbers, int64.

    Padding instead would not do: the convolution of the 13M family runs along the tokens, padding among them.

    Raises
    ------
    DataError
        If a window has no visible token.
    """
    num_visible_B = (~hidden_BL).sum(dim=1)
    for count in num_visible_B.unique().tolist():
        if count == 0:
            raise DataError("a window has no visible token: lower the mask ratio, or leave this recording out")
        yield torch.nonzero(num_visible_B == count)[:, 0]


def take_noise(noise: Tensor | None, inputs: Tensor, num_tokens: int, generator: torch.Generator | None) -> Tensor:
    """Return the given noise once its shape is checked, or uniform noise from `generator` (None: torch's own)."""
    expected = (len(inputs), num_tokens)
    if noise is None:
        device = inputs.device if generator is None else generator.device
        return torch.rand(expected, generator=generator, device=device).to(inputs.device)
    if noise.shape != expected:
        raise DataError(f"noise has shape {tuple(noise.shape)}, expected (windows, tokens) = {expected}")
    return noise


def restore_order(visible_BVD: Tensor, mask_token_11D: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """Return all tokens (B, L, D) in their own order: the visible ones, and the mask token for the hidden ones."""
    B, V, _ = visible_BVD.shape
    hidden = mask_token_11D.expand(B, ids_restore_BL.shape[1] - V, -1)
    return gather_tokens(torch.cat([visible_BVD, hidden], dim=1), ids_restore_BL)


class SelfAttention(nn.Module):
    """Multi-head attention without its output map; published as ``attention.attention`` or ``attention.self``.

    With `conv_len`, a depthwise convolution of the values along the tokens is added, one kernel per head: the
    Nystromformer layers of the 13M family.
    """

    def __init__(self, width: int, num_heads: int, bias: bool, dropout: float = 0.0, conv_len: int | None = None):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.conv = None
        if conv_len is not None:
            self.conv = nn.Conv2d(
                num_heads, num_heads, (conv_len, 1), padding=(conv_len // 2, 0), groups=num_heads, bias=False
            )

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        q, k, v = (
            linear(x_BLD).view(B, L, self.num_heads, -1).transpose(1, 2)  # (B, H, L, E)
            for linear in (self.query, self.key, self.value)
        )
        if self.training and self.dropout > 0:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        else:
            y = attend(q, k, v)
        if self.conv is not None:
            y = y + self.conv(v)
        return y.transpose(1, 2).reshape(B, L, D)


class Dense(nn.Module):
    """A linear map under the published name ``dense``."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class LayerList(nn.Module):
    """Layers in a row under the published name ``encoder.layer``."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for layer in self.layer:
            x_BLD = layer(x_BLD)
        return x_BLD
