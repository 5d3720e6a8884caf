"""What an atlas refuses, what it calls a difference, and that it survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from brainlm.atlas import MAX_LISTED, Atlas
from brainlm.errors import DataError
from brainlm.testing import synthetic_atlas


@pytest.fixture
def atlas() -> Atlas:
    return Atlas(
        name="gappy",
        sha256="0" * 64,
        labels=np.array([2, 130, 300]),  # gaps, above 127 and 255
        parcel_names=("A", "B", "C"),
        coords_mm=np.array([[-30.5, 0, 10], [30.25, 0, 10], [0, -70, 5]]),
        networks=("", "visual", "visual"),
        space="MNI152NLin6Asym",
        hemispheres=("L", "R", ""),
    )


def test_atlas_survives_json(atlas: Atlas) -> None:
    again = Atlas.from_json(json.loads(json.dumps(atlas.to_json())))
    assert again.to_json() == atlas.to_json()
    np.testing.assert_array_equal(again.labels, [2, 130, 300])
    np.testing.assert_array_equal(again.coords_mm, atlas.coords_mm)
    assert (again.parcel_names, again.networks, again.space) == (atlas.parcel_names, atlas.networks, atlas.space)
    assert again.hemispheres == atlas.hemispheres == ("L", "R", "")
    assert (again.labels.dtype, again.coords_mm.dtype) == (np.int64, np.float32)


def test_coordinates_survive_json_to_the_bit() -> None:
    coords_mm = np.random.default_rng(0).uniform(-120, 120, (40, 3)).astype(np.float32)
    atlas = replace(synthetic_atlas(40), coords_mm=coords_mm)
    np.testing.assert_array_equal(Atlas.from_json(json.loads(json.dumps(atlas.to_json()))).coords_mm, atlas.coords_mm)
    np.testing.assert_allclose(atlas.coords_mm, coords_mm, atol=6e-4)


def test_atlas_without_networks_or_hemispheres_survives_json(atlas: Atlas) -> None:
    again = Atlas.from_json(json.loads(json.dumps(replace(atlas, networks=None, hemispheres=None).to_json())))
    assert again.networks is None
    assert again.hemispheres is None


def test_an_atlas_written_before_hemispheres_were_carried_still_reads(atlas: Atlas) -> None:
    tree = atlas.to_json()
    del tree["hemispheres"]
    assert Atlas.from_json(tree).hemispheres is None


def test_hemispheres_are_no_difference_between_two_atlases(atlas: Atlas) -> None:
    older = replace(atlas, hemispheres=None)
    assert atlas.differences(older) == []
    assert older.differences(atlas) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parcel_names": ("A", "B", "A")}, "parcel names must be unique, found twice: A"),
        ({"labels": np.array([2, 130, 130])}, "labels must be unique, found twice: 130"),
        ({"labels": np.array([2, 130])}, r"labels of shape \(2,\)"),
        ({"coords_mm": np.zeros((3, 2))}, r"coordinates of shape \(3, 2\)"),
        ({"coords_mm": np.full((3, 3), np.nan)}, "finite"),
        ({"networks": ("visual",)}, "3 parcels but 1 network names"),
        ({"hemispheres": ("L",)}, "3 parcels but 1 hemispheres"),
        ({"hemispheres": ("L", "R", "left")}, 'L, R, B or "", found left'),
        ({"parcel_names": (), "labels": np.zeros(0), "coords_mm": np.zeros((0, 3))}, "no parcels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(atlas: Atlas, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(atlas, **changes)


def test_an_atlas_does_not_differ_from_itself_or_from_another_resolution(atlas: Atlas) -> None:
    finer = replace(atlas, sha256="1" * 64, coords_mm=atlas.coords_mm + 0.5)  # 0.87 mm: another resolution
    assert atlas.differences(atlas) == []
    assert atlas.differences(finer) == []


def test_reordered_parcels_are_called_reordered() -> None:
    ours = synthetic_atlas(8)
    order = [1, 0, *range(2, 8)]
    theirs = replace(ours, parcel_names=tuple(ours.parcel_names[i] for i in order), coords_mm=ours.coords_mm[order])
    (found,) = ours.differences(theirs)
    first, second = ours.parcel_names[:2]
    assert found == (
        f"the same parcels in another order: column 0: {first} against {second}; column 1: {second} against {first}"
    )


def test_many_renamed_parcels_are_counted_and_only_some_listed() -> None:
    ours = synthetic_atlas(40)
    (found,) = ours.differences(replace(ours, parcel_names=tuple(f"x{i}" for i in range(40))))
    assert found.startswith("other parcel names: column 0: ")
    assert found.count(" against ") == MAX_LISTED
    assert found.endswith(f", and {40 - MAX_LISTED} more")


def test_moved_parcels_are_named_with_their_distance(atlas: Atlas) -> None:
    moved = atlas.coords_mm.copy()
    moved[1] += (0, 3, 4)
    moved[2] += (1.5, 0, 0)
    (found,) = atlas.differences(replace(atlas, coords_mm=moved))
    assert found.startswith("2 parcels lie elsewhere, B by 5.0 mm")


def test_another_number_of_parcels_is_a_difference_both_ways() -> None:
    small, large = synthetic_atlas(6, name="small"), synthetic_atlas(8, name="large")
    assert small.differences(large)[0] == "6 parcels (small) against 8 (large)"
    assert large.differences(small)[0] == "8 parcels (large) against 6 (small)"


def test_a_prefix_of_an_atlas_is_not_the_atlas() -> None:
    whole = synthetic_atlas(8)
    part = Atlas(
        name=whole.name,
        sha256=whole.sha256,
        labels=whole.labels[:6],
        parcel_names=whole.parcel_names[:6],
        coords_mm=whole.coords_mm[:6],
    )
    assert whole.differences(part)
    assert part.differences(whole)
