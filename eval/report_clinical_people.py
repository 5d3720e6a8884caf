"""Tables of the clinical section about parts of the people: groups such as sites, and single folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.figures import minus
from eval.report_clinical_input import FOLD_WORDS, Method, Target
from eval.report_clinical_tables import metric_words
from eval.report_input import Results, counted, interval_text
from eval.report_tables import Cell, Row, Table

FEWEST = 5  # people of a group: a score of fewer says nothing, and tells too much about them


def group_tables(results: Results, target: Target, methods: Sequence[Method]) -> list[Table]:
    """Return one table a column by which people are told apart: groups down, methods and metrics across."""
    rows = target.rows("groups", **target.base)
    if rows is None:
        return []
    made = []
    for by in dict.fromkeys(rows["by"]):
        of_column = rows[rows["by"] == by]
        shown = of_column[of_column["num_subjects"] >= FEWEST]
        metrics = list(dict.fromkeys(shown["metric"]))
        found = {
            (row.label, row.model, row.readout, row.metric): Cell(
                value=minus(row.value), interval=interval_text(_end(row.ci_low), _end(row.ci_high))
            )
            for row in shown.itertuples()
            if np.isfinite(row.value)
        }
        used = [m for m in methods if any(key[1:3] == (m.model, m.readout) for key in found)]
        if not used:
            continue
        people = shown.groupby("label")["num_subjects"].max()
        left_out = of_column["label"].nunique() - len(people)
        made.append(
            Table(
                title=f"{target.name}, people by {by}",
                caption=_group_caption(results, target, metrics, left_out),
                columns=[f"{metric_words(metric).name}: {m.label(results)}" for metric in metrics for m in used],
                rows=[
                    Row(
                        label=label,
                        cells=[found.get((label, m.model, m.readout, k), Cell()) for k in metrics for m in used],
                        tag=f"n = {num}",
                    )
                    for label, num in sorted(people.items())
                ],
                head=by.capitalize(),
            )
        )
    return made


def _group_caption(results: Results, target: Target, metrics: Sequence[str], left_out: int) -> str:
    words = [f"{metric_words(m).name}: {metric_words(m).definition}" for m in metrics]
    words.append(
        f"The same predictions as above ({target.base_words}), scored within each group; n: people. Brackets: "
        f"{results.level_text} bootstrap interval."
    )
    if left_out:
        words.append(f"Not shown: {counted(left_out, 'group')} of fewer than {FEWEST} people.")
    return " ".join(words)


def _end(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def fold_tables(results: Results, target: Target, methods: Sequence[Method]) -> list[Table]:
    """Return one table a kind of folds: every single fold down, methods across."""
    made = []
    for kind in FOLD_WORDS:
        rows = target.rows("folds", folds=kind, confounds=target.base.get("confounds", "kept"))
        if rows is None:
            continue
        rows = rows[rows["metric"] == target.metric]
        keys = zip(rows["repeat"], rows["fold"], rows["model"], rows["readout"])
        found = {key: minus(float(value)) for key, value in zip(keys, rows["value"]) if np.isfinite(value)}
        used = [m for m in methods if any(key[2:] == (m.model, m.readout) for key in found)]
        if not used:
            continue
        folds = rows.drop_duplicates(["repeat", "fold"]).sort_values(["repeat", "fold"])
        several = folds["repeat"].nunique() > 1
        made.append(
            Table(
                title=f"{target.name}: {metric_words(target.metric).name} in every fold, {FOLD_WORDS[kind]}",
                caption=f"{metric_words(target.metric).definition} Here of each fold alone, confounds "
                f"{target.base.get('confounds', 'kept')}; beside the fold: people trained on / tested. Other methods, "
                "the losses on validation people and what was chosen by them are in clinical_folds.parquet.",
                columns=[m.label(results) for m in used],
                rows=[
                    Row(
                        label=(f"repeat {row.repeat}, " if several else "")
                        + (f"fold {row.fold}" if kind == "random" else str(row.fold)),
                        cells=[Cell(value=found.get((row.repeat, row.fold, m.model, m.readout), "")) for m in used],
                        tag=f"{row.num_train} / {row.num_test}",
                    )
                    for row in folds.itertuples()
                ],
                head="Fold",
            )
        )
    return made
