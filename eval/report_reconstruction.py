"""The section on reconstruction of hidden tokens: a figure, and one table a metric and definition."""

from __future__ import annotations

from eval import figures_charts
from eval.figures_charts import Panel
from eval.report_input import Results, condition_groups, percent, reconstruction_base
from eval.report_page import Artist, Section, estimate, ordered_looks
from eval.report_tables import (
    CENTRING_NAMES,
    PAPER_RECONSTRUCTION,
    caption_text,
    make_table,
    metric_text,
    other_conditions,
)


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
                estimates={s.model: estimate(s) for s in main if s.condition.get("mask_ratio") == ratio},
            )
            for ratio in ratios
        ]
        figure = figures_charts.draw_intervals(panels, ordered_looks(results, main), "R² of hidden values")
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
            is_plain = (
                metric in ("r2", "r2_pooled_contract_units") and centring in ("recording", "") and kind == "random"
            )
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
                paper={"BrainLM, paper (UK Biobank)": PAPER_RECONSTRUCTION} if is_plain else None,
            )
            first = metric == "r2" or (metric == "r2_pooled_contract_units" and group == base)
            (section.tables if first else section.more_tables).append(table)
    return section
