"""What the summary of a report claims of a checkpoint and a clinical target."""

from __future__ import annotations

from collections.abc import Sequence

from eval.figures import minus
from eval.report_clinical_input import (
    CONFOUNDS_ONLY,
    PERMUTED,
    READOUT_WORDS,
    Method,
    Target,
    clinical_targets,
)
from eval.report_clinical_tables import metric_words, paper_meaning
from eval.report_input import Results, among, listed, number, of_model, strongest
from eval.report_tables import p_text
from eval.report_verdicts import Claim, Verdict, compare, held_out, judge, paired_difference, untrained_like
from eval.results import Score

LEVEL = 0.05
OPEN = Verdict(tone="open", word="not judged", reason="")


def clinical_claims(results: Results, model: str) -> list[Claim]:
    """Return one claim a target: the readout that was best on validation people against the reference baseline."""
    claims = [_claim(results, target, model) for target in clinical_targets(results)]
    return [claim for claim in claims if claim is not None]


def shows_paper_rows(results: Results) -> bool:
    """Whether the paper's numbers stand in a table of the clinical section."""
    return any(paper_meaning(results, t) and t.find("mse_transformed") for t in clinical_targets(results))


def _claim(results: Results, target: Target, model: str) -> Claim | None:
    method = target.chosen(model)
    ours = target.score(method, **target.base) if method is not None else None
    if method is None or ours is None:
        return None
    label, metric = results.labels[model], metric_words(target.metric).name
    readout = READOUT_WORDS.get(method.readout, method.readout)
    by = "the readout with the lowest loss on validation people" if target.validation_losses(model) else ""
    with_readout = f" with {readout}{f' ({by})' if by and len(target.readouts(model)) > 1 else ''}" if readout else ""
    parts = [
        f"{label}{with_readout} predicts {target.name} with {metric} {number(ours)} ({held_out(ours)}, "
        f"{target.base_words})." + _worthless(target, ours)
    ]
    verdict, sentence = _against_reference(results, target, ours)
    parts.append(sentence)
    details = [
        _against_untrained(results, target, ours, method),
        _against_confounds(results, target, ours),
        _elsewhere(results, target, method, "With confounds removed from the features", confounds="removed"),
        _elsewhere(results, target, method, "At sites that were left out of training", folds="sites"),
        _permuted(results, target, method),
        _other_readouts(target, method),
    ]
    return Claim(
        topic=f"Clinical: {target.name}",
        verdict=verdict,
        text=" ".join(part for part in parts if part),
        details=tuple(detail for detail in details if detail),
    )


def _worthless(target: Target, ours: Score) -> str:
    """Say that a score is no better than what can be had without looking."""
    what = "naming the mean" if target.is_regression else "chance"
    if (ours.value if ours.ci_high is None else ours.ci_high) < target.chance:
        return f" That is worse than {what}."
    if ours.ci_low is not None and ours.ci_low <= target.chance:
        return f" The interval includes {target.chance:g}, which is {what}."
    return ""


def _rival(results: Results, target: Target, here: Sequence[Score]) -> tuple[Score | None, str]:
    """Return what to hold a checkpoint against, and what it is: the reference baseline, else the strongest one."""
    reference = of_model(here, target.reference)
    if reference is not None:
        return reference, "Reference baseline, the best on validation people"
    return strongest(among(here, "baseline")), "Strongest baseline on these same people (no reference is named)"


def _against_reference(results: Results, target: Target, ours: Score) -> tuple[Verdict, str]:
    rival, what = _rival(results, target, target.find(target.metric, **target.base))
    if rival is None:
        return OPEN, "No baseline was scored."
    verdict, sentence = judge(results, ours, rival, what)
    return verdict, sentence + _tested(paired_difference(results, ours, rival), verdict)


