"""The section on clinical variables: phenotypes predicted by cross-validation over people."""

from __future__ import annotations

import numpy as np

from eval import figures_charts, figures_clinical
from eval.figures import Look
from eval.figures_charts import Panel
from eval.figures_clinical import Cloud, Curve, Reliability
from eval.report_clinical_input import (
    CONFOUNDS_ONLY,
    FOLD_WORDS,
    TABLES,
    TASK,
    Method,
    Target,
    clinical_targets,
)
from eval.report_clinical_people import fold_tables, group_tables
from eval.report_clinical_tables import first_table, metric_words, more_metrics, paper_tables
from eval.report_input import Results, listed
from eval.report_page import Artist, Drawing, Section, estimate, ordered_looks
from eval.report_tables import Table

ABOUT = (
    "A phenotype is predicted from a recording by methods that learned it from other people: people are divided into "
    "folds, relatives in one fold, and each fold is predicted by what was learned on the others. Choices within a "
    "method are made on a part of the training people, the validation people. With random folds, people of a site are "
    "on both sides; with each site left out, a method has never seen the scanner it is tested on."
)
CONTROLS = (
    "Controls: confounds only is a model of site, head motion and the like without any brain; with permuted targets "
    "there is nothing to learn, so that what lies above chance there shows a fault; constant always gives the same "
    "answer."
)
MOST_GROUPS = 12  # rows of a table of groups that is shown unfolded


def clinical_section(results: Results, artist: Artist) -> Section:
    """Return tables and figures of every target; the files of single predictions and folds may be missing."""
    section = Section(title="Clinical variables", anchor=TASK, more_title="Further metrics, calibration and folds")
    targets = clinical_targets(results)
    if not targets:
        section.absent.append(results.why_absent(TASK))
        return section
    section.paragraphs += [ABOUT, CONTROLS]
    for name, meaning in TABLES.items():
        if results.table(f"clinical_{name}.parquet") is None:
            section.absent.append(f"clinical_{name}.parquet is not there: {meaning}.")
    for target in targets:
        methods = compared_methods(results, target)
        section.drawings.append(_forest(results, target, artist))
        truth, reliability = _truth(results, target, artist), _reliability(results, target, artist)
        section.drawings += [truth] if truth is not None else []
        if reliability is not None:
            (section.more_drawings if truth is not None else section.drawings).append(reliability)
        section.tables.append(first_table(results, target))
        section.more_tables += more_metrics(results, target)
        for table in group_tables(results, target, _pictured(results, target)):
            _put(section, table)
        section.more_tables += fold_tables(results, target, methods)
    errors = paper_tables(results, targets)
    section.tables += errors[:1]
    section.more_tables[:0] = errors[1:]
    return section


def _put(section: Section, table: Table) -> None:
    (section.tables if len(table.rows) <= MOST_GROUPS else section.more_tables).append(table)


def compared_methods(results: Results, target: Target) -> list[Method]:
    """Return what tables of folds show: each checkpoint with its chosen readout, the reference, confounds alone."""
    methods = [method for model in results.models if (method := target.chosen(model)) is not None]
    scored = {s.model for s in target.scores}
    return methods + [Method(model=name) for name in (target.reference, CONFOUNDS_ONLY) if name in scored]


def _pictured(results: Results, target: Target) -> list[Method]:
    """Return the checkpoint that was best on validation people, and the reference baseline."""
    best = target.best_network(results)
    reference = [Method(model=target.reference)] if target.reference in results.looks else []
    return ([best] if best is not None else []) + reference


