"""Ranges and masks say the same, and what stands in for censored values comes from visible kept ones alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from brainlm.censoring import censored_ranges, kept_timepoints, refill_censored

P, K, PATCH = 5, 6, 4
W = K * PATCH


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_ranges_and_masks_are_each_others_inverse(share: float, rng: np.random.Generator) -> None:
    for _ in range(20):
        kept = rng.random(30) >= share
        ranges = censored_ranges(kept)
        np.testing.assert_array_equal(kept_timepoints(ranges, 30), kept)
        assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))  # as few as can be


def test_ranges_end_before_their_second_number() -> None:
    assert censored_ranges(np.array([0, 0, 1, 0, 1, 0], dtype=bool)) == ((0, 2), (3, 4), (5, 6))
    assert kept_timepoints(((1, 3),), 4).tolist() == [True, False, False, True]


def refilled(window: np.ndarray, visible: np.ndarray, kept: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The same parcel by parcel through `numpy.interp`."""
    out = window.copy()
    for p in range(P):
        shown = np.repeat(visible[p], PATCH)
        known, wanted = np.flatnonzero(shown & kept), np.flatnonzero(shown & ~kept)
        out[p, wanted] = np.interp(wanted, known, window[p, known]) if len(known) else empty[p]
    return out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_refilling_interpolates_each_parcel_between_what_is_visible_and_kept(
    share: float, rng: np.random.Generator
) -> None:
    for _ in range(50):
        window = rng.normal(size=(P, W)).astype(np.float32)
        visible, kept = rng.random((P, K)) < 0.5, rng.random(W) >= share
        empty = rng.normal(size=P).astype(np.float32)
        expected = refilled(window, visible, kept, empty)
        refill_censored(window, visible, kept, empty)
        np.testing.assert_allclose(window, expected, rtol=1e-5, atol=1e-6)


def test_hidden_and_censored_values_have_no_influence_on_what_is_filled_in(rng: np.random.Generator) -> None:
    visible, kept = rng.random((P, K)) < 0.5, rng.random(W) < 0.6
    shown = np.repeat(visible, PATCH, axis=1)
    window = rng.normal(size=(P, W)).astype(np.float32)
    other = np.where(shown & kept, window, np.float32(np.nan))
    refill_censored(window, visible, kept)
    refill_censored(other, visible, kept)
    np.testing.assert_array_equal(window[shown], other[shown])
    assert np.isnan(other[~shown]).all()  # what is hidden stays as it was


def test_a_window_without_censored_timepoints_is_left_alone(rng: np.random.Generator) -> None:
    window = rng.normal(size=(P, W)).astype(np.float32)
    before = window.copy()
    refill_censored(window, np.ones((P, K), dtype=bool), np.ones(W, dtype=bool))
    np.testing.assert_array_equal(window, before)
