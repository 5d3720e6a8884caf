"""Write ``report.html``: what was run on what, which claims hold, and every number behind them, in one file.

The page is made from the files of a results folder alone. ``results.json`` must be there; whatever else is missing is
said in a sentence where it would have stood. Verdicts are computed from the records: a model is ahead or behind only if
an interval says so.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainlm.errors import BrainLMError, StoreError
from brainlm.store import Store
from eval import figures
from eval.figures import Estimate, Look, Panel, minus
from eval.report_claims import (
    caveats,
    lead,
    make_claims,
)
from eval.report_input import (
    FOLD_NAMES,
    FOLD_PHRASES,
    HEADLINE_RATIO,
    Results,
    among,
    as_list,
    column_key,
    condition_groups,
    counted,
    filter_text,
    headline_ratio,
    listed,
    network_level,
    of_model,
    percent,
    position_alone,
    read_results,
    reconstruction_base,
    strongest,
    without_ids,
)
from eval.report_tables import (
    CENTRING_NAMES,
    PAPER_FORECASTING,
    PAPER_FORECASTING_HORIZON,
    PAPER_NETWORKS,
    PAPER_RECONSTRUCTION,
    RECORD_COLUMNS,
    Cell,
    Row,
    Table,
    caption_text,
    make_table,
    metric_text,
    num_text,
    other_conditions,
    record_rows,
)
from eval.results import Score

log = logging.getLogger(__name__)
REPORT_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report_template.html.j2")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as the page shows it."""

    svg: str
    caption: str


