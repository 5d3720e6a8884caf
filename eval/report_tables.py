"""Tables of a report: the definition of every metric, the paper's numbers, and scores laid out in rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.figures import minus
from eval.report_input import (
    Results,
    among,
    column_key,
    counted,
    interval_text,
)
from eval.results import Score

KIND_TAGS = {"baseline": "baseline", "control": "control", "untrained": "untrained", "optimum": "bound", "brainlm": ""}
CENTRING_NAMES = {
    "recording": "each parcel centred on the whole recording (the paper; the hidden values take part in that mean)",
    "visible": "each parcel centred on its visible values only (leak-free)",
}


@dataclass(frozen=True, kw_only=True)
class MetricText:
    """What a metric is called and how a caption defines it."""

    name: str
    definition: str
    higher_is_better: bool = True


METRICS = {
    "r2": MetricText(
        name="R²",
        definition="R² = 1 − ΣSSE / ΣSST over all scored values, each in units of its own recording's and parcel's "
        "standard deviation; SST is about the recording-and-parcel mean, so that guessing this mean scores 0. Never "
        "clipped.",
    ),
    "r2_pooled_contract_units": MetricText(
        name="R², pooled (the paper's definition)",
        definition="R² = 1 − ΣSSE / ΣSST in contract units, (x − median) / IQR of the group; SST is about the mean of "
        "all scored values, so loud recordings weigh more. Never clipped.",
    ),
    "pearson_r": MetricText(
        name="Pearson r",
        definition="Correlation of prediction and truth over all scored values, in units of recording-and-parcel "
        "standard deviations; 0 for a constant prediction.",
    ),
    "mse": MetricText(
        name="Mean squared error",
        definition="Mean squared error in squared recording-and-parcel standard deviations; lower is better.",
        higher_is_better=False,
    ),
    "mae": MetricText(
        name="Mean absolute error",
        definition="Mean absolute error in recording-and-parcel standard deviations; lower is better.",
        higher_is_better=False,
    ),
    "mse_contract_units": MetricText(
        name="Mean squared error, contract units",
        definition="Mean squared error in contract units, (x − median) / IQR of the group; lower is better.",
        higher_is_better=False,
    ),
    "mae_contract_units": MetricText(
        name="Mean absolute error, contract units",
        definition="Mean absolute error in contract units, (x − median) / IQR of the group; lower is better.",
        higher_is_better=False,
    ),
    "accuracy": MetricText(name="Accuracy", definition="Share of test parcels whose network is named correctly."),
    "balanced_accuracy": MetricText(
        name="Balanced accuracy", definition="Mean over networks of the share of their parcels named correctly."
    ),
}
# BrainLM (ICLR 2024), tables 1, 3 and 4: other data (UK Biobank), shown for orientation.
PAPER_RECONSTRUCTION = {0.2: 0.402, 0.5: 0.389, 0.75: 0.343}
PAPER_FORECASTING = {"r2": 0.086, "pearson_r": 0.280}
PAPER_FORECASTING_HORIZON = 20
PAPER_NETWORKS = {"attention": 0.588, "raw series": 0.392}


def metric_text(metric: str) -> MetricText:
    if metric.endswith("_minus_reference"):
        base = metric_text(metric.removesuffix("_minus_reference"))
        return MetricText(
            name=f"{base.name}: paired difference from the reference baseline",
            definition=f"Difference of {base.name} from the reference baseline, which was named in advance or chosen "
            "on validation recordings; both are resampled together, by subject. An interval that includes 0 shows no "
            "difference. p: two-sided, by exchanging the two methods' results of subjects, corrected for all "
            "comparisons of the task (Holm).",
        )
    return METRICS.get(metric, MetricText(name=metric, definition=f"{metric}, as the task defines it."))


@dataclass(frozen=True, kw_only=True)
class Cell:
    value: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    label: str
    cells: list[Cell]
    tag: str = ""
    kind: str = ""
    marks: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells with their caption; ``marks`` explain the letters at rows."""

    title: str
    caption: str
    columns: list[str]
    rows: list[Row]
    head: str = "Model"
    marks: list[tuple[str, str]] = field(default_factory=list)


