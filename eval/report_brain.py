"""The section on where in the brain: scores by parcel as pictures, and by functional network as a table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import figures_brain
from eval.figures import minus
from eval.report_input import HEADLINE_RATIO, Results, among, percent, reconstruction_base, strongest
from eval.report_page import Artist, Section
from eval.report_tables import Cell, Row, Table


def brain_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Where in the brain", anchor="brain")
    if not results.store.exists("parcels.parquet"):
        section.absent.append(
            "No scores by parcel were kept (parcels.parquet is not there), so there is no brain picture."
        )
        return section
    import pandas as pd

    frame = pd.read_parquet(io.BytesIO(results.store.read_bytes("parcels.parquet")))
    frame = frame[np.isfinite(frame["r2"].to_numpy(np.float64))]
    if frame.empty:
        section.absent.append("parcels.parquet holds no finite score.")
        return section
    present = list(dict.fromkeys(frame["model"]))
    model = next((m for m in results.models if m in present), present[0])
    ratios = np.array(sorted(set(frame.loc[frame["model"] == model, "mask_ratio"])), dtype=np.float64)
    ratio = float(ratios[np.argmin(np.abs(ratios - HEADLINE_RATIO))])
    here = frame[np.isclose(frame["mask_ratio"].to_numpy(np.float64), ratio)]
    ours = here[here["model"] == model].set_index("parcel").sort_index()
    label = results.labels.get(model, str(model))
    values = ours["r2"].to_numpy(np.float64)
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    try:
        coords_mm = _coords(ours)
        drawings = [
            artist.show(
                figures_brain.draw_brain(values, coords_mm, label="R²"),
                "brain-r2",
                f"R² of {label} by parcel on a glass brain",
                f"R² of {label} by parcel, {percent(ratio)} hidden, {len(ours)} parcels: median {minus(middle)}, "
                f"from {minus(low)} (10th percentile) to {minus(high)} (90th).",
            )
        ]
        scored = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=ratio)
        rival = strongest(s for s in among(scored, "baseline") if s.model in present)
        if rival is not None and rival.model != model:
            theirs = here[here["model"] == rival.model].set_index("parcel")["r2"]
            difference = (ours["r2"] - theirs).dropna()
            if len(difference):
                gap = difference.to_numpy(np.float64)
                drawings.append(
                    artist.show(
                        figures_brain.draw_brain(
                            gap,
                            _coords(ours.loc[difference.index]),
                            label="difference of R²",
                            limit=max(float(np.quantile(np.abs(gap), 0.98)), 1e-3),
                        ),
                        "brain-difference",
                        f"Difference of R² by parcel between {label} and {results.labels[rival.model]}",
                        f"R² of {label} minus R² of {results.labels[rival.model]}, the strongest baseline; red: "
                        f"{label} is better. It is in {percent(float(round((gap > 0).mean(), 2)))} of the parcels.",
                    )
                )
        networks = [str(n) if n is not None and n == n else "" for n in ours["network"]] if "network" in ours else []
        if len(set(networks) - {""}) > 1:
            named = np.array([bool(n) for n in networks])
            drawings.append(
                artist.show(
                    figures_brain.draw_networks([n for n in networks if n], coords_mm[named]),
                    "brain-networks",
                    "Functional network of every parcel on a glass brain",
                    "Functional networks of the atlas, for orientation.",
                )
            )
            section.tables.append(_by_network(ours, networks, label, ratio))
        section.drawings = drawings
    except ImportError as error:
        section.absent.append(f'The brain pictures need nilearn ({error}): pip install -e ".[eval]".')
    return section


def _coords(frame: Any) -> Any:
    return frame[["x_mm", "y_mm", "z_mm"]].to_numpy(np.float64)


def _by_network(ours: Any, networks: Sequence[str], label: str, ratio: float) -> Table:
    values = ours["r2"].to_numpy(np.float64)
    rows = []
    for name in sorted(set(networks) - {""}):
        inside = values[[n == name for n in networks]]
        cells = [Cell(value=str(len(inside))), *(Cell(value=minus(q)) for q in np.quantile(inside, [0.5, 0, 1]))]
        rows.append(Row(label=name, cells=cells))
    return Table(
        title="R² by network",
        caption=f"R² of {label} by parcel, {percent(ratio)} hidden, summarised by network (same definition as the "
        "first table of reconstruction, summed over recordings for each parcel).",
        columns=["Parcels", "Median", "Lowest", "Highest"],
        rows=rows,
        head="Network",
    )
