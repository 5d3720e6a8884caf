"""Reading of series, and numbers about their quality."""

import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep.quality import dvars_z, lag1_autocorrelation
from data_prep.read_series import missing_columns, read_series


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


def test_quality_numbers_tell_noise_from_slow_series(rng):
    noise = rng.normal(size=(2000, 5)).astype(np.float32)
    assert dvars_z(noise) == pytest.approx(np.sqrt(2), rel=0.05)
    assert lag1_autocorrelation(noise) == pytest.approx(0, abs=0.05)
    assert lag1_autocorrelation(np.cumsum(noise, axis=0)) > 0.9
