"""Confounds, trend and frequencies removed in one projection that kept timepoints alone decide."""

import itertools
import tracemalloc

import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep import clean as clean_module
from data_prep.clean import clean, degrees_of_freedom, fill_censored, leak_flags
from data_prep.read_series import missing_columns
from data_prep.settings import CleanSettings, ScrubSettings

FILTERS = [(None, None), (0.01, None), (None, 0.1), (0.01, 0.1)]


def make_bold(rng, num_timepoints=300, num_parcels=7):
    walk = np.cumsum(rng.normal(size=(num_timepoints, num_parcels)), axis=0)
    return (1000 + walk).astype(np.float32)


def make_confounds(rng, num_timepoints=300, count=6):
    """Slow ones, on scales from 1e-4 to 1e3, around 5."""
    scale = 10.0 ** rng.integers(-4, 4, count)
    return np.cumsum(rng.normal(size=(num_timepoints, count)), axis=0) * scale + 5


def make_mask(rng, num_timepoints=300, fraction=0.05):
    return rng.random(num_timepoints) >= fraction


def stop_cosines(num_timepoints, tr_s, high_pass_hz, low_pass_hz):
    """Written out from the definition: cos(pi k (t + 1/2) / T) has frequency k / (2 T TR)."""
    k = np.arange(1, num_timepoints)
    hz = k / (2 * num_timepoints * tr_s)
    stop = np.zeros(len(k), dtype=bool)
    if high_pass_hz is not None:
        stop |= hz < high_pass_hz
    if low_pass_hz is not None:
        stop |= hz > low_pass_hz
    return np.cos(np.pi * np.outer(np.arange(num_timepoints) + 0.5, k[stop]) / num_timepoints)


def dense_design(settings, tr_s, regressors, num_timepoints):
    parts = [np.ones((num_timepoints, 1))]
    parts.append(stop_cosines(num_timepoints, tr_s, settings.high_pass_hz, settings.low_pass_hz))
    if settings.detrend:
        parts.append(np.arange(num_timepoints)[:, None] / num_timepoints)
    if regressors is not None:
        parts.append(regressors)
    return np.concatenate(parts, axis=1)


def dense_clean(bold, settings, tr_s, regressors, keep_mask):
    """Return cleaned series at kept timepoints and the degrees of freedom, by least squares on the whole design."""
    design = dense_design(settings, tr_s, regressors, len(bold))[keep_mask]
    design /= np.linalg.norm(design, axis=0)
    series = bold[keep_mask].astype(np.float64)
    mean = series.mean(axis=0)
    weights, _, rank, _ = np.linalg.lstsq(design, series - mean, rcond=1e-12)
    return series - design @ weights, int(keep_mask.sum()) - rank


@pytest.mark.parametrize(
    ("filters", "detrend", "count", "fraction", "tr_s"),
    list(itertools.product(FILTERS, (False, True), (0, 6), (0.0, 0.04), (2.0, 0.735))),
)
def test_every_combination_equals_dense_least_squares(rng, filters, detrend, count, fraction, tr_s):
    settings = CleanSettings(high_pass_hz=filters[0], low_pass_hz=filters[1], detrend=detrend)
    bold, keep = make_bold(rng), make_mask(rng, fraction=fraction)
    regressors = make_confounds(rng, count=count) if count else None
    if filters == (None, None) and not detrend and not count:
        assert degrees_of_freedom(settings, tr_s, regressors, keep) == keep.sum()
        return
    expected, freedom = dense_clean(bold, settings, tr_s, regressors, keep)
    np.testing.assert_allclose(clean(bold, settings, tr_s, regressors, keep)[keep], expected, atol=2e-4)
    assert degrees_of_freedom(settings, tr_s, regressors, keep) == freedom


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("gaps", [(1, 1, 1), (30, 12, 5, 1)])
def test_the_residual_is_orthogonal_to_the_whole_design_at_kept_timepoints(rng, filters, gaps):
    settings = CleanSettings(high_pass_hz=filters[0], low_pass_hz=filters[1], detrend=True)
    bold, regressors = make_bold(rng, 600), make_confounds(rng, 600)
    keep = np.ones(600, dtype=bool)
    for number, gap in enumerate(gaps):
        keep[100 * number + 50 : 100 * number + 50 + gap] = False
    cleaned = clean(bold, settings, 1.0, regressors, keep)[keep].astype(np.float64)
    series = cleaned - bold[keep].astype(np.float64).mean(axis=0)
    design = dense_design(settings, 1.0, regressors, 600)[keep]
    design[:, -6:] -= design[:, -6:].mean(axis=0)
    cosine = design.T @ series / np.linalg.norm(design, axis=0)[:, None] / np.linalg.norm(series, axis=0)
    assert np.abs(cosine).max() < 1e-5
    # ... and what was taken away is in the span of the design, so that nothing else was.
    taken = bold[keep] - cleaned
    basis, values, _ = np.linalg.svd(design / np.linalg.norm(design, axis=0), full_matrices=False)
    basis = basis[:, values > 1e-12 * values[0]]
    left = taken - basis @ (basis.T @ taken)
    assert np.linalg.norm(left) < 1e-5 * np.linalg.norm(taken - taken.mean(axis=0))


