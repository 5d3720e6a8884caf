"""``quality.html``: one plain page, with everything in it, that says what a data set holds and what it refused.

However many recordings there are, the page stays a few megabytes at most: lists are cut where the parquet tables tell
the rest. Its bytes depend on the report alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.dataset import SPLITS
from brainlm.input_contract import InputContract
from data_prep.carpet_plots import RANKING_COLUMNS, carpet_svg, choose_recordings
from data_prep.histogram_plots import histograms_svg
from data_prep.stored_table import Table

HISTOGRAMS = {
    "duration_s": "Kept time (s)",
    "fraction_kept": "Fraction of timepoints kept",
    "mean_fd_mm": "Mean framewise displacement (mm)",
    "dvars_z": "DVARS of z-scored parcels",
    "tsnr": "Temporal signal-to-noise ratio (images)",
    "lag1_autocorrelation": "Lag-1 autocorrelation",
    "mean_coverage": "Mean coverage of parcels",
    "num_missing_parcels": "Missing parcels",
    "num_constant_parcels": "Constant parcels",
}
TEXT_COLUMNS = ("site", "space", "denoised", "cohort")
SITE_COLUMNS = ("site", "subject", "split", "source_tr_s", "resampled", "mean_fd_mm", "dvars_z", "fraction_kept")
MAX_LISTED = 200  # lines of a list
MAX_GROUPS = 60  # kinds of refusals that are told apart
MAX_REFUSAL_CHARACTERS = 700_000  # of all listed refusals together
MAX_REASON_CHARACTERS = 400
MAX_WORST_PARCELS = 25
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{border-bottom:1px solid #ccc;padding:.2rem .8rem}
th{text-align:left}td.n{text-align:right}h2{margin-top:2rem}svg{max-width:100%}code{font-size:.9em}
details{margin:.3rem 0}summary{cursor:pointer}details ul{font-size:.85em;overflow-wrap:anywhere}
figure{margin:1rem 0}figcaption{font-size:.9em}"""

Carpet = Callable[[str], tuple[NDArray[np.float32], NDArray[np.bool_]]]


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """What the page shows.

    Parameters
    ----------
    name : str
    recordings : DataFrame or StoredTable
        As ``recordings.parquet``.
    rejected : DataFrame
        As ``rejected.parquet``.
    contract : InputContract
    duplicates : sequence of lists of recording ids
        Those that hold the same series.
    warnings : sequence of str
    carpet : callable, optional
        Gives ``bold (T, P)`` and ``keep_mask (T,)`` of a recording; it is asked for four. None: no carpet plots.
    parcel_coverage : ndarray, shape (P,), optional
        Mean over recordings of each parcel's coverage.
    """

    name: str
    recordings: Table
    rejected: pd.DataFrame
    contract: InputContract
    duplicates: Sequence[Sequence[str]]
    warnings: Sequence[str]
    carpet: Carpet | None = None
    parcel_coverage: NDArray[np.float32] | None = None


def quality_page(report: QualityReport) -> str:
    """Return the page as HTML without any outside file."""
    table, contract = report.recordings, report.contract
    sections = [
        ("Splits", _splits(_read(table, "split", "subject", "num_timepoints", "mean_fd_mm"))),
        ("Repetition times", _repetition_times(_read(table, "source_tr_s", "resampled", "site"), contract)),
        ("Sites", _sites(_read(table, *SITE_COLUMNS))),
        ("What was done before", _before(_read(table, *TEXT_COLUMNS))),
        ("Distributions", _distributions(_read(table, *HISTOGRAMS))),
        ("Carpet plots", _carpets(report)),
        ("Refused", _refusals(report.rejected)),
        ("Equal series", _duplicates(report.duplicates)),
        ("Parcels", _parcels(report)),
        ("Warnings", _list(report.warnings) if report.warnings else "<p>None.</p>"),
        ("Known facts for every score", _list(contract.flags) if contract.flags else "<p>None.</p>"),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.name)}: quality</title>\n'
        f"<style>{STYLE}</style></head><body>\n{_summary(report)}\n{body}\n</body></html>\n"
    )


def reason_kind(reason: str, *names: str) -> str:
    """Return what a reason says without its numbers, file names and the given names, so that like reasons are equal."""
    for name in sorted((name for name in names if name and not name.isdigit()), key=len, reverse=True):
        reason = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", reason)
    reason = re.sub(r"\S*/\S*", "…", reason)
    reason = re.sub(r"\d+([.,]\d+)*(e[+-]?\d+)?", "#", reason)
    return reason[:160]


def _read(recordings: Table, *names: str) -> pd.DataFrame:
    """Return some columns; those that an older data set lacks are empty."""
    asked = list(dict.fromkeys([*names, "num_kept", "num_timepoints"] if "fraction_kept" in names else names))
    table = recordings[[name for name in asked if name in recordings.columns]]
    lacking = [name for name in asked if name not in table.columns]
    table = table.assign(**{name: "" if name in TEXT_COLUMNS else np.nan for name in lacking})
    return table.assign(fraction_kept=table["num_kept"] / table["num_timepoints"]) if len(asked) > len(names) else table


