"""Scans to parcels: the same numbers whatever the form of the file; refusals that say why."""

import gzip
import tracemalloc

import nibabel
import numpy as np
import pandas as pd
import pytest

from brainlm.errors import DataError
from data_prep.atlas_image import load_atlas
from data_prep.parcellate import parcellate
from data_prep.settings import AtlasSettings, CheckSettings

LABELS = (3, 7, 130, 300, 1000, 1001)
LAS = np.array([[-14.0, 0, 0, 77], [0, 14.0, 0, -105], [0, 0, 14.0, -63], [0, 0, 0, 1.0]])


@pytest.fixture
def atlas(toy):
    return load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))


@pytest.fixture
def series(toy, rng):
    return toy.write_series(rng, 20)


def run(path, atlas, space="MNI152NLin6Asym", tr_s=None, mean_over="covered", **checks):
    settings = CheckSettings(**checks)
    return parcellate(path, atlas, space=space, tr_s=tr_s, tr_from="the test", checks=settings, mean_over=mean_over)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_labels_with_gaps_and_above_255_keep_their_order_whatever_their_type(toy, dtype):
    image = toy.write_atlas("typed.nii.gz", dtype=dtype)
    atlas = load_atlas(AtlasSettings(image=str(image), name="typed"))
    assert atlas.atlas.labels.tolist() == list(LABELS)
    assert atlas.atlas.parcel_names[2] == "typed_130"
    reference = load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))
    assert atlas.atlas.sha256 == reference.atlas.sha256


def test_coordinates_are_centres_of_mass_in_mm(toy, atlas):
    where = np.argwhere(toy.labels == 130).mean(axis=0)
    np.testing.assert_allclose(atlas.atlas.coords_mm[2], LAS[:3, :3] @ where + LAS[:3, 3], rtol=1e-6)


def test_table_gives_names_by_label_and_coordinates(toy):
    places = {label: LAS[:3, :3] @ np.argwhere(toy.labels == label)[0] + LAS[:3, 3] for label in LABELS}
    rows = "\n".join(f"{label}\tp{label}\t{x}\t{y}\t{z}" for label, (x, y, z) in places.items())
    (toy.folder / "xyz.tsv").write_text(f"index\tname\tx_mm\ty_mm\tz_mm\n999\textra\t0\t0\t0\n{rows}\n")
    atlas = load_atlas(
        AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy", labels=str(toy.folder / "xyz.tsv"))
    )
    assert atlas.atlas.parcel_names == ("p3", "p7", "p130", "p300", "extra", "p1000", "p1001")  # by label
    assert atlas.atlas.coords_mm[[0, 1, 2, 3, 5, 6]].tolist() == [place.tolist() for place in places.values()]
    assert atlas.atlas.coords_mm[4].tolist() == [0, 0, 0]
    assert "parcels that nothing covers: [999]" in atlas.warnings[0]


def test_a_row_without_voxels_or_coordinates_is_left_out_with_a_warning(toy):
    rows = "\n".join(f"{label}\tp{label}" for label in LABELS)
    (toy.folder / "names.tsv").write_text(f"index\tname\n999\textra\n{rows}\n")
    atlas = load_atlas(
        AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy", labels=str(toy.folder / "names.tsv"))
    )
    assert atlas.atlas.num_parcels == len(LABELS)
    assert "are left out, for want of coordinates: [999]" in atlas.warnings[0]


def test_table_without_a_label_of_the_image_is_refused(toy):
    (toy.folder / "few.tsv").write_text("index\tname\n3\ta\n7\tb\n")
    with pytest.raises(DataError, match="no row for 4 labels"):
        load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="t", labels=str(toy.folder / "few.tsv")))


@pytest.mark.parametrize("value", ["three", "3.5", "n/a", "inf"])
def test_label_that_is_no_whole_number_is_named(toy, value):
    names = toy.folder / "atlas.tsv"
    names.write_text(names.read_text() + f"{value}\tx\tnet\n")
    settings = AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy", labels=str(names))
    with pytest.raises(DataError, match=r"atlas\.tsv: index: expected (a|whole) number"):
        load_atlas(settings)


