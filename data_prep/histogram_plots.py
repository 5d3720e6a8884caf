"""Histograms of a data set's measures, three in a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from data_prep.svg_axes import WIDTH, Box, picture, text, ticks_below, ticks_left, ticks_of

NUM_BINS = 30
NUM_COLUMNS = 3
ROW_PX = 212
MARGIN = 0.05  # of the range, empty at both ends
FILL = "#2e86ab"


def histograms_svg(measures: Mapping[str, NDArray[np.float64]], words: str) -> str:
    """Draw a histogram of each measure.

    Parameters
    ----------
    measures : mapping of label to ndarray, shape (N,)
        Finite values that are not all equal; N may differ.
    words : str
        What the picture shows, for those who do not see it.
    """
    parts = []
    for number, (label, values) in enumerate(measures.items()):
        row, column = divmod(number, NUM_COLUMNS)
        left = 60 + column * (WIDTH - 36) / NUM_COLUMNS
        parts.append(_histogram(Box(left, 10 + row * ROW_PX, 225, 150), label, values, is_first=column == 0))
    num_rows = -(-len(measures) // NUM_COLUMNS)
    return picture(parts, num_rows * ROW_PX, words)


def _histogram(box: Box, label: str, values: NDArray[np.float64], is_first: bool) -> str:
    counts, edges = np.histogram(values, bins=NUM_BINS)
    margin = MARGIN * (edges[-1] - edges[0])
    low, high, most = float(edges[0] - margin), float(edges[-1] + margin), (1 + MARGIN) * float(counts.max())
    x_of = box.left + box.width * (edges - low) / (high - low)
    y_of = box.bottom - box.height * counts / most
    steps = "".join(f"V{y:.1f}H{x:.1f}" for y, x in zip(y_of, x_of[1:]))
    below = [(box.left + box.width * (value - low) / (high - low), name) for value, name in ticks_of(low, high, 6)]
    beside = [  # whole recordings, whatever the ticks between them would be
        (box.bottom - box.height * value / most, f"{value:.0f}")
        for value, _ in ticks_of(0.0, most, 6)
        if value == round(value)
    ]
    parts = [
        f'<path d="M{x_of[0]:.1f} {box.bottom:.1f}{steps}V{box.bottom:.1f}Z" fill="{FILL}"/>',
        f'<path d="M{box.left:.1f} {box.top:.1f}V{box.bottom:.1f}H{box.right:.1f}" fill="none" stroke="#222"/>',
        ticks_below(box, below),
        ticks_left(box, beside),
        text(label, box.left + box.width / 2, box.bottom + 31),
    ]
    if is_first:
        parts.append(text("Recordings", box.left - 46, box.top + box.height / 2, turn=True))
    return "".join(parts)
