"""CIFTI label files as atlases: parcels are found by structure and vertex or voxel, never by position in a file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ScalarAxis

from brainlm.errors import DataError
from data_prep.atlas_image import load_atlas
from data_prep.settings import AtlasSettings

LEFT, RIGHT = "CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT"
THALAMUS = "CIFTI_STRUCTURE_THALAMUS_LEFT"
NUM_VERTICES = 40
LAS = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])
VOLUME = (91, 109, 91)
# Left vertices 3..22, right 0..19; some without a label. Labels with gaps, above 127 and 255.
LEFT_VERTICES = np.arange(3, 23)
RIGHT_VERTICES = np.arange(20)
VOXELS = np.array([[50 + i, 55, 40 + j] for i in range(3) for j in range(4)])
KEYS = np.concatenate([np.repeat([7, 130], 10), np.repeat([0, 300], [4, 16]), np.repeat([1000], 12)])
NAMES = {0: "???", 7: "L_V1", 130: "L_V2", 300: "R_V1", 1000: "thalamus"}
TABLE = "index\tx_mm\ty_mm\tz_mm\n7\t-10\t-90\t0\n130\t-12\t-80\t5\n300\t10\t-90\t0\n1000\t-14\t-16\t12\n"


def axis(
    left: np.ndarray = LEFT_VERTICES,
    right: np.ndarray = RIGHT_VERTICES,
    voxels: np.ndarray | None = VOXELS,
    num_vertices: int = NUM_VERTICES,
    affine: np.ndarray = LAS,
    shape: tuple[int, int, int] = VOLUME,
) -> BrainModelAxis:
    parts = [
        BrainModelAxis.from_surface(left, num_vertices, LEFT),
        BrainModelAxis.from_surface(right, num_vertices, RIGHT),
    ]
    if voxels is not None:
        parts.append(
            BrainModelAxis(THALAMUS, voxel=voxels, affine=affine, volume_shape=shape),
        )
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def write(
    path: Path,
    keys: np.ndarray = KEYS,
    models: BrainModelAxis | None = None,
    names: dict[int, str] = NAMES,
    maps: int = 1,
) -> Path:
    table = {key: (name, (1.0, 1.0, 1.0, 1.0)) for key, name in names.items()}
    labels = LabelAxis([f"map{i}" for i in range(maps)], [table] * maps)
    data = np.tile(keys.astype(np.float32), (maps, 1))
    nibabel.save(nibabel.Cifti2Image(data, (labels, axis() if models is None else models)), path)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def run(path: Path | None = None, table: str | None = TABLE, **settings: Any) -> Any:
        if table is not None:
            (tmp_path / "table.tsv").write_text(table)
            settings["labels"] = str(tmp_path / "table.tsv")
        image = write(tmp_path / "a.dlabel.nii") if path is None else path
        return load_atlas(AtlasSettings(name="mmp", image=str(image), **settings))

    return run


def test_parcels_are_those_of_the_label_table_without_key_0(load):
    found = load()
    assert found.atlas.parcel_names == ("L_V1", "L_V2", "R_V1", "thalamus")
    np.testing.assert_array_equal(found.atlas.labels, [7, 130, 300, 1000])
    np.testing.assert_array_equal(found.atlas.coords_mm[0], [-10, -90, 0])
    np.testing.assert_array_equal(found.grayordinates.num_grayordinates, [10, 10, 16, 12])


def test_a_key_called_nothing_is_no_parcel(load, tmp_path):
    keys = np.where(KEYS == 0, 5, KEYS)
    found = load(write(tmp_path / "b.dlabel.nii", keys, names=NAMES | {5: "???"}))
    assert found.atlas.parcel_names == ("L_V1", "L_V2", "R_V1", "thalamus")


def test_its_own_axis_gives_back_its_own_labels(load):
    found = load()
    columns = found.columns_of(axis())
    expected = np.searchsorted([7, 130, 300, 1000], KEYS)
    np.testing.assert_array_equal(columns, np.where(KEYS == 0, -1, expected))


def test_a_series_in_another_order_with_other_grayordinates_is_looked_up(load, rng):
    """A dense series need not list what the labels list: another medial wall, another order, more structures."""
    found = load()
    left, right = rng.permutation(NUM_VERTICES)[:30], np.arange(NUM_VERTICES)
    voxels = rng.permutation(np.vstack([VOXELS[2:], VOXELS + np.array([0, 7, 0])]))
    series = axis(left, right, voxels)
    other = BrainModelAxis("CIFTI_STRUCTURE_PUTAMEN_LEFT", voxel=VOXELS, affine=LAS, volume_shape=VOLUME)
    parts = [series[len(left) + len(right) :], other, series[: len(left) + len(right)]]  # voxels first
    series = parts[0] + parts[1] + parts[2]
    by_vertex = {(LEFT, v): k for v, k in zip(LEFT_VERTICES, KEYS)} | {
        (RIGHT, v): k for v, k in zip(RIGHT_VERTICES, KEYS[20:])
    }
    by_voxel = {tuple(ijk): 1000 for ijk in VOXELS}
    labels = [7, 130, 300, 1000]
    expected = []
    for name, vertex, voxel in zip(series.name, series.vertex, series.voxel):
        if name == THALAMUS:
            key = by_voxel.get(tuple(voxel), 0)
        else:
            key = by_vertex.get((name, vertex), 0)
        expected.append(labels.index(key) if key else -1)
    np.testing.assert_array_equal(found.columns_of(series), expected)
    assert 0 < np.count_nonzero(np.array(expected) >= 0) < len(expected)


def test_voxels_are_matched_in_space_when_the_series_is_stored_the_other_way_round(load):
    ras = LAS @ np.array([[-1, 0, 0, VOLUME[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    flipped = VOXELS * np.array([-1, 1, 1]) + np.array([VOLUME[0] - 1, 0, 0])
    columns = load().columns_of(axis(voxels=flipped, affine=ras))
    np.testing.assert_array_equal(columns[-len(VOXELS) :], 3)
    unflipped = load().columns_of(axis(voxels=VOXELS, affine=ras))
    assert (unflipped[-len(VOXELS) :] == -1).any()


def test_another_mesh_is_refused(load):
    with pytest.raises(DataError, match="surface of 64 vertices, the CIFTI atlas one of 40"):
        load().columns_of(axis(num_vertices=64))


@pytest.mark.parametrize("shift_mm", [1.0, 0.3])
def test_voxels_on_another_grid_are_refused(load, shift_mm):
    shifted = LAS.copy()
    shifted[0, 3] += shift_mm
    with pytest.raises(DataError, match="lie on another grid"):
        load().columns_of(axis(affine=shifted))


def test_larger_voxels_are_refused_even_where_they_start_alike(load):
    larger = LAS.copy()
    larger[:3, :3] *= 2
    with pytest.raises(DataError, match="lie on another grid"):
        load().columns_of(axis(affine=larger, voxels=VOXELS // 2))


def test_nothing_in_common_is_refused(load, tmp_path):
    cerebellum = BrainModelAxis("CIFTI_STRUCTURE_CEREBELLUM_LEFT", voxel=VOXELS, affine=LAS, volume_shape=VOLUME)
    with pytest.raises(DataError, match="no grayordinate in common"):
        load().columns_of(cerebellum)


def test_surface_parcels_need_coordinates_from_a_table(load):
    with pytest.raises(DataError, match=r"3 parcels lie on surfaces.*give atlas\.labels.*wb_command"):
        load(table=None)


def test_volume_parcels_have_their_centres_of_mass(load, tmp_path):
    models = BrainModelAxis(THALAMUS, voxel=VOXELS, affine=LAS, volume_shape=VOLUME)
    path = write(tmp_path / "v.dlabel.nii", np.repeat([3, 9], 6), models, {0: "???", 3: "front", 9: "back"})
    found = load(path, table=None)
    assert found.atlas.parcel_names == ("front", "back")
    expected = VOXELS[:6].mean(axis=0) * [-2, 2, 2] + [90, -126, -72]
    np.testing.assert_allclose(found.atlas.coords_mm[0], expected, atol=1e-3)


def test_names_and_hemispheres_of_a_table_win_and_are_carried(load):
    rows = [line.split("\t") for line in TABLE.splitlines()]
    names = ["name", "one", "two", "three", "four"]
    sides = ["hemi", "L", "L", "R", "L"]
    table = "\n".join("\t".join([*row, name, side]) for row, name, side in zip(rows, names, sides))
    found = load(table=table, hemisphere_column="hemi")
    assert found.atlas.parcel_names == ("one", "two", "three", "four")
    assert found.atlas.hemispheres == ("L", "L", "R", "L")


def test_a_table_that_numbers_the_hemispheres_the_other_way_is_refused(load):
    """The labels of the volume of Glasser's parcels begin left, those of its CIFTI file right."""
    mirrored = TABLE.replace("-10", "+10").replace("-12", "+12").replace("\t10", "\t-10")
    with pytest.raises(DataError, match="3 of 4 parcels lie in the other hemisphere"):
        load(table=mirrored)


