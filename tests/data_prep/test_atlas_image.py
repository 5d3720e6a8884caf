"""Label images and their tables: whatever form they come in, and whatever is silently wrong with them."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import fsspec
import nibabel
import numpy as np
import pytest

from brainlm.atlas import Atlas
from brainlm.config import build
from brainlm.errors import ConfigError, DataError
from brainlm.testing import synthetic_atlas
from data_prep.atlas_image import AtlasImage, load_atlas, series_atlas
from data_prep.settings import AtlasSettings

SHAPE = (12, 14, 12)
LABELS = (3, 7, 130, 300, 1000, 1001)  # as the toy atlas
LAS = np.array([[-14.0, 0, 0, 77], [0, 14.0, 0, -105], [0, 0, 14.0, -63], [0, 0, 0, 1]])


def load(
    toy, image: Path | str = "atlas.nii.gz", table: str | None = None, suffix: str = ".tsv", **settings: Any
) -> AtlasImage:
    if table is not None:
        (toy.folder / f"table{suffix}").write_text(table)
        settings["labels"] = str(toy.folder / f"table{suffix}")
    return load_atlas(AtlasSettings(name="toy", image=str(toy.folder / image), **settings))


def write(path: Path, values: np.ndarray, kind: Any = nibabel.Nifti1Image, **scaling: float) -> Path:
    image = kind(values, LAS)
    image.header["sform_code"] = image.header["qform_code"] = 4
    if scaling:
        image.header.set_slope_inter(scaling["slope"], scaling["inter"])
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_the_type_of_the_file_changes_nothing(toy, dtype, kind):
    few = {label: number for number, label in enumerate(LABELS, 250)} if dtype == np.uint8 else {}
    labels = np.vectorize(lambda v: few.get(int(v), int(v)))(toy.labels)
    write(toy.folder / "typed.nii.gz", labels.astype(dtype), kind)
    write(toy.folder / "plain.nii", labels.astype(np.int32))
    found, plain = load(toy, "typed.nii.gz"), load(toy, "plain.nii")
    assert found.atlas.to_json() == plain.atlas.to_json()
    np.testing.assert_array_equal(found.columns, plain.columns)
    np.testing.assert_array_equal(found.atlas.labels, np.unique(labels)[1:])


@pytest.mark.parametrize(("slope", "inter"), [(1.0, -7.0), (0.1, 0.0), (2.0, 1.0), (0.01, 3.0)])
def test_labels_are_the_scaled_values(toy, slope, inter):
    values = toy.labels[:, 6] if slope == 0.01 else toy.labels
    values = np.where(values == 0, 0, np.round(values))
    if slope == 2.0:
        values = np.where(values == 0, 1, 2 * values + 1)  # odd numbers, which 2 n + 1 can store
    if slope == 0.01:
        values = toy.labels % 100
    stored = np.round((values - inter) / slope).astype(np.int16)
    write(toy.folder / "scaled.nii.gz", stored, slope=slope, inter=inter)
    found = load(toy, "scaled.nii.gz")
    np.testing.assert_array_equal(found.atlas.labels, np.unique(values[values > 0]))
    expected = np.where(values > 0, np.searchsorted(found.atlas.labels, values), -1)
    np.testing.assert_array_equal(found.columns, expected)


@pytest.mark.parametrize("shape", [(*SHAPE, 1), (*SHAPE, 1, 1)])
def test_one_volume_with_further_axes_is_one_volume(toy, shape):
    write(toy.folder / "four.nii.gz", toy.labels.astype(np.int16).reshape(shape))
    assert load(toy, "four.nii.gz").atlas.to_json() == load(toy).atlas.to_json()


def _header_claims(folder: Path, shape: tuple[int, ...], offset: float = 352.0, version: int = 1) -> Path:
    """Write a header with nothing behind it."""
    path = folder / "claims.nii.gz"
    if version == 1:
        head = bytearray(352)
        struct.pack_into("<i", head, 0, 348)
        struct.pack_into(f"<{len(shape) + 1}h", head, 40, len(shape), *shape)
        struct.pack_into("<hh", head, 70, 16, 32)
        struct.pack_into("<f", head, 108, offset)
        head[344:348] = b"n+1\0"
    else:
        head = bytearray(544)
        struct.pack_into("<i", head, 0, 540)
        head[4:12] = b"n+2\0\r\n\x1a\n"
        struct.pack_into("<hh", head, 12, 16, 32)
        struct.pack_into(f"<{len(shape) + 1}q", head, 16, len(shape), *shape)
        struct.pack_into("<q", head, 168, int(offset))
    path.write_bytes(gzip.compress(bytes(head)))
    return path


def _values(change: Any) -> Any:
    return lambda toy: write(toy.folder / "bad.nii.gz", change(toy.labels))


def _without_forms(toy) -> Path:
    image = nibabel.Nifti1Image(toy.labels.astype(np.int16), None)
    nibabel.save(image, toy.folder / "bad.nii")
    return toy.folder / "bad.nii"


def _flat(toy) -> Path:
    path = write(toy.folder / "bad.nii", toy.labels.astype(np.int16))
    data = bytearray(path.read_bytes())
    data[280:328] = bytes(48)  # sform all 0
    path.write_bytes(bytes(data))
    return path


def _cut(toy) -> Path:
    path = write(toy.folder / "bad.nii.gz", np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int32))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def _text(toy) -> Path:
    (toy.folder / "bad.nii").write_text("not an image" * 100)
    return toy.folder / "bad.nii"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_values(lambda v: v - 1), "found -1"),
        (_values(lambda v: v / 7), "whole numbers"),
        (_values(lambda v: v * 1e-6), "whole numbers"),
        (_values(lambda v: np.where(v == 0, np.nan, v)), "a voxel is nan"),
        (_values(lambda v: v * 1e9), "from 0 up to"),
        (_values(lambda v: np.repeat(v[..., None], 3, axis=3)), "probability map"),
        (_values(lambda v: (v * 0).astype(np.int16)), "no label above 0"),
        (_values(lambda v: v.astype(np.complex64)), "complex64 are not labels"),
        (_without_forms, "neither qform nor sform"),
        (_flat, "affine of the atlas is not usable"),
        (_cut, "cannot read the atlas image"),
        (_text, "not a NIfTI header"),
        (lambda toy: toy.folder / "none.nii.gz", "there is no atlas image"),
        (lambda toy: toy.folder / "atlas.tsv", "expected a label image"),
        (lambda toy: _header_claims(toy.folder, (30000, 30000, 30000)), "its header claims"),
        (lambda toy: _header_claims(toy.folder, (-5, 10, 10)), "its header claims"),
        (lambda toy: _header_claims(toy.folder, (10**6, 10**6, 10**6), version=2, offset=544), "its header claims"),
        (lambda toy: _header_claims(toy.folder, (10, 10, 10), offset=2e9), "begin at byte 2e"),
        (lambda toy: _header_claims(toy.folder, (10, 10, 10), offset=float("nan")), "begin at byte nan"),
        (lambda toy: _header_claims(toy.folder, (10, 10, 10), version=2, offset=-1), "begin at byte -1"),
    ],
)
def test_what_is_no_label_image_is_refused_before_much_is_read(toy, make, message):
    with pytest.raises(DataError, match=message):
        load(toy, make(toy))


def test_a_scan_is_no_atlas(toy, rng):
    write(toy.folder / "scan.nii.gz", rng.permutation(20000).reshape(20, 20, 50).astype(np.int32))
    with pytest.raises(DataError, match="more than 10000 labels are too many"):
        load(toy, "scan.nii.gz")


def lines(separator: str = "\t", order: tuple[int, ...] = LABELS, extra: str = "") -> str:
    return "\n".join(separator.join([str(label), f"p{label}"]) for label in order) + extra


NAMES = tuple(f"p{label}" for label in LABELS)
COLOURS = "\n".join(f"{label}  p{label}   10 20 30 0" for label in LABELS[::-1])
XML = "".join(f"<label><index>{label}</index><name>p{label}</name></label>" for label in LABELS[::-1])


@pytest.mark.parametrize(
    ("suffix", "table"),
    [
        (".tsv", "index\tname\n" + lines(order=LABELS[::-1])),
        (".csv", "name,index\n" + "\n".join(f"p{label},{label}" for label in LABELS)),
        (".tsv", "index\tname\n0\tBackground\n" + lines()),
        (".txt", "# colours\n\n0 Unknown 0 0 0 0\n" + COLOURS),
        (".lut", COLOURS),
        (".txt", "index name\n" + lines(" ")),
        (".xml", f"<?xml version='1.0'?><atlas><data>{XML}</data></atlas>"),
    ],
)
def test_names_are_found_by_label_in_every_kind_of_table(toy, suffix, table):
    assert load(toy, table=table, suffix=suffix).atlas.parcel_names == NAMES


@pytest.mark.parametrize(
    ("suffix", "table", "message"),
    [
        (".tsv", lines(), "has no column 'index', 'name'.*needs a header line, such as index, name"),
        (".txt", "\n".join(f"{label} 1 2 3" for label in LABELS), "'index name r g b a'.*found '3 1 2 3' first"),
        (".txt", "index name\n" + lines(" ", extra="\n9 two words"), "expected 2 columns .* found '9 two words'"),
        (".txt", "# nothing\n", "is empty"),
        (".xml", "<atlas><data></data></atlas>", "expected elements <label>"),
        (".xml", "<atlas><label>", "not readable XML"),
        (".xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "no use for XML entities"),
        (".tsv", "index\tname\n" + lines(extra="\n3\tagain"), "a label stands in several rows"),
        (".tsv", "index\tname\n" + lines().replace("p3\n", "Background\n"), "calls label 3 'Background'"),
    ],
)
def test_a_table_that_cannot_be_understood_says_what_is_expected(toy, suffix, table, message):
    with pytest.raises(DataError, match=message):
        load(toy, table=table, suffix=suffix)


def test_image_and_table_may_lie_on_remote_storage(toy):
    fs = fsspec.filesystem("memory")
    for name, text in (("atlas.nii.gz", (toy.folder / "atlas.nii.gz").read_bytes()), ("colours.txt", COLOURS.encode())):
        fs.pipe_file(f"/atlases/{name}", text)
    settings = AtlasSettings(name="toy", image="memory://atlases/atlas.nii.gz", labels="memory://atlases/colours.txt")
    assert load_atlas(settings).atlas.parcel_names == NAMES
    fs.rm("/atlases", recursive=True)


def test_a_large_table_is_not_read(toy, monkeypatch):
    monkeypatch.setattr("data_prep.label_table.MAX_TABLE_BYTES", 20)
    with pytest.raises(DataError, match="too many for a table"):
        load(toy, table="index\tname\n" + lines())


def placed(x: tuple[float, ...] = (-7,) * 6, sides: str = "LLLLLL") -> str:
    """A table that puts each parcel into its own block; the blocks follow one another along y."""
    rows = [f"{label}\tp{label}\t{x[i]}\t{-70 + 28 * i}\t28\t{sides[i]}" for i, label in enumerate(LABELS)]
    return "index\tname\tx_mm\ty_mm\tz_mm\themisphere\n" + "\n".join(rows)


def test_coordinates_by_the_table_replace_the_centres_of_mass(toy):
    atlas = load(toy, table=placed((-8, -8, -8, -8, -8, -8.5))).atlas
    np.testing.assert_array_equal(atlas.coords_mm[:, 0], [-8, -8, -8, -8, -8, -8.5])
    np.testing.assert_array_equal(atlas.coords_mm[:, 1], np.arange(-70, 90, 28))


@pytest.mark.parametrize(
    "change", [lambda xyz: np.roll(xyz, 1, axis=0), lambda xyz: xyz * (1, -1, 1), lambda xyz: xyz / 14 + 6]
)
def test_coordinates_of_other_rows_signs_or_units_are_refused(toy, change):
    rows = [line.split("\t") for line in placed().splitlines()]
    moved = change(np.array([row[2:5] for row in rows[1:]], dtype=float))
    text = "\n".join("\t".join([*row[:2], *map(str, xyz), row[5]]) for row, xyz in zip(rows[1:], moved))
    with pytest.raises(DataError, match=r"coordinates lie \d+ mm \(median\) outside of the parcels"):
        load(toy, table="\t".join(rows[0]) + "\n" + text)


def test_a_parcel_without_coordinates_is_named(toy):
    with pytest.raises(DataError, match=r"1 parcels have no coordinates in x_mm, y_mm, z_mm, for example 7"):
        load(toy, table=placed().replace("7\tp7\t-7\t", "7\tp7\tn/a\t"))


def halves(toy) -> Path:
    """Six parcels, three in each hemisphere."""
    labels = np.zeros(SHAPE)
    for number, label in enumerate(LABELS):
        side = slice(1, 4) if number % 2 else slice(7, 10)  # LAS: low i is right
        labels[side, 4 * (number // 2) : 4 * (number // 2) + 3, 3:8] = label
    return write(toy.folder / "halves.nii.gz", labels.astype(np.int16))


@pytest.mark.parametrize("words", [("L", "R", ""), ("left", "RIGHT", "n/a"), ("lh", "rh", "midline")])
def test_hemispheres_are_read_from_their_column(toy, words):
    left, right, none = words
    sides = [left, right, left, right, left, none]
    table = "index\tname\tside\n" + "\n".join(f"{v}\tp{v}\t{s}" for v, s in zip(LABELS, sides))
    found = load(toy, halves(toy), table=table, hemisphere_column="side").atlas
    assert found.hemispheres == ("L", "R", "L", "R", "L", "")
    assert Atlas.from_json(json.loads(json.dumps(found.to_json()))).hemispheres == found.hemispheres


def test_hemispheres_in_names_are_read_where_asked_for_and_never_guessed(toy):
    names = ["7Networks_LH_Vis_1", "Precentral_R", "lh.V1", "Right-Amygdala", "L_R_between", "Vermis_4"]
    table = "index\tname\n" + "\n".join(f"{v}\t{n}" for v, n in zip(LABELS, names))
    assert load(toy, halves(toy), table=table, hemisphere_column="name").atlas.hemispheres == (
        "L",
        "R",
        "L",
        "R",
        "",
        "",
    )
    assert load(toy, halves(toy), table=table).atlas.hemispheres is None


def test_exchanged_hemispheres_are_refused(toy):
    table = "index\tname\tside\n" + "\n".join(f"{v}\tp{v}\t{'RL'[i % 2]}" for i, v in enumerate(LABELS))
    with pytest.raises(DataError, match=r"column 'side', 6 of 6 parcels lie in the other hemisphere"):
        load(toy, halves(toy), table=table, hemisphere_column="side")


def test_an_unknown_hemisphere_is_refused(toy):
    with pytest.raises(DataError, match=r"hemisphere: expected L, R, B .* found X, Y"):
        load(toy, table=placed(sides="XYXLLL"), hemisphere_column="hemisphere")


@pytest.mark.parametrize("column", ["network_column", "hemisphere_column"])
def test_a_column_of_no_table_is_refused(toy, column):
    with pytest.raises(DataError, match=rf"atlas\.{column} names a column of a table, but atlas\.labels gives none"):
        load(toy, **{column: "side"})


def named_by_network(other=""):
    names = [f"7Networks_{'LR'[i % 2]}H_{('Vis', 'Default_PFCv')[i % 2]}_{v}" for i, v in enumerate(LABELS)]
    return "index\tname\n" + "\n".join(f"{v}\t{name}" for v, name in zip(LABELS, [*names[:-1], other or names[-1]]))


def test_networks_come_from_names_by_a_pattern_of_the_settings(toy):
    pattern = "7Networks_[LR]H_([A-Za-z]+)_.+"
    found = load(toy, table=named_by_network(), network_pattern=pattern).atlas
    assert found.networks == ("Vis", "Default") * 3
    with pytest.raises(DataError, match=r"expected names that hold a network .* found Cerebellum:.*network_pattern"):
        load(toy, table=named_by_network("Cerebellum"), network_pattern=pattern)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network_pattern": "7Networks_.+"}, "must have a group"),
        ({"network_pattern": "(a"}, "is no regular expression"),
        ({"network_pattern": "(a)", "network_column": "network"}, "not both"),
    ],
)
def test_a_pattern_of_networks_that_cannot_be_used_is_refused_in_the_config(settings, said):
    with pytest.raises(ConfigError, match=said):
        build(AtlasSettings, {"name": "mine", **settings}, "test")


def test_it_travels_small_and_unchanged(toy):
    atlas = load(toy, table=placed(), hemisphere_column="hemisphere")
    grid = atlas.on_grid(SHAPE, LAS)
    packed = pickle.dumps(atlas)
    again = pickle.loads(packed)
    assert again.atlas.to_json() == atlas.atlas.to_json()
    np.testing.assert_array_equal(again.columns, atlas.columns)
    np.testing.assert_array_equal(again.on_grid(SHAPE, LAS).columns, grid.columns)
    assert len(packed) < 10_000
    assert again.warnings == atlas.warnings


def test_an_atlas_without_an_image_serves_series_alone():
    atlas = synthetic_atlas(8)
    found = series_atlas(atlas)
    assert found.atlas is atlas
    assert not found.has_volume
    with pytest.raises(DataError, match=r"no image here .*give atlas\.image"):
        found.on_grid(SHAPE, LAS)
    with pytest.raises(DataError, match=r"has no image: give atlas\.image a CIFTI"):
        found.columns_of(None)
    assert pickle.loads(pickle.dumps(found)).atlas.to_json() == atlas.to_json()


def test_real_tables_that_count_the_background_are_refused_not_shifted(shared_data):
    """Row 1 of this table is the background, and row 2 the parcel of label 1: joined by label, every name is wrong."""
    folder = shared_data / "atlases"
    image, table = str(folder / "schaefer400_7n.nii.gz"), str(folder / "schaefer400_7n_labels.csv")
    with pytest.raises(DataError, match="calls label 1 'Background'"):
        load_atlas(AtlasSettings(name="schaefer400", image=image, labels=table))


@pytest.mark.parametrize(
    ("image", "table", "count", "name", "side"),
    [
        ("glasser360.nii.gz", "glasser360_labels.csv", 360, "L_V1", "L"),
        ("aal116.nii.gz", "aal116_labels.csv", 116, "Precentral_L", "L"),
    ],
)
def test_real_atlases_have_their_hemispheres_where_they_lie(shared_data, image, table, count, name, side):
    folder = shared_data / "atlases"
    settings = AtlasSettings(
        name="real", image=str(folder / image), labels=str(folder / table), hemisphere_column="name"
    )
    atlas = load_atlas(settings).atlas
    assert (atlas.num_parcels, atlas.parcel_names[0], atlas.hemispheres[0]) == (count, name, side)
    sided = [(x, s) for x, s in zip(atlas.coords_mm[:, 0], atlas.hemispheres) if s]
    assert np.mean([(x > 0) == (s == "R") for x, s in sided]) > 0.99


def test_real_a424_with_its_table_by_label(shared_data):
    folder = shared_data / "atlases"
    settings = AtlasSettings(
        name="A424",
        image=str(folder / "A424+2mm.nii.gz"),
        labels=str(folder / "A424_yeo7.csv"),
        label_column="a424",
        coords_columns=("x_mni", "y_mni", "z_mni"),
        hemisphere_column="hemi",
        network_column="yeo7_name",
    )
    atlas = load_atlas(settings).atlas
    assert atlas.num_parcels == 424
    assert atlas.parcel_names[0] == "R_V1"
    assert {s: atlas.hemispheres.count(s) for s in ("L", "R", "")} == {"L": 209, "R": 208, "": 7}
    assert len(pickle.dumps(load_atlas(settings))) < 300_000


OTHER = "MNI152NLin2009cAsym"
FINE = np.array([[-2.0, 0, 0, 20], [0, 2.0, 0, -22], [0, 0, 2.0, -18], [0, 0, 0, 1]])


def blocks() -> np.ndarray:
    """Parcels of several sizes on a grid of 2 mm, one of them at the right edge."""
    labels = np.zeros((20, 22, 18), dtype=np.int16)
    labels[0:4, 4:9, 5:9] = 5
    labels[6:9, 10:16, 6:12] = 130
    labels[9:16, 10:16, 6:12] = 300
    labels[12:15, 2:5, 13:16] = 1000
    return labels


def itk_shift(path: Path, right: float = 0.0, anterior: float = 0.0, superior: float = 0.0) -> Path:
    """Write the transform that brings images to a space in which everything lies further right, anterior, superior."""
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: 1 0 0 0 1 0 0 0 1 {right} {anterior} {-superior}\nFixedParameters: 0 0 0\n"
    )
    return path


def with_transform(toy, transform: Path) -> AtlasImage:
    image = nibabel.Nifti1Image(blocks(), FINE)
    image.header["sform_code"] = image.header["qform_code"] = 4
    nibabel.save(image, toy.folder / "blocks.nii.gz")
    return load(toy, "blocks.nii.gz", space="MNI152NLin6Asym", transforms={OTHER: str(transform)})


def volume_of(grid: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the column of each voxel, -1 for none."""
    flat = np.full(int(np.prod(shape)), -1)
    flat[grid.voxels] = grid.columns
    return flat.reshape(shape, order="F")


