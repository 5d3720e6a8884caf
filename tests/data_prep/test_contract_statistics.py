"""Median and IQR by counted digits, against numpy on the whole data."""

import io
import tracemalloc

import numpy as np
import pytest

from brainlm.errors import DataError
from brainlm.scaling import centre, robust_statistics
from brainlm.store import Store
from data_prep import contract_statistics
from data_prep.contract_statistics import compute_statistics, update
from data_prep.radix_quantiles import NUM_PASSES, QuartileSearch, ordered_keys, values_of_keys
from data_prep.work import Workers

F32 = np.finfo(np.float32)


class ShuffledWorkers(Workers):
    """This process, finishing tasks in a random order."""

    def __init__(self, seed=0):
        super().__init__(None)
        self.rng = np.random.default_rng(seed)

    def _stream(self, function, tasks, when_lost=None):
        for position in self.rng.permutation(len(tasks)):
            yield int(position), function(*tasks[position])


def stage(store, recordings):
    """Write (bold, keep_mask) of each recording as `prepare_recording` does; return their ids."""
    ids = []
    for number, (bold, keep_mask) in enumerate(recordings):
        buffer = io.BytesIO()
        np.savez(buffer, bold=bold, coverage=(~np.isnan(bold[0])).astype(np.float32), keep_mask=keep_mask)
        store.write_bytes(f"rec{number}.npz", buffer.getvalue())
        ids.append(f"rec{number}")
    return ids


def quartiles_of(parts, order=None):
    """Search the quartiles of (N, P) parts with columns of NaN, counted one by one and summed in an order."""
    search = QuartileSearch(parts[0].shape[1])
    for _ in range(NUM_PASSES):
        counted = []
        for part in parts:
            counts = search.next_pass.empty_counts()
            search.next_pass.add_counts(counts, part, np.flatnonzero(~np.isnan(part).any(axis=0)))
            counted.append(counts)
        search.narrow(sum(counted[i] for i in (order or range(len(parts)))))
    return search.num_values, search.quartiles()


def percentiles_by_numpy(parts):
    whole = np.concatenate(parts).astype(np.float64)
    return np.nanpercentile(whole, (25, 50, 75), axis=0).T


def uncentred(rng, lengths=(40, 55, 61, 70), num_parcels=5):
    """Recordings of different level and scale, with censoring, and parcels that some or all of them miss."""
    recordings = []
    for number, length in enumerate(lengths):
        bold = rng.normal(1000 * (1 + number), 10.0 ** rng.integers(-2, 4), (length, num_parcels)).astype(np.float32)
        bold[:, number % 3] = np.nan
        bold[:, num_parcels - 1] = np.nan
        recordings.append((bold, rng.random(length) < 0.8))
    return recordings


def whole(recordings):
    return np.concatenate([centre(bold, keep_mask)[keep_mask] for bold, keep_mask in recordings])


VALUES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy-tailed": lambda rng, shape: np.clip(rng.standard_cauchy(shape) ** 5, -3e38, 3e38),
    "constant": lambda rng, shape: np.full(shape, -7.25),
    "tied": lambda rng, shape: rng.integers(-2, 3, shape),
    "nearly equal": lambda rng, shape: 1000 + rng.integers(-3, 3, shape) * float(np.spacing(np.float32(1000))),
    "denormal": lambda rng, shape: rng.integers(-50, 50, shape) * float(F32.smallest_subnormal),
    "zeros of both signs": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
    "huge": lambda rng, shape: rng.choice([-1.0, 1.0], shape) * float(F32.max),
    "every magnitude": lambda rng, shape: rng.choice([-1, 1], shape) * 2.0 ** rng.uniform(-149, 127.9, shape),
    "all negative": lambda rng, shape: -rng.gamma(0.1, size=shape),
}


def test_keys_order_like_numbers_and_give_them_back(rng):
    numbers = np.array([F32.min, -1.5, -1, -F32.tiny, -F32.smallest_subnormal], dtype=np.float32)
    numbers = np.concatenate([numbers, np.float32([-0.0, 0.0]), -numbers[::-1]])
    keys = ordered_keys(numbers)
    assert np.all(np.diff(keys.astype(np.int64)) > 0)
    assert values_of_keys(keys).tobytes() == numbers.tobytes()
    drawn = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    drawn = drawn[np.isfinite(drawn)]
    assert values_of_keys(ordered_keys(drawn)).tobytes() == drawn.tobytes()
    np.testing.assert_array_equal(drawn[np.argsort(ordered_keys(drawn))], np.sort(drawn))


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("lengths", [(1,), (2,), (3,), (1, 1, 1, 1), (5,), (1, 7), (300, 201, 2)])
def test_quartiles_are_those_of_numpy_on_the_whole_data(rng, name, lengths):
    parts = [VALUES[name](rng, (length, 4)).astype(np.float32) for length in lengths]
    num_values, quartiles = quartiles_of(parts)
    assert num_values.tolist() == [sum(lengths)] * 4
    np.testing.assert_array_equal(quartiles, percentiles_by_numpy(parts))  # equal, not close
    assert not np.signbit(quartiles[quartiles == 0]).any()


