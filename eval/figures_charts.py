"""Charts of a report: intervals, training curves, example windows, forecasts. None knows about files or records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.figures import INK, MODEL_COLOURS, MUTED, PAPER, SHADE, Look, blank_figure, is_number, minus

OFF_SCALE = -0.1  # an R2 far below zero would flatten everything else; it gets an arrow with its value instead
SMOOTH_OVER = 51  # optimizer steps of the running median in the training curves


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its interval; ``low`` and ``high`` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of `draw_intervals`: estimates by row, and named vertical lines."""

    title: str
    estimates: Mapping[str, Estimate]
    lines: Mapping[str, float] = field(default_factory=dict)


def draw_intervals(panels: Sequence[Panel], looks: Mapping[str, Look], xlabel: str, chance: float = 0.0) -> Any:
    """Draw one row a model and one panel a condition: value and interval, on one scale.

    Values further below chance than `OFF_SCALE` become an arrow with the number beside it, unless nothing lies above.

    Parameters
    ----------
    panels : sequence of Panel
    looks : mapping
        Row key to look, top to bottom.
    chance : float
        Value that says nothing; it gets an upright line.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [key for key in looks if any(key in panel.estimates for panel in panels)]
    everything = [estimate for panel in panels for estimate in panel.estimates.values()]
    lowest = chance + OFF_SCALE
    values = np.array([e.value for e in everything] + [line for panel in panels for line in panel.lines.values()])
    ends = np.array([x for e in everything for x in (e.low, e.high) if x is not None and x >= lowest])
    shown = np.concatenate([values[values >= lowest], ends]) if (values >= lowest).any() else values
    left, right = min(float(shown.min()), chance), max(float(shown.max()), chance + 0.05)
    cut = bool((values < left).any())
    pad = 0.06 * (right - left)
    left, right = left - ((0.12 + 0.12 * len(panels)) * (right - left) if cut else pad), right + pad
    figure = blank_figure(9.4, 1.05 + 0.31 * len(rows))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        axis.set_title(panel.title)
        axis.grid(axis="x")
        axis.axvline(chance, color=MUTED, lw=0.8)
        for name, x in panel.lines.items():
            axis.axvline(x, color=MUTED, lw=1, ls=(0, (4, 3)))
            axis.annotate(
                f" {name}",
                (x, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=7.5,
                color=MUTED,
                rotation=90,
                ha="right",
            )
        for row, key in enumerate(rows):
            estimate = panel.estimates.get(key)
            if estimate is None:
                continue
            look = looks[key]
            if estimate.value < left:
                axis.annotate(
                    f"◂ {minus(estimate.value, 2)}",
                    (0, row),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8,
                    color=look.colour,
                )
                continue
            if estimate.low is not None and estimate.high is not None:
                axis.plot([max(estimate.low, left), estimate.high], [row, row], color=look.colour, lw=2.2)
            axis.plot(
                [estimate.value],
                [row],
                look.marker,
                color=look.colour,
                ms=4.8,
                mec=look.colour,
                mfc=PAPER if look.dashed else look.colour,
            )
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [looks[key].label for key in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].set_xlim(left, right)
    steps = [1, 2, 5, 10] if chance else None  # ticks that meet a chance of 0.5
    axes[0].xaxis.set_major_locator(MaxNLocator(4 if len(panels) > 2 else 7, prune="upper", steps=steps))
    figure.supxlabel(xlabel, fontsize=9)
    return figure


def draw_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> Any:
    """Draw loss, held-out R2, learning rate and gradient norm against the step, one line a training run.

    A noisy curve is drawn pale, its running median over it.
    """
    wanted = (
        (("loss", "train_loss"), "Loss (hidden values)"),
        (("val_r2",), "R², validation"),
        (("lr", "learning_rate"), "Learning rate"),
        (("grad_norm",), "Gradient norm"),
    )
    curves = []
    for names, title in wanted:
        found = {run: curve for run, rows in runs.items() if len(curve := _series(rows, names))}
        if found:
            curves.append((title, found))
    if not curves:
        return None
    figure = blank_figure(9.4, 2.3 if len(curves) <= 2 else 4.3)
    axes = figure.subplots(1 if len(curves) <= 2 else 2, min(len(curves), 2), squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for axis, (title, found) in zip(axes, curves):
        axis.set_title(title)
        axis.grid(axis="y")
        for run, curve in found.items():
            steps, values = curve[:, 0], curve[:, 1]
            sparse = len(curve) <= 60
            noisy = not sparse and title.startswith(("Loss", "Gradient"))
            axis.plot(
                steps, values, color=colours[run], lw=0.7 if noisy else 1.6, alpha=0.35 if noisy else 1,
                marker="o" if sparse else None, ms=3,
            )  # fmt: skip
            if noisy:
                axis.plot(steps, running_median(values, min(SMOOTH_OVER, len(values))), color=colours[run], lw=1.6)
        axis.set_xlabel("optimizer step")
        if title == "Learning rate":
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if title == "Loss (hidden values)":
            _log_if_wide(axis, [curve[:, 1] for curve in found.values()])
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colours[run], label=run) for run in runs]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 4))
    return figure


def _log_if_wide(axis: Any, values: Sequence[NDArray[np.float64]]) -> None:
    pooled = np.concatenate(values)
    if pooled.min() > 0 and pooled.max() / pooled.min() > 30:
        axis.set_yscale("log")


def _series(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> NDArray[np.float64]:
    """Return (step, value) pairs, shape (K, 2), finite ones only; of a step logged twice the last."""
    found: dict[float, float] = {}
    for row in rows:
        for name in names:
            value, step = row.get(name), row.get("step")
            if is_number(value) and is_number(step):
                found[float(step)] = float(value)  # type: ignore[arg-type]
    return np.array(sorted(found.items()), dtype=np.float64).reshape(-1, 2)


def running_median(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the centred running median, the ends with what there is of them."""
    half = max(width // 2, 1)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def draw_example(
    truth_PW: NDArray[np.floating[Any]],
    predictions: Mapping[str, NDArray[np.floating[Any]]],
    hidden_PW: NDArray[np.bool_],
    parcels: Sequence[int],
    names: Sequence[str],
    looks: Mapping[str, Look],
    tr_s: float,
    patch_len: int,
) -> Any:
    """Draw truth and predictions of some parcels of one window; hidden patches are shaded.

    Parameters
    ----------
    truth_PW, predictions : ndarray, shape (P, W)
        Same units; predictions are read only where hidden.
    hidden_PW : ndarray, shape (P, W), bool
    parcels : sequence of int
        Rows to draw.
    names : sequence of str
        Label of each drawn parcel.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = blank_figure(9.4, 0.75 + 0.95 * len(parcels))
    axes = figure.subplots(len(parcels), 1, sharex=True, squeeze=False)[:, 0]
    seconds = np.arange(truth_PW.shape[1]) * tr_s
    for axis, parcel, name in zip(axes, parcels, names):
        for start, stop in _runs(hidden_PW[parcel]):
            axis.axvspan((start - 0.5) * tr_s, (stop - 0.5) * tr_s, color=SHADE, lw=0)
        axis.plot(seconds, truth_PW[parcel], color=INK, lw=1.0)
        for model, prediction in reversed(list(predictions.items())):  # the first model on top
            for start, stop in _patches(hidden_PW[parcel], patch_len):
                axis.plot(
                    seconds[start:stop],
                    prediction[parcel, start:stop],
                    color=looks[model].colour,
                    lw=1.8 if looks[model].colour in MODEL_COLOURS else 1.1,
                    ls="--" if looks[model].dashed else "-",
                )
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="x", length=0)
        axis.set_xlim(-0.5 * tr_s, seconds[-1] + 0.5 * tr_s)
        axis.tick_params(axis="y", labelsize=7)
    axes[-1].set_xlabel("seconds")
    handles: list[Any] = [Line2D([], [], color=INK, lw=1, label="measured"), Patch(color=SHADE, label="hidden")]
    handles += [
        Line2D([], [], color=looks[m].colour, lw=1.8, ls="--" if looks[m].dashed else "-", label=looks[m].label)
        for m in predictions
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _runs(hidden: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def _patches(hidden: NDArray[np.bool_], patch_len: int) -> list[tuple[int, int]]:
    """Return hidden stretches cut at patch borders: each patch was decoded on its own, so lines do not join them."""
    return [(start, start + patch_len) for start in range(0, len(hidden), patch_len) if hidden[start]]


def draw_forecast(
    curves: Mapping[str, Sequence[NDArray[np.float64]]],
    looks: Mapping[str, Look],
    xlabel: str,
    marked: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Any:
    """Draw R2 against the step ahead; a curve is (x, value, low, high), the ends NaN where there is no interval.

    Steps that are `marked` get a ring.
    """
    figure = blank_figure(9.4, 3.1)
    axis = figure.subplots()
    axis.axhline(0, color=MUTED, lw=0.8)
    axis.grid(axis="y")
    lowest, highest = 0.0, 0.05
    for model, (x, value, low, high) in curves.items():
        look = looks[model]
        kept = value[value >= OFF_SCALE]
        lowest, highest = min([lowest, *kept]), max([highest, *value])
        axis.fill_between(x, low, high, color=look.colour, alpha=0.16, lw=0)
        axis.plot(
            x, value, color=look.colour, lw=2 if look.colour in MODEL_COLOURS else 1.3,
            ls="--" if look.dashed else "-", marker=look.marker, ms=3, label=look.label,
        )  # fmt: skip
    for model, steps in (marked or {}).items():
        x, value = curves[model][0][steps], curves[model][1][steps]
        axis.scatter(x, value, s=42, facecolors="none", edgecolors=looks[model].colour, linewidths=1.2, zorder=4)
    pad = 0.08 * (highest - lowest)
    axis.set_ylim(lowest - pad, highest + pad)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("R²")
    figure.legend(loc="outside right upper")
    return figure