def columns_of_blocks(labels: np.ndarray) -> np.ndarray:
    return np.where(labels > 0, np.searchsorted([5, 130, 300, 1000], labels), -1)


def test_a_parcel_that_lies_further_right_in_the_images_is_read_where_it_lies(toy):
    """4 mm to the right are 2 voxels down the first axis, which runs to the left."""
    atlas = with_transform(toy, itk_shift(toy.folder / "shift.txt", right=4.0))
    moved = np.zeros_like(blocks())
    moved[:-2] = blocks()[2:]
    grid = atlas.on_grid(moved.shape, FINE, OTHER)
    np.testing.assert_array_equal(volume_of(grid, moved.shape), columns_of_blocks(moved))
    signal = np.where(moved == 130, 7.0, 1.0).ravel(order="F")  # an image whose parcel 130 stands out
    assert signal[grid.voxels][grid.columns == 1].tolist() == [7.0] * int((blocks() == 130).sum())


@pytest.mark.parametrize(("way", "axis", "shift"), [("anterior", 1, 3), ("superior", 2, -2)])
def test_signs_are_right_along_the_other_axes(toy, way, axis, shift):
    atlas = with_transform(toy, itk_shift(toy.folder / "shift.txt", **{way: 2.0 * shift}))
    expected = np.roll(blocks(), shift, axis=axis)  # both axes run the way of RAS; no block reaches the edge
    grid = atlas.on_grid(expected.shape, FINE, OTHER)
    np.testing.assert_array_equal(volume_of(grid, expected.shape), columns_of_blocks(expected))


