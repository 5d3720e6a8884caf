"""Scores of the clinical task: values over repeats, intervals over families or subjects, tests over folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval.clinical.answers import CONDITIONS, Answers, Condition, answers_by_condition, interval, plain_condition
from eval.clinical.comparison_test import resampled_t_p_value
from eval.clinical.settings import ClinicalSettings
from eval.make_scores import corrected
from eval.models import MethodSpec
from eval.results import Score
from eval.task import ScoreContext, UnitOutput

Outputs = Sequence[tuple[MethodSpec, UnitOutput]]
AUTO = "auto"


def clinical_scores(settings: ClinicalSettings, version: int, outputs: Outputs, context: ScoreContext) -> list[Score]:
    """Score every method under every condition, and compare each with the reference baseline of its target."""
    everything = {spec.name: dict(answers_by_condition(output.table)) for spec, output in outputs}
    specs = {spec.name: spec for spec, _ in outputs}
    fits = {spec.name: output.validation for spec, output in outputs}
    references = choose_references(settings, outputs)
    num_folds: dict[Condition, int] = {}
    for answers_of in everything.values():
        for condition, answers in answers_of.items():
            key = _bare(condition)
            num_folds[key] = max(num_folds.get(key, 0), answers.num_folds)
    scores: list[Score] = []
    for name, answers_of in everything.items():
        for condition, answers in answers_of.items():
            common = _common(settings, version, specs[name], answers, context)
            complete = num_folds[_bare(condition)]
            if answers.num_folds < complete:
                lacking = f"{answers.num_folds} of {complete} folds alone: the others could not be computed"
                common["notes"] += (lacking,)
            plain = plain_condition(condition)
            for metric_name, metric in answers.metrics.items():
                value = answers.value(metric)
                if not np.isfinite(value):  # the correlation of a constant, for instance
                    continue
                drawn = answers.replicates(metric, context.num_bootstrap, context.seed)
                low, high = interval(drawn, len(answers.groups), context.level)
                scores.append(
                    Score(metric=metric_name, value=value, ci_low=low, ci_high=high, condition=plain, **common)
                )
            reference = references.get(_bare(condition), "")
            theirs = everything.get(reference, {}).get(_bare(condition))
            if theirs is not None and name != reference:
                compared = compare(answers, theirs, context, share_tested(fits[name], condition))
                if compared:
                    first = f"{answers.first_metric}_minus_reference"
                    scores.append(
                        Score(metric=first, condition={**plain, "reference": reference}, **compared, **common)
                    )
    return _corrected(scores)


def _corrected(scores: Sequence[Score]) -> list[Score]:
    """Correct p values for the number of methods that are compared with one reference."""
    column = ("target", "folds", "confounds")
    keys = [tuple(score.condition.get(name, "") for name in column) for score in scores]
    found = list(scores)
    for key in dict.fromkeys(keys):
        places = [place for place, other in enumerate(keys) if other == key]
        for place, score in zip(places, corrected([found[place] for place in places]), strict=True):
            found[place] = score
    return found


def compare(ours: Answers, theirs: Answers, context: ScoreContext, share: float) -> dict[str, Any]:
    """Return the difference of the first metric with interval and p value; {} where it is not defined.

    Nor is it where the two were not asked about the same people in every repeat.
    """
    metric = ours.metrics[ours.first_metric]
    value = ours.value(metric) - theirs.value(metric)
    if not np.isfinite(value) or ours.rows != theirs.rows:
        return {}
    drawn = [answers.replicates(metric, context.num_bootstrap, context.seed) for answers in (ours, theirs)]
    low, high = interval(drawn[0] - drawn[1], len(ours.groups), context.level)
    both = ours.by_fold.merge(theirs.by_fold, on=["repeat", "fold"], suffixes=("", "_theirs"))
    differences = (both["value"] - both["value_theirs"]).to_numpy(np.float64)
    weights = (both["weight"] / both.groupby("repeat")["weight"].transform("sum")).to_numpy(np.float64)
    p_value = resampled_t_p_value(differences, share, weights)
    return {"value": value, "ci_low": low, "ci_high": high, "p_value": p_value if np.isfinite(p_value) else None}


def choose_references(settings: ClinicalSettings, outputs: Outputs) -> dict[Condition, str]:
    """Return the reference baseline for each target, kind of folds, and removal of confounds.

    The one that is set, or the one whose loss on validation rows within the training folds is lowest, among those that
    were validated on all training rows by turns.
    """
    fits = [
        output.validation.assign(model=spec.name)
        for spec, output in outputs
        if output.validation is not None and len(output.validation)
        if spec.kind == "baseline" or spec.name == settings.reference
    ]
    if not fits:
        return {}
    found: dict[Condition, str] = {}
    for key, frame in pd.concat(fits).groupby(["target", "folds", "confounds"], sort=False):
        target, folds, confounds = (str(value) for value in key)
        frame = frame[frame["cross_validated"]] if frame["cross_validated"].any() else frame
        means = frame.groupby("model", sort=False)["validation_loss"].mean().dropna()
        if settings.reference != AUTO:
            found[target, "", folds, confounds] = settings.reference
        elif len(means):
            found[target, "", folds, confounds] = str(means.idxmin())
    return found


def _bare(condition: Condition) -> Condition:
    """Return the same condition of a baseline, which has no readout."""
    return condition[0], "", condition[2], condition[3]


def share_tested(fits: pd.DataFrame | None, condition: Condition) -> float:
    """Return tested rows over training rows of a fold, on average over those of a condition."""
    assert fits is not None
    here = fits[(fits[list(CONDITIONS)] == list(condition)).all(axis=1)]
    return float((here["num_test"] / here["num_train"]).mean())


def _common(
    settings: ClinicalSettings, version: int, spec: MethodSpec, answers: Answers, context: ScoreContext
) -> dict[str, Any]:
    num_subjects = int(answers.frame["subject"].nunique())
    notes = spec.notes + context.notes
    if not context.seen_left_out:
        notes += ("people that a checkpoint was pretrained on may be among those who are tested",)
    if len(answers.groups) < num_subjects:
        notes += ("subjects of one family are resampled together",)
    if len(answers.groups) < 2:
        notes += ("nothing to resample: no interval",)
    return {
        "task": "clinical",
        "version": version,
        "dataset": context.dataset,
        "dataset_hash": context.dataset_hash,
        "split": context.split if settings.of == "split" else "unseen" if context.seen_left_out else "all",
        "model": spec.name,
        "model_kind": spec.kind,
        "model_hash": spec.model_hash,
        "num_subjects": num_subjects,
        "num_recordings": int(answers.frame["recording"].nunique()),
        "statistics_from": "checkpoint" if spec.checkpoint and spec.scaled_by == "checkpoint" else "cohort",
        "notes": notes,
    }
