"""Quality of a recording: over kept timepoints alone, against plain formulas; and the rules that refuse."""

import math
import tracemalloc

import numpy as np
import pytest

from data_prep.quality import dvars_z, lag1_autocorrelation, quality_row, refusal
from data_prep.settings import CheckSettings

GOOD = {"num_timepoints": 200, "num_kept": 180, "duration_s": 360.0, "mean_fd_mm": 0.1, "tsnr": 80.0}


def recording(rng, num_timepoints=120, num_parcels=70):
    walk = np.cumsum(rng.normal(size=(num_timepoints, num_parcels)), axis=0)
    return (1000 + walk + 3 * rng.normal(size=walk.shape)).astype(np.float32)


def censored(rng, num_timepoints=120):
    keep_mask = rng.random(num_timepoints) > 0.2
    keep_mask[40:50] = False
    return keep_mask


def row(bold, keep_mask=None, coverage=None, tr_s=2.0):
    keep_mask = np.ones(len(bold), dtype=bool) if keep_mask is None else keep_mask
    coverage = np.ones(bold.shape[1], dtype=np.float32) if coverage is None else coverage
    return quality_row(bold, coverage, keep_mask, tr_s)


def test_dvars_and_autocorrelation_are_those_of_plain_loops(rng):
    bold, keep_mask = recording(rng), censored(rng)
    kept = bold[keep_mask].astype(np.float64)
    z = (bold - kept.mean(axis=0)) / kept.std(axis=0)
    steps, products = [], []
    for t in range(len(z) - 1):
        if keep_mask[t] and keep_mask[t + 1]:
            steps.append(math.sqrt(np.mean((z[t + 1] - z[t]) ** 2)))
            products.append(z[t + 1] * z[t])
    r = np.sum(products, axis=0) * (len(kept) - 1) / len(products) / np.sum(z[keep_mask] ** 2, axis=0)
    found = row(bold, keep_mask)
    assert found["dvars_z"] == pytest.approx(np.mean(steps), rel=1e-9)
    assert found["lag1_autocorrelation"] == pytest.approx(np.median(r), rel=1e-9)


def test_white_noise_and_slow_series_have_the_known_values(rng):
    white = rng.normal(size=(5000, 70)).astype(np.float32)
    assert dvars_z(white) == pytest.approx(math.sqrt(2), abs=0.01)
    assert lag1_autocorrelation(white) == pytest.approx(0.0, abs=0.01)
    slow = np.zeros((5000, 60))
    for t in range(1, len(slow)):
        slow[t] = 0.8 * slow[t - 1] + rng.normal(size=60)
    assert lag1_autocorrelation(slow.astype(np.float32)) == pytest.approx(0.8, abs=0.02)
    assert dvars_z(slow.astype(np.float32)) == pytest.approx(math.sqrt(2 * (1 - 0.8)), abs=0.02)


def test_censoring_at_random_does_not_shift_the_autocorrelation(rng):
    slow = np.zeros((20000, 5))
    for t in range(1, len(slow)):
        slow[t] = 0.8 * slow[t - 1] + rng.normal(size=5)
    bold = slow.astype(np.float32)
    keep_mask = rng.random(len(bold)) > 0.3
    assert lag1_autocorrelation(bold, keep_mask) == pytest.approx(lag1_autocorrelation(bold), abs=0.01)
    assert dvars_z(bold, keep_mask) == pytest.approx(dvars_z(bold), abs=0.01)


@pytest.mark.parametrize("filling", [1e9, np.nan, np.inf])
def test_censored_timepoints_never_influence_the_result(rng, filling):
    bold, keep_mask = recording(rng), censored(rng)
    spoilt = bold.copy()
    spoilt[~keep_mask] = filling
    assert row(spoilt, keep_mask) == row(bold, keep_mask)


def test_a_jump_across_a_censored_gap_is_no_step(rng):
    bold = rng.normal(scale=0.01, size=(100, 8)).astype(np.float32)
    bold[50:] += 20
    keep_mask = np.ones(100, dtype=bool)
    with_jump = dvars_z(bold)
    assert with_jump > 2 / 99
    keep_mask[50] = False
    assert dvars_z(bold, keep_mask) < 0.1 * with_jump


