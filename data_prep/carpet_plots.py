"""Carpet plots: a whole recording at a glance, one row a parcel (Power 2017, NeuroImage 154, over voxels).

Vertical bands are what moves all parcels at once, most often movement or breathing; a block of rows that differs is
a network, or a parcel without signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data_prep.svg_axes import Box, image, picture, text, ticks_below, ticks_of

RANKING_COLUMNS = ("recording_id", "mean_fd_mm", "dvars_z")
NUM_WORST = 3
LIMIT = 2.5  # standard deviations at which grey ends
MAX_COLUMNS = 900  # longer recordings are averaged down to what a screen shows
MAX_ROWS = 300  # finer atlases likewise
NUM_GREYS = 32  # fewer than a screen has, which halves the size of a picture
CENSORED, LINE = "#d1495b", "#2e86ab"
NAME_PX = 10
HEIGHT = 278
BOX = Box(126, 8, 720, 224)
STRIP = Box(126, 8, 720, 13)
BOX_BELOW_STRIP = Box(126, 24, 720, 208)
NO_NETWORK = "no network"


class Chosen(NamedTuple):
    """A recording to look at, and why."""

    recording_id: str
    why: str


def choose_recordings(table: pd.DataFrame, duplicates: Sequence[Sequence[str]]) -> tuple[str, list[Chosen]]:
    """Return the measure that tells noisy recordings from clean ones, and the worst and the median recording by it.

    The measure is ``mean_fd_mm`` where at least half of the recordings have one, else ``dvars_z``; "" and nobody where
    neither is known. Equal values are told apart by id, so that the choice depends on the rows alone; a series that is
    there under several ids, which `duplicates` lists, is shown once.
    """
    import pyarrow
    import pyarrow.compute

    known = {name: table[name].notna() for name in ("mean_fd_mm", "dvars_z")}
    measure = "mean_fd_mm" if 2 * known["mean_fd_mm"].sum() >= max(len(table), 1) else "dvars_z"
    ranked = table.loc[known[measure], ["recording_id", measure]]
    if ranked.empty:
        return "", []
    keys = [(measure, "ascending"), ("recording_id", "ascending")]
    # pandas would make a Python object of every id
    order = pyarrow.compute.sort_indices(pyarrow.Table.from_pandas(ranked, preserve_index=False), sort_keys=keys)
    ranked = ranked.iloc[order.to_numpy()]
    series_of = {recording_id: number for number, ids in enumerate(duplicates) for recording_id in ids}
    if series_of:
        series = [series_of.get(recording_id, -1 - row) for row, recording_id in enumerate(ranked["recording_id"])]
        ranked = ranked[~pd.Series(series).duplicated().to_numpy()]
    ids, values = ranked["recording_id"].array, ranked[measure].array
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


def carpet_svg(
    bold: NDArray[np.float32], keep_mask: NDArray[np.bool_], tr_s: float, networks: Sequence[str] | None, words: str
) -> str:
    """Draw one recording: time in seconds, parcels by network, censored timepoints in red above.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        NaN in missing parcels, which are left out. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = kept.
    tr_s : float
    networks : sequence of str, length P, or None
    words : str
        What the picture shows, for those who do not see it.

    Returns
    -------
    str
        An ``<svg>`` element that needs no other file: the same input gives the same text.
    """
    order, names = order_by_network(networks, bold.shape[1])
    present = np.asarray(~np.isnan(bold).all(axis=0))
    names = [name for name, here in zip(names, present[order]) if here]
    shown = z_scored(bold[:, order[present[order]]], keep_mask).clip(-LIMIT, LIMIT)
    box = BOX if keep_mask.all() else BOX_BELOW_STRIP
    parts = [] if keep_mask.all() else [_censored_strip(keep_mask)]
    if names:
        parts.append(image(_greys(_reduced(_reduced(shown, MAX_COLUMNS).T, MAX_ROWS)), box))
    duration_s = len(bold) * tr_s
    times = [(box.left + box.width * value / duration_s, label) for value, label in ticks_of(0.0, duration_s, 6)]
    parts += [
        _frame(box),
        ticks_below(box, times, 13),
        text("Time (s)", box.left + box.width / 2, HEIGHT - 10, size=13),
    ]
    return picture([*parts, _name_networks(box, names)], HEIGHT, words)


def _greys(shown: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return what is drawn for values in [-LIMIT, LIMIT]: one of NUM_GREYS, from black to white."""
    level = np.round((shown + LIMIT) * ((NUM_GREYS - 1) / (2 * LIMIT)))
    return np.asarray(np.round(level * (255 / (NUM_GREYS - 1))).astype(np.uint8))


def _frame(box: Box) -> str:
    return (
        f'<rect x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" fill="none" '
        'stroke="#222"/>'
    )


def _censored_strip(keep_mask: NDArray[np.bool_]) -> str:
    """Draw a bar over each run of censored timepoints, at least half a pixel wide."""
    edges = np.flatnonzero(np.diff(keep_mask.astype(np.int8), prepend=1, append=1))
    scale = STRIP.width / len(keep_mask)
    bars = "".join(
        f"M{STRIP.left + scale * start:.1f} {STRIP.top:g}v{STRIP.height:g}h{max(scale * (stop - start), 0.5):.1f}"
        f"v-{STRIP.height:g}z"
        for start, stop in zip(edges[::2], edges[1::2])
    )
    word = text("censored", STRIP.left - 7, STRIP.top + STRIP.height / 2, "end", NAME_PX, CENSORED)
    return f'<path d="{bars}" fill="{CENSORED}"/>{_frame(STRIP)}{word}'


def _name_networks(box: Box, names: Sequence[str]) -> str:
    starts = [n for n, name in enumerate(names) if n == 0 or name != names[n - 1]]
    if len(starts) < 2:
        return text("Parcels", box.left - 15, box.top + box.height / 2, size=13, turn=True)
    row_px = box.height / len(names)
    lines = "".join(f"M{box.left:g} {box.top + row_px * start:.1f}h{box.width:g}" for start in starts[1:])
    stops = [*starts[1:], len(names)]
    tall = [n for n in range(len(starts)) if stops[n] - starts[n] >= 0.035 * len(names)]  # room for a name
    words = [
        text(names[starts[n]][:20], box.left - 7, box.top + row_px * (starts[n] + stops[n]) / 2, "end", NAME_PX)
        for n in tall
    ]
    return f'<path d="{lines}" stroke="{LINE}" stroke-width=".8"/>{"".join(words)}'


def _reduced(values: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """Return at most `most` rows: means of as many neighbours as it takes; the last may be of fewer."""
    step = -(-len(values) // most)
    if step == 1:
        return values
    edges = np.arange(0, len(values), step)
    counts = np.diff([*edges, len(values)]).astype(np.float32)
    return np.asarray(np.add.reduceat(values, edges, axis=0) / counts[:, None])
