"""A comparison in plain text: what differs between the runs, a table for each task and metric, what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from brainlm.errors import ConfigError
from eval.comparison import Comparison, ScoreDifference
from eval.results_folder import RUN, ResultsFolder
from eval.summary import HEADLINE

LONGEST = 60
MOST_NAMED = 2
SMALL = 5e-4
COLUMNS = ("", "", "A", "B", "B - A", "95 % interval", "")


def comparison_text(comparison: Comparison, metric: str = "") -> str:
    """Return everything that is printed; `metric` "" shows those of the closing table of an evaluation.

    Raises
    ------
    ConfigError
        If no task has the metric.
    """
    known = list(dict.fromkeys(score.metric for score in comparison.scores))
    if metric and metric not in known:
        raise ConfigError(f"--metric: expected one of {', '.join(known)}, found {metric!r}")
    blocks = [
        [f"A: {_about(comparison.a)}", f"B: {_about(comparison.b)}"],
        [f"compared: {pair.a} (A) with {pair.b} (B), {pair.why}" for pair in comparison.pairs if pair.why],
        _differences(comparison),
    ]
    shown: list[ScoreDifference] = []
    for task in dict.fromkeys(score.task for score in comparison.scores):
        rows = [score for score in comparison.scores if score.task == task]
        names = (metric,) if metric else HEADLINE.get(task, (rows[0].metric,))
        here = [name for name in names if any(score.metric == name for score in rows)]
        if metric and not here:
            blocks.append([f"{task} has no metric {metric}"])
        for name in here:  # numbers and classes of the clinical task have metrics of their own
            chosen = [score for score in rows if score.metric == name]
            blocks.append([f"{task}: {name}", *_table(chosen)])
            shown += chosen
    if any(score.excludes_zero for score in shown):
        blocks.append(["* the interval excludes 0; of 20 scores that did not change, about one has such an interval"])
    blocks.append(
        [
            f"{left.folder} alone has {left.num_scores} score{'' if left.num_scores == 1 else 's'} of {left.model} "
            f"on {left.task}"
            for left in comparison.unmatched
        ]
    )
    blocks.append(_notes(shown))
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _about(folder: ResultsFolder) -> str:
    first = folder.scores[0]
    return f"{folder.store.url} ({first.dataset} {first.dataset_hash[:12]}, {folder.split})"


def _differences(comparison: Comparison) -> list[str]:
    folders = {"A": comparison.a, "B": comparison.b}
    lacking = [folder.store.url_of(RUN) for folder in folders.values() if not folder.run]
    if lacking:
        return [f"What differs between the runs is not known: {' and '.join(lacking)} not there."]
    changed = [side for side, folder in folders.items() if (folder.run.get("git") or {}).get("dirty")]
    lines = [f"  {d.key}: {_short(d.a)} -> {_short(d.b)}" for d in comparison.differences]
    return [
        "What differs (A -> B):" if lines else "Nothing that the folders record differs between the runs.",
        *lines,
        *(f"  {side} was scored by files that differ from their commit: the code is not known" for side in changed),
    ]


def _table(scores: Sequence[ScoreDifference]) -> list[str]:
    """Return a row for each score that changed, model by model, and a count of those that did not."""
    models = list(dict.fromkeys(score.model_b for score in scores))
    same = [score for score in scores if score.difference == 0 and score.ci_low == score.ci_high == 0]
    changed = sorted((score for score in scores if score not in same), key=lambda score: models.index(score.model_b))
    rows = [COLUMNS, *(_row(score) for score in changed)] if changed else []
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    counted = Counter(score.model_b for score in same)
    if counted:
        lines.append(f"  the same in every digit: {', '.join(f'{model} ({num})' for model, num in counted.items())}")
    return lines


def _row(score: ScoreDifference) -> tuple[str, ...]:
    interval = "none"
    if score.ci_low is not None and score.ci_high is not None:
        interval = f"[{_signed(score.ci_low)}, {_signed(score.ci_high)}]"
    return (
        score.model_b if score.model_a == score.model_b else f"{score.model_a} -> {score.model_b}",
        ", ".join(f"{name} {value}" for name, value in score.condition.items()),
        f"{score.value_a:.4f}",
        f"{score.value_b:.4f}",
        _signed(score.difference),
        interval,
        "*" if score.excludes_zero else "",
    )


def _signed(value: float) -> str:
    return f"{value:+.1e}" if 0 < abs(value) < SMALL else f"{value + 0.0:+.4f}"


def _notes(scores: Sequence[ScoreDifference]) -> list[str]:
    """Return each note once, with its models; what holds for the data as a whole is left to the JSON file."""
    about: dict[str, list[str]] = {}
    for score in scores:
        for note in score.notes:
            if not note.startswith("data: "):
                about.setdefault(note, []).append(score.model_b)
    notes = [f"note ({_models(models, len(scores))}): {note}" for note, models in about.items()]
    if any(score.model_hash_a != score.model_hash_b for score in scores):
        notes.append("note: intervals hold for these weights; another training run of the same recipe scores otherwise")
    return notes


def _models(models: Sequence[str], num_scores: int) -> str:
    names = list(dict.fromkeys(models))
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(models)} of {num_scores} scores"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
