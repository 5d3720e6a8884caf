"""Axes of the quality page as SVG text: a data set is drawn in milliseconds, where a drawing library takes a second.

Lengths are in pixels of the page, y grows downwards.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH = 864
TEXT_PX = 11
TICK_PX = 4
MANTISSAS = (1.0, 2.0, 2.5, 5.0, 10.0)  # a step between ticks is one of these times a power of ten


class Box(NamedTuple):
    """Where axes lie in a picture."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def ticks_of(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Return at most `most` + 1 round values from `low` to `high`, ascending, each with its label.

    Raises
    ------
    ValueError
        If `low` is not below `high`, or either is not finite.
    """
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"ticks need finite low < high, found {low} and {high}")
    rough = (high - low) / most
    power = math.floor(math.log10(rough))
    mantissa = next(m for m in MANTISSAS if m * 10.0**power >= rough * (1 - 1e-9))
    step = mantissa * 10.0**power
    decimals = max(0, -power + (mantissa == 2.5) - (mantissa == 10.0))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [number * step for number in range(first, last + 1)]
    form = f".{decimals}f" if decimals <= 5 and max(abs(low), abs(high)) < 1e7 else ".9g"
    return [(value, format(value, form)) for value in values]


def text(
    words: str, x: float, y: float, anchor: str = "middle", size: float = TEXT_PX, colour: str = "", turn: bool = False
) -> str:
    """Return words centred on `y`; `anchor` says what of them is at `x`: start, middle or end. `turn`: upwards."""
    rotated = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    filled = f' fill="{colour}"' if colour else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}" font-size="{size:g}"{filled}{rotated}>'
        f"{escape(words)}</text>"
    )


def ticks_below(box: Box, places: Sequence[tuple[float, str]], size: float = TEXT_PX) -> str:
    """Return marks and labels below the axes; places are pairs of x in pixels and a label."""
    marks = "".join(f"M{x:.1f} {box.bottom:.1f}v{TICK_PX}" for x, _ in places)
    labels = "".join(text(label, x, box.bottom + TICK_PX + 0.8 * size, size=size) for x, label in places)
    return f'<path d="{marks}" stroke="#222"/>{labels}'


def ticks_left(box: Box, places: Sequence[tuple[float, str]], size: float = TEXT_PX) -> str:
    """Return marks and labels left of the axes; places are pairs of y in pixels and a label."""
    marks = "".join(f"M{box.left:.1f} {y:.1f}h-{TICK_PX}" for y, _ in places)
    labels = "".join(text(label, box.left - TICK_PX - 3, y, "end", size) for y, label in places)
    return f'<path d="{marks}" stroke="#222"/>{labels}'


def picture(parts: Sequence[str], height: float, words: str) -> str:
    """Return a whole picture as an element of a page; `words` say what it shows to those who do not see it."""
    return (
        f'<svg role="img" aria-label="{escape(words)}" width="{WIDTH}" viewBox="0 0 {WIDTH} {height:g}" fill="#222">'
        f"{''.join(parts)}</svg>"
    )


def image(pixels: NDArray[np.uint8], box: Box) -> str:
    """Return a grey picture that fills the axes, each pixel a block of one grey."""
    encoded = base64.b64encode(grey_png(pixels)).decode()
    return (
        f'<image x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="data:image/png;base64,{encoded}"/>'
    )


def grey_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return a PNG without metadata (ISO/IEC 15948): the same pixels give the same bytes.

    Parameters
    ----------
    pixels : ndarray, shape (rows, columns), uint8
        0 is black, 255 white; at least one.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    num_rows, num_columns = pixels.shape
    header = struct.pack(">IIBBBBB", num_columns, num_rows, 8, 0, 0, 0, 0)  # 8 bits of grey, not interlaced
    lines = np.zeros((num_rows, num_columns + 1), dtype=np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = pixels
    data = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
