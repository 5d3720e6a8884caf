"""Targets: transforms of the paper, classes, losses in units of the best constant answer, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from brainlm.errors import DataError
from brainlm.targets import Target, TargetSettings, label_of, numbers

AGES = [20.0, 35.0, None, 50.0, 80.0, float("nan"), 44.0]


def fit(values: list[object], **settings: object) -> Target:
    return Target.fit(TargetSettings(column="x", **settings), values)  # type: ignore[arg-type]


def test_z_score_is_of_the_known_values() -> None:
    target = fit(AGES)
    known = np.array([20.0, 35.0, 50.0, 80.0, 44.0])
    np.testing.assert_allclose(target.transformed([50.0]), (50 - known.mean()) / known.std())
    assert target.num_subjects == 5
    wanted, known_mask = target.encode(AGES)
    assert known_mask.tolist() == [True, True, False, True, True, False, True]
    assert wanted[~known_mask].tolist() == [0, 0]
    assert wanted[known_mask].mean() == pytest.approx(0, abs=1e-6)
    assert wanted[known_mask].std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("transform", ["zscore", "minmax", "log1p_minmax", "none"])
def test_answers_come_back_in_original_units(transform: str) -> None:
    values: list[object] = [0.0, 3.0, 17.0, 60.0]
    target = fit(values, transform=transform)
    wanted, _ = target.encode([3.0, 17.0, 100.0])
    assert [target.original(float(u)) for u in wanted] == pytest.approx([3.0, 17.0, 100.0], rel=1e-5)


def test_min_max_transforms_are_the_papers() -> None:
    assert fit([1.0, 3.0, 5.0], transform="minmax").transformed([1, 2, 5]).tolist() == [0, 0.25, 1]
    target = fit([0.0, math.e - 1, math.e**2 - 1], transform="log1p_minmax")
    np.testing.assert_allclose(target.transformed([0, math.e - 1, math.e**2 - 1]), [0, 0.5, 1])


@pytest.mark.parametrize("transform", ["zscore", "minmax", "log1p_minmax", "none"])
def test_the_best_constant_answer_of_a_regression_costs_one(transform: str) -> None:
    values: list[object] = [0.0, 3.0, 17.0, 60.0]
    target = fit(values, transform=transform)
    wanted = torch.from_numpy(target.encode(values)[0])
    assert float(target.loss(torch.zeros(4, 1), wanted).mean()) == pytest.approx(1, rel=1e-5)
    assert float(target.loss(torch.full((4, 1), 0.1), wanted).mean()) > 1


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_the_best_constant_answer_of_a_classification_costs_one(class_weights: str | None) -> None:
    values: list[object] = ["a"] * 6 + ["b"] * 3 + ["c"]
    target = fit(values, kind="classification", class_weights=class_weights)
    wanted = torch.from_numpy(target.encode(values)[0])
    assert float(target.loss(torch.zeros(10, 3), wanted).mean()) == pytest.approx(1, rel=1e-5)
    for other in torch.eye(3):
        assert float(target.loss(0.2 * other.expand(10, 3), wanted).mean()) > 1
    shares = target.answers(torch.zeros(1, 3))[0].tolist()
    assert shares == pytest.approx([1 / 3] * 3 if class_weights else [0.6, 0.3, 0.1])


def test_cross_entropy_is_torchs() -> None:
    values: list[object] = ["a"] * 6 + ["b"] * 3 + ["c"]
    target = fit(values, kind="classification", class_weights="balanced")
    outputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(target.encode(values)[0])
    logits = outputs + torch.tensor(target.shares).log()
    expected = torch.nn.functional.cross_entropy(
        logits, wanted.long(), weight=torch.tensor(target.weights), reduction="none"
    )
    entropy = math.log(3)
    torch.testing.assert_close(target.loss(outputs, wanted), expected / entropy)


@pytest.mark.parametrize(("value", "label"), [(1, "1"), (1.0, "1"), (1.5, "1.5"), ("F ", "F"), (None, ""), ("n/a", "")])
def test_labels(value: object, label: str) -> None:
    assert label_of(value) == label


def test_numbers_may_be_written_as_text() -> None:
    np.testing.assert_array_equal(numbers("x", ["1", " 2.5", "n/a", None, float("inf")]), [1, 2.5] + [np.nan] * 3)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ([None, float("nan")], {}, "target x: all training subjects lack a value"),
        ([2.0, 2.0, None], {}, "target x: constant, all 2 training subjects have 2"),
        ([1.0, "old", "young"], {}, r"found text in 2 of 3 rows \(old, young\).*kind=classification"),
        ([1.0, -2.0], {"transform": "log1p_minmax"}, "needs values above -1, found -2"),
        ([None], {"kind": "classification"}, "all training subjects lack a value"),
        (["F", "F", None], {"kind": "classification"}, "one class, all training subjects are 'F'"),
        (list(range(60)), {"kind": "classification"}, "60 classes among 60 training subjects.*kind=regression"),
    ],
)
def test_what_cannot_be_learned_is_refused(values: list[object], settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(values, **settings)


def test_a_class_that_no_training_subject_has_is_refused() -> None:
    target = fit(["F", "M"], kind="classification")
    with pytest.raises(DataError, match="no training subject is X; classes are F, M"):
        target.encode(["F", "X"])