def test_censoring_is_the_same_as_a_regressor_for_each_censored_timepoint(rng):
    settings = CleanSettings(high_pass_hz=0.01, low_pass_hz=0.15)
    bold, regressors = make_bold(rng), make_confounds(rng)
    keep = np.ones(300, dtype=bool)
    keep[[5, 80, 81, 200]] = False
    spikes = np.eye(300)[:, ~keep]
    censored = clean(bold, settings, 2.0, regressors, keep)
    spiked = clean(bold, settings, 2.0, np.concatenate([regressors, spikes], axis=1), np.ones(300, dtype=bool))
    shift = bold[keep].mean(axis=0, dtype=np.float64) - bold.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(censored[keep], spiked[keep] + shift, atol=5e-4)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("nonsense", [1e6, np.nan, np.inf])
def test_censored_timepoints_never_influence_the_result(rng, filters, nonsense):
    settings = CleanSettings(high_pass_hz=filters[0], low_pass_hz=filters[1], detrend=True)
    bold, regressors = make_bold(rng), make_confounds(rng)
    keep = make_mask(rng)
    keep[[0, 1, 299]] = False
    expected = clean(bold, settings, 2.0, regressors, keep)
    bold[~keep] = nonsense
    regressors[~keep] = nonsense
    np.testing.assert_array_equal(clean(bold, settings, 2.0, regressors, keep), expected)
    assert np.isfinite(expected).all()


def test_censored_timepoints_lie_between_their_kept_neighbours(rng):
    keep = np.ones(8, dtype=bool)
    keep[[0, 3, 4, 7]] = False
    bold = np.array([9, 1, 2, 9, 9, 5, 7, 9], dtype=np.float32)[:, None]
    expected = np.array([1, 1, 2, 3, 4, 5, 7, 7], dtype=np.float32)[:, None]
    np.testing.assert_array_equal(fill_censored(bold, keep), expected)
    np.testing.assert_array_equal(clean(bold, CleanSettings(), 2.0, None, keep), expected)
    np.testing.assert_array_equal(fill_censored(expected, keep), expected)
    cleaned = clean(make_bold(rng), CleanSettings(detrend=True), 2.0, None, mask := make_mask(rng))
    np.testing.assert_array_equal(fill_censored(cleaned, mask), cleaned)


def test_nothing_asked_changes_nothing(rng):
    bold = make_bold(rng)
    assert clean(bold, CleanSettings(), 2.0, None, np.ones(300, dtype=bool)) is bold


def test_input_stays_as_it_was(rng):
    bold, regressors, keep = make_bold(rng), make_confounds(rng), make_mask(rng)
    before = bold.copy(), regressors.copy(), keep.copy()
    clean(bold, CleanSettings(detrend=True, low_pass_hz=0.2), 2.0, regressors, keep)
    for now, then in zip((bold, regressors, keep), before):
        np.testing.assert_array_equal(now, then)


