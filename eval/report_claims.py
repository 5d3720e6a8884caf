"""The summary of a report: which claims hold, judged by intervals alone, and what a reader must keep in mind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eval.baselines.optimum import MEAN_UNKNOWN
from eval.figures import minus
from eval.report_input import (
    FOLD_PHRASES,
    Results,
    among,
    as_list,
    condition_groups,
    counted,
    headline_ratio,
    listed,
    network_level,
    number,
    of_model,
    percent,
    position_alone,
    reconstruction_base,
    strongest,
)
from eval.results import Score

FEW_SUBJECTS = 20  # below this a percentile bootstrap over subjects is usually too narrow
ABOVE_OPTIMUM = 0.01  # the optimum is exact up to the centring of the series, see eval.baselines.optimum
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


def make_claims(results: Results) -> list[Claim]:
    claims = []
    for model in results.models:
        for make in (_reconstruction_claim, _training_claim, _forecasting_claim, _networks_claim):
            claim = make(results, model)
            if claim is not None:
                claims.append(claim)
    return claims


def _held_out(score: Score) -> str:
    seen = any("trained on" in note or "seen" in note for note in score.notes)
    held_out = "held-out " if score.split in ("val", "test") and not seen else ""
    return counted(score.num_subjects, f"{held_out}subject")


def _sentence(results: Results, ours: Score, theirs: Score, what: str) -> tuple[Verdict, str]:
    verdict = compare(ours, theirs, paired_difference(results, ours, theirs))
    label = results.labels[ours.model]
    start = {
        "ahead": f"{label} is ahead",
        "behind": f"{label} is behind",
        "no clear difference": "No clear difference",
        "not judged": "Not judged",
    }[verdict.word]
    return verdict, f"{what}: {results.labels[theirs.model]}, {number(theirs)}. {start}: {verdict.reason}."


def _reconstruction_claim(results: Results, model: str) -> Claim | None:
    base, ratio = reconstruction_base(results), headline_ratio(results)
    here = results.find("reconstruction", "r2", **base, mask_ratio=ratio)
    ours, best = of_model(here, model), strongest(among(here, "baseline"))
    if ours is None or ratio is None:
        return None
    label = results.labels[model]
    parts = [f"{label} reaches R² {number(ours)} with {percent(ratio)} of the tokens hidden ({_held_out(ours)})."]
    if ours.value < 0:
        parts.append("That is worse than guessing the mean.")
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = _sentence(results, ours, best, "Strongest baseline")
        parts.append(sentence)
    optimum = strongest(among(here, "optimum"))
    details = []
    if optimum is not None:
        share = f", of which {label} reaches {percent(round(ours.value / optimum.value, 2))}"
        details.append(
            f"Exact optimum (Kalman): {number(optimum)}{share if min(ours.value, optimum.value) > 0 else ''}."
        )
    others: dict[str, list[str]] = {}
    for other in sorted(
        {s.condition.get("mask_ratio") for s in results.find("reconstruction", "r2", **base)} - {ratio}
    ):  # type: ignore[type-var]
        at = results.find("reconstruction", "r2", **base, mask_ratio=other)
        mine, rival = of_model(at, model), strongest(among(at, "baseline"))
        if mine is not None and rival is not None:
            word = compare(mine, rival, paired_difference(results, mine, rival)).word
            others.setdefault(word, []).append(percent(float(other)))  # type: ignore[arg-type]
    if others:
        words = "; ".join(f"{word} at {listed(at_ratios)}" for word, at_ratios in others.items())
        details.append(f"Other mask ratios, each against its strongest baseline: {words}.")
    if base.get("centring") == "recording":
        free = results.find("reconstruction", "r2", **{**base, "centring": "visible"}, mask_ratio=ratio)
        mine, rival = of_model(free, model), strongest(among(free, "baseline"))
        if mine is not None:
            against = ""
            if rival is not None:
                word = compare(mine, rival, paired_difference(results, mine, rival)).word
                against = f" against {number(rival)} of the strongest baseline, {results.labels[rival.model]}: {word}"
            details.append(f"Centred on visible values only (leak-free): {number(mine)}{against}.")
    return Claim(topic="Reconstruction", verdict=verdict, text=" ".join(parts), details=tuple(details))


def _training_claim(results: Results, model: str) -> Claim | None:
    here = results.find("reconstruction", "r2", **reconstruction_base(results), mask_ratio=headline_ratio(results))
    ours, theirs = of_model(here, model), _untrained_like(here, model)
    if ours is None or theirs is None:
        return None
    verdict, sentence = _sentence(results, ours, theirs, "The same network without training")
    verdict = replace(verdict, word={"ahead": "yes", "behind": "no"}.get(verdict.word, verdict.word))
    return Claim(
        topic="Does training help?", verdict=verdict, text=f"{results.labels[model]}: {number(ours)}. {sentence}"
    )


def _untrained_like(scores: Sequence[Score], model: str) -> Score | None:
    untrained = among(scores, "untrained")
    named = [score for score in untrained if model in score.model]
    return named[0] if named else untrained[0] if len(untrained) == 1 else None


def _forecasting_claim(results: Results, model: str) -> Claim | None:
    everything = results.find("forecasting", "r2")
    groups = condition_groups(everything, "horizon")
    horizons = sorted({int(s.condition["horizon"]) for s in everything if "horizon" in s.condition})
    if not groups or not horizons:
        return None
    told, verdict = [], None
    for horizon in horizons:
        here = results.find("forecasting", "r2", **groups[0], horizon=horizon)
        ours, best = of_model(here, model), strongest(among(here, "baseline"))
        if ours is None:
            continue
        seconds = f" ({horizon * results.tr_s:g} s)" if results.tr_s else ""
        parts = [
            f"Over the next {horizon} timepoints{seconds}, {results.labels[model]} reaches R² {number(ours)} "
            f"({_held_out(ours)})."
        ]
        if best is not None:
            found, sentence = _sentence(results, ours, best, "Strongest baseline")
            verdict = verdict or found
            parts.append(sentence)
        optima = among(here, "optimum")
        optimum = of_model(optima, MEAN_UNKNOWN) or strongest(optima)
        if optimum is not None:
            label = results.labels[optimum.model]
            parts.append(f"{label[0].upper()}{label[1:]}: {number(optimum)}.")
        told.append(" ".join(parts))
    if not told:
        return None
    verdict = verdict or Verdict(tone="open", word="not judged", reason="")
    return Claim(topic="Forecasting", verdict=verdict, text=told[0], details=tuple(told[1:]))


def _networks_claim(results: Results, model: str) -> Claim | None:
    level = network_level(results)
    kinds = [k for k in ("blocked", "mirrored", "random") if results.find("networks", "accuracy", level=level, folds=k)]
    if not kinds:
        return None
    hardest = kinds[0]
    here = results.find("networks", "accuracy", level=level, folds=hardest)
    mine = [s for s in here if s.model == model]
    ours = next((s for s in mine if s.condition.get("part") == "encoder"), mine[0] if mine else None)
    if ours is None:
        return None
    best = strongest(_comparable(here, ours))
    part = f" ({ours.condition['part']})" if "part" in ours.condition else ""
    parts = [
        f"Attention of {results.labels[model]}{part} names the network of a parcel with accuracy {number(ours)}, "
        f"{FOLD_PHRASES[hardest]} ({_held_out(ours)})."
    ]
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = _sentence(results, ours, best, "Strongest of all other features and controls")
        parts.append(sentence)
    details = []
    place = position_alone(here)
    if place is not None:
        text = f"Position alone reaches {number(place)}"
        if "random" in kinds[1:]:
            easy = results.find("networks", "accuracy", level=level, folds="random")
            position = position_alone(easy)
            attention = next(
                (s for s in easy if s.model == model and s.condition.get("part") == ours.condition.get("part")), None
            )
            if position is not None and attention is not None:
                text += (
                    f"; with random folds, the paper's, position alone reaches {number(position)} "
                    f"and attention {number(attention)}"
                )
        details.append(text + ".")
    details += [_other_part(results, here, other) for other in mine if other is not ours]
    return Claim(topic="Functional networks", verdict=verdict, text=" ".join(parts), details=tuple(details))


def _comparable(here: list[Score], ours: Score) -> list[Score]:
    """Pick features and controls to hold a score against: encoder attention against encoder attention, not decoder."""
    part = ours.condition.get("part")
    return [
        s
        for s in here
        if s.model_kind in ("baseline", "control", "untrained") and s.condition.get("part", part) == part
    ]


def _other_part(results: Results, here: list[Score], other: Score) -> str:
    """Say what attention of the other part reaches beside its own controls."""
    same = [s for s in _comparable(here, other) if "part" in s.condition]
    beside = "; ".join(f"{results.labels[s.model]} {number(s)}" for s in same)
    text = f"{str(other.condition.get('part', 'other')).capitalize()} attention: {number(other)}"
    if beside:
        text += f" (controls: {beside})"
    permuted = [s for s in same if "permuted" in s.model and s.value >= other.value - 0.05]
    if permuted:
        text += (
            ". It finds the networks on series permuted across parcels too, so it shows what the weights know about "
            "the parcels of this atlas, not what is in a recording"
        )
    return text + "."


def lead(results: Results) -> str:
    """Say in two sentences what was run on what."""
    first = results.scores[0]
    subjects = max(s.num_subjects for s in results.scores)
    recordings = max(s.num_recordings for s in results.scores)
    tasks = listed(list(dict.fromkeys(s.task for s in results.scores)))
    simulated = ", which is simulated," if results.is_simulated else ""
    models = [results.labels[m] for m in results.models]
    who = listed(models) if models else "No checkpoint, only baselines"
    was = "were" if len(models) > 1 else "was"
    return (
        f"{who} {was} scored on {tasks}, using {counted(subjects, 'subject')} ({counted(recordings, 'recording')}) of "
        f"the {first.split} split of the data set {first.dataset}{simulated} beside "
        f"{counted(len({s.model for s in results.scores if s.model_kind != 'brainlm'}), 'baseline or control')}."
    ).replace("baseline or controls", "baselines and controls")


def caveats(results: Results) -> list[str]:
    """Say what a reader of the summary must keep in mind."""
    found = []
    if any(score.metric == "r2" for score in results.scores):
        found.append(
            "R² is the share of the variance of unseen values that is predicted: 1 is perfect, 0 is guessing the mean, "
            "and below 0 is worse than that."
        )
    if results.is_simulated:
        found.append(
            "The data are simulated: the exact optimum is known, and nothing here is evidence about real brains."
        )
    subjects = max(s.num_subjects for s in results.scores)
    if subjects < 2:
        found.append("There is one subject: no interval can be given, and nothing can be said about other people.")
    elif subjects < FEW_SUBJECTS:
        found.append(
            f"{counted(subjects, 'subject')} are few: intervals from a bootstrap over so few people are usually too "
            "narrow."
        )
    found.append(
        f"Intervals are {results.level_text} percentile bootstraps over subjects, not corrected for the number of "
        "comparisons. The strongest baseline is the one that scored best on these same subjects, which favours the "
        "baselines."
    )
    if results.models and any(s.task == "reconstruction" for s in results.scores):
        found.append(
            "The paper's numbers (grey rows) come from other data and are there for orientation, not for comparison."
        )
    for task in ("reconstruction", "forecasting"):
        for optimum in among(results.find(task, "r2"), "optimum"):
            for score in among(results.find(task, "r2", **optimum.condition), "brainlm", "baseline"):
                if score.value > optimum.value + ABOVE_OPTIMUM:
                    found.append(
                        f"{results.labels[score.model]} scores above the exact optimum in {task} ({minus(score.value)} "
                        f"against {minus(optimum.value)}). That is impossible without a leak or a fault: find it "
                        "before using any number."
                    )
    notes = {note for s in results.scores if s.model_kind == "brainlm" for note in s.notes if "interval" not in note}
    notes |= results.common_notes | set(as_list(results.run.get("warnings")))
    found += sorted(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in notes)
    count = len(as_list(results.dataset.get("warnings")))
    if count:
        found.append(f"The data set carries {counted(count, 'warning')}, listed in section 8.")
    if results.left_out:
        found.append(
            f"{counted(results.left_out, 'record')} of another data set, split or task version: "
            "listed in section 8 only."
        )
    return found
