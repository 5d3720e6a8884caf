"""Maps of perturbations against values by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from brainlm.errors import ConfigError, DataError
from brainlm.perturbation_maps import asymmetry, change_by_network, change_by_parcel, mirrored_pairs
from brainlm.testing import synthetic_atlas


def test_a_parcel_has_the_mean_size_of_its_change_over_kept_timepoints() -> None:
    change = np.array([[[1.0, -3.0, 100.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]]], dtype=np.float32)
    present, kept = np.array([[True, True, False]]), np.array([[True, True, False]])
    np.testing.assert_allclose(change_by_parcel(change, present, kept), [[2.0, 0.0, np.nan]])
    np.testing.assert_allclose(change_by_parcel(change, present)[0, 0], 104 / 3)
    assert np.isnan(change_by_parcel(change, present, np.zeros((1, 3), dtype=bool))).all()


def test_a_network_is_the_mean_over_its_known_parcels() -> None:
    by_parcel = np.array([[1.0, 3.0, np.nan, 7.0, 9.0]])
    found = change_by_network(by_parcel, ["Vis", "Vis", "Vis", "Som", ""])
    assert {name: values.tolist() for name, values in found.items()} == {"Som": [7.0], "Vis": [2.0]}
    with pytest.raises(DataError, match="5 parcels and 2 names"):
        change_by_network(by_parcel, ["Vis", "Som"])
    with pytest.raises(DataError, match="no parcel has a network"):
        change_by_network(by_parcel, [""] * 5)


def test_mirrored_parcels_are_found_and_compared() -> None:
    atlas = synthetic_atlas(6, 2, 0)
    coords = np.array([[-30, 0, 0], [31, 1, 0], [-50, -20, 10], [49, -20, 10], [0, 5, 5], [-30, 60, 0]], np.float32)
    pairs = mirrored_pairs(replace(atlas, coords_mm=coords))
    assert (pairs.left.tolist(), pairs.right.tolist()) == ([0, 2], [1, 3])
    by_parcel = np.array([[3.0, 1.0, 0.0, 2.0, 5.0, 5.0], [0.0, 0.0, np.nan, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(asymmetry(by_parcel, pairs), [[0.5, -1.0], [np.nan, np.nan]])
    with pytest.raises(ConfigError, match=r"each other's mirror image within 0\.5 mm"):
        mirrored_pairs(replace(atlas, coords_mm=coords), within_mm=0.5)
