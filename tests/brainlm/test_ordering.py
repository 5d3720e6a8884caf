"""The order of windows is a pure function of lengths, seed and epoch, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from brainlm.errors import DataError
from brainlm.ordering import even_starts, rank_part, window_order

LENGTHS = np.array([200, 230, 500, 201, 200])
WINDOW_LEN = 200


def order(seed: int = 0, epoch: int = 0, windows: int = 4) -> np.ndarray:
    return window_order(LENGTHS, WINDOW_LEN, windows, seed, epoch)


def test_the_same_arguments_give_the_same_order_whatever_was_drawn_before() -> None:
    first = order()
    np.random.default_rng().random(5)
    np.random.seed(3)  # noqa: NPY002
    lengths = LENGTHS.copy()
    np.testing.assert_array_equal(window_order(lengths, WINDOW_LEN, 4, 0, 0), first)
    np.testing.assert_array_equal(lengths, LENGTHS)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_parts_of_all_ranks_are_the_global_batch(world_size: int) -> None:
    batch = order()[:16]
    parts = [rank_part(batch, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {16 // world_size}
    np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_a_batch_that_ranks_cannot_share_equally_is_refused() -> None:
    with pytest.raises(DataError, match="16 windows cannot be divided among 3 ranks"):
        rank_part(order()[:16], 0, 3)


@pytest.mark.parametrize("windows", [1, 4])
def test_every_recording_gets_its_windows_inside_itself(windows: int) -> None:
    rows = order(windows=windows)
    np.testing.assert_array_equal(np.bincount(rows[:, 0]), [windows] * len(LENGTHS))
    assert (rows[:, 1] >= 0).all()
    assert (rows[:, 1] + WINDOW_LEN <= LENGTHS[rows[:, 0]]).all()


def test_starts_are_uniform_and_reach_the_last_one() -> None:
    num_starts, draws = 8, 8000
    rows = window_order(np.array([WINDOW_LEN + num_starts - 1]), WINDOW_LEN, draws, 0, 0)
    counts = np.bincount(rows[:, 1], minlength=num_starts)
    assert len(counts) == num_starts
    chi_squared = ((counts - draws / num_starts) ** 2 / (draws / num_starts)).sum()
    assert chi_squared < 24.3  # 99.9 % of a chi-squared with 7 degrees of freedom


def test_recordings_come_in_an_order_of_chance() -> None:
    lengths = np.full(400, 300)
    recordings = window_order(lengths, WINDOW_LEN, 1, 0, 0)[:, 0]
    assert abs(np.corrcoef(recordings, np.arange(400))[0, 1]) < 0.2
    assert abs(np.corrcoef(recordings, window_order(lengths, WINDOW_LEN, 1, 0, 1)[:, 0])[0, 1]) < 0.2


def test_epochs_and_seeds_differ() -> None:
    many = [order(seed, epoch).tobytes() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(many)) == len(many)  # seed 0 epoch 1 is not seed 1 epoch 0 either


def test_a_recording_shorter_than_a_window_is_refused_by_its_number() -> None:
    with pytest.raises(DataError, match="recording 1 has 199 timepoints, a window needs 200"):
        window_order(np.array([300, 199, 250]), WINDOW_LEN, 1, 0, 0)


def test_no_recordings_are_refused() -> None:
    with pytest.raises(DataError, match="no recordings"):
        window_order(np.array([], dtype=np.int64), WINDOW_LEN, 1, 0, 0)


@pytest.mark.parametrize("num_timepoints", [20, 21, 39, 40, 59, 60, 97, 1000])
@pytest.mark.parametrize("max_windows", [1, 2, 5])
def test_even_windows_lie_inside_apart_and_centred(num_timepoints: int, max_windows: int) -> None:
    starts = even_starts(num_timepoints, 20, max_windows)
    assert len(starts) == min(max_windows, num_timepoints // 20)
    gaps = np.diff([-20, *starts, num_timepoints]) - 20  # before, between and after
    assert gaps.min() >= 0
    between = gaps[1:-1]
    assert abs(gaps[0] - gaps[-1]) <= 1
    assert len(between) == 0 or np.ptp(between) <= 1


def test_a_recording_without_room_for_one_even_window_is_refused() -> None:
    with pytest.raises(DataError, match="19 timepoints is shorter than a window of 20"):
        even_starts(19, 20, 3)