def test_coordinates_outside_of_the_voxels_are_refused(load):
    with pytest.raises(DataError, match="outside of the parcels"):
        load(table=TABLE.replace("1000\t-14\t-16\t12", "1000\t-54\t-16\t12"))


def test_volume_and_cifti_do_not_mix(load, toy):
    cifti, volume = load(), load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))
    with pytest.raises(DataError, match="volume image, the atlas mmp a CIFTI label file"):
        cifti.on_grid(VOLUME, LAS)
    with pytest.raises(DataError, match=r"dense CIFTI series, the atlas toy a volume image.*\.dlabel\.nii"):
        volume.columns_of(axis())


def test_the_hash_depends_on_labels_and_places_alone(load, tmp_path):
    shuffled = np.random.default_rng(3).permutation(20)
    models = axis(left=LEFT_VERTICES[shuffled])
    keys = np.concatenate([KEYS[:20][shuffled], KEYS[20:]])
    assert load(write(tmp_path / "s.dlabel.nii", keys, models)).atlas.sha256 == load().atlas.sha256
    moved = KEYS.copy()
    moved[9] = 130
    assert load(write(tmp_path / "m.dlabel.nii", moved)).atlas.sha256 != load().atlas.sha256
    assert (
        load(write(tmp_path / "t.dlabel.nii", models=axis(left=LEFT_VERTICES + 1))).atlas.sha256 != load().atlas.sha256
    )


