"""P values against scipy's randomisation test, against known distributions, and Holm's worked example."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import permutation_test

from brainlm.significance import holm, paired_p_value

Sums = Mapping[str, NDArray[np.float64]]


def mean(sums: Sums) -> NDArray[np.float64]:
    return sums["total"] / sums["n"]


def r2(sums: Sums) -> NDArray[np.float64]:
    return 1 - sums["sse"] / sums["sst"]


def sums_of(values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"total": values, "n": np.ones(len(values))}


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_exact_p_values_are_those_of_scipy(rng: np.random.Generator, shift: float) -> None:
    a, b = rng.normal(size=10) + shift, rng.normal(size=10)
    theirs = permutation_test(
        (a, b), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired_p_value(sums_of(a), sums_of(b), mean, 2000, 0) == pytest.approx(theirs.pvalue)


def test_random_exchanges_agree_with_all_of_them(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=14) + 0.6, rng.normal(size=14)
    exact = paired_p_value(sums_of(a), sums_of(b), mean, 2**14, 0)
    drawn = paired_p_value(sums_of(a), sums_of(b), mean, 2**14 - 1, 0)
    assert 0.001 < exact < 0.5
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact / 2**14))


def test_a_ratio_of_sums_is_tested_as_such(rng: np.random.Generator) -> None:
    """With equal denominators, the difference of two R2 is a mean difference of squared errors."""
    sst = rng.uniform(1, 100, size=9)
    ours, theirs = rng.uniform(0.2, 0.9, size=9) * sst, rng.uniform(0.4, 1.0, size=9) * sst
    by_ratio = paired_p_value({"sse": ours, "sst": sst}, {"sse": theirs, "sst": sst}, r2, 1000, 0)
    assert by_ratio == pytest.approx(paired_p_value(sums_of(ours), sums_of(theirs), mean, 1000, 0))


def test_without_a_difference_p_values_are_uniform(rng: np.random.Generator) -> None:
    found = np.array(
        [paired_p_value(*(sums_of(rng.standard_t(3, size=12)) for _ in range(2)), mean, 300, i) for i in range(400)]
    )
    for level in (0.05, 0.2, 0.5):
        assert (found <= level).mean() == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 400))


def test_equal_methods_and_single_units() -> None:
    same = sums_of(np.arange(6.0))
    assert paired_p_value(same, same, mean, 1000, 0) == 1.0
    assert np.isnan(paired_p_value(sums_of(np.ones(1)), sums_of(np.zeros(1)), mean, 1000, 0))


def test_few_subjects_cannot_give_a_small_p_value() -> None:
    assert paired_p_value(sums_of(np.full(5, 9.0)), sums_of(np.zeros(5)), mean, 1000, 0) == 2 / 2**5


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