def test_probability_map_is_no_atlas(toy):
    image = toy.write_atlas("fractions.nii.gz", labels=toy.labels / 7.0)
    with pytest.raises(DataError, match="whole numbers"):
        load_atlas(AtlasSettings(image=str(image), name="t"))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_painted_series_come_back(toy, atlas, series, name, big_endian):
    path = toy.write_image(toy.folder / name, toy.paint(series), big_endian=big_endian)
    found = run(path, atlas)
    np.testing.assert_allclose(found.bold, series, rtol=1e-6)
    np.testing.assert_array_equal(found.coverage, np.ones(6))
    assert found.tr_s == 2.0


def test_int16_with_slope_and_intercept_gives_scaled_values(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), dtype=np.int16, slope=(0.5, 10.0))
    stored = nibabel.load(path)
    assert stored.dataobj.slope == 0.5
    found = run(path, atlas)
    np.testing.assert_allclose(found.bold, series, rtol=0, atol=0.2501)
    np.testing.assert_array_equal(found.bold[:, 0], np.asarray(stored.dataobj)[4, 2, 5])
    np.testing.assert_array_equal(found.coverage, np.ones(6))


@pytest.mark.parametrize("flips", [(0,), (1,), (2,), (0, 1, 2)])
def test_orientation_of_storage_does_not_matter(toy, atlas, series, rng, flips):
    volume = toy.paint(series) + rng.normal(size=(*toy.labels.shape, 1))
    straight = run(toy.write_image(toy.folder / "a.nii.gz", volume), atlas)
    affine = LAS.copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (volume.shape[axis] - 1)
        affine[:3, axis] *= -1
    flipped = run(toy.write_image(toy.folder / "b.nii.gz", np.flip(volume, flips), affine=affine), atlas)
    np.testing.assert_allclose(flipped.bold, straight.bold, rtol=1e-6)
    np.testing.assert_array_equal(flipped.coverage, straight.coverage)


def test_swapped_axes_do_not_matter(toy, atlas, series):
    affine = LAS[:, [1, 0, 2, 3]]
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series).transpose(1, 0, 2, 3), affine=affine)
    np.testing.assert_allclose(run(path, atlas).bold, series, rtol=1e-6)


def test_finer_grid_gives_the_same_series(toy, atlas, series):
    fine = np.repeat(np.repeat(np.repeat(toy.paint(series), 2, 0), 2, 1), 2, 2)
    affine = LAS.copy()
    affine[:3, :3] /= 2
    affine[:3, 3] -= affine[:3, :3].sum(axis=1) / 2  # the corner of the first voxel stays
    found = run(toy.write_image(toy.folder / "a.nii.gz", fine, affine=affine), atlas)
    np.testing.assert_allclose(found.bold, series, rtol=1e-6)
    np.testing.assert_array_equal(found.coverage, np.ones(6))


def test_parcels_outside_the_field_of_view_are_missing_not_zero(toy, atlas, series):
    volume = toy.paint(series)[:, :12]  # the last parcel lies in the cut rows
    found = run(toy.write_image(toy.folder / "a.nii.gz", volume), atlas)
    np.testing.assert_array_equal(found.coverage, [1, 1, 1, 1, 1, 0])
    assert np.isnan(found.bold[:, 5]).all()
    half = run(toy.write_image(toy.folder / "b.nii.gz", toy.paint(series)[:, :13]), atlas)
    np.testing.assert_allclose(half.coverage[5], 0.5)
    np.testing.assert_allclose(half.bold[:, 5], series[:, 5], rtol=1e-6)


def test_voxels_without_signal_lower_the_coverage(toy, atlas, series):
    volume = toy.paint(series)
    volume[3:6][toy.labels[3:6] == 7] = 0
    volume[toy.labels == 300] = np.nan
    volume[4, 2, 5, 7] = np.nan  # one voxel, one volume: a step in the mean of the first parcel
    found = run(toy.write_image(toy.folder / "a.nii.gz", volume), atlas)
    np.testing.assert_allclose(found.coverage, [59 / 60, 0.5, 1, 0, 1, 1])
    assert np.isnan(found.bold[:, [0, 3]]).all()
    assert np.isfinite(found.bold[:, [1, 2, 4, 5]]).all()


