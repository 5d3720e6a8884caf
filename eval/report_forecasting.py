"""The section on forecasting: the score against the time ahead, and one table a metric."""

from __future__ import annotations

import io

import numpy as np

from eval import figures_charts
from eval.figures_charts import OFF_SCALE
from eval.report_input import Results, condition_groups, filter_text, listed
from eval.report_page import Artist, Drawing, Section
from eval.report_tables import (
    PAPER_FORECASTING,
    PAPER_FORECASTING_HORIZON,
    caption_text,
    make_table,
    metric_text,
    other_conditions,
)

LEVEL = 0.05


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
    marked = {}
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
        if "p_corrected" in rows:
            found = (rows["p_corrected"] < LEVEL) & (rows["difference"] > 0)
            marked[model] = found.to_numpy(bool)
    if not curves:
        return None
    axis = "seconds ahead" if results.tr_s else "timepoints ahead"
    unseen = [results.labels[m] for m, (_, value, *_) in curves.items() if not (value >= OFF_SCALE).any()]
    below = f" Below the axis at every step: {listed(unseen)}." if unseen else ""
    rings = ""
    if any(steps.any() for steps in marked.values()):
        reference = results.labels.get(str(frame["reference"].iloc[0]), str(frame["reference"].iloc[0]))
        rings = f" Rings: ahead of {reference} (p < {LEVEL:g}, corrected for all methods and steps)."
    elif marked:
        rings = f" At no step is a method ahead of the reference baseline (p < {LEVEL:g}, corrected)."
    return artist.show(
        figures_charts.draw_forecast(curves, results.looks, axis, marked),
        "forecast",
        "R² of every method against the time ahead",
        f"R² of each step ahead with {results.level_text} intervals (bands).{rings}{horizon}{below} "
        f"{filter_text(results)}",
    )
