"""What is read off the encoder: one vector a window.

Nothing is hidden and the tokens are in order, so that an embedding is the same each time.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Embedding(NamedTuple):
    """``cls (B, D)`` and ``pooled (B, D)``, the mean over the other tokens; nothing hidden."""

    cls: Tensor
    pooled: Tensor