def test_memory_layout_and_storage_type_change_no_bit(rng):
    bold, regressors, keep = make_bold(rng), make_confounds(rng), make_mask(rng)
    settings = CleanSettings(detrend=True, high_pass_hz=0.01, low_pass_hz=0.2)
    expected = clean(bold, settings, 2.0, regressors, keep)
    wide = np.zeros((600, 14), dtype=np.float32)
    wide[::2, ::2] = bold
    for other in (
        np.asfortranarray(bold),
        bold[::-1].copy()[::-1],
        wide[::2, ::2],
        bold.astype(">f4"),
        bold.astype("f8"),
    ):
        np.testing.assert_array_equal(clean(other, settings, 2.0, regressors, keep), expected)
    np.testing.assert_array_equal(clean(bold, settings, 2.0, np.asfortranarray(regressors), keep), expected)
    assert expected.dtype == np.float32


def test_parcel_means_first_equals_cleaning_voxels(rng):
    voxels = (500 + rng.normal(size=(300, 40)).cumsum(axis=0)).astype(np.float32)
    membership = rng.random((40, 3))
    membership /= membership.sum(axis=0)
    settings = CleanSettings(detrend=True, high_pass_hz=0.01, low_pass_hz=0.2)
    arguments = (settings, 2.0, make_confounds(rng), make_mask(rng))
    means_first = clean((voxels @ membership).astype(np.float32), *arguments)
    np.testing.assert_allclose(means_first, clean(voxels, *arguments) @ membership, atol=1e-3)


def test_time_can_run_backwards(rng):
    bold, regressors, keep = make_bold(rng), make_confounds(rng), make_mask(rng)
    settings = CleanSettings(detrend=True, high_pass_hz=0.01, low_pass_hz=0.2)
    forwards = clean(bold, settings, 2.0, regressors, keep)
    backwards = clean(bold[::-1], settings, 2.0, regressors[::-1], keep[::-1])
    np.testing.assert_allclose(backwards[::-1], forwards, atol=5e-4)


def test_parcels_do_not_depend_on_one_another_whatever_the_block(rng):
    bold, regressors = make_bold(rng, 20_000, 60), make_confounds(rng, 20_000)  # three blocks
    arguments = (CleanSettings(high_pass_hz=0.01), 0.72, regressors, make_mask(rng, 20_000, 0.01))
    together = clean(bold, *arguments)
    np.testing.assert_allclose(together[:, 59:], clean(bold[:, 59:], *arguments), atol=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("detrend", [False, True])
def test_confounds_alone_agree_with_nilearn(rng, detrend):
    from nilearn.signal import clean as nilearn_clean

    bold, regressors = make_bold(rng), make_confounds(rng)
    if detrend:  # nilearn regresses in two steps, which is one when the confounds have no trend either
        time = np.stack([np.ones(300), np.arange(300)], axis=1)
        regressors -= time @ np.linalg.lstsq(time, regressors, rcond=None)[0]
    mean = bold.mean(axis=0, dtype=np.float64)
    expected = nilearn_clean(
        bold - mean, detrend=detrend, standardize=None, confounds=regressors, standardize_confounds=True, filter=False
    )
    found = clean(bold, CleanSettings(detrend=detrend, confounds=("a",)), 2.0, regressors, np.ones(300, dtype=bool))
    np.testing.assert_allclose(found, expected + mean, atol=2e-4)


def test_the_pass_band_is_flat_and_the_stop_band_empty(rng):
    noise = rng.normal(size=(2000, 200)).astype(np.float32)
    cleaned = clean(noise, CleanSettings(high_pass_hz=0.01, low_pass_hz=0.1), 2.0, None, np.ones(2000, dtype=bool))
    taper = np.hanning(2000)[:, None]
    before, after = (np.abs(np.fft.rfft(taper * x, axis=0)) ** 2 for x in (noise, cleaned - cleaned.mean(axis=0)))
    gain = after.mean(axis=1) / before.mean(axis=1)
    hz = np.fft.rfftfreq(2000, 2.0)
    edge = 3 / (2000 * 2.0)  # what the taper smears
    np.testing.assert_allclose(gain[(hz > 0.01 + edge) & (hz < 0.1 - edge)], 1, atol=0.02)
    assert gain[(hz < 0.01 - edge) | (hz > 0.1 + edge)].max() < 1e-3


@pytest.mark.parametrize(
    ("hz", "passes"), [(0.004, False), (0.0123, True), (0.05, True), (0.0987, True), (0.13, False)]
)
def test_a_sine_passes_unchanged_or_not_at_all(hz, passes):
    time_s = np.arange(600) * 1.5
    sine = np.sin(2 * np.pi * hz * time_s + 1)
    settings = CleanSettings(high_pass_hz=0.008, low_pass_hz=0.11)
    found = clean((100 + sine[:, None]).astype(np.float32), settings, 1.5, None, np.ones(600, dtype=bool))[:, 0] - 100
    inner = slice(120, -120)
    expected = sine if passes else np.zeros(600)
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.06)