def make_table(
    results: Results,
    scores: Sequence[Score],
    *,
    column: str,
    column_text: Callable[[Any], str],
    title: str,
    caption: str,
    row_conditions: tuple[str, ...] = (),
    higher_is_better: bool = True,
    mark_best: bool = True,
    paper: Mapping[str, Mapping[Any, float]] | None = None,
    head: str = "Model",
) -> Table:
    """Lay scores out: models down, one condition across.

    Rows come in the order checkpoints, untrained, baselines (best first), controls, optimum, the paper's.

    Parameters
    ----------
    column : str
        Condition across.
    row_conditions : tuple of str
        Conditions that make a row of their own.
    paper : mapping, optional
        Label to value by column, for grey rows.
    """
    columns = sorted({s.condition[column] for s in scores if column in s.condition}, key=column_key)
    rows: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        rows.setdefault((score.model, *(str(score.condition.get(c, "")) for c in row_conditions)), []).append(score)
    sign = -1.0 if higher_is_better else 1.0
    order = ("brainlm", "untrained", "baseline", "control", "optimum")
    ranked = sorted(
        rows.items(),
        key=lambda item: (
            order.index(item[1][0].model_kind),
            sign * float(np.mean([s.value for s in item[1]]))
            if item[1][0].model_kind not in ("brainlm", "untrained")
            else 0,
        ),
    )
    best: dict[Any, float] = {}
    for value in columns:
        real = [s.value for s in among(scores, "brainlm", "baseline") if s.condition.get(column) == value]
        if real and mark_best:
            best[value] = max(real) if higher_is_better else min(real)
    shared = set.intersection(*(set(s.notes) for s in scores)) if scores else set()
    shared |= results.common_notes
    letters: dict[str, str] = {}
    made = []
    for (model, *conditions), group in ranked:
        notes = dict.fromkeys(note for s in group for note in s.notes if note not in shared)
        marks = "".join(letters.setdefault(note, chr(ord("a") + len(letters) % 26)) for note in notes)
        cells = []
        for value in columns:
            found = next((s for s in group if s.condition.get(column) == value), None)
            if found is None:
                cells.append(Cell())
                continue
            is_best = found.model_kind in ("brainlm", "baseline") and found.value == best.get(value)
            interval = interval_text(found.ci_low, found.ci_high) + p_text(found)
            cells.append(Cell(value=minus(found.value), interval=interval, best=is_best))
        kind = group[0].model_kind
        extra = ", ".join(c for c in conditions if c)
        label = results.labels[model] + (f", {extra}" if extra else "")
        made.append(Row(label=label, cells=cells, tag=KIND_TAGS[kind], kind=kind, marks=marks))
    for label, values in (paper or {}).items():
        cells = [Cell(value=minus(values[c]) if c in values else "") for c in columns]
        if any(cell.value for cell in cells):
            made.append(Row(label=label, cells=cells, tag="other data", kind="paper"))
    explained = [(letter, note) for note, letter in letters.items()]
    explained += [("", f"All rows: {note}") for note in sorted(shared - results.common_notes)]
    return Table(
        title=title,
        caption=caption,
        columns=[column_text(c) for c in columns],
        rows=made,
        head=head,
        marks=explained,
    )


def p_text(score: Score) -> str:
    """Return a corrected p value, to go after an interval."""
    if score.p_corrected is None:
        return ""
    return " p < 0.001" if score.p_corrected < 0.001 else f" p = {score.p_corrected:.3f}"


def num_text(scores: Sequence[Score]) -> str:
    subjects = sorted({s.num_subjects for s in scores})
    recordings = sorted({s.num_recordings for s in scores})
    if len(subjects) == 1 and len(recordings) == 1:
        return f"n = {counted(subjects[0], 'subject')}, {counted(recordings[0], 'recording')}."
    return f"n = {subjects[0]} to {subjects[-1]} subjects."


def caption_text(results: Results, scores: Sequence[Score], metric: MetricText, *more: str) -> str:
    interval = (
        f"Brackets: {results.level_text} bootstrap interval." if any(s.ci_low is not None for s in scores) else ""
    )
    best = "Bold: best among checkpoints and baselines." if len(scores) > 1 else ""
    return " ".join(part for part in (metric.definition, *more, num_text(scores), interval, best) if part)


def other_conditions(group: Mapping[str, object], *without: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in group.items() if k not in without)


def record_rows(results: Results) -> list[list[str]]:
    """Return every record as a line of text cells, for the table at the end."""
    return [
        [
            f"{s.task} v{s.version}",
            results.labels[s.model],
            s.model_kind,
            s.metric,
            ", ".join(f"{k} {v}" for k, v in s.condition.items()),
            minus(s.value),
            interval_text(s.ci_low, s.ci_high) + p_text(s),
            f"{s.num_subjects} / {s.num_recordings}",
            s.statistics_from,
            s.model_hash[:12],
            f"{s.dataset} {s.dataset_hash[:8]} {s.split}",
        ]
        for s in results.all_scores
    ]


RECORD_COLUMNS = [
    "Task",
    "Model",
    "Kind",
    "Metric",
    "Condition",
    "Value",
    "Interval",
    "Subjects / rec.",
    "Statistics",
    "Model hash",
    "Data",
]
