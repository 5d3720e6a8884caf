from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from brainlm.errors import DataError
from brainlm.store import Store
from eval.results import FILE_NAME, Score, read_scores, write_scores

SCORE = Score(
    task="reconstruction",
    version=1,
    dataset="demo",
    dataset_hash="abc",
    split="test",
    model="gaussian",
    model_kind="baseline",
    model_hash="gaussian v1",
    metric="r2",
    value=0.5,
    ci_low=0.4,
    ci_high=0.6,
    num_subjects=5,
    num_recordings=6,
    condition={"mask_ratio": 0.5, "centring": "recording", "horizon": 20},
    statistics_from="cohort",
    notes=("a note",),
)


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    scores = [SCORE, replace(SCORE, ci_low=None, ci_high=None, notes=())]
    write_scores(store, scores)
    assert read_scores(store) == scores


@pytest.mark.parametrize(
    "change",
    [
        {"value": float("nan")},
        {"ci_low": 0.7},
        {"ci_low": None},
        {"model_kind": "oracle"},
        {"statistics_from": "nowhere"},
        {"version": 0},
    ],
)
def test_a_score_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        replace(SCORE, **change)  # type: ignore[arg-type]


def test_unknown_and_missing_keys_are_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tree = SCORE.to_json()
    store.write_json(FILE_NAME, [{**tree, "q_value": 0.01}])
    with pytest.raises(DataError, match="q_value"):
        read_scores(store)
    del tree["metric"]
    store.write_json(FILE_NAME, [tree])
    with pytest.raises(DataError, match="metric"):
        read_scores(store)


def test_records_from_before_there_were_p_values_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tree = SCORE.to_json()
    del tree["p_value"], tree["p_corrected"]
    store.write_json(FILE_NAME, [tree])
    assert read_scores(store) == [SCORE]