@pytest.mark.parametrize("slope", [None, (0.5, 10.0)])
def test_the_mean_is_over_voxels_with_signal_unless_all_are_asked_for(toy, atlas, series, slope):
    volume = toy.paint(np.round(series))
    volume[3:6][toy.labels[3:6] == 7] = 0  # half of the parcel
    dtype = np.float32 if slope is None else np.int16
    path = toy.write_image(toy.folder / "a.nii.gz", volume, dtype=dtype, slope=slope)
    covered, everything = run(path, atlas), run(path, atlas, mean_over="all")
    np.testing.assert_allclose(covered.bold, np.round(series), rtol=1e-6)
    np.testing.assert_allclose(everything.bold[:, 1], np.round(series)[:, 1] / 2, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(covered.bold, 1, axis=1), np.delete(everything.bold, 1, axis=1))
    np.testing.assert_array_equal(covered.coverage, everything.coverage)


def test_coverage_is_measured_below_the_limit_too_and_the_parcel_is_missing(toy, atlas, series):
    volume = toy.paint(series)
    volume[3:8][toy.labels[3:8] == 7] = 0  # five sixths of the parcel
    path = toy.write_image(toy.folder / "a.nii.gz", volume)
    for limit, is_missing in ((0.25, True), (0.1, False)):
        found = run(path, atlas, min_parcel_coverage=limit)
        np.testing.assert_allclose(found.coverage, [1, 1 / 6, 1, 1, 1, 1])
        assert np.isnan(found.bold).all(axis=0).tolist() == [False, is_missing, False, False, False, False]
        assert np.isnan(found.bold).any(axis=0).tolist() == np.isnan(found.bold).all(axis=0).tolist()


def test_signal_that_begins_late_is_signal(toy, atlas, series):
    volume = toy.paint(series)
    volume[..., :19][toy.labels == 130] = 0
    volume[4, 4, 5] = 0  # one voxel of the second parcel, never
    found = run(toy.write_image(toy.folder / "a.nii.gz", volume), atlas)
    np.testing.assert_allclose(found.coverage, [1, 59 / 60, 1, 1, 1, 1])