def _summary(report: QualityReport) -> str:
    contract, table = report.contract, _read(report.recordings, "num_timepoints", "subject")
    hours = (table["num_timepoints"] * contract.tr_s).sum() / 3600
    return (
        f"<h1>{escape(report.name)}: recordings and their quality</h1>\n"
        f"<p>{len(table)} recordings ({hours:.1f} h) of {table['subject'].nunique()} subjects prepared, "
        f"{len(report.rejected)} refused. Atlas {escape(contract.atlas.name)}: {contract.atlas.num_parcels} parcels, "
        f"{int(contract.usable.sum())} usable. TR {contract.tr_s:g} s.</p>"
    )


def _splits(table: pd.DataFrame) -> str:
    rows = [
        [split, len(part), part["subject"].nunique(), int(part["num_timepoints"].sum()), _mean(part["mean_fd_mm"])]
        for split in SPLITS
        for part in [table[table["split"] == split]]
    ]
    return _table(["split", "recordings", "subjects", "timepoints", "mean FD (mm)"], rows)


def _repetition_times(table: pd.DataFrame, contract: InputContract) -> str:
    groups = table.groupby(table["source_tr_s"].round(4), sort=True, dropna=False)
    rows = [
        [f"{tr_s:g}", f"{contract.tr_s:g}", len(part), int(part["resampled"].sum()), part["site"].nunique()]
        for tr_s, part in groups
    ]
    num_resampled = int(table["resampled"].sum())
    told = (
        f"<p>{num_resampled} of {len(table)} recordings were resampled to {contract.tr_s:g} s.</p>"
        if num_resampled
        else "<p>No recording was resampled.</p>"
    )
    return told + _table(["TR of the source (s)", "TR here (s)", "recordings", "resampled", "sites"], rows)


def _sites(table: pd.DataFrame) -> str:
    rows = []
    for site, part in table.groupby("site", sort=True):
        times = sorted(f"{value:g}" for value in part["source_tr_s"].round(4).unique())
        counts = part["split"].value_counts()
        rows.append(
            [
                str(site) or "(unknown)",
                len(part),
                part["subject"].nunique(),
                *(int(counts.get(split, 0)) for split in SPLITS),
                ", ".join(times[:5]) + (" and others" if len(times) > 5 else ""),
                int(part["resampled"].sum()),
                _mean(part["mean_fd_mm"]),
                _mean(part["dvars_z"]),
                _mean(part["fraction_kept"], "{:.1%}"),
            ]
        )
    header = ["site", "recordings", "subjects", *SPLITS, "source TR (s)", "resampled"]
    return _table([*header, "mean FD (mm)", "DVARS", "kept"], rows)


def _before(table: pd.DataFrame) -> str:
    """Say in which spaces recordings came, what had cleaned them, and with which cohort, where any of it is known."""
    names = {"cohort": "cohort", "space": "template space", "denoised": "denoised before by"}
    varied = [name for name in names if table[name].nunique() > 1 or (name != "cohort" and (table[name] != "").any())]
    if not varied:
        return ""
    groups = table.groupby(varied, sort=True)
    rows = [[*(str(value) or "-" for value in key), len(part)] for key, part in groups]
    return _table([*(names[name] for name in varied), "recordings"], rows)


def _distributions(table: pd.DataFrame) -> str:
    """Draw what varies; say in words what is unknown or the same everywhere."""
    shown, told = {}, []
    for name, label in HISTOGRAMS.items():
        values = table[name].dropna().to_numpy(dtype=float)
        unknown = len(table) - len(values)
        # values that differ by rounding alone leave no room for the borders of a histogram's bins
        is_same = len(values) > 0 and np.ptp(values) <= 1e-9 * np.abs(values).max()
        if len(values) and not is_same:
            shown[label] = values
        if unknown:
            told.append(f"{label}: unknown for {f'{unknown} of' if len(values) else 'all'} {len(table)} recordings")
        elif is_same:
            told.append(f"{label}: {values[0]:g} in every recording")
    if not shown:
        return _list(told)
    drawn = histograms_svg(shown, f"Histograms of {', '.join(shown)}")
    return drawn + (_list(told) if told else "")


