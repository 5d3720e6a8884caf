"""What a claim of a report is made of: a verdict that intervals alone decide, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report_input import Results, among, counted, number
from eval.results import Score

Tone = Literal["ahead", "behind", "open"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one score is above another, and how that is known."""

    tone: Tone
    word: str
    reason: str


def compare(ours: Score, theirs: Score, paired: Score | None = None) -> Verdict:
    """Judge whether `ours` is above `theirs` (higher is better).

    Parameters
    ----------
    paired : Score, optional
        Difference ours - theirs with its interval from the same subjects; it decides where there is one. Otherwise
        the two intervals must not overlap, which is the stricter rule.
    """
    overlap = _overlap(ours, theirs)
    if paired is not None and paired.ci_low is not None and paired.ci_high is not None:
        difference = f"difference on the same subjects {'+' if paired.value > 0 else ''}{number(paired)}"
        if paired.ci_low > 0 or paired.ci_high < 0:
            although = ", although the two intervals overlap" if overlap else ""
            word: Tone = "ahead" if paired.ci_low > 0 else "behind"
            return Verdict(tone=word, word=word, reason=difference + although)
        return Verdict(tone="open", word="no clear difference", reason=f"{difference}, which includes 0")
    if overlap is None:
        side = "above" if ours.value > theirs.value else "below" if ours.value < theirs.value else "level"
        reason = f"the value lies {side}, but without intervals nothing follows from that"
        return Verdict(tone="open", word="not judged", reason=reason)
    if overlap:
        return Verdict(tone="open", word="no clear difference", reason="the intervals overlap")
    word = "ahead" if ours.value > theirs.value else "behind"
    return Verdict(tone=word, word=word, reason="the intervals do not overlap")


def _overlap(a: Score, b: Score) -> bool | None:
    if a.ci_low is None or a.ci_high is None or b.ci_low is None or b.ci_high is None:
        return None
    return a.ci_low <= b.ci_high and b.ci_low <= a.ci_high


def paired_difference(results: Results, ours: Score, theirs: Score) -> Score | None:
    """Return the stored paired difference of two scores, if `theirs` is the reference that it was computed against."""
    for score in results.find(ours.task, f"{ours.metric}_minus_reference", **ours.condition):
        if score.model == ours.model and score.condition.get("reference") == theirs.model:
            return score
    return None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the summary."""

    topic: str
    verdict: Verdict
    text: str
    details: tuple[str, ...] = ()


WHO = {
    "unseen": "that no checkpoint was pretrained on,",
    "all": "whom a checkpoint may have been pretrained on,",
}
"""Of people that a task has chosen, whatever the splits of the data set."""


def held_out(score: Score) -> str:
    """Count the people behind a score, and say whether the model has met them."""
    if score.split in WHO:
        return f"{counted(score.num_subjects, 'subject')} {WHO[score.split].rstrip(',')}"
    seen = any("trained on" in note or "seen" in note for note in score.notes)
    held_out = "held-out " if score.split in ("val", "test") and not seen else ""
    return counted(score.num_subjects, f"{held_out}subject")


def judge(results: Results, ours: Score, theirs: Score, what: str) -> tuple[Verdict, str]:
    """Compare two scores: the verdict, and a sentence that gives the other score and the reason."""
    verdict = compare(ours, theirs, paired_difference(results, ours, theirs))
    label = results.labels[ours.model]
    start = {
        "ahead": f"{label} is ahead",
        "behind": f"{label} is behind",
        "no clear difference": "No clear difference",
        "not judged": "Not judged",
    }[verdict.word]
    return verdict, f"{what}: {results.labels[theirs.model]}, {number(theirs)}. {start}: {verdict.reason}."


def untrained_like(scores: Sequence[Score], model: str) -> Score | None:
    """Return the score of a checkpoint's network as it was before training."""
    untrained = among(scores, "untrained")
    named = [score for score in untrained if score.model.endswith(f"({model})")]
    named = named or [score for score in untrained if model in score.model]
    return named[0] if named else untrained[0] if len(untrained) == 1 else None