@dataclass(kw_only=True)
class Section:
    """One numbered part of the page; ``more_*`` are folded away."""

    title: str
    anchor: str
    absent: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more_drawings: list[Drawing] = field(default_factory=list)
    more_tables: list[Table] = field(default_factory=list)
    more_title: str = "Further metrics"


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Saves a figure into ``figures/`` and returns it for the page."""

    store: Store

    def show(self, figure: Any, name: str, label: str, caption: str) -> Drawing:
        svg = figures.to_svg(figure)
        self.store.write_bytes(f"figures/{name}.svg", svg)
        self.store.write_bytes(f"figures/{name}.png", figures.to_png(figure))
        return Drawing(svg=figures.inline_svg(svg, name, label), caption=caption)


def _estimate(score: Score) -> Estimate:
    return Estimate(value=score.value, low=score.ci_low, high=score.ci_high)


def training_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Training", anchor="training")
    if not results.models:
        section.absent.append("No checkpoint was scored, so there are no training curves.")
        return section
    runs: dict[str, list[dict[str, Any]]] = {}
    for info in results.run.get("checkpoints") or []:
        rows = training_log(str(info.get("path") or info.get("folder") or ""))
        if rows:
            name = str(info.get("name", "checkpoint"))
            runs[name] = rows
            rates = [row["windows_per_s"] for row in rows if figures.is_number(row.get("windows_per_s"))]
            last = max((row["step"] for row in rows if figures.is_number(row.get("step"))), default=None)
            facts = [f"{name}: {counted(int(last), 'optimizer step')} logged" if last is not None else name]
            if rates:
                facts.append(f"median speed {float(np.median(rates)):.3g} windows/s")
            section.paragraphs.append(", ".join(facts) + ".")
    if not runs:
        section.absent.append("No metrics.jsonl was found beside the checkpoint, so there are no training curves.")
        return section
    colours = {run: figures.SERIES[i % len(figures.SERIES)] for i, run in enumerate(runs)}
    figure = figures.draw_training(runs, colours)
    if figure is None:
        section.absent.append(
            "metrics.jsonl holds none of loss, val_r2, lr and grad_norm, so there are no training curves."
        )
        return section
    section.drawings.append(
        artist.show(
            figure,
            "training",
            "Training curves",
            "Training curves. Pale: as logged; strong: running median. Loss is over hidden values in contract units; "
            "validation R² is in units of recording-and-parcel standard deviations, on subjects of the val split.",
        )
    )
    return section


def training_log(checkpoint: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the training run that a checkpoint belongs to, [] if there are none.

    A half-written last line, as a killed job leaves it, is passed over.
    """
    match = re.fullmatch(r"(.+)/checkpoints/[^/]+/?", checkpoint)
    if not match:
        return []
    try:
        store = Store(match[1])
        text = store.read_bytes("metrics.jsonl").decode(errors="replace") if store.exists("metrics.jsonl") else ""
    except StoreError as error:
        log.warning("training curves are left out: %s", error)
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def reconstruction_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Reconstruction of hidden tokens", anchor="reconstruction")
    scores = results.task_scores("reconstruction")
    if not scores:
        section.absent.append(results.why_absent("reconstruction"))
        return section
    base = reconstruction_base(results)
    main = results.find("reconstruction", "r2", **base)
    ratios = sorted({float(s.condition["mask_ratio"]) for s in main if "mask_ratio" in s.condition})
    if main:
        panels = [
            Panel(
                title=f"{percent(ratio)} hidden",
                estimates={s.model: _estimate(s) for s in main if s.condition.get("mask_ratio") == ratio},
            )
            for ratio in ratios
        ]
        figure = figures.draw_intervals(panels, _ordered_looks(results, main), "R² of hidden values")
        section.drawings.append(
            artist.show(
                figure,
                "reconstruction",
                "R² of every method at every mask ratio, with intervals",
                f"R² of hidden values with {results.level_text} intervals; "
                f"{CENTRING_NAMES.get(str(base.get('centring')), 'as in the table below')}. "
                "An arrow stands for a value far below zero.",
            )
        )
    for metric in dict.fromkeys(s.metric for s in scores):
        text = metric_text(metric)
        for group in condition_groups([s for s in scores if s.metric == metric], "mask_ratio"):
            here = [s for s in scores if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())]
            centring = str(group.get("centring", ""))
            kind = str(group.get("mask", "random"))
            words = [
                text.name,
                "primary definition" if metric == "r2" else "",
                "leak-free centring" if centring == "visible" else "",
                "" if kind == "random" else f"hidden: {kind}",
                other_conditions(group, "centring", "mask"),
            ]
            is_plain = metric in ("r2", "r2_pooled_contract_units") and centring in ("recording", "")
            table = make_table(
                results,
                here,
                column="mask_ratio",
                column_text=lambda ratio: f"{percent(ratio)} hidden",
                title=", ".join(part for part in words if part),
                caption=caption_text(
                    results,
                    here,
                    text,
                    f"{CENTRING_NAMES[centring][0].upper()}{CENTRING_NAMES[centring][1:]}."
                    if centring in CENTRING_NAMES
                    else "",
                    "Only hidden values are scored; every method sees the same masks.",
                    "Grey: BrainLM on UK Biobank as printed in the paper, pooled definition." if is_plain else "",
                ),
                higher_is_better=text.higher_is_better,
                mark_best="_minus_reference" not in metric,
                paper={"BrainLM, paper (UK Biobank)": PAPER_RECONSTRUCTION} if is_plain and kind == "random" else None,
            )
            first = metric == "r2" or (metric == "r2_pooled_contract_units" and group == base)
            (section.tables if first else section.more_tables).append(table)
    return section


def _ordered_looks(results: Results, scores: Sequence[Score]) -> dict[str, Look]:
    order = ("brainlm", "untrained", "baseline", "control", "optimum")
    mean: dict[str, list[float]] = {}
    for score in scores:
        mean.setdefault(score.model, []).append(score.value)
    kinds = {s.model: s.model_kind for s in scores}
    ranked = sorted(
        mean, key=lambda m: (order.index(kinds[m]), -float(np.mean(mean[m])) if kinds[m] != "brainlm" else 0)
    )
    return {model: results.looks[model] for model in ranked}


