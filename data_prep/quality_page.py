"""``quality.html``: one plain page, with everything in it, that says what a data set holds and what it refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.input_contract import InputContract

HISTOGRAMS = {
    "num_timepoints": "Timepoints",
    "mean_fd_mm": "Mean framewise displacement (mm)",
    "dvars_z": "DVARS of z-scored parcels",
    "lag1_autocorrelation": "Lag-1 autocorrelation",
    "num_missing_parcels": "Missing parcels",
}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{border-bottom:1px solid #ccc;padding:.2rem .8rem}
th{text-align:left}td.n{text-align:right}h2{margin-top:2rem}img{max-width:100%}code{font-size:.9em}"""


@dataclass(frozen=True)
class QualityReport:
    """What the page shows."""

    name: str
    recordings: pd.DataFrame
    rejected: pd.DataFrame
    contract: InputContract
    duplicates: Sequence[Sequence[str]]
    warnings: Sequence[str]


def quality_page(report: QualityReport) -> str:
    """Return the page as HTML without any outside file."""
    table, contract = report.recordings, report.contract
    parts = [f"<h1>{escape(report.name)}: recordings and their quality</h1>"]
    parts.append(
        f"<p>{len(table)} recordings of {table['subject'].nunique()} subjects prepared, {len(report.rejected)} "
        f"refused. Atlas {escape(contract.atlas.name)}: {contract.atlas.num_parcels} parcels, "
        f"{int(contract.usable.sum())} usable. TR {contract.tr_s:g} s.</p>"
    )
    by_split = [
        [split, len(part), part["subject"].nunique(), int(part["num_timepoints"].sum())]
        for split in SPLITS
        for part in [table[table["split"] == split]]
    ]
    parts += ["<h2>Splits</h2>", _table(["split", "recordings", "subjects", "timepoints"], by_split)]
    groups = table.groupby(["site", "source_tr_s"], sort=True)
    sites = [
        [site or "(unknown)", f"{tr_s:g}", len(part), part["subject"].nunique(), _mean(part["mean_fd_mm"])]
        for (site, tr_s), part in groups
    ]
    parts.append("<h2>Sites and repetition times</h2>")
    parts.append(_table(["site", "TR of the source (s)", "recordings", "subjects", "mean FD (mm)"], sites))
    parts += ["<h2>Distributions</h2>", _histograms(table)]
    parts += ["<h2>Refused</h2>", "<p>None.</p>" if report.rejected.empty else _frame(report.rejected)]
    parts.append("<h2>Equal series</h2>")
    if report.duplicates:
        parts.append("<p>These recordings hold the same series under several ids; each group is in one split.</p>")
        parts.append(_list([", ".join(ids) for ids in report.duplicates]))
    else:
        parts.append("<p>None found.</p>")
    parts += ["<h2>Parcels</h2>", _parcels(contract)]
    parts += ["<h2>Warnings</h2>", _list(report.warnings) if report.warnings else "<p>None.</p>"]
    parts += ["<h2>Known facts for every score</h2>", _list(contract.flags) if contract.flags else "<p>None.</p>"]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.name)}: quality</title>\n'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" if values.notna().any() else "unknown"


def _parcels(contract: InputContract) -> str:
    names = np.asarray(contract.atlas.parcel_names)
    uncovered = names[~contract.covered].tolist()
    lines = [
        f"Covered by no train recording: {', '.join(uncovered) or 'none'}",
        f"Covered, with an IQR of 0: {', '.join(contract.zero_iqr_parcels) or 'none'}",
    ]
    return _list(lines)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = "" if isinstance(value, str) else ' class="n"'
        return f"<td{kind}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows) + "</table>"


def _frame(frame: pd.DataFrame) -> str:
    return _table(list(frame.columns), frame.astype(str).to_numpy().tolist())


def _histograms(table: pd.DataFrame) -> str:
    from matplotlib.figure import Figure

    shown = {name: label for name, label in HISTOGRAMS.items() if table[name].notna().any()}
    figure = Figure(figsize=(9, 2.6 * -(-len(shown) // 2)), layout="constrained")
    for number, (name, label) in enumerate(shown.items()):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, number + 1)
        axes.hist(table[name].dropna().to_numpy(dtype=float), bins=30, color="#4a6fa5")
        axes.set_xlabel(label)
        axes.set_ylabel("Recordings")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="Histograms of {escape(", ".join(shown.values()))}" src="data:image/png;base64,{encoded}">'
