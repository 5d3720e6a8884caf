"""The closing words of an evaluation: a table in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from eval.results import Score

HEADLINE = {"reconstruction": "r2", "forecasting": "r2", "networks": "accuracy"}
MEANING = {
    "reconstruction": "R2 of hidden values (units: SD of recording and parcel); the recording's mean scores 0",
    "forecasting": "R2 of the predicted end of each window; the recording's mean scores 0",
    "networks": "fraction of parcels put into the right network",
}
BLOCK = {"reconstruction": "centring", "networks": "level"}
BLOCK_WORDS = {
    ("reconstruction", "recording"): "  series centred on the whole recording (as in the paper)",
    ("reconstruction", "visible"): "  series centred on visible values only (no statistic of hidden values)",
    ("networks", "recording"): "  within each recording (intervals over subjects)",
    ("networks", "group"): "  features averaged over recordings (intervals over parcels)",
}
IN_ROW = ("part",)
SILENT = ("mask",)


def summary(scores: Sequence[Score], level: float) -> str:
    """Return one table a task: models down, conditions across, each cell a value and its interval."""
    blocks = []
    own = {score.task: score.metric for score in reversed(scores) if score.task not in HEADLINE}  # its first metric
    for task, metric in (HEADLINE | own).items():
        chosen = [score for score in scores if score.task == task and score.metric == metric]
        if not chosen:
            continue
        meaning = MEANING.get(task, metric)
        lines = [f"{task}: {meaning}; {chosen[0].num_subjects} subjects, {level:.0%} intervals"]
        by = BLOCK.get(task, "")
        for value in dict.fromkeys(score.condition.get(by, "") for score in chosen):
            if value:
                lines.append(BLOCK_WORDS[task, str(value)])
            lines += _table([score for score in chosen if score.condition.get(by, "") == value], by)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _table(scores: Sequence[Score], by: str) -> list[str]:
    rows = list(dict.fromkeys(_row(score) for score in scores))
    columns = list(dict.fromkeys(_column(score, by) for score in scores))
    cells = {(_row(score), _column(score, by)): _cell(score) for score in scores}
    width = max(len(row) for row in rows)
    widths = [max(len(c), *(len(cells.get((row, c), "-")) for row in rows)) for c in columns]
    lines = ["    " + " " * width + "  " + "  ".join(c.rjust(w) for c, w in zip(columns, widths))]
    for row in rows:
        values = "  ".join(cells.get((row, c), "-").rjust(w) for c, w in zip(columns, widths))
        lines.append(f"    {row.ljust(width)}  {values}")
    return lines


def _row(score: Score) -> str:
    extra = [str(score.condition[name]) for name in IN_ROW if name in score.condition]
    return ", ".join([score.model, *extra])


def _column(score: Score, by: str) -> str:
    words = {"mask_ratio": "{:.0%} hidden", "horizon": "{} timepoints ahead", "folds": "{} folds"}
    shown = {name: value for name, value in score.condition.items() if name not in (*IN_ROW, *SILENT, by)}
    if score.condition.get("mask", "random") != "random":
        words = words | {"mask_ratio": "{:.0%} of " + str(score.condition["mask"]).replace("_", " ") + " hidden"}
    return ", ".join(words.get(name, name + " {}").format(value) for name, value in shown.items())


def _cell(score: Score) -> str:
    if score.ci_low is None or score.ci_high is None:
        return _number(score.value)
    return f"{_number(score.value)} [{_number(score.ci_low)}, {_number(score.ci_high)}]"


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no "-0.000"
