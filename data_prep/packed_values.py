"""Lists of plain values, compressed while nobody needs them."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from typing import Any


def pack(values: Sequence[Any]) -> bytes:
    return zlib.compress(pickle.dumps(list(values)), level=1)


def unpack(packed: bytes) -> list[Any]:
    """Return what this process has packed."""
    values: list[Any] = pickle.loads(zlib.decompress(packed))
    return values