def _carpets(report: QualityReport) -> str:
    if report.carpet is None:
        return ""
    measure, chosen = choose_recordings(_read(report.recordings, *RANKING_COLUMNS), report.duplicates)
    if not chosen:
        return "<p>No recording has a measure of noise.</p>"
    networks = report.contract.atlas.networks
    ordered = "by network" if networks is not None and any(networks) else "in the order of the atlas"
    known = (
        "mean framewise displacement" if measure == "mean_fd_mm" else "DVARS (mean framewise displacement is not known)"
    )
    parts = [
        f"<p>The worst recordings and the median one by {known}. A row is a parcel ({ordered}), z-scored over kept "
        "timepoints; grey ends at 2.5 standard deviations. Censored timepoints are marked in red above; what is drawn "
        "below them is interpolated.</p>"
    ]
    for recording_id, why in chosen:
        bold, keep_mask = report.carpet(recording_id)
        missing = int(np.isnan(bold).all(axis=0).sum())
        facts = f"{len(bold)} timepoints, {int((~keep_mask).sum())} censored, {missing} parcels missing"
        drawn = carpet_svg(bold, keep_mask, report.contract.tr_s, networks, f"Carpet plot of {recording_id}")
        caption = f"{escape(recording_id)}: {escape(why)}; {facts}"
        parts.append(f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def _refusals(rejected: pd.DataFrame) -> str:
    """List refusals by kind: first how many of each, then each with its reason, folded away."""
    if rejected.empty:
        return "<p>None.</p>"
    columns = [rejected[name].fillna("").astype(str).tolist() for name in ("recording_id", "subject", "source")]
    stages, reasons = (rejected[name].fillna("").astype(str).tolist() for name in ("stage", "reason"))
    kinds: dict[tuple[str, str], list[int]] = {}
    for row, (stage, reason, *names) in enumerate(zip(stages, reasons, *columns)):
        kinds.setdefault((stage, reason_kind(reason, *names)), []).append(row)
    ranked = sorted(kinds.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    if len(ranked) > MAX_GROUPS:
        rest = [row for _, rows in ranked[MAX_GROUPS - 1 :] for row in rows]
        ranked = [*ranked[: MAX_GROUPS - 1], (("", f"other reasons ({len(ranked) - MAX_GROUPS + 1} kinds)"), rest)]
    by_stage = pd.Series(stages).value_counts().sort_index()
    parts = [_table(["refused at", "recordings"], [[str(s), int(n)] for s, n in by_stage.items()])]
    budget = MAX_REFUSAL_CHARACTERS // len(ranked)
    for (stage, kind), rows in ranked:
        rows = sorted(rows, key=lambda row: columns[0][row])
        lines: list[str] = []
        size = 0
        for row in rows:
            line = f"{columns[0][row]}: {_shortened(reasons[row])}"
            size += len(line)
            if size > budget and lines:
                break
            lines.append(line)
        left = f"<p>and {len(rows) - len(lines)} more, see rejected.parquet</p>" if len(rows) > len(lines) else ""
        told = f"{stage}: {kind}" if stage else kind
        summary = f"<summary>{len(rows)} {escape(told)}</summary>"
        parts.append(f"<details>{summary}{_list(lines, len(lines))}{left}</details>")
    return "\n".join(parts)


def _duplicates(duplicates: Sequence[Sequence[str]]) -> str:
    if not duplicates:
        return "<p>None found.</p>"
    return (
        f"<p>{len(duplicates)} series are there under several ids; the recordings of each are in one split.</p>"
        + _list([", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "") for ids in duplicates])
    )


def _parcels(report: QualityReport) -> str:
    contract, coverage = report.contract, report.parcel_coverage
    names = contract.atlas.parcel_names
    uncovered = [names[p] for p in np.flatnonzero(~contract.covered)]
    told = _list(
        [
            f"Covered by no train recording: {_joined(uncovered)}",
            f"Covered, with an IQR of 0: {_joined(contract.zero_iqr_parcels)}",
        ]
    )
    if coverage is None:
        return told
    order = np.argsort(coverage, kind="stable")
    poor = [int(p) for p in order if coverage[p] < 0.9995]
    if not poor:
        return told + "<p>Every parcel is covered in full in every recording.</p>"
    networks = contract.atlas.networks
    rows = [
        [names[p], *([networks[p] or "-"] if networks else []), f"{coverage[p]:.1%}"] for p in poor[:MAX_WORST_PARCELS]
    ]
    header = ["worst covered", *(["network"] if networks else []), "mean coverage"]
    more = f"<p>{len(poor)} parcels are not covered in full in every recording; these are the worst.</p>"
    return told + more + _table(header, rows)


def _mean(values: pd.Series, form: str = "{:.3f}") -> str:
    return form.format(values.mean()) if values.notna().any() else "unknown"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]}…"


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "none") + more


def _list(lines: Iterable[str], most: int = MAX_LISTED) -> str:
    lines = list(lines)
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines[:most])
    return f"<ul>{items}</ul>" + (f"<p>and {len(lines) - most} more</p>" if len(lines) > most else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        kind = "" if isinstance(value, str) else ' class="n"'
        return f"<td{kind}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows[:MAX_LISTED])
    more = f"<p>and {len(rows) - MAX_LISTED} more rows</p>" if len(rows) > MAX_LISTED else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"
