"""Contrasts of maps: against least squares, scipy and chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from brainlm.errors import DataError
from brainlm.group_contrast import contrast, false_discovery_rate


def least_squares_t(y: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
    """b and t of the first column, by the textbook."""
    b, *_ = np.linalg.lstsq(columns, y, rcond=None)
    rest = y - columns @ b
    variance = rest @ rest / (len(y) - np.linalg.matrix_rank(columns)) * np.linalg.pinv(columns.T @ columns)[0, 0]
    return float(b[0]), float(b[0] / np.sqrt(variance))


def test_t_values_are_those_of_least_squares_with_covariates_and_blocks(rng: np.random.Generator) -> None:
    N = 40
    x, covariates = rng.integers(0, 2, N).astype(float), rng.standard_normal((N, 2))
    blocks = np.repeat(["a", "b", "c", "d"], 10)
    maps = rng.standard_normal((N, 3)) + 0.5 * x[:, None] + covariates @ rng.standard_normal((2, 3))
    found = contrast(maps, x, covariates=covariates, blocks=list(blocks), num_permutations=10)
    dummies = (blocks[:, None] == np.unique(blocks)).astype(float)
    for parcel in range(3):
        b, t = least_squares_t(maps[:, parcel], np.column_stack([x, covariates, dummies]))
        assert found.effect[parcel] == pytest.approx(b)
        assert found.t[parcel] == pytest.approx(t)


def test_p_values_without_covariates_are_those_of_the_exact_permutation_test(rng: np.random.Generator) -> None:
    a, b = rng.standard_normal(5) + 1.0, rng.standard_normal(5)
    exact = stats.permutation_test(
        (a, b), lambda x, y: stats.ttest_ind(x, y).statistic, permutation_type="independent", n_resamples=np.inf
    )
    found = contrast(np.concatenate([a, b])[:, None], [1.0] * 5 + [0.0] * 5, num_permutations=20_000)
    assert found.p[0] == pytest.approx(exact.pvalue, abs=0.015)
    assert found.p_max[0] == found.p[0]  # one parcel
    assert found.t[0] == pytest.approx(stats.ttest_ind(a, b).statistic)


def test_p_values_are_uniform_where_there_is_nothing(rng: np.random.Generator) -> None:
    motion = rng.exponential(size=60)
    x = (motion + rng.exponential(size=60) > 2).astype(float)  # those of one group move more
    maps = rng.exponential(size=(60, 400)) + 2 * motion[:, None]  # skewed, and motion is in all of them
    found = contrast(maps, x, covariates=motion[:, None], num_permutations=400)
    assert stats.kstest(found.p, "uniform").pvalue > 0.001
    assert (found.q > 0.05).mean() > 0.99
    assert contrast(maps, x, num_permutations=200).p.mean() < 0.05  # motion alone, where it is not a covariate


def test_the_largest_of_all_parcels_holds_the_rate_of_any_false_claim(rng: np.random.Generator) -> None:
    x = np.repeat([0.0, 1.0], 10)
    smallest = [
        contrast(rng.standard_normal((20, 30)), x, num_permutations=99, seed=seed).p_max.min() for seed in range(200)
    ]
    assert np.mean(np.array(smallest) <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert np.mean(np.array(smallest) <= 0.5) == pytest.approx(0.5, abs=0.12)


def test_conditions_within_subjects_are_found_whatever_subjects_differ_by(rng: np.random.Generator) -> None:
    subject = np.repeat(np.arange(15), 2)
    task = np.tile([0.0, 1.0], 15)
    maps = 10 * rng.standard_normal(15)[subject, None] + rng.standard_normal((30, 20))
    maps[:, :3] += 2 * task[:, None]
    found = contrast(maps, task, blocks=list(subject), num_permutations=1000)
    assert (found.q[:3] < 0.05).all()
    assert (found.p_max[3:] > 0.05).all()
    np.testing.assert_allclose(found.effect[:3], 2, atol=1.2)
    assert contrast(maps, task, num_permutations=200).p[:3].min() > 0.05  # not without blocks


def test_missing_and_constant_parcels_are_left_out(rng: np.random.Generator) -> None:
    maps = rng.standard_normal((12, 4))
    maps[3, 1], maps[:, 2] = np.nan, 5.0
    x = np.repeat([0.0, 1.0], 6)
    found, whole = (contrast(part, x, num_permutations=50) for part in (maps, maps[:, [0, 3]]))
    assert np.isnan(found.p).tolist() == [False, True, True, False]
    for name in ("effect", "t", "p", "q", "p_max"):
        np.testing.assert_array_equal(getattr(found, name)[[0, 3]], getattr(whole, name))


def test_what_cannot_be_tested_is_said(rng: np.random.Generator) -> None:
    maps, x = rng.standard_normal((8, 2)), np.repeat([0.0, 1.0], 4)
    for message, arguments in (
        ("are the blocks finer than the groups", {"blocks": list(range(8))}),
        ("the covariates tell all of x", {"covariates": 3 - 2 * x[:, None]}),
        ("no degree of freedom", {"covariates": rng.standard_normal((8, 6))}),
        ("8 rows and 3 names", {"blocks": [1, 2, 3]}),
        ("must be finite", {"covariates": np.full((8, 1), np.nan)}),
        ("at least 1", {"num_permutations": 0}),
    ):
        with pytest.raises(DataError, match=message):
            contrast(maps, x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected maps"):
        contrast(maps, x[:5])


def test_false_discovery_rates_are_those_of_scipy(rng: np.random.Generator) -> None:
    p = rng.uniform(size=50) ** 3
    np.testing.assert_allclose(false_discovery_rate(p), stats.false_discovery_control(p))