def test_zero_after_scaling_is_no_signal(toy, atlas, series):
    volume = toy.paint(series)
    volume[toy.labels == 7] = 0
    path = toy.write_image(toy.folder / "a.nii.gz", volume, dtype=np.int16, slope=(0.5, 10.0))
    np.testing.assert_array_equal(run(path, atlas).coverage, [1, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("slope", [None, (2.0, 5.0)])
def test_voxels_that_are_never_finite_have_no_signal(toy, atlas, series, slope):
    """Over all voxels they count as 0, as nilearn's masker has it for NaN; infinity of either sign is no better."""
    volume = toy.paint(series)
    volume[3, 2, 4], volume[3, 2, 5], volume[3, 2, 6] = np.nan, np.inf, -np.inf
    path = toy.write_image(toy.folder / "a.nii.gz", volume)
    if slope is not None:
        image = nibabel.load(path)
        data = path.with_name("b.nii")
        image.header.set_slope_inter(*slope)
        image.header["vox_offset"] = 352
        data.write_bytes(image.header.binaryblock + bytes(4) + volume.astype("<f4").tobytes(order="F"))
        path = data
    found = run(path, atlas, mean_over="all")
    scaled = series.astype(np.float32) * 2.0 + 5.0 if slope else series
    np.testing.assert_allclose(found.bold[:, 0], scaled[:, 0] * 57 / 60, rtol=1e-6)
    np.testing.assert_allclose(found.bold[:, 1:], scaled[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(run(path, atlas).bold, scaled, rtol=1e-6)
    np.testing.assert_allclose(found.coverage, [57 / 60, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("value", [1e200, 1.7e308])
def test_values_beyond_float32_are_refused(toy, atlas, series, value):
    volume = toy.paint(series)
    volume[4, 2, 5, 7] = volume[4, 3, 5, 7] = value
    path = toy.write_image(toy.folder / "a.nii.gz", volume, dtype=np.float64)
    with pytest.raises(DataError, match="volume 8 of 20 has values too large"):
        run(path, atlas)


TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("slope", [None, (0.25, -3.0), (-2.0, 100.0)])
def test_means_equal_scaling_each_voxel_first_at_float64(toy, atlas, rng, dtype, slope):
    volume = rng.uniform(1, 120, size=(12, 14, 12, 5))
    paths = []
    for big_endian in (False, True):
        header = nibabel.Nifti1Header(endianness="<>"[big_endian])
        stored = volume.astype(np.dtype(dtype).newbyteorder("<>"[big_endian]))
        header.set_data_dtype(stored.dtype)
        header.set_data_shape(stored.shape)
        header["pixdim"][4], header["magic"], header["vox_offset"] = 2.0, b"n+1", 352
        header.set_sform(LAS, 4)
        if slope:
            header.set_slope_inter(*slope)
        paths.append(toy.folder / f"{big_endian}.nii")
        paths[-1].write_bytes(header.binaryblock + bytes(4) + stored.tobytes(order="F"))
    found = [run(path, atlas, max_outside_brain=1.0) for path in paths]
    scaled = np.asarray(nibabel.load(paths[0]).get_fdata(dtype=np.float64))
    expected = np.stack([scaled[toy.labels == label].mean(axis=0) for label in LABELS], axis=1)
    np.testing.assert_allclose(found[0].bold, expected, rtol=1.2e-7)
    np.testing.assert_array_equal(found[0].bold, found[1].bold)
    voxels = scaled[toy.labels > 0]
    np.testing.assert_allclose(found[0].tsnr, np.median(voxels.mean(1) / voxels.std(1)), rtol=1e-9)


def test_every_run_gives_the_same_bits_compressed_or_not(toy, atlas, series, rng):
    volume = toy.paint(series) + rng.normal(size=(12, 14, 12, 20))
    paths = [toy.write_image(toy.folder / name, volume) for name in ("a.nii", "b.nii.gz", "c.nii.gz")]
    first, *others = [run(path, atlas) for path in paths + paths]
    for other in others:
        assert other.bold.tobytes() == first.bold.tobytes()
        assert other.tsnr == first.tsnr


def test_means_agree_with_nilearn(toy, atlas, series, rng):
    from nilearn.maskers import NiftiLabelsMasker

    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series) + rng.normal(size=(12, 14, 12, 20)))
    masker = NiftiLabelsMasker(str(toy.folder / "atlas.nii.gz"), standardize=None, reports=False)
    np.testing.assert_allclose(run(path, atlas).bold, masker.fit_transform(str(path)), rtol=1e-5)


def test_cleaning_parcel_means_equals_averaging_cleaned_voxels(toy, atlas, rng):
    """Any linear operation over time may come after the means: regression, filters, resampling."""
    volume = 1000 + 50 * rng.normal(size=(12, 14, 12, 20)).cumsum(axis=-1)
    operator = rng.normal(size=(15, 20)) / np.sqrt(20)
    found = run(toy.write_image(toy.folder / "a.nii.gz", volume, dtype=np.float64), atlas, max_outside_brain=1.0)
    cleaned = volume @ operator.T
    expected = np.stack([cleaned[toy.labels == label].mean(axis=0) for label in LABELS], axis=1)
    np.testing.assert_allclose(operator @ found.bold.astype(np.float64), expected, atol=2e-7 * 1500 * 5)
    assert expected.std() > 100


def test_tsnr_of_large_means_is_that_of_numpy(toy, atlas, rng):
    volume = np.round(30000 + rng.normal(scale=2.0, size=(12, 14, 12, 50)))
    path = toy.write_image(toy.folder / "a.nii.gz", volume, dtype=np.int16, slope=(1.0, 0.0))
    voxels = volume[toy.labels > 0]
    expected = np.median(voxels.mean(axis=1) / voxels.std(axis=1))
    np.testing.assert_allclose(run(path, atlas, max_outside_brain=1.0).tsnr, expected, rtol=1e-10)


def test_tsnr_leaves_out_voxels_that_are_constant_or_not_always_finite(toy, atlas, series, rng):
    volume = toy.paint(series)
    volume[toy.labels == 3] = 5.0
    volume[4, 4, 5, 7] = np.nan
    voxels = volume[(toy.labels > 3) & np.isfinite(volume).all(axis=-1)]
    found = run(toy.write_image(toy.folder / "a.nii.gz", volume, dtype=np.float64), atlas)
    np.testing.assert_allclose(found.tsnr, np.median(voxels.mean(axis=1) / voxels.std(axis=1)), rtol=1e-10)
    still = toy.paint(np.repeat(series[:1], 20, axis=0))
    assert run(toy.write_image(toy.folder / "b.nii.gz", still), atlas).tsnr is None


def test_tsnr_of_a_large_image_is_near_that_of_all_voxels_and_independent_of_storage(toy, atlas, rng):
    affine = LAS.copy()
    affine[:3, :3] /= 4
    affine[:3, 3] -= affine[:3, :3].sum(axis=1) * 1.5
    shape = (48, 56, 48)
    noise = rng.uniform(5, 20, size=shape)[..., None] * rng.normal(size=(*shape, 12))
    volume = np.round(1000 + noise)
    path = toy.write_image(toy.folder / "a.nii", volume, dtype=np.int16, slope=(1.0, 0.0), affine=affine)
    straight = run(path, atlas)
    grid = atlas.on_grid(shape, affine)
    assert len(grid.voxels) > 15 * len(grid.sampled) > 0
    voxels = volume.reshape(-1, 12, order="F")[grid.voxels]
    np.testing.assert_allclose(straight.tsnr, np.median(voxels.mean(1) / voxels.std(1)), rtol=0.05)
    flipped = affine.copy()
    flipped[:3, 3] += flipped[:3, 0] * (shape[0] - 1)
    flipped[:3, 0] *= -1
    turned = np.flip(volume, 0).transpose(2, 0, 1, 3)
    permuted = flipped[:, [2, 0, 1, 3]]
    path = toy.write_image(toy.folder / "b.nii", turned, dtype=np.int16, slope=(1.0, 0.0), affine=permuted)
    found = run(path, atlas)
    assert found.tsnr == straight.tsnr
    np.testing.assert_array_equal(found.bold, straight.bold)  # sums of integers are exact


def test_memory_does_not_grow_with_the_length_beyond_the_series(toy, atlas, rng):
    peaks = []
    for number in (10, 10, 200):
        path = toy.write_image(toy.folder / f"{number}.nii.gz", toy.paint(toy.write_series(rng, number)))
        tracemalloc.start()
        run(path, atlas)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 200 * 6 * 8 + 100_000  # 190 more volumes are 1.5 MB


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_cut_file_is_refused_with_the_volume(toy, atlas, series, rng, name):
    path = toy.write_image(toy.folder / name, toy.paint(series) + rng.normal(size=(12, 14, 12, 20)))
    with pytest.raises(DataError, match=r"cut off.* in volume \d+ of 20"):
        run(cut(path, 30000), atlas)


def test_damaged_compression_is_refused(toy, atlas, series, rng):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series) + rng.normal(size=(12, 14, 12, 20)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged or cut off"):
        run(path, atlas)


def test_other_files_are_refused_as_what_they_are(toy, atlas, series):
    text = toy.folder / "text.nii"
    text.write_text("hello")
    with pytest.raises(DataError, match="NIfTI"):
        run(text, atlas)
    with gzip.open(toy.folder / "zeros.nii.gz", "wb") as file:
        file.write(b"\0" * 1000)
    with pytest.raises(DataError, match="NIfTI"):
        run(toy.folder / "zeros.nii.gz", atlas)
    with pytest.raises(DataError, match="4-D"):
        run(toy.write_image(toy.folder / "still.nii.gz", toy.paint(series)[..., 0]), atlas)


def test_no_repetition_time_is_refused_and_a_given_one_is_used(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), tr_s=0.0)
    with pytest.raises(DataError, match="no repetition time"):
        run(path, atlas)
    assert run(path, atlas, tr_s=1.5).tr_s == 1.5


def test_two_repetition_times_are_refused(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), tr_s=2.0)
    with pytest.raises(DataError, match=r"1.5 s by the test, 2 s in the image's header"):
        run(path, atlas, tr_s=1.5)


def test_milliseconds_in_a_header_of_seconds_are_refused(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), tr_s=2000.0)
    with pytest.raises(DataError, match="milliseconds"):
        run(path, atlas)


def test_scanner_coordinates_without_a_claimed_space_are_native(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), code=1)
    with pytest.raises(DataError, match="native space"):
        run(path, atlas, space="")
    run(path, atlas, space="MNI152NLin6Asym")