def test_coverage_counts_what_the_transform_moves_out_of_view(toy):
    atlas = with_transform(toy, itk_shift(toy.folder / "shift.txt", right=4.0))
    grid = atlas.on_grid(blocks().shape, FINE, OTHER)
    np.testing.assert_allclose(grid.in_view, [0.5, 1, 1, 1])  # parcel 5: voxels 0 to 3, of which 0 and 1 are out
    np.testing.assert_allclose(atlas.on_grid(blocks().shape, FINE).in_view, 1)


def test_images_in_other_spaces_are_not_moved(toy):
    atlas = with_transform(toy, itk_shift(toy.folder / "shift.txt", right=4.0))
    plain = columns_of_blocks(blocks())
    for space in ("", "MNI152NLin6Asym", "MNI152Lin"):
        np.testing.assert_array_equal(volume_of(atlas.on_grid(plain.shape, FINE, space), plain.shape), plain)
    assert (volume_of(atlas.on_grid(plain.shape, FINE, OTHER), plain.shape) != plain).any()
    np.testing.assert_array_equal(volume_of(atlas.on_grid(plain.shape, FINE), plain.shape), plain)


def test_labels_through_a_field_equal_a_loop_over_voxels(toy, rng):
    """A smooth field on a grid of its own, an oblique image of other voxels: each centre is looked up alone."""
    shape, field_affine = (12, 13, 11), np.diag([-5.0, 5, 5, 1])
    field_affine[:3, 3] = 28, -30, -24
    voxel = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    shifts = np.stack([3 * np.sin(voxel @ rng.uniform(0.1, 0.4, 3) + i) for i in range(3)], axis=-1)
    image = nibabel.Nifti1Image(shifts[..., None, :].astype(np.float32), field_affine)
    image.header.set_intent("vector")
    nibabel.save(image, toy.folder / "field.nii.gz")
    atlas = with_transform(toy, toy.folder / "field.nii.gz")
    affine = np.array([[2.4, 0.3, 0, -20], [-0.3, 2.4, 0.2, -21], [0, -0.2, 2.5, -16], [0, 0, 0, 1]])
    size = (16, 15, 13)
    found = volume_of(atlas.on_grid(size, affine, OTHER), size)
    own, transform = columns_of_blocks(blocks()), atlas.transforms[OTHER].load()
    for ijk in rng.integers(0, size, size=(400, 3)):
        at = np.linalg.inv(FINE) @ np.append(transform((affine @ np.append(ijk, 1))[None, :3])[0], 1)
        nearest = np.floor(at[:3] + 0.5).astype(int)
        inside = (nearest >= 0).all() and (nearest < own.shape).all()
        assert found[tuple(ijk)] == (own[tuple(nearest)] if inside else -1)
    assert len(np.unique(found)) == 5


