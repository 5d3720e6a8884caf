"""The section on functional networks: how well features name a parcel's network, beside position alone."""

from __future__ import annotations

from collections.abc import Sequence

from eval import figures_charts
from eval.figures import Look, minus
from eval.figures_charts import Panel
from eval.report_input import (
    FOLD_NAMES,
    FOLD_PHRASES,
    Results,
    column_key,
    condition_groups,
    listed,
    network_level,
    of_model,
    position_alone,
)
from eval.report_page import Artist, Section, estimate, ordered_looks
from eval.report_tables import PAPER_NETWORKS, caption_text, make_table, metric_text, other_conditions
from eval.results import Score


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
        for score in sorted(main, key=lambda s: list(ordered_looks(results, main)).index(s.model)):
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
                        f"{s.model}/{s.condition.get('part', '')}": estimate(s)
                        for s in here
                        if s.model != "majority class"
                    },
                    lines={"majority": majority.value} if majority is not None else {},
                )
            )
        section.drawings.append(
            artist.show(
                figures_charts.draw_intervals(panels, looks, "accuracy"),
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
