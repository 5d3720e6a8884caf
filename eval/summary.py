"""The closing words of an evaluation: a table in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.results import Score

HEADLINE = {"reconstruction": ("r2",), "forecasting": ("r2",), "clinical": ("r2", "auc"), "networks": ("accuracy",)}
MEANING = {
    "reconstruction": "R2 of hidden values (units: SD of recording and parcel); the recording's mean scores 0",
    "forecasting": "R2 of the predicted end of each window; the recording's mean scores 0",
    "clinical": "phenotypes of people who were not trained on, by cross-validation",
    "networks": "fraction of parcels put into the right network",
}
BLOCK = {"reconstruction": "centring", "clinical": "target", "networks": "level"}
BLOCK_WORDS = {
    ("reconstruction", "recording"): "series centred on the whole recording (as in the paper)",
    ("reconstruction", "visible"): "series centred on visible values only (no statistic of hidden values)",
    ("networks", "recording"): "within each recording (intervals over subjects)",
    ("networks", "group"): "features averaged over recordings (intervals over parcels)",
}
CLINICAL_WORDS = {"r2": "R2; the mean of the tested people scores 0", "auc": "area under the ROC curve; chance is 0.5"}
IN_ROW = ("part", "readout")
SILENT = ("mask", "reference")
LEVEL = 0.05
ABOVE, BELOW = " *", " (*)"


def summary(scores: Sequence[Score], level: float) -> str:
    """Return one table a task: models down, conditions across, each cell a value and its interval.

    A sign marks cells that differ from the reference baseline (p below 0.05, corrected); what it means stands below
    the table.
    """
    blocks = []
    own = {score.task: (score.metric,) for score in reversed(scores) if score.task not in HEADLINE}  # its first metric
    for task, metrics in (HEADLINE | own).items():
        chosen = [score for score in scores if score.task == task and score.metric in metrics]
        if not chosen:
            continue
        people = "" if task == "clinical" else f"{chosen[0].num_subjects} subjects, "
        lines = [f"{task}: {MEANING.get(task, metrics[0])}; {people}{level:.0%} intervals"]
        by = BLOCK.get(task, "")
        of_task = [score for score in scores if score.task == task]
        tables = []
        for value in dict.fromkeys(score.condition.get(by, "") for score in chosen):
            here = [score for score in chosen if score.condition.get(by, "") == value]
            compared = [score for score in of_task if score.condition.get(by, "") == value and _is_compared(score)]
            head = ["  " + _block_words(here, str(value))] if value else []
            tables.append((head + _table(here, compared, by), _explained(compared)))
        blocks.append("\n".join(lines + _with_notes(tables)))
    return "\n\n".join(blocks)


def _is_compared(score: Score) -> bool:
    return score.metric.endswith("_minus_reference") and score.p_corrected is not None


def _block_words(scores: Sequence[Score], value: str) -> str:
    first = scores[0]
    if first.task != "clinical":
        return BLOCK_WORDS[first.task, value]
    return f"{value} ({CLINICAL_WORDS[first.metric]}); {max(s.num_subjects for s in scores)} subjects"


def _with_notes(tables: Sequence[tuple[list[str], list[str]]]) -> list[str]:
    """Join tables and what is said below them; what is said of all of them is said once."""
    if len({tuple(notes) for _, notes in tables}) == 1:
        return [line for table, _ in tables for line in table] + tables[0][1]
    return [line for table, notes in tables for line in (*table, *notes)]


def _table(scores: Sequence[Score], compared: Sequence[Score], by: str) -> list[str]:
    rows = list(dict.fromkeys(_row(score) for score in scores))
    columns = list(dict.fromkeys(_column(score, by) for score in scores))
    marks = _marks(compared, by)
    space = max((len(mark) for mark in marks.values()), default=0)  # so that numbers stand below one another
    cells = {
        (_row(score), _column(score, by)): _cell(score) + marks.get((_row(score), _column(score, by)), "").ljust(space)
        for score in scores
    }
    none = "-" + " " * space
    width = max(len(row) for row in rows)
    widths = [max(len(c), *(len(cells.get((row, c), none)) for row in rows)) for c in columns]
    lines = ["    " + " " * width + "  " + "  ".join(c.rjust(w) for c, w in zip(columns, widths))]
    for row in rows:
        values = "  ".join(cells.get((row, c), none).rjust(w) for c, w in zip(columns, widths))
        lines.append(f"    {row.ljust(width)}  {values}".rstrip())
    return lines


def _marks(compared: Sequence[Score], by: str) -> Mapping[tuple[str, str], str]:
    """Return the sign of every row and column that differs from the reference."""
    return {
        (_row(score), _column(score, by)): ABOVE if score.value > 0 else BELOW
        for score in compared
        if score.p_corrected is not None and score.p_corrected < LEVEL
    }


def _explained(compared: Sequence[Score]) -> list[str]:
    """Say what the signs mean and what the reference is, or that no difference was found."""
    if not compared:
        return []
    references = " or ".join(dict.fromkeys(str(score.condition.get("reference", "not named")) for score in compared))
    found = {mark: None for mark in (ABOVE, BELOW) if mark in _marks(compared, "").values()}
    of_what = "all methods of a column" if compared[0].task == "clinical" else "all comparisons of the task"
    test = f"p < {LEVEL:g}, two-sided, corrected for {of_what}"
    if not found:
        return [f"    no difference from the reference baseline, {references}, is shown ({test})"]
    words = {ABOVE: "above", BELOW: "below"}
    signs = ", ".join(f"{mark.strip()} {words[mark]}" for mark in found)
    return [f"    {signs} the reference baseline, {references} ({test})"]


def _row(score: Score) -> str:
    extra = [str(score.condition[name]) for name in IN_ROW if name in score.condition]
    return ", ".join([score.model, *extra])


def _column(score: Score, by: str) -> str:
    return condition_words({name: value for name, value in score.condition.items() if name not in (*IN_ROW, by)})


def condition_words(condition: Mapping[str, object]) -> str:
    """Return a condition as a heading."""
    words = {"mask_ratio": "{:.0%} hidden", "horizon": "{} timepoints ahead", "folds": "{} folds"}
    shown = {name: value for name, value in condition.items() if name not in SILENT}
    if condition.get("mask", "random") != "random":
        words = words | {"mask_ratio": "{:.0%} of " + str(condition["mask"]).replace("_", " ") + " hidden"}
    if condition.get("folds") == "sites":
        words = words | {"folds": "each site left out"}
    if "centring" in condition:
        whole = condition["centring"] == "recording"
        words = words | {"centring": "centred on the whole {}" if whole else "centred on {} values"}
    if shown.get("confounds") == "kept":
        del shown["confounds"]  # the usual case; the others say that they were removed
    return ", ".join(words.get(name, name + " {}").format(value) for name, value in shown.items())


def _cell(score: Score) -> str:
    if score.ci_low is None or score.ci_high is None:
        return _number(score.value)
    return f"{_number(score.value)} [{_number(score.ci_low)}, {_number(score.ci_high)}]"


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no "-0.000"