def _tested(paired: Score | None, verdict: Verdict) -> str:
    """Add the test over folds, and whether it agrees with the interval."""
    if paired is None or paired.p_corrected is None:
        return ""
    words = {
        (True, True): "agrees",
        (True, False): "does not confirm it",
        (False, True): "does find a difference",
        (False, False): "finds none either",
    }[verdict.tone != "open", paired.p_corrected < LEVEL]
    return f" The test over folds, corrected for the number of methods, {words} ({p_text(paired).strip()})."


def _against_untrained(results: Results, target: Target, ours: Score, method: Method) -> str:
    here = [s for s in target.find(target.metric, **target.base) if Method.of(s).readout == method.readout]
    theirs = untrained_like(here, method.model)
    if theirs is None:
        return "No network without training was scored with this readout."
    return judge(results, ours, theirs, "The same network without training, same readout")[1]


def _against_confounds(results: Results, target: Target, ours: Score) -> str:
    theirs = of_model(target.find(target.metric, **target.base), CONFOUNDS_ONLY)
    if theirs is None:
        return "A model of confounds alone was not scored, so site and head motion may be all there is to it."
    verdict = compare(ours, theirs, paired_difference(results, ours, theirs))
    meaning = {
        "ahead": f"{results.labels[ours.model]} is ahead: {verdict.reason}, so it tells more than these do",
        "behind": f"{results.labels[ours.model]} is behind: {verdict.reason}, so site and head motion may explain it",
        "open": f"Not shown: {verdict.reason}, so site and head motion may explain it",
    }[verdict.tone]
    return (
        "Is it more than site, head motion and other confounds? A model of these alone, without any brain: "
        f"{number(theirs)}. {meaning}."
    )


def _elsewhere(results: Results, target: Target, method: Method, what: str, **change: str) -> str:
    """Say how the verdict comes out under another condition."""
    where = target.base | change
    if where == target.base:
        return ""
    ours = target.score(method, **where)
    here = target.find(target.metric, **where)
    if not here:
        return ""
    if ours is None:
        return f"{what}: there is no score of this readout."
    rival, _ = _rival(results, target, here)
    if rival is None:
        return f"{what}: {number(ours)}."
    sentence = judge(results, ours, rival, "baseline")[1]
    return f"{what}: {number(ours)}; {sentence}"


def _permuted(results: Results, target: Target, method: Method) -> str:
    """Say whether what was learned from permuted targets is chance, as it should be."""
    here = target.find(target.metric, **target.base)
    own = [s for s in here if s.model == method.model + PERMUTED]
    own = [s for s in own if Method.of(s).readout == method.readout] or own[:1]
    others = [s for s in here if s.model.endswith(PERMUTED) and s.model.removesuffix(PERMUTED) not in results.models]
    controls = own + others
    if not controls:
        return "Nothing was learned from permuted targets, so it is not known that chance is where it should be."
    values = listed([f"{_permuted_label(results, s)} {number(s)}" for s in controls])
    high = [s for s in controls if s.ci_low is not None and s.ci_low > target.chance]
    unknown = [s for s in controls if s.ci_low is None]
    if high:
        return (
            f"With permuted targets: {values}. That is above {minus(target.chance, 1)}, which is chance: unless luck "
            "explains it, something leaks. Find it before using these numbers."
        )
    meaning = "without intervals it cannot be said whether this is chance" if unknown else "chance, as it should be"
    return f"With permuted targets: {values}: {meaning}."


def _permuted_label(results: Results, score: Score) -> str:
    model = score.model.removesuffix(PERMUTED)
    return Method(model=model, readout=Method.of(score).readout).label(results)


def _other_readouts(target: Target, method: Method) -> str:
    others = [
        (readout, score)
        for readout in target.readouts(method.model)
        if readout != method.readout
        and (score := target.score(Method(model=method.model, readout=readout), **target.base)) is not None
    ]
    if not others:
        return ""
    return f"Other readouts: {listed([f'{readout} {number(score)}' for readout, score in others])}."
