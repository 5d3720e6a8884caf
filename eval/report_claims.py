"""The summary of a report: which claims hold, judged by intervals alone, and what a reader must keep in mind."""

from __future__ import annotations

from dataclasses import replace

from eval.baselines.optimum import MEAN_UNKNOWN
from eval.figures import minus
from eval.report_clinical_claims import clinical_claims, shows_paper_rows
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
from eval.report_verdicts import (
    WHO,
    Claim,
    Verdict,
    compare,
    held_out,
    judge,
    paired_difference,
    untrained_like,
)
from eval.results import Score

FEW_SUBJECTS = 20  # below this a percentile bootstrap over subjects is usually too narrow
ABOVE_OPTIMUM = 0.01  # the optimum is exact up to the centring of the series, see eval.baselines.optimum


def make_claims(results: Results) -> list[Claim]:
    claims: list[Claim | None] = []
    for model in results.models:
        claims += [
            _reconstruction_claim(results, model),
            _training_claim(results, model),
            _forecasting_claim(results, model),
            *clinical_claims(results, model),
            _networks_claim(results, model),
        ]
    return [claim for claim in claims if claim is not None]


def _reconstruction_claim(results: Results, model: str) -> Claim | None:
    base, ratio = reconstruction_base(results), headline_ratio(results)
    here = results.find("reconstruction", "r2", **base, mask_ratio=ratio)
    ours, best = of_model(here, model), strongest(among(here, "baseline"))
    if ours is None or ratio is None:
        return None
    label = results.labels[model]
    parts = [f"{label} reaches R² {number(ours)} with {percent(ratio)} of the tokens hidden ({held_out(ours)})."]
    if (ours.value if ours.ci_high is None else ours.ci_high) < 0:
        parts.append("That is worse than guessing the mean.")
    elif ours.ci_low is not None and ours.ci_low <= 0:
        parts.append("The interval includes 0, which is guessing the mean.")
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = judge(results, ours, best, "Strongest baseline")
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
    ours, theirs = of_model(here, model), untrained_like(here, model)
    if ours is None or theirs is None:
        return None
    verdict, sentence = judge(results, ours, theirs, "The same network without training")
    verdict = replace(verdict, word={"ahead": "yes", "behind": "no"}.get(verdict.word, verdict.word))
    return Claim(
        topic="Does training help?", verdict=verdict, text=f"{results.labels[model]}: {number(ours)}. {sentence}"
    )


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
            f"({held_out(ours)})."
        ]
        if best is not None:
            found, sentence = judge(results, ours, best, "Strongest baseline")
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
        f"{FOLD_PHRASES[hardest]} ({held_out(ours)})."
    ]
    verdict = Verdict(tone="open", word="not judged", reason="")
    if best is not None:
        verdict, sentence = judge(results, ours, best, "Strongest of all other features and controls")
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
    parts = []
    for split in dict.fromkeys(s.split for s in results.scores):
        here = [s for s in results.scores if s.split == split]
        tasks = listed(list(dict.fromkeys(s.task for s in here)))
        subjects, recordings = max(s.num_subjects for s in here), max(s.num_recordings for s in here)
        of = WHO.get(split, f"of the {split} split")
        counts = f"{counted(subjects, 'subject')} ({counted(recordings, 'recording')})"
        parts.append(f"on {tasks}, using {counts} {of}")
    simulated = ", which is simulated," if results.is_simulated else ""
    models = [results.labels[m] for m in results.models]
    who = listed(models) if models else "No checkpoint, only baselines"
    was = "were" if len(models) > 1 else "was"
    return (
        f"{who} {was} scored {listed(parts)} of the data set {results.scores[0].dataset}{simulated} beside "
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
    by_split = {s.split: 0 for s in results.scores}
    for score in results.scores:
        by_split[score.split] = max(by_split[score.split], score.num_subjects)
    subjects = min(by_split.values())
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
        "baselines; a reference baseline was named in advance or chosen on validation people."
    )
    if results.models and (any(s.task == "reconstruction" for s in results.scores) or shows_paper_rows(results)):
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
        found.append(f"The data set carries {counted(count, 'warning')}, listed in the last section.")
    if results.left_out:
        found.append(
            f"{counted(results.left_out, 'record')} of another data set, split or task version: "
            "listed in the last section only."
        )
    return found