def examples_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Sample reconstructions", anchor="examples", more_title="More windows")
    if not results.store.exists("examples.npz"):
        section.absent.append("No sample windows were kept (examples.npz is not there).")
        return section
    with np.load(io.BytesIO(results.store.read_bytes("examples.npz")), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if not {"truth_z", "mask"} <= set(arrays) or arrays["truth_z"].ndim != 3 or len(arrays["truth_z"]) == 0:
        section.absent.append("examples.npz holds no windows.")
        return section
    truth, mask = arrays["truth_z"], arrays["mask"].astype(bool)
    num_windows, num_parcels, window_len = truth.shape
    patch_len = int(arrays["patch_len"]) if "patch_len" in arrays else window_len * num_parcels // mask.shape[1]
    hidden = np.repeat(mask.reshape(num_windows, num_parcels, -1), patch_len, axis=2)
    tr_s = float(arrays["tr_s"]) if "tr_s" in arrays else results.tr_s or 1.0
    predictions = _match_predictions(results, arrays)
    if not predictions:
        section.absent.append("examples.npz holds no predictions.")
        return section
    parcels = np.atleast_1d(arrays["parcels"]).astype(int) if "parcels" in arrays else np.arange(num_parcels)
    names = _parcel_names(arrays, num_parcels, parcels)
    for window in range(num_windows):
        wanted = [p for p in parcels if np.isfinite(truth[window, p]).all() and hidden[window, p].any()]
        wanted = wanted[: figures.MAX_EXAMPLE_PARCELS]
        if not wanted:
            continue
        figure = figures.draw_example(
            truth[window],
            {model: prediction[window] for model, prediction in predictions.items()},
            hidden[window],
            [int(p) for p in wanted],
            [names[int(p)] for p in wanted],
            results.looks,
            tr_s,
            patch_len,
        )
        ratio = (
            f" {percent(round(float(arrays['mask_ratio']), 3))} of the tokens are hidden."
            if "mask_ratio" in arrays
            else ""
        )
        drawing = artist.show(
            figure,
            f"example-{window + 1}",
            f"Measured and predicted series of {len(wanted)} parcels, window {window + 1}",
            f"Window {window + 1} of {num_windows}.{ratio} Series in units of the recording's own standard deviation; "
            "predictions are drawn only where values were hidden, patch by patch "
            f"({patch_len} timepoints, {patch_len * tr_s:g} s).",
        )
        (section.drawings if not section.drawings else section.more_drawings).append(drawing)
    return section


def _match_predictions(results: Results, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return predictions worth drawing by model: checkpoints, and the strongest baseline that is there."""
    simple = {_simple(model): model for model in results.looks}
    found = {}
    for name, array in arrays.items():
        model = simple.get(_simple(name.removeprefix("prediction_")))
        if name.startswith("prediction_") and model is not None:
            found[model] = array
    kinds = {s.model: s.model_kind for s in results.all_scores}
    ratio = headline_ratio(results)
    here = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=ratio)
    best = strongest(s for s in among(here, "baseline") if s.model in found)
    chosen = [m for m in results.models if m in found][:2] + ([best.model] if best else [])
    chosen += [m for m in found if kinds[m] == "optimum"]
    return {model: found[model] for model in chosen or list(found)[:2]}


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _parcel_names(arrays: Mapping[str, Any], num_parcels: int, parcels: np.ndarray) -> dict[int, str]:
    names = {int(p): f"parcel {int(p)}" for p in range(num_parcels)}
    given = [without_ids(str(n)) for n in np.atleast_1d(arrays["names"])] if "names" in arrays else []
    if len(given) == num_parcels:
        names.update(enumerate(given))
    elif len(given) == len(parcels):
        names.update({int(p): name for p, name in zip(parcels, given)})
    return {p: name if len(name) <= 22 else name[:21] + "…" for p, name in names.items()}


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
                figures.draw_brain(values, coords_mm, label="R²"),
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
                        figures.draw_brain(
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
                    figures.draw_networks([n for n in networks if n], coords_mm[named]),
                    "brain-networks",
                    "Functional network of every parcel on a glass brain",
                    "Functional networks of the atlas, for orientation.",
                )
            )
            section.tables.append(_by_network(ours, networks, label, ratio))
        section.drawings = drawings
    except ImportError as error:
        section.absent.append(f'The brain pictures need nilearn ({error}): pip install "brainlm[eval]".')
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
        "first table of section 3, summed over recordings for each parcel).",
        columns=["Parcels", "Median", "Lowest", "Highest"],
        rows=rows,
        head="Network",
    )


def forecasting_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Forecasting", anchor="forecasting")
    scores = results.task_scores("forecasting")
    if not scores:
        section.absent.append(results.why_absent("forecasting"))
        return section
    drawn = _forecast_drawing(results, artist)
    if drawn is None:
        section.absent.append(
            "No scores by step were kept (forecast_curves.parquet is not there), so there is no curve."
        )
    else:
        section.drawings.append(drawn)
    for metric in dict.fromkeys(s.metric for s in scores):
        text = metric_text(metric)
        for group in condition_groups([s for s in scores if s.metric == metric], "horizon"):
            here = [s for s in scores if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())]
            paper = {}
            if metric in PAPER_FORECASTING:
                paper["BrainLM fine-tuned, paper (UK Biobank)"] = {PAPER_FORECASTING_HORIZON: PAPER_FORECASTING[metric]}
            extra = other_conditions(group)
            table = make_table(
                results,
                here,
                column="horizon",
                column_text=lambda h: f"next {h} timepoints" + (f" ({h * results.tr_s:g} s)" if results.tr_s else ""),
                title=text.name + (f", {extra}" if extra else ""),
                caption=caption_text(
                    results,
                    here,
                    text,
                    "Each parcel is centred on the observed part of its window; all steps count alike.",
                    filter_text(results),
                    "Checkpoints are scored as pretrained, not fine-tuned. Grey: the paper's fine-tuned model, pooled "
                    "definition."
                    if paper
                    else "",
                ),
                higher_is_better=text.higher_is_better,
                mark_best="_minus_reference" not in metric,
                paper=paper,
            )
            (section.tables if metric == "r2" else section.more_tables).append(table)
    return section


def _forecast_drawing(results: Results, artist: Artist) -> Drawing | None:
    if not results.store.exists("forecast_curves.parquet"):
        return None
    import pandas as pd

    frame = pd.read_parquet(io.BytesIO(results.store.read_bytes("forecast_curves.parquet")))
    horizon = ""
    if "horizon" in frame.columns and frame["horizon"].nunique() > 1:
        longest = frame["horizon"].max()
        frame = frame[frame["horizon"] == longest]
        horizon = f" Windows with {int(longest)} hidden timepoints."
    curves = {}
    order = [m for m in results.looks if m in set(frame["model"])]
    kinds = {s.model: s.model_kind for s in results.all_scores}
    for model in order:
        if kinds[model] == "control":
            continue
        rows = frame[frame["model"] == model].sort_values("step")
        step = rows["step"].to_numpy(np.float64) * (results.tr_s or 1.0)
        curves[model] = [step] + [
            rows[name].to_numpy(np.float64) if name in rows else np.full(len(rows), np.nan)
            for name in ("r2", "ci_low", "ci_high")
        ]
    if not curves:
        return None
    axis = "seconds ahead" if results.tr_s else "timepoints ahead"
    unseen = [results.labels[m] for m, (_, value, *_) in curves.items() if not (value >= figures.OFF_SCALE).any()]
    below = f" Below the axis at every step: {listed(unseen)}." if unseen else ""
    return artist.show(
        figures.draw_forecast(curves, results.looks, axis),
        "forecast",
        "R² of every method against the time ahead",
        f"R² of each step ahead with {results.level_text} intervals (bands).{horizon}{below} {filter_text(results)}",
    )


def networks_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Functional networks", anchor="networks", more_title="Further tables")
    scores = results.task_scores("networks")
    if not scores:
        section.absent.append(results.why_absent("networks"))
        return section
    level = network_level(results)
    main = results.find("networks", "accuracy", level=level) or results.find("networks", "accuracy")
    kinds = sorted({s.condition.get("folds", "") for s in main}, key=column_key)
    if main:
        looks: dict[str, Look] = {}
        for score in sorted(main, key=lambda s: list(_ordered_looks(results, main)).index(s.model)):
            look, part = results.looks[score.model], score.condition.get("part", "")
            if score.model != "majority class":
                label = look.label + (f", {part}" if part else "")
                looks[f"{score.model}/{part}"] = Look(
                    label=label, colour=look.colour, marker=look.marker, dashed=look.dashed
                )
        panels = []
        for kind in kinds:
            here = [s for s in main if s.condition.get("folds", "") == kind]
            majority = of_model(here, "majority class")
            panels.append(
                Panel(
                    title=FOLD_NAMES.get(str(kind), str(kind)),
                    estimates={
                        f"{s.model}/{s.condition.get('part', '')}": _estimate(s)
                        for s in here
                        if s.model != "majority class"
                    },
                    lines={"majority": majority.value} if majority is not None else {},
                )
            )
        section.drawings.append(
            artist.show(
                figures.draw_intervals(panels, looks, "accuracy"),
                "networks",
                "Accuracy of every feature, by kind of folds",
                f"Accuracy with {results.level_text} intervals, by kind of folds. "
                "Dashed: always naming the largest network. " + _position_text(results, main),
            )
        )
    for metric in dict.fromkeys(s.metric for s in scores):
        text = metric_text(metric)
        for group in condition_groups([s for s in scores if s.metric == metric], "folds", "part"):
            here = [s for s in scores if s.metric == metric and all(s.condition.get(k) == v for k, v in group.items())]
            at = str(group.get("level", ""))
            where = {
                "recording": "Classified within each recording; interval over subjects.",
                "group": "Features averaged over recordings first; interval over parcels.",
            }.get(at, "")
            is_main = at == level and metric in ("accuracy", "balanced_accuracy")
            paper = None
            if metric == "accuracy" and at == "recording":
                paper = {f"{name}, paper (UK Biobank)": {"random": value} for name, value in PAPER_NETWORKS.items()}
            extra = other_conditions(group, "level")
            section_tables = section.tables if is_main else section.more_tables
            section_tables.append(
                make_table(
                    results,
                    here,
                    column="folds",
                    column_text=lambda kind: FOLD_NAMES.get(str(kind), str(kind)),
                    title=text.name
                    + (", by recording" if at == "recording" else ", group average" if at == "group" else "")
                    + (f", {extra}" if extra else ""),
                    caption=caption_text(
                        results,
                        here,
                        text,
                        "k nearest neighbours, k chosen on the training parcels of each fold.",
                        where,
                        _position_text(results, here) if "minus" not in metric else "",
                    ),
                    row_conditions=("part",),
                    head="Feature",
                    mark_best="_minus_reference" not in metric,
                    paper=paper,
                )
            )
    return section


def _position_text(results: Results, scores: Sequence[Score]) -> str:
    parts = []
    for kind in sorted({s.condition.get("folds", "") for s in scores}, key=column_key):
        place = position_alone(s for s in scores if s.condition.get("folds", "") == kind)
        if place is not None:
            parts.append(f"{minus(place.value)} {FOLD_PHRASES.get(str(kind), f'with {kind} folds')}")
    if not parts:
        return "No control by position alone was run."
    return f"Position alone (the better of the two) reaches {listed(parts)}: only what lies above that is signal."


def provenance(results: Results) -> dict[str, Any]:
    """Return the facts of section 8: pairs for tables, lists, and texts to fold away."""
    run, dataset = results.run, results.dataset
    first = results.scores[0]
    data = [("Name", first.dataset), ("Content hash", first.dataset_hash), ("Split scored", first.split)]
    data += [("Subjects, recordings scored", num_text(results.scores).removeprefix("n = ").rstrip("."))]
    counts = dataset.get("counts")
    if isinstance(counts, dict):
        rows = []
        for split, entry in counts.items():
            what = ", ".join(f"{v} {k}" for k, v in entry.items()) if isinstance(entry, dict) else str(entry)
            rows.append(f"{split}: {what}")
        data.append(("Splits", "; ".join(rows)))
    atlas = dataset.get("atlas")
    if atlas:
        named = atlas if not isinstance(atlas, dict) else ", ".join(f"{k} {_short(v)}" for k, v in atlas.items())
        data.append(("Atlas", str(named)))
    if results.tr_s is not None:
        data.append(("TR", f"{results.tr_s:g} s"))
    data.append(("Temporal filter", filter_text(results).removeprefix("Temporal filter: ").rstrip(".")))
    sources = sorted({s.statistics_from for s in results.scores})
    data.append(
        ("Median and IQR of the model input", f"from the {listed(sources)} (column in the table of all records)")
    )
    known = {
        "name",
        "content_hash",
        "counts",
        "atlas",
        "tr_s",
        "filter",
        "high_pass_hz",
        "low_pass_hz",
        "flags",
        "warnings",
    }
    data += [(k.replace("_", " "), _plain(v)) for k, v in dataset.items() if k not in known and v != {}]
    checkpoints = []
    for info in run.get("checkpoints") or []:
        manifest = info.get("manifest") if isinstance(info.get("manifest"), dict) else {}
        pairs = [("Path", str(info.get("path") or info.get("folder") or "not recorded"))]
        if info.get("weights_sha256"):
            pairs.append(("Weights, sha256", str(info["weights_sha256"])))
        if figures.is_number(info.get("num_parameters")):
            pairs.append(("Parameters", counted(int(info["num_parameters"]), "weight")))
        pairs += [(k.replace("_", " "), _plain(v)) for k, v in manifest.items() if not isinstance(v, dict | list)]
        pairs += [
            (name.replace("_", " "), _plain(info[name]))
            for name in ("statistics_from", "num_seen_subjects")
            if name in info
        ]
        if isinstance(manifest.get("versions"), dict):
            pairs.append(("Versions at training", _plain(manifest["versions"])))
        if isinstance(info.get("config"), dict):
            pairs.append(("Configuration", _plain(info["config"])))
        checkpoints.append((str(info.get("name", "checkpoint")), pairs))
    how = []
    git = run.get("git")
    if isinstance(git, dict):
        changed = ", with files that differ from it" if git.get("dirty") else ""
        how.append(("Git commit", f"{git.get('commit')}{changed}"))
    for name in ("command", "git_commit", "started", "finished"):
        if run.get(name):
            value = run[name]
            how.append(
                (
                    name.replace("_", " ").capitalize(),
                    " ".join(map(str, value)) if isinstance(value, list) else str(value),
                )
            )
    if run.get("versions"):
        how.append(("Versions", _plain(run["versions"])))
    durations = next((run[name] for name in ("seconds", "durations") if run.get(name)), None)
    seconds = durations if isinstance(durations, dict) else {"total": durations} if durations is not None else {}
    return {
        "absent": [] if run else ["run.json is not there: only what the scores themselves carry is known."],
        "data": data,
        "flags": as_list(dataset.get("flags")),
        "warnings": as_list(dataset.get("warnings")),
        "checkpoints": checkpoints,
        "how": how,
        "durations": [(k, f"{v:.1f} s" if figures.is_number(v) else _plain(v)) for k, v in seconds.items()],
        "config": _yaml(run["config"]) if isinstance(run.get("config"), dict) else "",
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = _plain(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _yaml(tree: Any) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False, width=110, allow_unicode=True)


def write_report(results_folder: str) -> None:
    """Write ``report.html`` and the files in ``figures/`` of a results folder.

    Parameters
    ----------
    results_folder : str
        Any fsspec URL; what `eval/run.py` wrote.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it is not a list of scores.
    """
    import jinja2
    from markupsafe import Markup

    results = read_results(results_folder)
    artist = Artist(store=results.store)
    with figures.quiet_drawing():
        sections = [
            make(results, artist)
            for make in (
                training_section,
                reconstruction_section,
                examples_section,
                brain_section,
                forecasting_section,
                networks_section,
            )
        ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["svg"] = Markup  # made by eval.figures, which escapes what it is given
    models = [results.labels[model] for model in results.models]
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=f"{listed(models) if models else 'Baselines'} on {results.scores[0].dataset}",
        lead=lead(results),
        simulated=results.is_simulated,
        claims=make_claims(results),
        no_claims="" if results.models else "No checkpoint was scored, so there is nothing to claim about a model.",
        caveats=caveats(results),
        sections=sections,
        facts=provenance(results),
        record_columns=RECORD_COLUMNS,
        records=record_rows(results),
        level=results.level_text,
    )
    results.store.write_bytes(REPORT_NAME, page.encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write report.html from the files of a results folder.")
    parser.add_argument("results_folder", help="folder or URL that eval/run.py wrote")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_report(args.results_folder)
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Store(args.results_folder).url_of(REPORT_NAME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
