"""Masks over tokens: True = hidden.

Tokens are parcel-major: token ``p * num_patches + k`` is patch ``k`` (in time) of parcel ``p``. Every random choice
takes an explicit generator. Parcels that are missing are hidden too, and are never scored (see `brainlm.model`).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from brainlm.errors import ConfigError

MaskKind = Literal["random", "future", "parcels", "time_blocks"]
_MASK = 0x3A


def mask_generator(seed: int, *position: int | str) -> torch.Generator:
    """Return a generator that depends on the seed and on a position (step and sample, or a recording id) alone."""
    words = [_MASK, seed]
    for part in position:
        words.extend(part.encode() if isinstance(part, str) else [part])
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def make_mask(
    kind: MaskKind,
    num_parcels: int,
    num_patches: int,
    mask_ratio: float,
    generator: torch.Generator,
    present: Tensor | None = None,
) -> Tensor:
    """Draw the mask of one window.

    Parameters
    ----------
    kind : {"random", "future", "parcels", "time_blocks"}
        ``random`` hides single tokens, ``future`` the last patches of every parcel, ``parcels`` whole parcels for the
        whole window, ``time_blocks`` whole patches in time for every parcel.
    mask_ratio : float
        Fraction hidden of the tokens of present parcels (of parcels, of patches in time), in (0, 1); rounded to the
        nearest count, at least one hidden and at least one visible.
    present : Tensor, shape (P,), bool, optional
        False = missing parcel. Missing parcels are hidden besides.

    Returns
    -------
    Tensor, shape (L,), bool
        True = hidden.
    """
    if kind not in get_args(MaskKind):
        raise ConfigError(f"mask kind: expected one of {', '.join(get_args(MaskKind))}, found {kind!r}")
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask_ratio: expected a fraction between 0 and 1, found {mask_ratio}")
    here = torch.ones(num_parcels, dtype=torch.bool) if present is None else present.cpu()
    parcels = torch.nonzero(here)[:, 0]
    mask = torch.ones(num_parcels, num_patches, dtype=torch.bool)
    if kind == "random":
        count = _num_hidden(len(parcels) * num_patches, mask_ratio)
        drawn = torch.zeros(len(parcels) * num_patches, dtype=torch.bool)
        drawn[torch.randperm(drawn.numel(), generator=generator)[:count]] = True
        mask[parcels] = drawn.view(len(parcels), num_patches)
    elif kind == "parcels":
        hidden = torch.randperm(len(parcels), generator=generator)[: _num_hidden(len(parcels), mask_ratio)]
        mask[parcels] = False
        mask[parcels[hidden]] = True
    else:
        count = _num_hidden(num_patches, mask_ratio)
        if kind == "future":
            hidden = torch.arange(num_patches - count, num_patches)
        else:
            hidden = torch.randperm(num_patches, generator=generator)[:count]
        mask[parcels] = False
        mask[:, hidden] = True
    return mask.flatten()


def complementary_masks(attendable_BL: Tensor, num_parts: int, generator: torch.Generator) -> Tensor:
    """Divide the tokens of windows at random into parts and hide one part at a time.

    Every token is hidden in exactly one of the masks, so a whole window can be rebuilt from values that were hidden.

    Parameters
    ----------
    attendable_BL : Tensor, shape (B, L), bool
        Tokens that carry signal. In each window these are divided evenly, and so are the others.

    Returns
    -------
    Tensor, shape (num_parts, B, L), bool
    """
    if num_parts < 2:
        raise ConfigError(f"num_parts: expected at least 2, found {num_parts}")
    seen = attendable_BL.cpu()
    order = torch.randperm(seen.shape[1], generator=generator)  # the same for every window
    ranks = torch.where(seen[:, order], seen[:, order].cumsum(dim=1), (~seen[:, order]).cumsum(dim=1)) - 1
    part = torch.empty_like(ranks)
    part[:, order] = ranks % num_parts
    return (part[None] == torch.arange(num_parts)[:, None, None]).to(attendable_BL.device)


def _num_hidden(count: int, mask_ratio: float) -> int:
    if count < 2:
        raise ConfigError(f"a mask needs at least 2 things to choose from, found {count}")
    return min(max(round(mask_ratio * count), 1), count - 1)
