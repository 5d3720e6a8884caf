"""Tables of the clinical section: methods by folds and confounds, the paper's table, groups of people, single folds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from eval.report_clinical_input import (
    FOLD_WORDS,
    Target,
    removed_text,
)
from eval.report_input import Results, condition_groups, dig
from eval.report_tables import MetricText, Table, make_table, num_text
from eval.results import Score

METRICS = {
    "r2": MetricText(
        name="R²",
        definition="R² = 1 − SSE / SST over all test predictions of one division into folds, in the target's own "
        "units; SST is about the mean of the tested people, so that naming this mean scores 0 and worse guesses score "
        "below it. Averaged over the divisions. Never clipped.",
    ),
    "auc": MetricText(
        name="AUC",
        definition="Area under the ROC curve: of two people tested in one fold, one of the class and one not, how "
        "often the first gets the higher prediction. 0.5 is chance, 1 is perfect. Of several classes the mean of each "
        "against the others.",
    ),
    "pearson_r": MetricText(
        name="Pearson r",
        definition="Correlation of prediction and truth within folds: both are taken about the means of their fold.",
    ),
    "mae": MetricText(
        name="Mean absolute error",
        definition="Mean distance of prediction and truth in the target's own units; lower is better.",
        higher_is_better=False,
    ),
    "mse_transformed": MetricText(
        name="Mean squared error, transformed",
        definition="Mean squared error in units of the transform that was fitted to the training people (the paper: "
        "age in standard deviations, the others scaled from 0 to 1, PCL and GAD after a logarithm); lower is better. "
        "It depends on how much the people differ, so errors on other data are not comparable.",
        higher_is_better=False,
    ),
    "calibration_slope": MetricText(
        name="Calibration slope",
        definition="Slope of the truth over the prediction: 1 is right, below 1 predictions are too extreme, above 1 "
        "too timid.",
    ),
    "balanced_accuracy": MetricText(
        name="Balanced accuracy",
        definition="Mean over classes of the share of their people who are named correctly; always naming one class "
        "scores 1 / number of classes.",
    ),
    "brier": MetricText(
        name="Brier score",
        definition="Mean squared distance of the predicted probabilities from what was the case; 0 is perfect, lower "
        "is better.",
        higher_is_better=False,
    ),
    "calibration_error": MetricText(
        name="Calibration error",
        definition="Mean distance of the predicted probability from the share of people for whom it came true, over 10 "
        "bins of the prediction, each weighted by its people (expected calibration error); lower is better.",
        higher_is_better=False,
    ),
}
NOT_RANKED = ("calibration_slope",)  # neither more nor less of it is better
MEANINGS = {
    "age": re.compile(r"(?<![a-z])age(?![a-z])", re.IGNORECASE),
    "pcl": re.compile(r"(?<![a-z])pcl", re.IGNORECASE),
    "gad": re.compile(r"(?<![a-z])gad(?![a-z])", re.IGNORECASE),
    "neuroticism": re.compile(r"neurotic", re.IGNORECASE),
}
PAPER_TRANSFORMS = {"age": "zscore", "pcl": "log1p_minmax", "gad": "log1p_minmax", "neuroticism": "minmax"}
# BrainLM (ICLR 2024), table 2, and the poster: mean squared errors on other data (UK Biobank), for orientation.
PAPER = {
    "paper: SVM on raw series": (2.0, 0.034, 0.172, 0.160),
    "paper: SVM on embeddings": (0.857, 0.022, 0.094, 0.086),
    "paper: BrainLM, fine-tuned": (0.485, 0.018, 0.074, 0.072),
    "poster: SVR": (0.659, 0.022, 0.090, 0.087),
    "poster: MLP": (0.693, 0.021, 0.081, 0.079),
    "poster: LSTM": (0.596, 0.019, 0.083, 0.076),
    "poster: GCN": (0.862, 0.021, 0.083, 0.077),
    "poster: BrainLM 13M": (0.464, 0.018, 0.074, 0.072),
    "poster: BrainLM 111M": (0.503, 0.015, 0.073, 0.069),
}
PAPER_COLUMNS = ("age", "pcl", "gad", "neuroticism")  # the order of PAPER


def metric_words(metric: str) -> MetricText:
    if metric.endswith("_minus_reference"):
        first = metric_words(metric.removesuffix("_minus_reference"))
        return MetricText(
            name=f"{first.name}: difference from the reference baseline",
            definition=f"{first.name} of a method less {first.name} of the reference on the same people; an interval "
            "that includes 0 shows no difference. p: two-sided t test over folds and divisions, its variance "
            "corrected for training people that folds share (Nadeau and Bengio), then for all methods of a "
            "column (Holm).",
        )
    return METRICS.get(metric, MetricText(name=metric, definition=f"{metric}, as the task defines it."))


def paper_meaning(results: Results, target: Target) -> str:
    """Return which of the paper's targets this one is, by the name of its column; "" if it is none of them.

    A column that is known to be transformed in another way is none of them either.
    """
    if not target.is_regression:
        return ""
    told = dig(results.run, "config", "clinical", "targets")
    entries = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
    transform = next((entry.get("transform") for entry in entries if entry.get("column") == target.name), None)
    for meaning, pattern in MEANINGS.items():
        if pattern.search(target.name):
            return meaning if transform in (None, PAPER_TRANSFORMS[meaning]) else ""
    return ""


def first_table(results: Results, target: Target) -> Table:
    return score_table(results, target, target.metric, removed_text(results))


def more_metrics(results: Results, target: Target) -> list[Table]:
    """Return a table for every metric but the first one, the difference from the reference first."""
    names = [m for m in dict.fromkeys(s.metric for s in target.scores) if m not in (target.metric, "mse_transformed")]
    names.sort(key=lambda name: not name.endswith("_minus_reference"))
    return [score_table(results, target, name) for name in names]


def score_table(results: Results, target: Target, metric: str, *more: str) -> Table:
    """Lay the scores of a target out: methods down, kinds of folds and treatments of confounds across."""
    text = metric_words(metric)
    found = target.find(metric)
    columns = sorted({_column(s) for s in found}, key=lambda words: (not words.startswith(FOLD_WORDS["random"]), words))
    scores = [replace(s, condition=s.condition | {"column": columns.index(_column(s))}) for s in found]
    is_difference = metric.endswith("_minus_reference")
    reference = results.labels.get(target.reference, target.reference)
    named = f"Reference, the baseline that is best on validation people: {reference}." if reference else ""
    ranked = not is_difference and metric not in NOT_RANKED
    return make_table(
        results,
        scores,
        column="column",
        column_text=lambda place: columns[place],
        title=f"{target.name}: {text.name}",
        caption=_caption(results, scores, text, ranked, *more, named),
        row_conditions=("readout",),
        higher_is_better=text.higher_is_better,
        mark_best=ranked,
        head="Method",
    )


def _column(score: Score) -> str:
    folds = str(score.condition.get("folds", ""))
    words = [FOLD_WORDS.get(folds, folds), f"confounds {score.condition.get('confounds', 'kept')}"]
    return ", ".join(word for word in words if word)


def _caption(results: Results, scores: Sequence[Score], text: MetricText, ranked: bool, *more: str) -> str:
    over = "families" if any("famil" in note for s in scores for note in s.notes) else "subjects"
    interval = f"Brackets: {results.level_text} interval, bootstrap over {over}."
    parts = [text.definition, *more, num_text(scores)]
    parts += [interval] if any(s.ci_low is not None for s in scores) else []
    parts += ["Bold: best among checkpoints and baselines."] if ranked and len(scores) > 1 else []
    return " ".join(part for part in parts if part)


def paper_tables(results: Results, targets: Sequence[Target]) -> list[Table]:
    """Return the paper's table of errors, all regressions across; then the same for other folds and confounds."""
    scores = [s for target in targets if target.is_regression for s in target.find("mse_transformed")]
    text = metric_words("mse_transformed")
    meanings = {target.name: meaning for target in targets if (meaning := paper_meaning(results, target))}
    made: list[Table] = []
    groups = condition_groups(scores, "target", "readout")
    for group in sorted(groups, key=lambda group: (group.get("folds") != "random", group.get("confounds") != "kept")):
        here = [s for s in scores if all(s.condition.get(k) == v for k, v in group.items())]
        grey = paper_rows(meanings) if not made else {}
        note = (
            "Grey: numbers of the paper and of its poster, on other people and other data (UK Biobank), for "
            "orientation and not for comparison."
        )
        made.append(
            make_table(
                results,
                here,
                column="target",
                column_text=str,
                title=f"{text.name}, {_column(here[0])}",
                caption=_caption(results, here, text, True, note if grey else ""),
                row_conditions=("readout",),
                higher_is_better=False,
                paper=grey,
                head="Method",
            )
        )
    return made


def paper_rows(meanings: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return the paper's rows, label to error by column, for the columns that mean one of the paper's targets."""
    return {
        label: {column: errors[PAPER_COLUMNS.index(meaning)] for column, meaning in meanings.items()}
        for label, errors in PAPER.items()
        if meanings
    }