def test_space_of_another_kind_is_refused(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series))
    with pytest.raises(DataError, match="space-T1w"):
        run(path, atlas, space="T1w")


def test_image_without_any_affine_is_refused(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), code=0)
    with pytest.raises(DataError, match="no affine"):
        run(path, atlas)


def test_brain_far_from_the_atlas_is_refused_whatever_the_header_claims(toy, atlas, series):
    affine = LAS.copy()
    affine[:3, 3] += 100
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series), affine=affine)
    with pytest.raises(DataError, match="of the bright voxels lie outside the template's brain"):
        run(path, atlas)


def test_slab_with_few_parcels_is_refused(toy, atlas, series):
    path = toy.write_image(toy.folder / "a.nii.gz", toy.paint(series)[:, :6])
    with pytest.raises(DataError, match="2 of 6 parcels have signal"):
        run(path, atlas)


def test_real_image_equals_the_oracle_with_parcel_405_missing(shared_data):
    folder = shared_data / "semireal_painted_mni4mm"
    image = next(folder.glob("*_bold.nii.gz"))
    atlas = load_atlas(AtlasSettings(image=str(shared_data / "atlases" / "A424+2mm.nii.gz"), name="A424"))
    assert atlas.atlas.num_parcels == 424
    found = run(image, atlas, mean_over="all", min_parcel_coverage=0.0)
    oracle = np.load(folder / "oracle_A424_mean_T220x424_float64.npy")
    missing = np.isnan(oracle).all(axis=0)
    missing[382] = True  # its only voxel at 4 mm is 0 throughout
    np.testing.assert_array_equal(found.coverage == 0, missing)
    np.testing.assert_allclose(found.bold[:, ~missing], oracle[:, ~missing], rtol=1e-5)
    assert found.tr_s == 2.0
    covered = run(image, atlas, min_parcel_coverage=0.0)  # nothing is cut off here: coverage is the share of voxels
    np.testing.assert_allclose((covered.bold * covered.coverage)[:, ~missing], oracle[:, ~missing], rtol=1e-5)


