"""Series and mask on another TR."""

import tracemalloc

import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep.clean import fill_censored
from data_prep.resample import future_s, num_resampled, resample, resample_mask, resampling_operator

TR_PAIRS = [(1.667, 2.0), (2.0, 1.5), (0.72, 2.0), (2.0, 0.8), (2.0, 1.0), (1.0, 2.0), (0.735, 1.0), (0.6, 1.8)]


def everything(num_timepoints):
    return np.ones(num_timepoints, dtype=bool)


def gains(tr_s, target_tr_s, frequencies):
    """Return how far sines are from themselves at the new times, and how large they are there; away from the ends."""
    operator = resampling_operator(2000, tr_s, target_tr_s)
    waves = np.exp(2j * np.pi * np.outer(np.arange(2000) * tr_s, frequencies))
    found = operator @ waves
    expected = np.exp(2j * np.pi * np.outer(np.arange(len(found)) * target_tr_s, frequencies))
    inner = slice(len(found) // 5, -len(found) // 5)
    return np.abs(found - expected)[inner].max(axis=0), np.abs(found)[inner].max(axis=0)


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
def test_sines_of_the_pass_band_keep_frequency_phase_and_amplitude(tr_s, target_tr_s):
    nyquist_hz = 0.5 / max(tr_s, target_tr_s)
    error, _ = gains(tr_s, target_tr_s, np.linspace(0, 0.65 * nyquist_hz, 100))
    assert error.max() < 1e-3


@pytest.mark.parametrize(("tr_s", "target_tr_s"), [(1.667, 2.0), (0.72, 2.0), (1.0, 2.0), (0.735, 1.0)])
def test_what_would_alias_is_59_db_down(tr_s, target_tr_s):
    nyquist_hz = 0.5 / target_tr_s
    _, size = gains(tr_s, target_tr_s, np.linspace(1.15 * nyquist_hz, 0.5 / tr_s, 100))
    assert 20 * np.log10(size.max()) < -59


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
def test_the_strongest_frequency_of_a_series_stays_in_hz(rng, tr_s, target_tr_s):
    time_s = np.arange(600) * tr_s
    series = 900 + np.sin(2 * np.pi * 0.06 * time_s) + 0.3 * rng.normal(size=600)
    found, _ = resample(series[:, None].astype(np.float32), everything(600), tr_s, target_tr_s)
    spectrum = np.abs(np.fft.rfft(found[:, 0] - found.mean()))
    peak_hz = np.fft.rfftfreq(len(found), target_tr_s)[spectrum.argmax()]
    assert peak_hz == pytest.approx(0.06, abs=1 / (len(found) * target_tr_s))


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
@pytest.mark.parametrize("num_timepoints", [2, 5, 150])
def test_the_banded_operator_equals_the_kernel_written_out(num_timepoints, tr_s, target_tr_s):
    slowest = max(tr_s, target_tr_s)
    half_s = 8 * slowest / 0.9
    count = num_resampled(num_timepoints, tr_s, target_tr_s)
    distance_s = np.arange(count)[:, None] * target_tr_s - np.arange(num_timepoints) * tr_s
    x = np.clip(np.abs(distance_s) / half_s, 0, 1)
    kernel = np.sinc(0.9 * distance_s / slowest) * np.i0(6 * np.sqrt(1 - x**2)) * (np.abs(distance_s) < half_s)
    kernel /= kernel.sum(axis=1, keepdims=True)
    operator = resampling_operator(num_timepoints, tr_s, target_tr_s)
    np.testing.assert_allclose(operator.toarray(), kernel, atol=1e-12)


def test_constants_stay_exact_and_no_time_is_invented():
    operator = resampling_operator(100, 1.667, 2.0)
    np.testing.assert_allclose(operator.sum(axis=1), 1.0, rtol=1e-12)
    assert operator.shape[0] == num_resampled(100, 1.667, 2.0) == 83
    assert num_resampled(100, 2.0, 2.0) == 100
    bold, keep = resample(np.full((50, 2), 7.0, dtype=np.float32), everything(50), 2.0, 1.5)
    np.testing.assert_array_equal(bold, 7.0)
    assert keep.all()
    with pytest.raises(DataError, match="1 timepoints cannot be resampled"):
        resample(bold[:1], keep[:1], 2.0, 1.5)


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
def test_a_timepoint_is_kept_if_all_that_are_nearer_than_the_longer_tr_are(rng, tr_s, target_tr_s):
    keep = rng.random(200) > 0.1
    found = resample_mask(keep, tr_s, target_tr_s)
    assert 0 < found.sum() < len(found)
    for index, kept in enumerate(found):
        apart_s = np.abs(np.arange(200) * tr_s - index * target_tr_s)
        assert kept == keep[apart_s < max(tr_s, target_tr_s) - 1e-6].all()


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
@pytest.mark.parametrize("nonsense", [1e6, np.nan])
def test_censored_timepoints_never_influence_the_result(rng, tr_s, target_tr_s, nonsense):
    bold, keep = rng.normal(size=(200, 3)).astype(np.float32), rng.random(200) > 0.1
    keep[[0, 199]] = False
    expected, mask = resample(fill_censored(bold, keep), keep, tr_s, target_tr_s)
    bold[~keep] = nonsense
    found, again = resample(bold, keep, tr_s, target_tr_s)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again, mask)
    assert len(found) == len(mask)


@pytest.mark.parametrize(("tr_s", "target_tr_s"), TR_PAIRS)
def test_kept_timepoints_are_near_those_of_the_recording_without_censoring(rng, tr_s, target_tr_s):
    time_s = np.arange(400) * tr_s
    series = np.stack([np.sin(2 * np.pi * hz * time_s) for hz in (0.02, 0.05)], axis=1).astype(np.float32)
    keep = rng.random(400) > 0.05
    whole, _ = resample(series, everything(400), tr_s, target_tr_s)
    found, mask = resample(series, keep, tr_s, target_tr_s)
    assert np.abs(found - whole)[mask].max() < 0.1
    assert 0.3 < mask.mean() < 1


def test_memory_layout_and_storage_type_change_no_bit_and_input_stays(rng):
    bold, keep = rng.normal(size=(200, 30)).astype(np.float32), rng.random(200) > 0.1
    before = bold.copy(), keep.copy()
    expected, _ = resample(bold, keep, 0.72, 2.0)
    for other in (np.asfortranarray(bold), bold[::-1].copy()[::-1], bold.astype(">f4"), bold.astype(np.float64)):
        np.testing.assert_array_equal(resample(other, keep, 0.72, 2.0)[0], expected)
    np.testing.assert_array_equal(bold, before[0])
    np.testing.assert_array_equal(keep, before[1])
    assert expected.dtype == np.float32


@pytest.mark.parametrize(("tr_s", "target_tr_s"), [(0.72, 2.0), (2.0, 0.72)])
def test_hours_of_scanning_stay_in_bounded_memory(rng, tr_s, target_tr_s):
    bold = rng.normal(size=(20_000, 100)).astype(np.float32)
    tracemalloc.start()
    found, _ = resample(bold, everything(20_000), tr_s, target_tr_s)
    peak_mb = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak_mb < 150
    alone, _ = resample(bold[:, 99:], everything(20_000), tr_s, target_tr_s)
    np.testing.assert_array_equal(found[:, 99:], alone)


def test_the_reach_into_the_future_is_where_the_kernel_ends():
    operator = resampling_operator(400, 0.72, 2.0).toarray()
    last = np.flatnonzero(operator[50])[-1]
    assert 0 <= future_s(0.72, 2.0) - (last * 0.72 - 50 * 2.0) < 0.72
