"""Carpet plots: a whole recording at a glance, one row a parcel (Power 2017, NeuroImage 154, over voxels).

Vertical bands are what moves all parcels at once, most often movement or breathing; a block of rows that differs is
a network, or a parcel without signal.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_WORST = 3
LIMIT = 2.5  # standard deviations at which grey ends
MAX_COLUMNS = 900  # longer recordings are averaged down to what a screen shows
MAX_ROWS = 600  # finer atlases likewise
NUM_GREYS = 40  # of the picture's palette, which halves its size
CENSORED, LINE = "#d1495b", "#2e86ab"
NO_NETWORK = "no network"


class Chosen(NamedTuple):
    """A recording to look at, and why."""

    recording_id: str
    why: str


def choose_recordings(table: pd.DataFrame) -> tuple[str, list[Chosen]]:
    """Return the measure that tells noisy recordings from clean ones, and the worst and the median recording by it.

    The measure is ``mean_fd_mm`` where at least half of the recordings have one, else ``dvars_z``; "" and nobody where
    neither is known. Equal values are told apart by id, so that the choice depends on the rows alone; a series that is
    there under several ids is shown once.
    """
    known = {name: table[name].notna() for name in ("mean_fd_mm", "dvars_z")}
    measure = "mean_fd_mm" if 2 * known["mean_fd_mm"].sum() >= max(len(table), 1) else "dvars_z"
    ranked = table.loc[known[measure], ["recording_id", "series_sha256", measure]]
    ranked = ranked.sort_values([measure, "recording_id"]).drop_duplicates("series_sha256")
    if ranked.empty:
        return "", []
    ids, values = ranked["recording_id"].tolist(), ranked[measure].tolist()
    unit = " mm" if measure == "mean_fd_mm" else ""
    label = "mean framewise displacement" if measure == "mean_fd_mm" else "DVARS of z-scored parcels"
    middle = len(ids) // 2
    worst = [n for n in range(len(ids) - 1, -1, -1) if n != middle][:NUM_WORST]
    ranks = ["worst", "second worst", "third worst"]
    chosen = [Chosen(str(ids[n]), f"{rank} by {label}, {values[n]:.3f}{unit}") for n, rank in zip(worst, ranks)]
    return measure, [*chosen, Chosen(str(ids[middle]), f"median by {label}, {values[middle]:.3f}{unit}")]


def order_by_network(networks: Sequence[str] | None, num_parcels: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return parcels with those of one network together, and the network of each in that order.

    Networks follow one another as in the atlas, parcels of none come last; without networks the order is the atlas'.
    """
    if networks is None or not any(networks):
        return np.arange(num_parcels), [""] * num_parcels
    rank = {name: number for number, name in enumerate(dict.fromkeys(name for name in networks if name))}
    order = np.array(sorted(range(num_parcels), key=lambda p: (rank.get(networks[p], len(rank)), p)))
    return order, [networks[p] or NO_NETWORK for p in order]


