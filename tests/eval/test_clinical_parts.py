"""Parts of the clinical task against independent implementations: coordinates, linear models, metrics, folds, tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student_t
from sklearn import metrics as sk
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVR

from brainlm.errors import StoreError
from brainlm.store import Store
from brainlm.targets import Target, TargetSettings
from eval.clinical import metrics
from eval.clinical.answers import Answers
from eval.clinical.comparison_test import resampled_t_p_value
from eval.clinical.coordinates import FeatureCoordinates, GramCoordinates, gram_of, standardised
from eval.clinical.features import centred_gram
from eval.clinical.folds import random_folds, site_folds
from eval.clinical.linear import Linear
from eval.clinical.metrics import Rows
from eval.clinical.problem import Problem, loss
from eval.clinical.scores import share_tested
from eval.clinical.support_vectors import SupportVectors
from eval.clinical.tangent import covariance, tangent_coordinates
from eval.models import MethodSpec
from eval.task import StoredFeatures, Unit, write_features

N, D = 60, 150


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, D)) * np.linspace(0.1, 3, D) + 5


def problem(y: np.ndarray, kind: str = "regression", nuisance: np.ndarray | None = None) -> Problem:
    target = Target.fit(TargetSettings(column="y", kind=kind), list(y[:45]))  # type: ignore[arg-type]
    return Problem(
        target=target,
        train=np.arange(45),
        y=target.encode(list(y[:45]))[0].astype(np.float64),
        groups=np.array([f"g{i // 2}" for i in range(45)]),
        test=np.arange(45, N),
        nuisance=nuisance,
    )


def ridge_on(train: np.ndarray, test: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(Ridge(alpha=3.0).fit(train, y).predict(test))


@pytest.mark.parametrize("num_features", [20, D])
def test_coordinates_give_ridge_the_answers_that_features_give(x: np.ndarray, num_features: int) -> None:
    x = x[:, :num_features]
    asked = problem(x[:, 0] + x[:, 3])
    train, test = standardised(x[asked.train], x[asked.test])
    expected = ridge_on(train, test, asked.y)
    np.testing.assert_allclose(ridge_on(*FeatureCoordinates(x).of(asked), asked.y), expected, atol=1e-9)
    centre = x[asked.train].mean(axis=0)
    expected = ridge_on(x[asked.train] - centre, x[asked.test] - centre, asked.y)
    gram = gram_of(lambda row: x[row], len(x))
    np.testing.assert_allclose(gram, x @ x.T)
    found = GramCoordinates(gram).of(asked)
    np.testing.assert_allclose(ridge_on(*found, asked.y), expected, atol=1e-7)
    products = found[0].T @ found[0]
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-6)
    assert (np.diff(np.diag(products)) <= 1e-6).all()


def test_confounds_are_removed_by_a_regression_on_training_rows_alone(x: np.ndarray, rng: np.random.Generator) -> None:
    confounds = np.column_stack([rng.standard_normal(N), np.arange(N) % 2, 1 - np.arange(N) % 2])  # not of full rank
    asked = problem(x[:, 0], nuisance=confounds)
    model = LinearRegression().fit(confounds[asked.train], x[asked.train])
    train, test = (x[rows] - model.predict(confounds[rows]) for rows in (asked.train, asked.test))
    found = GramCoordinates(x @ x.T).of(asked)
    np.testing.assert_allclose(ridge_on(*found, asked.y), ridge_on(train, test, asked.y), atol=1e-7)
    changed = x.copy()
    changed[asked.test] = rng.standard_normal((len(asked.test), D))
    np.testing.assert_allclose(GramCoordinates(changed @ changed.T).of(asked)[0], found[0], atol=1e-7)


def test_missing_features_and_constant_ones_are_the_mean() -> None:
    train = np.array([[1.0, 7.0, np.nan], [3.0, 7.0, 2.0], [np.nan, 7.0, 4.0]])
    test = np.array([[2.0, 9.0, np.nan]])
    a, b = standardised(train, test)
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a[:, 0], [-1, 1, 0])
    np.testing.assert_array_equal(a[:, 1], 0)
    np.testing.assert_allclose(b[0], [0, 0, 0])


def test_a_linear_model_finds_what_is_linear_and_says_when_there_is_nothing(
    x: np.ndarray, rng: np.random.Generator
) -> None:
    y = x[:, -1] - x[:, -2]
    asked = problem(y)
    answer = Linear(GramCoordinates(x @ x.T)).answer(asked)
    truth = asked.target.encode(list(y[45:]))[0]
    assert loss(asked.target, truth, answer.values) < 0.75
    assert answer.validation_loss < 0.8
    nothing = Linear(GramCoordinates(x @ x.T)).answer(problem(rng.standard_normal(N)))
    assert nothing.validation_loss > 0.9
    assert np.abs(nothing.values).max() < 0.5


def test_ridge_is_that_of_scikit_learn(x: np.ndarray) -> None:
    asked = problem(x[:, -1])
    answer = Linear(FeatureCoordinates(x)).answer(asked)
    train, test = FeatureCoordinates(x).of(asked)
    alpha = float(answer.chosen.removeprefix("penalty ")) * np.square(train).sum(axis=0).mean()
    np.testing.assert_allclose(
        answer.values[:, 0], Ridge(alpha=alpha).fit(train, asked.y).predict(test), rtol=1e-2, atol=1e-3
    )


def test_classes_are_learned_also_where_an_inner_fold_lacks_one(x: np.ndarray) -> None:
    labels = np.where(x[:, -1] + x[:, -2] > 10, "yes", "no").astype(object)
    labels[7] = "rare"
    asked = problem(labels, "classification")
    answer = Linear(GramCoordinates(x @ x.T)).answer(asked)
    assert answer.values.shape == (15, 3)
    np.testing.assert_allclose(answer.values.sum(axis=1), 1)
    yes = list(asked.target.classes).index("yes")
    assert sk.roc_auc_score(labels[45:] == "yes", answer.values[:, yes]) > 0.7


def test_support_vectors_are_those_of_the_kernel_on_features(x: np.ndarray) -> None:
    asked = problem(np.square(x[:, -1] - 5))
    answer = SupportVectors(GramCoordinates(x @ x.T)).answer(asked)
    cost, width = (float(part.split()[1]) for part in answer.chosen.split(", "))
    centred = x - x[asked.train].mean(axis=0)
    directions = np.linalg.svd(centred[asked.train], full_matrices=False)[2]
    centred = centred @ directions.T  # test rows as the training rows can see them
    gamma = width / np.square(centred[asked.train]).sum(axis=1).mean()
    kernel = rbf_kernel(centred, centred[asked.train], gamma=gamma)
    model = SVR(kernel="precomputed", C=cost, epsilon=0.1).fit(kernel[asked.train], asked.y)
    np.testing.assert_allclose(answer.values[:, 0], model.predict(kernel[asked.test]), atol=1e-3)


def test_support_vectors_give_probabilities(x: np.ndarray) -> None:
    labels = np.array([str(int(v)) for v in np.digitize(x[:, -1], [3.5, 6.5])])
    asked = problem(labels, "classification")
    answer = SupportVectors(FeatureCoordinates(x[:, -5:])).answer(asked)
    np.testing.assert_allclose(answer.values.sum(axis=1), 1)
    assert loss(asked.target, asked.target.encode(list(labels[45:]))[0], answer.values) < 0.8
    assert answer.validation_loss < 0.8


def test_tangent_space_is_that_of_nilearn_on_series(rng: np.random.Generator) -> None:
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import LedoitWolf

    mixing = rng.standard_normal((8, 8))
    series = [rng.standard_normal((80, 8)) @ (mixing + 0.2 * rng.standard_normal((8, 8))) for _ in range(20)]
    train, test = np.arange(14), np.arange(14, 20)
    measure = ConnectivityMeasure(
        cov_estimator=LedoitWolf(), kind="tangent", vectorize=True, discard_diagonal=False, standardize=False
    )
    fitted = measure.fit_transform([series[i] for i in train])
    vectors = np.concatenate([fitted, measure.transform([series[i] for i in test])])
    covariances = np.stack([covariance(one) for one in series])
    gram = tangent_coordinates(covariances, train, test).gram
    np.testing.assert_allclose(gram, vectors @ vectors.T, rtol=1e-3, atol=1e-3)


def rows_of(truth: np.ndarray, predicted: np.ndarray, fold: np.ndarray | None = None) -> Rows:
    fold = np.zeros(len(truth), dtype=np.int64) if fold is None else fold
    return Rows(
        fold=fold,
        truth=truth,
        predicted=predicted,
        truth_t=truth,
        predicted_t=predicted if predicted.ndim == 1 else None,
    )


def test_metrics_of_regressions_under_weights_are_those_of_repeated_rows(rng: np.random.Generator) -> None:
    truth = rng.standard_normal(N) + 3
    predicted = 0.5 * truth + rng.standard_normal(N)
    weights = rng.integers(0, 3, (4, N)).astype(np.float64)
    rows = rows_of(truth, predicted)
    for b in range(4):
        again = np.repeat(np.arange(N), weights[b].astype(int))
        y, p = truth[again], predicted[again]
        expected = {
            "r2": sk.r2_score(y, p),
            "pearson_r": np.corrcoef(y, p)[0, 1],
            "mae": sk.mean_absolute_error(y, p),
            "mse_transformed": sk.mean_squared_error(y, p),
            "calibration_slope": np.polyfit(p, y, 1)[0],
        }
        for name, value in expected.items():
            assert metrics.REGRESSION[name](rows, weights)[b] == pytest.approx(value), name


def test_metrics_of_classes_under_weights_are_those_of_scikit_learn(rng: np.random.Generator) -> None:
    truth = rng.integers(0, 3, N).astype(np.float64)
    p = rng.dirichlet([1, 1, 1], N) + 0.3 * (truth[:, None] == np.arange(3))
    p = np.round(p / p.sum(axis=1, keepdims=True), 1)  # with ties
    weights = rng.integers(0, 3, (3, N)).astype(np.float64)
    rows = rows_of(truth, p)
    for b in range(3):
        one_hot = truth[:, None] == np.arange(3)
        aucs = [sk.roc_auc_score(one_hot[:, c], p[:, c], sample_weight=weights[b]) for c in range(3)]
        assert metrics.auc(rows, weights)[b] == pytest.approx(np.mean(aucs))
        expected = sk.balanced_accuracy_score(truth, p.argmax(axis=1), sample_weight=weights[b])
        assert metrics.balanced_accuracy(rows, weights)[b] == pytest.approx(expected)
        brier = np.average(np.square(p - one_hot).sum(axis=1), weights=weights[b])
        assert metrics.brier(rows, weights)[b] == pytest.approx(brier)


def test_areas_and_correlations_compare_within_folds_alone(rng: np.random.Generator) -> None:
    """The constant of each fold is the share of its training rows, which is lower where its own share is higher."""
    fold = np.repeat(np.arange(6), 10)
    truth = (rng.random(60) < 0.5).astype(np.float64)
    share = np.array([truth[fold != k].mean() for k in fold])
    pooled = sk.roc_auc_score(truth, share)
    assert pooled < 0.4
    p = np.column_stack([1 - share, share])
    ones = np.ones((1, 60))
    assert metrics.auc(rows_of(truth, p, fold), ones)[0] == 0.5
    assert np.isnan(metrics.pearson_r(rows_of(truth, share, fold), ones)[0])
    assert np.corrcoef(truth, share)[0, 1] < -0.1


def test_calibration_error_is_zero_for_true_probabilities_and_large_for_wrong_ones(rng: np.random.Generator) -> None:
    p = rng.random(20_000)
    truth = (rng.random(20_000) < p).astype(np.float64)
    ones = np.ones((1, 20_000))
    assert metrics.calibration_error(rows_of(truth, np.column_stack([1 - p, p])), ones)[0] < 0.02
    sharp = np.where(p > 0.5, 0.99, 0.01)
    assert metrics.calibration_error(rows_of(truth, np.column_stack([1 - sharp, sharp])), ones)[0] > 0.2


def test_random_folds_test_every_group_once_a_repeat() -> None:
    groups = [f"g{i // 3}" for i in range(40)]
    folds = random_folds(groups, 5, 2, seed=0)
    assert len(folds) == 10
    for repeat in range(2):
        tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
        assert sorted(tested) == list(range(40))
    for fold in folds:
        assert not {groups[i] for i in fold.train} & {groups[i] for i in fold.test}
    assert [list(f.test) for f in folds[:5]] != [list(f.test) for f in folds[5:]]


def test_a_family_at_two_sites_is_not_learned_from_where_it_is_tested() -> None:
    groups = np.array(["a", "b", "c", "a", "d"])
    folds = site_folds(groups, ["x", "x", "y", "y", ""])
    assert [(f.name, list(f.train), list(f.test)) for f in folds] == [("x", [2, 4], [0, 1]), ("y", [1, 4], [2, 3])]
    assert site_folds(groups, ["x"] * 5) == []


def test_inner_folds_keep_groups_together_and_leave_test_rows_out(x: np.ndarray) -> None:
    asked = problem(x[:, 0])
    for fit, validate in asked.inner():
        assert not {asked.groups[i] for i in fit} & {asked.groups[i] for i in validate}
        inner = asked.within(fit, validate)
        assert not set(inner.train) & set(inner.test)
        assert not set(inner.test) & set(asked.test)


def test_the_resampled_t_test_is_that_of_the_formula() -> None:
    d = np.array([0.1, 0.2, -0.05, 0.15, np.nan])
    known = d[:4]
    statistic = known.mean() / np.sqrt((1 / 4 + 0.25) * known.var(ddof=1))
    assert resampled_t_p_value(d, 0.25) == pytest.approx(2 * student_t.sf(statistic, 3))
    assert resampled_t_p_value(np.zeros(5), 0.25) == 1
    assert np.isnan(resampled_t_p_value(d[:1], 0.25))
    assert np.isnan(resampled_t_p_value(np.full(3, 0.2), 0.25))


def test_folds_of_other_sizes_count_by_what_is_tested_in_them() -> None:
    """Ahead at the large site and behind at small ones: the mean that is tested has the sign of the score."""
    differences = np.array([0.3, *[-0.2 + 0.01 * i for i in range(8)]])
    weights = np.array([400.0, *[20.0] * 8])
    known = differences * weights / weights.mean()
    assert known.mean() == pytest.approx(np.average(differences, weights=weights))
    assert resampled_t_p_value(differences, 0.25, weights) == pytest.approx(resampled_t_p_value(known, 0.25))
    assert resampled_t_p_value(differences, 0.25, weights) > resampled_t_p_value(differences, 0.25)


def test_what_is_missing_is_the_mean_of_the_others(rng: np.random.Generator) -> None:
    values = rng.standard_normal((20, 6)) + 3
    for missing in (0.0, np.nan):
        lacking = values.copy()
        lacking[4, 2] = lacking[7, 5] = missing
        filled = values.copy()
        filled[4, 2], filled[7, 5] = np.delete(values[:, 2], 4).mean(), np.delete(values[:, 5], 7).mean()
        known = np.where([[(i, j) in {(4, 2), (7, 5)} for j in range(6)] for i in range(20)], np.nan, values)
        about = filled - np.nanmean(known, axis=0)
        np.testing.assert_allclose(centred_gram(lacking, np.float64(missing)), about @ about.T, atol=1e-12)


def test_the_resampled_t_test_holds_its_level_where_methods_are_alike(rng: np.random.Generator) -> None:
    """Two ridge models of equally useful halves of the features: told apart in about 5 % of cohorts, not in many."""
    found = []
    for _ in range(60):
        x = rng.standard_normal((50, 20))
        y = x.sum(axis=1) + rng.standard_normal(50)
        differences = []
        for fold in random_folds([str(i) for i in range(50)], 5, 2, seed=0):
            mse = [
                np.square(
                    Ridge(1.0).fit(x[fold.train, half], y[fold.train]).predict(x[fold.test, half]) - y[fold.test]
                ).mean()
                for half in (slice(0, 10), slice(10, 20))
            ]
            differences.append(mse[0] - mse[1])
        found.append(resampled_t_p_value(np.array(differences), 0.25) < 0.05)
    assert np.mean(found) < 0.2


def test_values_are_means_over_repeats_and_draws_are_shared(rng: np.random.Generator) -> None:
    truth = rng.standard_normal(20)
    frame = pd.DataFrame(
        {
            "target": "y", "kind": "regression", "readout": "", "folds": "random", "confounds": "kept",
            "repeat": np.repeat([0, 1], 20), "fold": np.tile(np.arange(20) % 4, 2).astype(str),
            "group": np.tile([f"g{i // 2}" for i in range(20)], 2), "truth": np.tile(truth, 2),
            "predicted": np.tile(truth, 2) + np.repeat([0.5, 1.0], 20), "truth_t": 0.0, "predicted_t": 0.0,
        }
    )  # fmt: skip
    answers = Answers(frame)
    each = [sk.r2_score(truth, truth + shift) for shift in (0.5, 1.0)]
    assert answers.value(metrics.r2) == pytest.approx(np.mean(each))
    drawn = answers.replicates(metrics.r2, 300, seed=0)
    assert drawn.shape == (300,)
    again = answers.replicates(metrics.r2, 300, seed=0)
    np.testing.assert_array_equal(drawn, again)
    by_fold = answers.by_fold
    assert by_fold["value"].mean() == pytest.approx(np.mean(each))


def test_classes_of_a_logistic_model_have_the_probabilities_of_scikit_learn(x: np.ndarray) -> None:
    labels = np.where(x[:, -1] > 5, "b", "a")
    asked = problem(labels, "classification")
    answer = Linear(FeatureCoordinates(x[:, -4:])).answer(asked)
    train, test = FeatureCoordinates(x[:, -4:]).of(asked)
    unit = np.sqrt(np.square(train).mean())
    penalty = float(answer.chosen.removeprefix("penalty "))
    model = LogisticRegression(C=1 / (penalty * 45), max_iter=2000, tol=1e-6).fit(train / unit, asked.y)
    np.testing.assert_allclose(answer.values, model.predict_proba(test / unit), atol=1e-4)


def test_tested_over_trained_rows_is_the_mean_over_folds_of_a_condition() -> None:
    fits = pd.DataFrame(
        {
            "target": "age",
            "readout": "",
            "folds": "random",
            "confounds": ["kept", "kept", "removed"],
            "num_test": [10, 30, 5],
            "num_train": [40, 60, 1],
        }
    )
    assert share_tested(fits, ("age", "", "random", "kept")) == pytest.approx((0.25 + 0.5) / 2)


def test_features_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    unit = Unit(task="t", spec=MethodSpec(name="m", kind="baseline", model_hash="1"), key="k", is_preparation=True)
    written = {"a": np.arange(6.0).reshape(3, 2), "b": np.ones(3)}
    write_features(store, unit, written)
    found = StoredFeatures(store, unit)
    assert list(found) == ["a", "b"]
    assert len(found) == 2
    assert isinstance(found["a"], np.memmap)
    np.testing.assert_array_equal(found["a"], written["a"])
    with pytest.raises(KeyError):
        found["c"]
    (tmp_path / f"{unit.stem}.b.npy").write_bytes(b"half")
    with pytest.raises(StoreError, match="is damaged; remove these files"):
        found["b"]
    elsewhere = Store("memory://features")
    write_features(elsewhere, unit, written)
    np.testing.assert_array_equal(StoredFeatures(elsewhere, unit)["a"], written["a"])
