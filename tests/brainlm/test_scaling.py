"""(x - median) / IQR with known numbers; what cannot be scaled is zero and masked out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from brainlm.errors import DataError
from brainlm.input_contract import InputContract
from brainlm.scaling import centre, robust_statistics, scale, unscale
from brainlm.testing import synthetic_atlas


def three_parcels(median: list[float], iqr: list[float], covered: tuple[bool, ...] = (True,) * 3) -> InputContract:
    return InputContract(
        atlas=synthetic_atlas(3),
        covered=np.array(covered),
        median=np.array(median),
        iqr=np.array(iqr),
        tr_s=2.0,
        window_len=20,
        patch_len=5,
    )


def test_scaling_gives_known_numbers() -> None:
    contract = three_parcels([1, -2, 0], [2, 4, 0.5])
    bold = np.array([[5, 2, 1], [1, -2, 0]], dtype=np.float32)
    np.testing.assert_array_equal(scale(bold, contract), [[2, 1, 2], [0, 0, 0]])
    # Not the published x - median / IQR, which would give 4.5, 2.5 and 1.
    assert not np.allclose(scale(bold, contract), bold - contract.median / contract.iqr)


def test_amplitude_does_not_matter_after_scaling(rng: np.random.Generator) -> None:
    series = rng.normal(size=(500, 3)).astype(np.float32)
    scaled = []
    for gain in (1.0, 1000.0):
        median, iqr = robust_statistics(gain * series)
        scaled.append(scale((gain * series).astype(np.float32), three_parcels(list(median), list(iqr))))
    np.testing.assert_allclose(scaled[0], scaled[1], atol=1e-4)
    low, middle, high = np.percentile(scaled[0], (25, 50, 75), axis=0)
    np.testing.assert_allclose(middle, 0, atol=1e-6)
    np.testing.assert_allclose(high - low, 1, atol=1e-6)


@pytest.mark.parametrize(("iqr", "covered"), [([1, 0, 1], (True,) * 3), ([1, 1, 1], (True, False, True))])
def test_a_parcel_without_spread_or_coverage_is_zero_and_not_usable(iqr: list[float], covered: tuple) -> None:
    contract = three_parcels([3, 3, 3], iqr, covered)
    bold = np.array([[4, 1e6, 4], [4, np.nan, 4]], dtype=np.float32)
    np.testing.assert_array_equal(scale(bold, contract), [[1, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(unscale(scale(bold, contract), contract), [[4, 0, 4], [4, 0, 4]])
    assert contract.usable.tolist() == [True, False, True]


def test_unscale_undoes_scale(contract: InputContract, rng: np.random.Generator) -> None:
    bold = rng.normal(0, 50, size=(4, 30, 6)).astype(np.float32)  # leading axes are free
    scaled = scale(bold, contract)
    np.testing.assert_allclose(unscale(scaled, contract), bold, rtol=1e-5, atol=1e-5)
    assert scaled.dtype == unscale(scaled, contract).dtype == np.float32


def test_the_input_is_not_modified(contract: InputContract, rng: np.random.Generator) -> None:
    bold = rng.normal(size=(30, 6)).astype(np.float32)
    before = bold.copy()
    for result in (scale(bold, contract), unscale(bold, contract), centre(bold), robust_statistics(bold)[0]):
        assert not np.shares_memory(result, bold)
    np.testing.assert_array_equal(bold, before)


def test_another_number_of_parcels_is_refused(contract: InputContract) -> None:
    with pytest.raises(DataError, match="7 columns, the contract has 6 parcels"):
        scale(np.zeros((3, 7), dtype=np.float32), contract)


def test_centring_uses_the_kept_timepoints_alone() -> None:
    bold = np.array([[1, 10], [3, 20], [1000, np.nan]], dtype=np.float32)
    centred = centre(bold, np.array([True, True, False]))
    np.testing.assert_array_equal(centred, [[-1, -5], [1, 5], [998, np.nan]])
    np.testing.assert_array_equal(centre(bold[:2]), centred[:2])


def test_centring_is_exact_on_a_large_baseline(rng: np.random.Generator) -> None:
    bold = (1e5 + rng.integers(-8, 9, size=(20_000, 2))).astype(np.float32)  # a float32 sum would round
    assert np.abs(centre(bold).mean(axis=0, dtype=np.float64)).max() < 1e-6


def test_centring_on_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no kept timepoints"):
        centre(np.zeros((3, 2), dtype=np.float32), np.zeros(3, dtype=bool))


def test_robust_statistics_are_the_ones_computed_by_hand() -> None:
    # First column sorted: 1 2 3 4 10, quartiles 2 and 4. Second, without NaN: 0 1 2 3, quartiles 0.75 and 2.25.
    series = np.array([[10, 3], [1, np.nan], [3, 0], [2, 1], [4, 2]], dtype=np.float32)
    median, iqr = robust_statistics(series)
    np.testing.assert_array_equal(median, [3, 1.5])
    np.testing.assert_array_equal(iqr, [2, 1.5])
    assert median.dtype == iqr.dtype == np.float32


def test_one_artefact_hardly_moves_the_statistics(rng: np.random.Generator, contract: InputContract) -> None:
    series = rng.normal(size=(1001, 6)).astype(np.float32)
    spoiled = series.copy()
    spoiled[500] = 1e6
    for clean, dirty in zip(robust_statistics(series), robust_statistics(spoiled)):
        np.testing.assert_allclose(dirty, clean, atol=0.02)
    usable = replace(contract, median=robust_statistics(spoiled)[0], iqr=robust_statistics(spoiled)[1]).usable
    assert usable.all()