def z_scored(bold: NDArray[np.float32], keep_mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return columns in standard deviations from the mean, both over kept timepoints; 0 where a column never varies.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        Parcels with signal only. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = kept.
    """
    kept = bold[keep_mask]
    mean, deviation = kept.mean(axis=0, dtype=np.float64), kept.std(axis=0, dtype=np.float64)
    return np.asarray((bold - mean.astype(np.float32)) / np.where(deviation > 0, deviation, np.inf).astype(np.float32))


def carpet_png(
    bold: NDArray[np.float32], keep_mask: NDArray[np.bool_], tr_s: float, networks: Sequence[str] | None
) -> bytes:
    """Draw one recording: time in seconds, parcels by network, censored timepoints in red above.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        NaN in missing parcels, which are left out. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = kept.
    tr_s : float
    networks : sequence of str, length P, or None

    Returns
    -------
    bytes
        A PNG without metadata: the same input gives the same bytes.
    """
    from matplotlib.figure import Figure

    order, names = order_by_network(networks, bold.shape[1])
    present = np.asarray(~np.isnan(bold).all(axis=0))
    names = [name for name, here in zip(names, present[order]) if here]
    shown = z_scored(bold[:, order[present[order]]], keep_mask).clip(-LIMIT, LIMIT)
    duration_s = len(bold) * tr_s
    figure = Figure(figsize=(8.6, 2.9))
    figure.subplots_adjust(left=0.15, right=0.98, top=0.97, bottom=0.17)  # a layout engine takes longer than the rest
    if keep_mask.all():
        carpet = figure.add_subplot()
    else:
        strip, carpet = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 16], "hspace": 0.02})
        _mark_censored(strip, keep_mask, duration_s)
    picture = _reduced(_reduced(shown, MAX_COLUMNS).T, MAX_ROWS)
    carpet.imshow(
        picture,
        aspect="auto",
        cmap="gray",
        vmin=-LIMIT,
        vmax=LIMIT,
        extent=(0.0, duration_s, float(shown.shape[1]), 0.0),
        interpolation="nearest",
    )
    carpet.set_xlabel("Time (s)")
    _name_networks(carpet, names)
    return figure_png(figure)


def _mark_censored(axes: Axes, keep_mask: NDArray[np.bool_], duration_s: float) -> None:
    from matplotlib.colors import ListedColormap

    censored = _reduced((~keep_mask)[:, None].astype(np.float32), MAX_COLUMNS, largest=True)
    axes.imshow(
        censored.T,
        aspect="auto",
        cmap=ListedColormap(["white", CENSORED]),
        vmin=0,
        vmax=1,
        extent=(0.0, duration_s, 0.0, 1.0),
        interpolation="nearest",
    )
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.set_ylabel("censored", rotation=0, ha="right", va="center", fontsize=7, color=CENSORED)


def _name_networks(axes: Axes, names: Sequence[str]) -> None:
    starts = [n for n, name in enumerate(names) if n == 0 or name != names[n - 1]]
    if len(starts) < 2:
        axes.set_ylabel("Parcels")
        return
    for start in starts[1:]:
        axes.axhline(start, color=LINE, linewidth=0.8)
    stops = [*starts[1:], len(names)]
    tall = [n for n in range(len(starts)) if stops[n] - starts[n] >= 0.035 * len(names)]  # room for a name
    axes.set_yticks([(starts[n] + stops[n]) / 2 for n in tall], [names[starts[n]][:20] for n in tall], fontsize=7)
    axes.tick_params(axis="y", length=0)


def _reduced(values: NDArray[np.float32], most: int, largest: bool = False) -> NDArray[np.float32]:
    """Return at most about `most` rows: means (or maxima) of as many neighbours as it takes; the last may be fewer."""
    step = -(-len(values) // most)
    if step == 1:
        return values
    edges = np.arange(0, len(values), step)
    if largest:
        return np.asarray(np.maximum.reduceat(values, edges, axis=0))
    counts = np.diff([*edges, len(values)]).astype(np.float32)
    return np.asarray(np.add.reduceat(values, edges, axis=0) / counts[:, None])


def figure_png(figure: Figure, dpi: int = 96) -> bytes:
    """Return a figure as a PNG with a small, fixed palette and nothing else in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image, ImageColor

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    canvas.draw()
    palette = Image.new("P", (1, 1))
    greys = [round(n * 255 / (NUM_GREYS - 1)) for n in range(NUM_GREYS)]
    palette.putpalette([value for grey in greys for value in (grey, grey, grey)] + _mixed(ImageColor.getrgb))
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _mixed(rgb_of: Callable[[str], tuple[int, ...]]) -> list[int]:
    """Return our colours, each at full strength and half way to white, as a palette has them."""
    return [value for name in (CENSORED, LINE) for share in (1.0, 0.5) for value in _towards_white(rgb_of(name), share)]


def _towards_white(rgb: Sequence[int], share: float) -> list[int]:
    return [round(255 - share * (255 - value)) for value in rgb[:3]]
