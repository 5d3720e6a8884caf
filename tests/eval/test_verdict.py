"""Claims are judged by the numbers, and a claim that does not hold is said to have failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from brainlm.store import Store
from eval.results import ModelKind, Score, write_scores
from eval.verdict import main


def score(model: str, kind: ModelKind, value: float, **condition: Any) -> Score:
    return Score(
        task="networks", version=1, dataset="d", dataset_hash="h", split="test", model=model, model_kind=kind,
        model_hash="m", metric="accuracy", value=value, ci_low=value - 0.1, ci_high=value + 0.1, num_subjects=5,
        num_recordings=5, condition=condition, statistics_from="cohort",
    )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    scores = [
        score("ours", "brainlm", 0.6, folds="random", part="encoder"),
        score("ours", "brainlm", 0.3, folds="blocked", part="encoder"),
        score("place", "control", 0.4, folds="random"),
        score("place", "control", 0.35, folds="blocked"),
    ]
    write_scores(Store(tmp_path), scores)
    return tmp_path


def judge(results: Path, **claim: Any) -> int:
    tree = {"results": str(results), "claims": [{"name": "c", "task": "networks", "metric": "accuracy", **claim}]}
    config = results / "verdict.yaml"
    config.write_text(yaml.safe_dump(tree))
    return main(["--config", str(config)])


def test_a_claim_that_holds_leaves_a_verdict(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert judge(results, conditions=[{"folds": "random", "part": "encoder"}], at_least=0.5, above=["place"]) == 0
    assert (results / "verdict.json").is_file()
    assert "0.600 [0.500, 0.700], needed 0.5, above place 0.400" in caplog.text


def test_one_failing_condition_fails_the_claim_and_removes_an_older_verdict(
    results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    both = [{"folds": "random", "part": "encoder"}, {"folds": "blocked", "part": "encoder"}]
    assert judge(results, conditions=both[:1], above=["place"]) == 0
    assert judge(results, conditions=both, above=["place"]) == 1
    assert not (results / "verdict.json").exists()
    assert "NOT above place 0.350" in caplog.text


def test_a_score_below_its_threshold_fails(results: Path) -> None:
    assert judge(results, conditions=[{"folds": "random", "part": "encoder"}], at_least=0.61) == 1


def test_a_claim_about_scores_that_are_not_there_is_an_error(results: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert judge(results, conditions=[{"folds": "mirrored"}], at_least=0.1) == 1
    assert "expected one trained model's score" in caplog.text


def test_no_results_is_an_error_that_says_what_to_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert judge(tmp_path, conditions=[{}], at_least=0.1) == 1
    assert "run eval/run.py first" in caplog.text