def test_units_do_not_matter_and_missing_or_constant_parcels_have_no_influence(rng):
    bold = recording(rng)
    scaled = np.float32(8) * bold
    assert row(scaled)["dvars_z"] == pytest.approx(row(bold)["dvars_z"], rel=1e-6)
    holes = np.insert(bold, [0, 30, 70], np.nan, axis=1)
    holes = np.insert(holes, [5], 7.0, axis=1).astype(np.float32)
    found = row(holes)
    assert found["num_missing_parcels"] == 3
    for name in ("dvars_z", "lag1_autocorrelation"):
        assert found[name] == pytest.approx(row(bold)[name], rel=1e-9)


def test_counts_seconds_and_coverage(rng):
    bold, keep_mask = recording(rng), censored(rng)
    coverage = np.linspace(0, 1, 70, dtype=np.float32)
    bold[:, :2] = np.nan
    found = row(bold, keep_mask, coverage, tr_s=0.72)
    assert found["num_kept"] == keep_mask.sum()
    assert found["duration_s"] == pytest.approx(keep_mask.sum() * 0.72)
    assert found["mean_coverage"] == pytest.approx(0.5)
    assert found["num_missing_parcels"] == 2


def test_what_cannot_be_said_is_none(rng):
    bold = recording(rng)
    alternating = np.arange(len(bold)) % 2 == 0
    constant = np.ones_like(bold)
    for found in (row(bold, alternating), row(constant), row(bold, np.zeros(len(bold), dtype=bool))):
        assert found["dvars_z"] is None
        assert found["lag1_autocorrelation"] is None


def test_input_is_untouched_and_memory_is_bounded(rng):
    bold = recording(rng, 4000, 300)
    keep_mask = censored(rng, 4000)
    before = bold.copy()
    tracemalloc.start()
    row(bold, keep_mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(bold, before)
    assert peak < bold.nbytes + 10 * 4000 * 64 * 8


def test_a_good_recording_passes_and_rules_are_off_by_default():
    strict = CheckSettings(min_kept=0.9, max_mean_fd_mm=0.1, min_tsnr=80.0, min_duration_s=360.0)
    assert refusal(GOOD, strict) == ""  # each limit itself is allowed
    bad = {"num_timepoints": 200, "num_kept": 100, "duration_s": 1.0, "mean_fd_mm": None, "tsnr": 0.0}
    assert refusal(bad, CheckSettings()) == ""


@pytest.mark.parametrize(
    ("setting", "limit", "changed", "said"),
    [
        ("min_kept", 0.8, {"num_kept": 159}, "159 of 200 timepoints kept (79.5%), below 80.0% (checks.min_kept)"),
        ("max_mean_fd_mm", 0.5, {"mean_fd_mm": 0.62}, "0.62 mm, above 0.5 mm (checks.max_mean_fd_mm)"),
        ("max_mean_fd_mm", 0.5, {"mean_fd_mm": None}, "unknown, it must be known to be at most 0.5 mm"),
        ("max_mean_fd_mm", 0.5, {"mean_fd_mm": math.nan}, "(checks.max_mean_fd_mm)"),
        ("min_tsnr", 30.0, {"tsnr": 12.5}, "12.5, below 30 (checks.min_tsnr)"),
        ("min_duration_s", 300.0, {"duration_s": 299.0}, "299 s of kept time, below 300 s (checks.min_duration_s)"),
    ],
)
def test_a_broken_rule_is_stated_with_value_limit_and_setting(setting, limit, changed, said):
    reason = refusal(GOOD | changed, CheckSettings(**{setting: limit}))
    assert said in reason
    assert ";" not in reason


def test_series_without_tsnr_pass_its_limit():
    assert refusal(GOOD | {"tsnr": None}, CheckSettings(min_tsnr=30.0)) == ""


def test_all_broken_rules_are_listed():
    bad = GOOD | {"mean_fd_mm": 2.0, "tsnr": 1.0, "num_kept": 10, "duration_s": 20.0}
    reason = refusal(bad, CheckSettings(max_mean_fd_mm=1.0, min_tsnr=30.0, min_duration_s=300.0))
    assert len(reason.split("; ")) == 4
