"""Charts of predicted phenotypes: truth over prediction, and reliability. None knows about files or about records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.figures import MUTED, PAPER, SERIES, blank_figure

MOST_DOTS = 1500
HALF_PERCENT = 0.005


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """One panel of `draw_truth`: predictions and truths of shape (n,)."""

    title: str
    predicted: NDArray[np.float64]
    truth: NDArray[np.float64]
    colour: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bins of a reliability diagram: mean prediction, what was observed, and how many fell into the bin."""

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    num: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """One panel of `draw_reliability`: a curve a class, or one with the name ""."""

    title: str
    curves: Mapping[str, Curve]
    colour: str


def draw_truth(clouds: Sequence[Cloud], target: str) -> Any:
    """Draw truth over prediction, one panel a method on one scale; on the dashed line they agree.

    Of more than `MOST_DOTS` dots, evenly chosen ones are drawn. The scale leaves out the outermost half percent of
    predictions, which single wild guesses would otherwise decide.
    """
    figure = blank_figure(9.4, 3.7)
    axes = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    truths = np.concatenate([cloud.truth for cloud in clouds])
    predicted = np.concatenate([cloud.predicted for cloud in clouds])
    ends = np.quantile(predicted, [HALF_PERCENT, 1 - HALF_PERCENT])
    low, high = min(float(truths.min()), float(ends[0])), max(float(truths.max()), float(ends[1]))
    pad = 0.05 * (high - low) or 1.0
    for axis, cloud in zip(axes, clouds):
        axis.set_title(cloud.title)
        axis.grid()
        axis.set_axisbelow(True)
        axis.plot([low - pad, high + pad], [low - pad, high + pad], color=MUTED, lw=1, ls=(0, (4, 3)))
        kept = np.unique(np.linspace(0, len(cloud.truth) - 1, MOST_DOTS).astype(int))
        axis.scatter(
            cloud.predicted[kept], cloud.truth[kept], s=14, color=cloud.colour, alpha=0.45 if len(kept) > 150 else 0.7,
            linewidths=0,
        )  # fmt: skip
        axis.set_xlim(low - pad, high + pad)
        axis.set_ylim(low - pad, high + pad)
        axis.set_xlabel("predicted")
    axes[0].set_ylabel(f"{target}, truth")
    return figure


def draw_reliability(panels: Sequence[Reliability], ylabel: str, is_share: bool) -> Any:
    """Draw what was observed over what was predicted, by bin; the area of a dot grows with its people.

    Parameters
    ----------
    is_share : bool
        Both axes run from 0 to 1.
    """
    from matplotlib.lines import Line2D

    figure = blank_figure(9.4, 3.7)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    curves = [curve for panel in panels for curve in panel.curves.values()]
    both = np.concatenate([np.concatenate([curve.predicted, curve.observed]) for curve in curves])
    low, high = (0.0, 1.0) if is_share else (float(both.min()), float(both.max()))
    pad = 0.04 * (high - low) or 1.0
    most = max(float(curve.num.max()) for curve in curves)
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}
    for axis, panel in zip(axes, panels):
        axis.set_title(panel.title)
        axis.grid()
        axis.set_axisbelow(True)
        axis.plot([low - pad, high + pad], [low - pad, high + pad], color=MUTED, lw=1, ls=(0, (4, 3)))
        for name, curve in panel.curves.items():
            colour = colours[name] if len(names) > 1 else panel.colour
            axis.plot(curve.predicted, curve.observed, color=colour, lw=1.4)
            axis.scatter(
                curve.predicted, curve.observed, s=10 + 70 * curve.num / most, color=colour, edgecolors=PAPER,
                linewidths=0.8, zorder=3,
            )  # fmt: skip
        axis.set_xlim(low - pad, high + pad)
        axis.set_ylim(low - pad, high + pad)
        axis.set_xlabel("predicted probability" if is_share else "predicted")
    axes[0].set_ylabel(ylabel)
    if len(names) > 1:
        handles = [Line2D([], [], color=colours[name], marker="o", ms=4, label=name) for name in names]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6))
    return figure
