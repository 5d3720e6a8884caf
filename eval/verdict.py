"""Say whether results are as they must be: stated claims are checked against results.json.

    python eval/verdict.py --config eval/configs/demo_verdict.yaml

Prints each claim with the scores it rests on, and leaves verdict.json in the results folder if all of them hold. The
exit status is 0 only then.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from brainlm.config import Section, load_config, parse_entry_args
from brainlm.errors import BrainLMError, ConfigError, DataError
from brainlm.store import Store
from eval.results import FILE_NAME, Score, read_scores

logger = logging.getLogger("verdict")


@dataclass(frozen=True, kw_only=True)
class Claim(Section):
    """What must hold of the trained model's score for each of some conditions."""

    name: str
    task: str
    metric: str
    conditions: tuple[dict[str, Any], ...]
    """Each one picks the scores whose condition has these entries."""
    at_least: float | None = None
    above: tuple[str, ...] = ()
    """Models that the score must be above, in the same condition (entries they do not have are left out)."""
    beside: dict[str, str] = field(default_factory=dict)
    """Models shown next to it, with the words to show them by."""

    def __post_init__(self) -> None:
        if self.at_least is None and not self.above:
            raise ConfigError(f"claim {self.name!r}: give at_least, above, or both")


@dataclass(frozen=True, kw_only=True)
class VerdictSettings(Section):
    results: str
    """Folder that eval/run.py wrote."""
    claims: tuple[Claim, ...]


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = load_config(VerdictSettings, args.config, args.overrides)
        if args.dry_run:
            for claim in settings.claims:
                print(claim)
            return 0
        return judge(settings)
    except BrainLMError as error:
        logger.error("verdict: %s", error)
        return 1


def judge(settings: VerdictSettings) -> int:
    """Print every claim, and return 0 if all hold."""
    store = Store(settings.results)
    if not store.exists(FILE_NAME):
        raise DataError(f"{settings.results} has no {FILE_NAME}: run eval/run.py first")
    store.remove("verdict.json")
    scores = read_scores(store)
    held: dict[str, bool] = {}
    for claim in settings.claims:
        lines, holds = check(claim, scores)
        held[claim.name] = holds
        logger.info("%s  %s", "holds " if holds else "FAILED", claim.name)
        for line in lines:
            logger.info("        %s", line)
    logger.info("report: %s", store.url_of("report.html"))
    failed = [name for name, holds in held.items() if not holds]
    if failed:
        logger.error("verdict: FAILED: %s", "; ".join(failed))
        return 1
    store.write_json("verdict.json", {"claims": held})
    return 0


def check(claim: Claim, scores: list[Score]) -> tuple[list[str], bool]:
    """Return what is shown of a claim, a line a condition, and whether it holds in all of them."""
    lines, holds = [], True
    for condition in claim.conditions:
        ours = [s for s in scores if s.model_kind == "brainlm" and _matches(s, claim, condition)]
        if len(ours) != 1:
            raise DataError(
                f"claim {claim.name!r}: expected one trained model's score with {condition}, found {len(ours)}"
            )
        score = ours[0]
        passed = claim.at_least is None or score.value >= claim.at_least
        parts = [f"{_words(condition)}: {_value(score)}"]
        if claim.at_least is not None:
            parts.append(f"needed {claim.at_least:g}")
        for name in claim.above:
            other = _of_model(name, claim, condition, scores)
            passed &= score.value > other.value
            parts.append(
                f"above {name} {other.value:.3f}" if score.value > other.value else f"NOT above {name} {_value(other)}"
            )
        for name, words in claim.beside.items():
            parts.append(f"{words} {_of_model(name, claim, condition, scores).value:.3f}")
        lines.append(", ".join(parts))
        holds &= passed
    return lines, holds


def _matches(score: Score, claim: Claim, condition: dict[str, Any]) -> bool:
    same = score.task == claim.task and score.metric == claim.metric
    return same and all(score.condition.get(key) == value for key, value in condition.items())


def _of_model(name: str, claim: Claim, condition: dict[str, Any], scores: list[Score]) -> Score:
    named = [s for s in scores if s.model == name and s.task == claim.task and s.metric == claim.metric]
    shared = {key: value for key, value in condition.items() if any(key in s.condition for s in named)}
    found = [s for s in named if _matches(s, claim, shared)]
    if len(found) != 1:
        raise DataError(f"claim {claim.name!r}: expected one score of {name!r} with {shared}, found {len(found)}")
    return found[0]


def _value(score: Score) -> str:
    if score.ci_low is None or score.ci_high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"


def _words(condition: dict[str, Any]) -> str:
    known = {
        "mask_ratio": lambda v: f"{v:.0%} hidden",
        "folds": lambda v: f"{v} folds",
        "part": lambda v: f"{v} attention",
    }
    return ", ".join(known[k](v) for k, v in condition.items() if k in known)


if __name__ == "__main__":
    sys.exit(main())
