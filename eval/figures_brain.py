"""Brain pictures of a report: one marker a parcel on nilearn's glass brain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def draw_brain(
    values: NDArray[np.float64], coords_mm: NDArray[np.float64], *, label: str, limit: float | None = None
) -> Any:
    """Draw one marker a parcel on nilearn's glass brain, coloured by a number.

    Parameters
    ----------
    values : ndarray, shape (K,)
    coords_mm : ndarray, shape (K, 3)
        MNI millimetres.
    limit : float, optional
        Draws a diverging scale from -limit to limit; without it the scale runs over the values.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if limit is None:
        low, high = float(np.quantile(values, 0.02)), float(np.quantile(values, 0.98))
        high = high if high > low else low + 1e-3
        cmap = "viridis"
    else:
        low, high, cmap = -limit, limit, "RdBu_r"
    figure = _glass_brain(values, coords_mm, cmap, low, high)
    scale = ScalarMappable(Normalize(low, high), cmap)
    axis = figure.add_axes((0.9, 0.16, 0.012, 0.66))
    outside = bool((values < low).any()), bool((values > high).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[outside]
    bar = figure.colorbar(scale, cax=axis, extend=extend)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return figure


def draw_networks(networks: Sequence[str], coords_mm: NDArray[np.float64]) -> Any:
    """Draw one marker a parcel, coloured by its network."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    names = sorted(set(networks))
    palette = [colormaps["tab20" if len(names) > 10 else "tab10"](i % 20) for i in range(len(names))]
    codes = np.array([names.index(name) for name in networks], dtype=np.float64)
    figure = _glass_brain(codes, coords_mm, ListedColormap(palette), -0.5, len(names) - 0.5)
    handles = [
        Line2D([], [], ls="", marker="o", ms=6, color=colour, label=name or "none")
        for name, colour in zip(names, palette)
    ]
    figure.legend(handles=handles, loc="center right", fontsize=8, handletextpad=0.2, ncols=2 if len(names) > 10 else 1)
    return figure


def _glass_brain(
    values: NDArray[np.float64], coords_mm: NDArray[np.float64], cmap: Any, low: float, high: float
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from nilearn.plotting import plot_markers

    figure = Figure(figsize=(9.4, 2.75))
    FigureCanvasAgg(figure)
    plot_markers(
        values,
        coords_mm,
        node_size=26 if len(values) > 150 else 40,
        node_cmap=cmap,
        node_vmin=low,
        node_vmax=high,
        alpha=0.92,
        display_mode="lzr",
        figure=figure,
        axes=(0, 0, 0.87, 1),
        colorbar=False,
    )
    return figure
