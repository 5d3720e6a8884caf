from __future__ import annotations

import numpy as np
import pytest

from eval.neighbours import FOLD_KINDS, classify, majority, make_folds, vote


def test_the_majority_wins_and_ties_go_to_the_nearest() -> None:
    distance = np.array([[1.0, 2.0, 3.0, 4.0]])
    labels = np.array([1, 0, 0, 1])
    assert vote(distance, labels, 2, [1, 2, 3, 4]).ravel().tolist() == [1, 1, 0, 1]


def test_more_neighbours_than_there_are_means_all_of_them() -> None:
    assert vote(np.array([[1.0, 2.0, 3.0]]), np.array([1, 0, 0]), 2, [99]).ravel().tolist() == [0]


def test_a_parcel_is_never_its_own_neighbour(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 200)
    distance = 1 - np.eye(200)  # knows nothing but itself
    folds = np.arange(200) % 5
    accuracy = (classify(distance, labels, folds, 2, (1, 3)) == labels).mean()
    assert accuracy < 0.75


def test_clusters_are_found_and_k_is_chosen_among_training_parcels(rng: np.random.Generator) -> None:
    labels = np.repeat([0, 1, 2], 20)
    points = labels[:, None] * 5 + rng.standard_normal((60, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    folds = rng.integers(0, 5, 60)
    assert (classify(distance, labels, folds, 3, (1, 5, 55)) == labels).mean() > 0.95


def test_the_majority_class_comes_from_the_other_folds() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    assert majority(labels, np.array([0, 0, 1, 1, 1])).tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", FOLD_KINDS)
def test_every_fold_holds_about_a_fifth_and_depends_on_the_seed_alone(kind, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    coords = rng.uniform(-60, 60, (100, 3)).astype(np.float32)
    folds = make_folds(kind, coords, 5, 20, seed=1)
    assert set(folds) == set(range(5))
    assert np.bincount(folds).min() >= 10
    assert (folds == make_folds(kind, coords, 5, 20, seed=1)).all()


def test_mirrored_folds_keep_pairs_together(rng: np.random.Generator) -> None:
    right = rng.uniform((5, -90, -40), (65, 65, 70), (40, 3))
    coords = np.concatenate([right, right * (-1, 1, 1)]).astype(np.float32)
    folds = make_folds("mirrored", coords, 5, 10, seed=0)
    assert (folds[:40] == folds[40:]).all()
    random = make_folds("random", coords, 5, 10, seed=0)
    assert (random[:40] != random[40:]).any()


def test_blocked_folds_separate_neighbours_less_than_random_ones(rng: np.random.Generator) -> None:
    coords = rng.uniform(-60, 60, (200, 3)).astype(np.float32)
    distance = np.linalg.norm(coords[:, None] - coords[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    together = {kind: (f := make_folds(kind, coords, 5, 10, 0))[nearest] == f for kind in ("blocked", "random")}
    assert together["blocked"].mean() > 0.7 > 0.4 > together["random"].mean()