def _forest(results: Results, target: Target, artist: Artist) -> Drawing:
    scores = target.find(target.metric)
    order = list(ordered_looks(results, scores))
    methods = sorted(dict.fromkeys(Method.of(s) for s in scores), key=lambda method: order.index(method.model))
    looks: dict[str, Look] = {method.key: method.look(results) for method in methods}
    conditions = {(str(s.condition.get("folds", "")), str(s.condition.get("confounds", "kept"))) for s in scores}
    panels = [
        Panel(
            title=f"{FOLD_WORDS.get(folds, folds)},\nconfounds {confounds}",
            estimates={
                Method.of(s).key: estimate(s)
                for s in scores
                if (str(s.condition.get("folds", "")), str(s.condition.get("confounds", "kept"))) == (folds, confounds)
            },
        )
        for folds, confounds in sorted(conditions)
    ]
    text = metric_words(target.metric)
    zero = "of naming the mean" if target.is_regression else "of chance"
    return artist.show(
        figures_charts.draw_intervals(panels, looks, f"{target.name}: {text.name}", target.chance),
        f"{target.slug}-scores",
        f"{text.name} of every method for {target.name}",
        f"{target.name}: {text.name} of every method with {results.level_text} intervals. The upright line is the "
        f"value {zero}; an arrow stands for a value far below it. What it means that confounds are removed stands "
        "above the table.",
    )


def _truth(results: Results, target: Target, artist: Artist) -> Drawing | None:
    if not target.is_regression:
        return None
    clouds = []
    for method in _pictured(results, target):
        rows = target.rows_of("predictions", method, **target.base)
        if rows is None:
            continue
        rows = rows[rows["repeat"] == rows["repeat"].min()]
        pairs = rows[["predicted", "truth"]].to_numpy(np.float64)
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        if len(pairs):
            look = method.look(results)
            clouds.append(Cloud(title=look.label, predicted=pairs[:, 0], truth=pairs[:, 1], colour=look.colour))
    if not clouds:
        return None
    return artist.show(
        figures_clinical.draw_truth(clouds, target.name),
        f"{target.slug}-truth",
        f"Truth over prediction of {target.name}",
        f"{target.name}: truth over prediction for people who were not trained on, one dot a recording "
        f"({target.base_words}). On the dashed line they agree; an upright, narrow cloud says that about "
        f"the same value is named for everyone. {_which(results, target)}",
    )


def _reliability(results: Results, target: Target, artist: Artist) -> Drawing | None:
    panels = []
    for method in _pictured(results, target):
        rows = target.rows_of("calibration", method, **target.base)
        if rows is None:
            continue
        rows = rows.dropna(subset=["predicted", "observed"])
        classes = sorted(rows["class"].unique())
        curves = {}
        for name in classes[-1:] if len(classes) == 2 else classes:  # of two, one mirrors the other
            bins = rows[rows["class"] == name].sort_values("bin")
            predicted, observed, num = (bins[c].to_numpy(np.float64) for c in ("predicted", "observed", "num"))
            curves[str(name)] = Curve(predicted=predicted, observed=observed, num=num)
        if curves:
            look = method.look(results)
            panels.append(Reliability(title=look.label, curves=curves, colour=look.colour))
    if not panels:
        return None
    shown = list(panels[0].curves)
    what = f"share of {shown[0]}" if len(shown) == 1 and shown[0] else "share observed"
    ylabel = f"{target.name}, mean truth" if target.is_regression else f"{target.name}: {what}"
    about = "the mean truth" if target.is_regression else "the share of people who are of the class"
    return artist.show(
        figures_clinical.draw_reliability(panels, ylabel, not target.is_regression),
        f"{target.slug}-reliability",
        f"Reliability of predictions of {target.name}",
        f"{target.name}: {about} over what was predicted, by bin of the prediction ({target.base_words}); larger dots: "
        "more people. On the dashed line predictions mean what they say; where a curve is flatter, they are too "
        f"extreme. {_which(results, target)}",
    )


def _which(results: Results, target: Target) -> str:
    """Say how the methods in a figure were chosen."""
    best = target.best_network(results)
    words = []
    if best is not None:
        chosen = target.validation_losses(best.model)
        why = "the checkpoint and readout with the lowest loss on validation people" if chosen else "a checkpoint"
        words.append(f"{best.label(results)}, {why}")
    if target.reference in results.labels:
        words.append(f"{results.labels[target.reference]}, the reference baseline")
    return f"Shown: {listed(words)}." if words else ""