def test_it_travels_to_workers(load):
    found = load()
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.columns_of(axis()), found.columns_of(axis()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": 2}, r"holds 2 label maps \(map0, map1\)"),
        ({"names": {0: "???", 7: "a"}}, "no entry for 3 labels, for example 130"),
        ({"keys": np.zeros_like(KEYS)}, "no label above 0"),
        ({"keys": KEYS - 5}, "found -5"),
        ({"keys": KEYS / 3}, "whole numbers"),
        ({"models": axis(num_vertices=10**9)}, "1000000000 vertices is not believable"),
    ],
)
def test_what_is_no_label_file_is_refused(load, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "b.dlabel.nii", **changes))


def test_a_scalar_file_is_no_label_file(load, tmp_path):
    image = nibabel.Cifti2Image(KEYS[None].astype(np.float32), (ScalarAxis(["myelin"]), axis()))
    nibabel.save(image, tmp_path / "b.dscalar.nii")
    with pytest.raises(DataError, match=r"expected a dense label file .* found ScalarAxis, BrainModelAxis"):
        load(tmp_path / "b.dscalar.nii")


def test_transforms_between_volumes_are_refused(load, tmp_path):
    with pytest.raises(DataError, match="grayordinates need none"):
        load(space="MNI152NLin6Asym", transforms={"MNI152NLin2009cAsym": "x.h5"})
