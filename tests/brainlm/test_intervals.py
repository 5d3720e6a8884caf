from __future__ import annotations

import numpy as np

from brainlm.intervals import bootstrap_counts, bootstrap_difference, bootstrap_interval, metric_value


def mean(sums):  # type: ignore[no-untyped-def]
    return sums["total"] / sums["n"]


def test_intervals_of_a_mean_cover_it_about_as_often_as_they_say(rng: np.random.Generator) -> None:
    counts = bootstrap_counts(30, 400, seed=0)
    hits = 0
    for _ in range(400):
        sums = {"total": 1 + rng.standard_normal(30), "n": np.ones(30)}
        low, high = bootstrap_interval(sums, mean, counts, 0.95)
        hits += low <= 1 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_a_ratio_of_sums_weights_subjects_by_their_size() -> None:
    sums = {"total": np.array([10.0, 0.0]), "n": np.array([10.0, 90.0])}
    assert metric_value(sums, mean) == 0.1


def test_one_subject_has_no_interval() -> None:
    low, high = bootstrap_interval({"total": np.ones(1), "n": np.ones(1)}, mean, bootstrap_counts(1, 50, 0))
    assert np.isnan(low)
    assert np.isnan(high)


def test_draws_depend_on_seed_and_size_alone() -> None:
    assert (bootstrap_counts(7, 20, 3) == bootstrap_counts(7, 20, 3)).all()
    assert (bootstrap_counts(7, 20, 3) != bootstrap_counts(7, 20, 4)).any()
    assert (bootstrap_counts(7, 20, 3).sum(axis=1) == 7).all()


def test_a_paired_difference_is_narrower_than_its_parts(rng: np.random.Generator) -> None:
    shared = 5 * rng.standard_normal(40)
    ours = {"total": shared + 1 + 0.1 * rng.standard_normal(40), "n": np.ones(40)}
    theirs = {"total": shared, "n": np.ones(40)}
    counts = bootstrap_counts(40, 500, 0)
    low, high = bootstrap_difference(ours, theirs, mean, counts)
    assert 0.9 < low < 1 < high < 1.1