def test_means_stay(rng):
    bold, keep = make_bold(rng), make_mask(rng)
    cleaned = clean(bold, CleanSettings(detrend=True, low_pass_hz=0.1), 2.0, make_confounds(rng), keep)
    np.testing.assert_allclose(cleaned[keep].mean(axis=0), bold[keep].mean(axis=0), rtol=1e-6)


def test_confounds_that_say_nothing_new_change_nothing(rng):
    bold, regressors, keep = make_bold(rng), make_confounds(rng), make_mask(rng)
    settings = CleanSettings(high_pass_hz=0.01, detrend=True)
    slow = stop_cosines(300, 2.0, 0.01, None)
    rounded = np.round(slow, 7)  # as a table holds them
    more = [regressors, 3 * regressors[:, :2] - 7, np.full((300, 1), 0.1), np.zeros((300, 1)), rounded]
    more.append(np.arange(300)[:, None] * 0.3)
    expected = clean(bold, settings, 2.0, regressors, keep)
    found = clean(bold, settings, 2.0, np.concatenate(more, axis=1), keep)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert degrees_of_freedom(settings, 2.0, np.concatenate(more, axis=1), keep) == degrees_of_freedom(
        settings, 2.0, regressors, keep
    )


def test_a_parcel_that_the_confounds_explain_becomes_constant(rng):
    bold, regressors = make_bold(rng), make_confounds(rng)
    bold[:, 2] = 800 + regressors[:, 0] / regressors[:, 0].std()
    bold[:, 4] = regressors[:, 1] - regressors[:, 1].mean()
    bold[:, 5] = 0
    cleaned = clean(bold, CleanSettings(high_pass_hz=0.01), 2.0, regressors, np.ones(300, dtype=bool))
    np.testing.assert_array_equal(missing_columns(cleaned), [False, False, True, False, True, True, False])


@pytest.mark.parametrize("name", ["high_pass_hz", "low_pass_hz"])
def test_a_cut_off_beyond_nyquist_is_refused(rng, name):
    with pytest.raises(DataError, match=rf"{name} 0.3 is not below the Nyquist frequency 0.25 Hz of TR 2 s"):
        clean(make_bold(rng), CleanSettings(**{name: 0.3}), 2.0, None, np.ones(300, dtype=bool))


def test_a_design_that_leaves_nothing_is_refused_with_counts(rng):
    keep = np.ones(300, dtype=bool)
    keep[::6] = False
    with pytest.raises(
        DataError, match="0 degrees of freedom, expected at least 10: of 300 timepoints 50 are censored"
    ):
        clean(make_bold(rng), CleanSettings(low_pass_hz=0.1), 0.72, None, keep)
    with pytest.raises(DataError, match=r"9 degrees of freedom.*confounds and trend 290"):
        clean(make_bold(rng), CleanSettings(), 2.0, rng.normal(size=(300, 290)), np.ones(300, dtype=bool))
    clean(make_bold(rng), CleanSettings(), 2.0, rng.normal(size=(300, 289)), np.ones(300, dtype=bool))


