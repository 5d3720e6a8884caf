"""What a comparison of two results folders finds: one typed record a score, and what was left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.difference_interval import INTERVALS, Pairing
from eval.model_pairs import ModelPair
from eval.results import ConditionValue
from eval.results_folder import ResultsFolder
from eval.run_differences import RunDifference


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """One score of two folders.

    Parameters
    ----------
    difference : float
        B - A.
    ci_low, ci_high
        Of the difference; None where there is no interval, and `notes` say why.
    interval : {"paired", "unpaired", "none"}
        ``paired``: both were resampled together; ``unpaired``: each by itself, because the data are not the same.
    excludes_zero : bool
        The interval does not hold 0.
    notes : tuple of str
        Those of both scores, those of one of them after ``A:`` or ``B:``, and what the comparison has to say.
    """

    task: str
    version: int
    metric: str
    condition: dict[str, ConditionValue]
    model_a: str
    model_b: str
    model_hash_a: str
    model_hash_b: str
    value_a: float
    value_b: float
    difference: float
    ci_low: float | None
    ci_high: float | None
    interval: Pairing
    excludes_zero: bool
    num_subjects_a: int
    num_subjects_b: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Scores that only one folder has, counted."""

    folder: Literal["A", "B"]
    task: str
    model: str
    num_scores: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Two results folders, which models were put together, and everything that was found."""

    a: ResultsFolder
    b: ResultsFolder
    pairs: Sequence[ModelPair]
    scores: Sequence[ScoreDifference]
    unmatched: Sequence[Unmatched]
    differences: Sequence[RunDifference]

    def to_json(self) -> dict[str, Any]:
        folders = {
            side: {"results": folder.store.url, "dataset_hash": folder.dataset_hash, "split": folder.split}
            for side, folder in (("a", self.a), ("b", self.b))
        }
        return {
            **folders,
            "intervals": dataclasses.asdict(INTERVALS),
            "models": [dataclasses.asdict(pair) for pair in self.pairs],
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
            "unmatched": [dataclasses.asdict(left) for left in self.unmatched],
            "scores": [score.to_json() for score in self.scores],
        }
