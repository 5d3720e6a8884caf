"""Metrics of predictions against scikit-learn, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn

from brainlm import metrics


def test_metrics_of_a_regression_are_those_of_scikit_learn(rng: np.random.Generator) -> None:
    truth = rng.standard_normal(40)
    predicted = 0.3 * truth + rng.standard_normal(40)
    assert metrics.r2(truth, predicted) == pytest.approx(sklearn.r2_score(truth, predicted))
    assert metrics.mse(truth, predicted) == pytest.approx(sklearn.mean_squared_error(truth, predicted))
    assert metrics.mae(truth, predicted) == pytest.approx(sklearn.mean_absolute_error(truth, predicted))
    assert metrics.pearson_r(truth, predicted) == pytest.approx(np.corrcoef(truth, predicted)[0, 1])


@pytest.mark.parametrize("num_classes", [2, 4])
def test_metrics_of_a_classification_are_those_of_scikit_learn(num_classes: int, rng: np.random.Generator) -> None:
    classes = rng.integers(0, num_classes, 60)
    p = rng.dirichlet(np.ones(num_classes), 60).round(1) + 1e-3  # with ties
    p /= p.sum(axis=1, keepdims=True)
    guess = p.argmax(axis=1)
    scored = p[:, 1] if num_classes == 2 else p
    assert metrics.macro_auc(classes, p) == pytest.approx(sklearn.roc_auc_score(classes, scored, multi_class="ovr"))
    assert metrics.accuracy(classes, p) == pytest.approx(sklearn.accuracy_score(classes, guess))
    assert metrics.balanced_accuracy(classes, p) == pytest.approx(sklearn.balanced_accuracy_score(classes, guess))


def test_what_is_not_defined_is_nan() -> None:
    one = np.array([1.0])
    assert np.isnan(metrics.r2(one, one))
    assert np.isnan(metrics.pearson_r(one, one))
    assert np.isnan(metrics.auc(np.array([True, True]), np.array([0.1, 0.2])))
    assert np.isnan(metrics.mse(np.array([]), np.array([])))


def test_intervals_resample_groups(rng: np.random.Generator) -> None:
    truth = rng.standard_normal(50).repeat(4)
    predicted = truth + rng.standard_normal(50).repeat(4)
    groups = [str(i) for i in range(50) for _ in range(4)]
    together = metrics.with_interval(metrics.mse, truth, predicted, groups)
    alone = metrics.with_interval(metrics.mse, truth, predicted, [str(i) for i in range(200)])
    assert (together.num, together.num_groups, alone.num_groups) == (200, 50, 200)
    assert together.low < together.value < together.high
    assert together.high - together.low > 1.5 * (alone.high - alone.low)  # copies are no evidence
    error = (predicted - truth)[::4] ** 2
    assert (together.high - together.low) / 2 == pytest.approx(1.96 * error.std() / np.sqrt(50), rel=0.25)


def test_an_interval_needs_two_groups() -> None:
    found = metrics.with_interval(metrics.mae, np.array([1.0, 2.0]), np.array([1.0, 1.0]), ["a", "a"])
    assert found.value == 0.5
    assert np.isnan([found.low, found.high]).all()
