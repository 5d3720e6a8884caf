"""A picture of one reconstruction, for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SERIES = 4


@dataclass(frozen=True, eq=False)
class Example:
    """One window: ``truth (P, W)`` in contract units, ``hidden (P, W)``, and ``rebuilt (P, W)``, NaN where visible."""

    truth: NDArray[np.float32]
    hidden: NDArray[np.bool_]
    rebuilt: NDArray[np.float32]


def draw_example(example: Example) -> Figure:
    """Draw what was there, what was visible and what was rebuilt, all parcels; and the series of a few parcels."""
    from matplotlib.figure import Figure

    truth, hidden = example.truth, example.hidden
    rebuilt = np.where(hidden, example.rebuilt, truth)
    figure = Figure(figsize=(12, 6.5), dpi=70)  # places are given, and pixels few: it is drawn while training waits
    halves = figure.add_gridspec(2, 1, height_ratios=(3, 2), left=0.05, right=0.97, bottom=0.08, top=0.95, hspace=0.2)
    limit = float(np.nanpercentile(np.abs(truth), 98)) or 1.0
    panels = (("measured", truth), ("visible", np.where(hidden, np.nan, truth)), ("hidden ones rebuilt", rebuilt))
    axes = halves[0].subgridspec(1, 3).subplots(sharey=True, squeeze=False)[0]
    for ax, (title, values) in zip(axes, panels, strict=True):
        ax.set_facecolor("0.6")
        image = ax.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(title)
    axes[0].set_ylabel("parcel")
    figure.colorbar(image, ax=axes, label="contract units")
    answered = np.flatnonzero((hidden & np.isfinite(example.rebuilt)).any(axis=1))
    shown = answered[np.linspace(0, len(answered) - 1, min(NUM_SERIES, len(answered))).astype(int)]
    if len(shown):
        for ax, parcel in zip(halves[1].subgridspec(1, len(shown)).subplots(squeeze=False)[0], shown, strict=True):
            ax.plot(truth[parcel], color="0.3", linewidth=1, label="measured")
            own = np.where(hidden[parcel], example.rebuilt[parcel], np.nan)
            ax.plot(own, color="tab:red", linewidth=1.5, label="rebuilt")
            ax.set(title=f"parcel {parcel} (from 0)", xlabel="timepoint")
        ax.legend(fontsize=8, loc="upper right")
    return figure