def test_values_that_are_missing_at_kept_timepoints_are_refused(rng):
    bold, regressors, keep = make_bold(rng), make_confounds(rng), np.ones(300, dtype=bool)
    regressors[7, 1] = np.nan
    with pytest.raises(DataError, match="1 confounds have NaN or infinite values at kept timepoints"):
        clean(bold, CleanSettings(), 2.0, regressors, keep)
    bold[7, 3], bold[8, 3] = np.inf, -np.inf
    with pytest.raises(DataError, match="1 parcels have NaN or infinite values at kept timepoints"):
        clean(bold, CleanSettings(detrend=True), 2.0, None, keep)


@pytest.mark.parametrize("settings", [CleanSettings(), CleanSettings(detrend=True), CleanSettings(low_pass_hz=0.1)])
def test_nothing_kept_is_refused(rng, settings):
    with pytest.raises(DataError, match="all 300 timepoints are censored"):
        clean(make_bold(rng), settings, 2.0, None, np.zeros(300, dtype=bool))


def test_a_band_without_a_cosine_is_refused(rng):
    keep = make_mask(rng)
    with pytest.raises(DataError, match="cleaning leaves 0 degrees of freedom"):
        clean(make_bold(rng), CleanSettings(high_pass_hz=0.2, low_pass_hz=0.2001), 2.0, None, keep)


def test_more_censored_timepoints_than_memory_allows_are_refused(rng):
    num_timepoints = 2 * clean_module.MAX_CENSORED + 2
    bold, keep = make_bold(rng, num_timepoints, 1), np.arange(num_timepoints) % 2 == 0
    with pytest.raises(DataError, match="with a filter at most"):
        clean(bold, CleanSettings(high_pass_hz=0.01), 2.0, None, keep)
    clean(bold, CleanSettings(detrend=True), 2.0, None, keep)


@pytest.mark.parametrize(("filters", "fraction"), [((0.01, 0.1), 0.0), ((0.01, None), 0.1)])
def test_hours_of_scanning_stay_in_bounded_memory(rng, filters, fraction):
    bold = rng.normal(size=(20_000, 424)).astype(np.float32)
    keep = make_mask(rng, 20_000, fraction)
    settings = CleanSettings(high_pass_hz=filters[0], low_pass_hz=filters[1])
    tracemalloc.start()
    clean(bold, settings, 0.72, make_confounds(rng, 20_000, 24), keep)
    peak_mb = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak_mb < 150


def test_real_recordings_go_through_the_band_pass(shared_data, rng):
    files = sorted((shared_data / "abide_cc200" / "ts").glob("*.npy"))[::15]
    assert files
    settings = CleanSettings(detrend=True, high_pass_hz=0.01, low_pass_hz=0.1)
    for file in files:
        bold = np.load(file)
        before = bold.copy()
        keep = make_mask(rng, len(bold), 0.03)
        cleaned = clean(bold, settings, 2.0, None, keep)
        np.testing.assert_array_equal(bold, before)
        assert np.isfinite(cleaned).all()
        np.testing.assert_array_equal(missing_columns(cleaned[keep]), missing_columns(bold))
        series = cleaned[keep].astype(np.float64) - bold[keep].mean(axis=0, dtype=np.float64)
        stop = stop_cosines(len(bold), 2.0, 0.01, 0.1)[keep]
        cosine = stop.T @ series / np.linalg.norm(stop, axis=0)[:, None] / np.linalg.norm(series, axis=0)
        assert np.abs(cosine).max() < 1e-3  # series of a few units around 10,000 are rounded to float32


def test_what_looks_ahead_is_flagged():
    assert leak_flags(CleanSettings(dummy_scans=4)) == []
    flags = leak_flags(
        CleanSettings(
            strategy="24P",
            global_signal=True,
            confounds=("a", "b"),
            scrub=ScrubSettings(min_segment=7),
            detrend=True,
            high_pass_hz=0.01,
        )
    )
    assert len(flags) == 4
    assert "24P, global signal, 2 columns" in flags[1]
    assert "7 later timepoints" in flags[3]
