"""Reading, cleaning and resampling of series."""

import numpy as np
import pandas as pd
import pytest

from brainlm.errors import DataError
from data_prep.clean import MOTION_COLUMNS, clean, leak_flags, mean_fd_mm, read_confounds, select_confounds
from data_prep.quality import dvars_z, lag1_autocorrelation
from data_prep.read_series import missing_columns, read_series
from data_prep.resample import num_resampled, resample, resampling_operator
from data_prep.settings import CleanSettings


@pytest.fixture
def bold(rng):
    return (1000 + np.cumsum(rng.normal(size=(120, 4)), axis=0)).astype(np.float32)


def test_npy_is_read_along_either_axis(tmp_path, bold):
    np.save(tmp_path / "a.npy", bold.astype(np.float64))
    np.save(tmp_path / "b.npy", bold.T)
    np.testing.assert_array_equal(read_series(tmp_path / "a.npy", 4, "from_atlas"), bold)
    np.testing.assert_array_equal(read_series(tmp_path / "b.npy", 4, "from_atlas"), bold)
    with pytest.raises(DataError, match="expected 4 columns, one for each parcel of the atlas; found 120"):
        read_series(tmp_path / "b.npy", 4, "timepoints_by_parcels")


def test_square_series_are_ambiguous_until_told(tmp_path, rng):
    square = rng.normal(size=(4, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", square)
    with pytest.raises(DataError, match="ambiguous"):
        read_series(tmp_path / "a.npy", 4, "from_atlas")
    np.testing.assert_array_equal(read_series(tmp_path / "a.npy", 4, "parcels_by_timepoints"), square.T)


def test_pickles_and_archives_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable"):
        read_series(tmp_path / "a.npy", 4, "from_atlas")
    np.savez(tmp_path / "b.npz", a=np.zeros(3))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(DataError, match="archive of several"):
        read_series(tmp_path / "b.npy", 4, "from_atlas")


@pytest.mark.parametrize(
    ("name", "separator", "header"),
    [("a.csv", ",", "a,b,c,d\n"), ("a.tsv", "\t", "0\t1\t2\t3\n"), ("a.txt", " ", ""), ("a.1D", "\t", "#1\t#2\t#3\n")],
)
def test_text_series_are_read_with_or_without_a_header(tmp_path, bold, name, separator, header):
    text = header + "\n".join(separator.join(f"{value:.9g}" for value in row) for row in bold)
    (tmp_path / name).write_text(text + "\n")
    np.testing.assert_array_equal(read_series(tmp_path / name, 4, "from_atlas"), bold)


def test_ragged_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("7,2,3\n4,5\n")
    with pytest.raises(DataError, match="2 to 3 columns"):
        read_series(tmp_path / "a.csv", 3, "from_atlas")


def test_constant_and_broken_columns_are_missing(bold):
    bold[:, 1] = 7
    bold[5, 2] = np.inf
    np.testing.assert_array_equal(missing_columns(bold), [False, True, True, False])


def test_confounds_are_orthogonal_afterwards_and_means_and_input_stay(bold, rng):
    confounds = rng.normal(size=(120, 3)) + 5
    before = bold.copy(), confounds.copy()
    cleaned = clean(bold, CleanSettings(confounds=("a", "b", "c")), 2.0, confounds)
    centred = cleaned.astype(np.float64) - cleaned.mean(axis=0, dtype=np.float64)
    product = (confounds - confounds.mean(axis=0)).T @ centred
    assert np.abs(product).max() < 1e-3 * np.linalg.norm(confounds) * np.linalg.norm(centred)
    np.testing.assert_allclose(cleaned.mean(axis=0), bold.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(bold, before[0])
    np.testing.assert_array_equal(confounds, before[1])


def test_nothing_asked_changes_nothing(bold):
    assert clean(bold, CleanSettings(), 2.0, None) is bold


def test_detrending_and_filters_keep_the_mean_and_remove_their_part(bold):
    time_s = np.arange(120) * 2.0
    slow, fast = np.sin(2 * np.pi * 0.02 * time_s), np.sin(2 * np.pi * 0.2 * time_s)
    series = (500 + time_s[:, None] + slow[:, None] + fast[:, None]).astype(np.float32)
    cleaned = clean(series, CleanSettings(detrend=True, low_pass_hz=0.1), 2.0, None)[:, 0]
    inner = slice(20, 100)
    rest = cleaned - cleaned.mean()
    assert abs(np.dot(rest[inner], fast[inner])) < 0.05 * np.dot(fast[inner], fast[inner])
    assert np.dot(rest[inner], slow[inner]) == pytest.approx(np.dot(slow[inner], slow[inner]), rel=0.1)
    assert cleaned.mean() == pytest.approx(series.mean(), rel=1e-5)


def test_filter_beyond_nyquist_is_refused(bold):
    with pytest.raises(DataError, match="Nyquist"):
        clean(bold, CleanSettings(low_pass_hz=0.3), 2.0, None)


def test_first_row_of_derivatives_is_filled_and_other_gaps_are_refused(tmp_path):
    path = tmp_path / "c.tsv"
    path.write_text("a\ta_derivative1\n1\tn/a\n3\t2\n4\t1\n")
    table = read_confounds(path)
    np.testing.assert_array_equal(select_confounds(table, ("a_derivative1",), 3), [[2], [2], [1]])
    table.loc[2, "a"] = np.nan
    with pytest.raises(DataError, match="missing values after the first row: a"):
        select_confounds(table, ("a",), 3)
    with pytest.raises(DataError, match="no column 'b'"):
        select_confounds(table, ("b",), 3)
    with pytest.raises(DataError, match="3 rows of confounds, 4 timepoints"):
        select_confounds(table, ("a_derivative1",), 4)


def test_displacement_adds_rotations_as_arcs():
    table = pd.DataFrame(np.zeros((3, 6)), columns=list(MOTION_COLUMNS))
    table["trans_x"] = [0.0, 0.5, 0.5]
    table["rot_z"] = [0.0, 0.0, 0.01]
    assert mean_fd_mm(table) == pytest.approx((0.5 + 0.5) / 2)
    assert mean_fd_mm(pd.DataFrame({"framewise_displacement": ["n/a", 0.2, 0.4]})) == pytest.approx(0.3)
    assert mean_fd_mm(pd.DataFrame({"csf": [1.0]})) is None


def test_what_looks_ahead_is_flagged():
    assert leak_flags(CleanSettings()) == []
    assert len(leak_flags(CleanSettings(confounds=("a",), detrend=True, high_pass_hz=0.01))) == 3


@pytest.mark.parametrize(("tr_s", "target_tr_s"), [(1.667, 2.0), (2.0, 1.5), (0.72, 2.0), (2.0, 0.8)])
def test_sine_keeps_its_frequency_in_hz(tr_s, target_tr_s):
    frequency_hz = 0.05
    series = 100 + np.sin(2 * np.pi * frequency_hz * np.arange(400) * tr_s)
    found = resample(series[:, None].astype(np.float32), tr_s, target_tr_s)[:, 0]
    expected = 100 + np.sin(2 * np.pi * frequency_hz * np.arange(len(found)) * target_tr_s)
    inner = slice(len(found) // 8, -len(found) // 8)
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.01)


def test_frequencies_above_the_new_nyquist_are_removed():
    series = np.sin(2 * np.pi * 0.4 * np.arange(600) * 0.72)  # would alias to 0.1 Hz at 2 s
    found = resample(series[:, None].astype(np.float32), 0.72, 2.0)[:, 0]
    assert np.abs(found[30:-30]).max() < 0.01


def test_constants_stay_exact_and_no_time_is_invented():
    operator = resampling_operator(100, 1.667, 2.0)
    np.testing.assert_allclose(operator.sum(axis=1), 1.0, rtol=1e-12)
    assert len(operator) == num_resampled(100, 1.667, 2.0) == 83
    assert num_resampled(100, 2.0, 2.0) == 100
    np.testing.assert_array_equal(resample(np.full((50, 2), 7.0, dtype=np.float32), 2.0, 1.5), 7.0)


def test_quality_numbers_tell_noise_from_slow_series(rng):
    noise = rng.normal(size=(2000, 5)).astype(np.float32)
    assert dvars_z(noise) == pytest.approx(np.sqrt(2), rel=0.05)
    assert lag1_autocorrelation(noise) == pytest.approx(0, abs=0.05)
    assert lag1_autocorrelation(np.cumsum(noise, axis=0)) > 0.9