def test_parcels_are_counted_apart_and_missing_ones_not_at_all(rng):
    parts = [rng.normal(size=(length, 6)).astype(np.float32) * 10.0 ** np.arange(-3, 3) for length in (30, 41, 52)]
    parts = [part.astype(np.float32) for part in parts]
    parts[0][:, [0, 5]] = np.nan
    parts[1][:, [1, 5]] = np.nan
    parts[2][:, [0, 5]] = np.nan
    num_values, quartiles = quartiles_of(parts)
    assert num_values.tolist() == [41, 82, 123, 123, 123, 0]
    np.testing.assert_array_equal(quartiles[:5], percentiles_by_numpy([part[:, :5] for part in parts]))
    assert np.isnan(quartiles[5]).all()


def test_order_and_grouping_change_no_bit(rng):
    parts = [VALUES["heavy-tailed"](rng, (length, 3)).astype(np.float32) for length in (50, 1, 20, 33)]
    _, quartiles = quartiles_of(parts)
    for other in (quartiles_of(parts, order=[2, 0, 3, 1]), quartiles_of([np.concatenate(parts)])):
        assert other[1].tobytes() == quartiles.tobytes()


def test_counts_beyond_32_bits_are_right(rng):
    """As if each value had come 2**33 times, which no array can hold."""
    times, values = 2**33, rng.normal(size=(7, 1)).astype(np.float32)
    search = QuartileSearch(1)
    for _ in range(NUM_PASSES):
        counts = search.next_pass.empty_counts()
        search.next_pass.add_counts(counts, values, np.array([0]))
        search.narrow(counts * times)
    assert search.num_values.tolist() == [7 * times]
    for quarter, found in zip((1, 2, 3), search.quartiles()[0]):
        assert found == np.sort(values[:, 0])[(7 * times - 1) * quarter // 4 // times]


def test_long_recordings_need_no_more_memory_than_short_ones(rng):
    peaks = []
    for length in (20_000, 400_000):
        series = rng.normal(size=(length, 3)).astype(np.float32)
        sought = QuartileSearch(3).next_pass
        counts = sought.empty_counts()
        tracemalloc.start()
        sought.add_counts(counts, series, np.arange(3))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_statistics_of_staged_recordings_are_the_exact_ones(rng, tmp_path):
    recordings = uncentred(rng)
    store = Store(tmp_path)
    covered, median, iqr = compute_statistics(store, stage(store, recordings), 5, Workers(None))
    expected_median, expected_iqr = robust_statistics(whole(recordings)[:, :4])
    assert covered.tolist() == [True] * 4 + [False]
    assert median[:4].tobytes() == expected_median.tobytes()
    assert iqr[:4].tobytes() == expected_iqr.tobytes()
    assert (median[4], iqr[4]) == (0, 0)
    assert (median.dtype, iqr.dtype, covered.dtype) == (np.float32, np.float32, bool)


@pytest.mark.parametrize(("per_task", "tasks", "parcels"), [(1, 64, 1024), (2, 1, 1024), (64, 1, 1024), (3, 2, 2)])
def test_tasks_their_order_and_blocks_of_parcels_change_nothing(rng, tmp_path, monkeypatch, per_task, tasks, parcels):
    store = Store(tmp_path)
    rows = stage(store, uncentred(rng, lengths=(30, 25, 60, 11, 40, 33, 20)))
    expected = compute_statistics(store, rows, 5, Workers(None))
    monkeypatch.setattr(contract_statistics, "RECORDINGS_PER_TASK", per_task)
    monkeypatch.setattr(contract_statistics, "TASKS", tasks)
    monkeypatch.setattr(contract_statistics, "PARCELS_AT_ONCE", parcels)
    found = compute_statistics(store, rows[::-1], 5, ShuffledWorkers(seed=per_task))
    for one, other in zip(found, expected):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("length", [300, 70_000])
def test_many_equal_values_in_one_task_are_all_counted(rng, tmp_path, length):
    """Tasks send their counts in the smallest integers that hold them."""
    bold = np.where(rng.random((length, 1)) < 0.96, 3.0, rng.normal(size=(length, 1))).astype(np.float32)
    recordings = [(bold, np.ones(length, dtype=bool)), (bold[: length // 2], np.ones(length // 2, dtype=bool))]
    store = Store(tmp_path)
    _, median, iqr = compute_statistics(store, stage(store, recordings), 1, Workers(None))
    expected_median, expected_iqr = robust_statistics(whole(recordings))
    assert (median.tobytes(), iqr.tobytes()) == (expected_median.tobytes(), expected_iqr.tobytes())


def test_censored_timepoints_never_influence_the_result(rng, tmp_path):
    recordings = uncentred(rng)
    store = Store(tmp_path)
    expected = compute_statistics(store, stage(store, recordings), 5, Workers(None))
    for bold, keep_mask in recordings:
        bold[np.ix_(~keep_mask, ~np.isnan(bold[0]))] = 1e30
    found = compute_statistics(store, stage(store, recordings), 5, Workers(None))
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_a_recording_without_kept_timepoints_counts_for_nothing(rng, tmp_path):
    recordings = uncentred(rng)
    store = Store(tmp_path)
    expected = compute_statistics(store, stage(store, recordings), 5, Workers(None))
    recordings.append((np.zeros((50, 5), dtype=np.float32), np.zeros(50, dtype=bool)))
    found = compute_statistics(store, stage(store, recordings), 5, Workers(None))
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_an_atlas_that_no_recording_covers_has_no_statistics(tmp_path):
    store = Store(tmp_path)
    bold = np.full((30, 3), np.nan, dtype=np.float32)
    covered, median, iqr = compute_statistics(store, stage(store, [(bold, np.ones(30, dtype=bool))]), 3, Workers(None))
    assert not covered.any()
    assert median.tolist() == iqr.tolist() == [0, 0, 0]


def test_staged_series_are_not_modified(rng):
    bold, keep_mask = uncentred(rng)[0]
    before = bold.copy()
    sought = QuartileSearch(5).next_pass
    update(sought.empty_counts(), sought, bold, keep_mask)
    np.testing.assert_array_equal(bold, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, F32.max])
def test_a_parcel_that_is_finite_at_some_timepoints_alone_is_an_error_that_names_the_recording(rng, tmp_path, value):
    recordings = [(rng.normal(size=(40, 3)).astype(np.float32), np.ones(40, dtype=bool)) for _ in range(3)]
    recordings[1][0][7:9, 2] = value, -value
    recordings[1][0][9:, 2] = -value  # F32.max: the mean is near its negative, so that the centred value overflows
    store = Store(tmp_path)
    with pytest.raises(DataError, match=r"rec1 .*finite at all kept timepoints or missing .*found both in column 2"):
        compute_statistics(store, stage(store, recordings), 3, Workers(None))


def test_a_column_of_infinities_is_not_taken_for_a_missing_parcel(rng, tmp_path):
    bold = rng.normal(size=(40, 3)).astype(np.float32)
    bold[:, 1] = np.inf
    store = Store(tmp_path)
    with pytest.raises(DataError, match="column 1"):
        compute_statistics(store, stage(store, [(bold, np.ones(40, dtype=bool))]), 3, Workers(None))


def test_a_recording_of_another_atlas_is_an_error_that_names_it(rng, tmp_path):
    store = Store(tmp_path)
    rows = stage(store, [(rng.normal(size=(40, 3)).astype(np.float32), np.ones(40, dtype=bool))])
    with pytest.raises(DataError, match=r"rec0 .*expected bold \(T, 4\).*found \(40, 3\)"):
        compute_statistics(store, rows, 4, Workers(None))


def test_no_train_recordings_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no train recordings"):
        compute_statistics(Store(tmp_path), [], 4, Workers(None))


def test_recordings_that_change_between_passes_are_an_error(rng, tmp_path):
    store = Store(tmp_path)
    rows = stage(store, uncentred(rng))

    class Meddler(Workers):
        def stream(self, function, tasks, label, when_lost=None):
            yield from super().stream(function, tasks, label)
            stage(store, uncentred(rng))

    with pytest.raises(DataError, match="changed meanwhile"):
        compute_statistics(store, rows, 5, Meddler(None))


def test_real_recordings_give_the_statistics_of_numpy(shared_data, rng, tmp_path):
    files = sorted((shared_data / "abide_cc200" / "ts").glob("*.npy"))[::12]
    recordings = []
    for file in files:
        bold = np.load(file).astype(np.float32)
        bold[:, bold.std(axis=0) == 0] = np.nan
        recordings.append((bold, rng.random(len(bold)) < 0.9))
    recordings[0][0][:, 5] = np.nan
    store = Store(tmp_path)
    covered, median, iqr = compute_statistics(store, stage(store, recordings), 200, ShuffledWorkers())
    assert covered.sum() > 190
    expected_median, expected_iqr = robust_statistics(whole(recordings)[:, covered])
    np.testing.assert_array_equal(median[covered], expected_median)
    np.testing.assert_array_equal(iqr[covered], expected_iqr)
    assert (iqr[covered] > 0).all()