def test_workers_make_each_grid_once_however_often_the_atlas_travels(toy):
    path = itk_shift(toy.folder / "shift.txt", right=4.0)
    atlas = with_transform(toy, path)
    packed = pickle.dumps(atlas)
    first = pickle.loads(packed).on_grid(blocks().shape, FINE, OTHER)
    path.unlink()  # a worker that would read it again would fail
    again = pickle.loads(packed).on_grid(blocks().shape, FINE, OTHER)
    np.testing.assert_array_equal(again.columns, first.columns)


def test_grids_of_atlases_that_differ_in_the_table_alone_are_kept_apart(toy):
    table = "index\tname\tx_mm\ty_mm\tz_mm\n" + placed().split("\n", 1)[1].replace("\tL\n", "\n").removesuffix("\tL")
    plain, more = load(toy, table=table), load(toy, table=table + "\n9\tp9\t0\t0\t0")
    assert plain.on_grid(SHAPE, LAS).columns.max() == 5
    assert more.on_grid(SHAPE, LAS).columns.max() == 6
    assert plain.on_grid(SHAPE, LAS).columns.max() == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "", "transforms": {OTHER: "shift.txt"}}, r"atlas\.space must name it"),
        ({"space": OTHER, "transforms": {OTHER: "shift.txt"}}, "in that space already"),
        ({"space": "MNI152NLin6Asym", "transforms": {OTHER: "none.h5"}}, r"there is no transform none\.h5"),
        (
            {"space": "MNI152NLin6Asym", "transforms": {OTHER: f"tpl-MNI152NLin6Asym_from-{OTHER}_mode-image_xfm.h5"}},
            "by its name it brings them from",
        ),
    ],
)
def test_transforms_that_cannot_be_used_are_refused_before_any_work(toy, monkeypatch, settings, message):
    itk_shift(toy.folder / "shift.txt", right=4.0)
    monkeypatch.chdir(toy.folder)
    with pytest.raises(DataError, match=message):
        load(toy, **settings)