def test_real_atlas_coordinates_lie_near_its_published_table(shared_data):
    atlas = load_atlas(AtlasSettings(image=str(shared_data / "atlases" / "A424+2mm.nii.gz"), name="A424")).atlas
    table = pd.read_csv(shared_data / "atlases" / "A424_Coordinates.txt", sep=r"\s+", header=None).to_numpy()
    distance = np.linalg.norm(atlas.coords_mm - table[:, 1:], axis=1)
    assert np.median(distance) < 5


def test_a_parcel_of_the_table_without_a_voxel_stays_a_column_that_nothing_covers(shared_data):
    folder = shared_data / "semireal_painted_mni4mm"
    atlas = load_atlas(
        AtlasSettings(
            image=str(folder / "A424+2mm_strided_to_4mm.nii.gz"),
            name="A424",
            labels=str(shared_data / "atlases" / "A424_yeo7.csv"),
            label_column="a424",
            coords_columns=("x_mni", "y_mni", "z_mni"),
        )
    )
    assert atlas.atlas.num_parcels == 424
    assert "no voxel in the image and are parcels that nothing covers: [405]" in atlas.warnings[0]
    found = run(next(folder.glob("*_bold.nii.gz")), atlas, mean_over="all", min_parcel_coverage=0.0)
    oracle = np.load(folder / "oracle_A424_mean_T220x424_float64.npy")
    assert found.coverage[404] == 0
    assert np.isnan(found.bold[:, 404]).all()
    present = found.coverage > 0
    assert present.sum() == 422
    np.testing.assert_allclose(found.bold[:, present], oracle[:, present], rtol=1e-5)
