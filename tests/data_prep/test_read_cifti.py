"""CIFTI series: means by structure and vertex, not by position in the file; the medial wall; TR and units."""

import struct
import tracemalloc

import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, Cifti2Image, LabelAxis, ParcelsAxis, SeriesAxis

from brainlm.atlas import Atlas
from brainlm.errors import DataError
from data_prep import read_cifti
from data_prep.atlas_image import AtlasImage, load_atlas
from data_prep.read_cifti import read_dense_series, read_parcel_series
from data_prep.read_recording import read_recording
from data_prep.settings import AtlasSettings, CheckSettings
from data_prep.source_entry import SourceEntry

NUM_VERTICES = 40
LABELS = (2, 130, 300, 1001)  # left cortex, right cortex, both cortices, thalamus
NAMES = ("L_A", "R_A", "B_A", "Thalamus")
VOLUME_AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def models(rng=None, leave_out=()):
    """Return grayordinates: two surfaces and a few voxels, in order or shuffled, without some positions."""
    left = BrainModelAxis.from_surface(np.arange(NUM_VERTICES), NUM_VERTICES, "CORTEX_LEFT")
    right = BrainModelAxis.from_surface(np.arange(NUM_VERTICES), NUM_VERTICES, "CORTEX_RIGHT")
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[1:3, 1:3, 1:3] = True
    voxels = BrainModelAxis.from_mask(mask, affine=VOLUME_AFFINE, name="THALAMUS_LEFT")
    axis = left + right + voxels
    kept = np.setdiff1d(np.arange(len(axis)), leave_out)
    if rng is not None:
        kept = np.concatenate([rng.permutation(kept[kept < 40]), rng.permutation(kept[kept >= 40])])
    return axis[kept], kept


def label_of(position):
    """Return the label of each grayordinate of the whole axis: 0 = none."""
    labels = np.zeros(2 * NUM_VERTICES + 8, dtype=int)
    labels[5:15], labels[45:60] = 2, 130
    labels[20:25], labels[65:70] = 300, 300
    labels[80:] = 1001
    return labels[position]


@pytest.fixture
def atlas(tmp_path):
    axis, kept = models()
    table = {0: ("???", (0, 0, 0, 0))} | {label: (name, (1, 0, 0, 1)) for label, name in zip(LABELS, NAMES)}
    data = label_of(kept).astype(np.float32)[None]
    nibabel.save(Cifti2Image(data, (LabelAxis(["map"], [table]), axis)), tmp_path / "atlas.dlabel.nii")
    rows = "\n".join(f"{label}\t{name}\t{x}\t2\t3" for label, name, x in zip(LABELS, NAMES, (-30, 30, 0, 3)))
    (tmp_path / "atlas.tsv").write_text(f"index\tname\tx_mm\ty_mm\tz_mm\n{rows}\n")
    settings = AtlasSettings(
        image=str(tmp_path / "atlas.dlabel.nii"), name="gray", labels=str(tmp_path / "atlas.tsv"), space="fsLR"
    )
    return load_atlas(settings)


@pytest.fixture
def parcel_atlas():
    made = Atlas(
        name="gray",
        sha256="0" * 64,
        labels=np.array(LABELS),
        parcel_names=NAMES,
        coords_mm=np.zeros((4, 3), dtype=np.float32),
    )
    return AtlasImage(made, np.full((1, 1, 1), -1, dtype=np.int32), np.eye(4))


def write_dense(path, values, axis, tr_s=0.72, unit="SECOND", dtype=np.float32):
    image = Cifti2Image(values.astype(np.float32), (SeriesAxis(0, tr_s, len(values), unit), axis))
    image.nifti_header.set_data_dtype(dtype)
    nibabel.save(image, path)
    return path


def read(path, atlas, tr_s=None, **checks):
    return read_dense_series(path, atlas, tr_s=tr_s, tr_from="the test", checks=CheckSettings(**checks))


def oracle(values, kept):
    """Return the mean of each parcel's grayordinates, one after the other in float64."""
    return np.stack([values[:, label_of(kept) == label].mean(axis=1) for label in LABELS], axis=1)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 4096, 16 * 1024**2])
def test_dense_series_become_means_by_structure_and_vertex(tmp_path, rng, atlas, shuffled, block_bytes, monkeypatch):
    monkeypatch.setattr(read_cifti, "BLOCK_BYTES", block_bytes)
    axis, kept = models(rng if shuffled else None)
    values = (1000 + rng.normal(size=(30, len(axis)))).astype(np.float32)
    found = read(write_dense(tmp_path / "a.dtseries.nii", values, axis), atlas)
    np.testing.assert_allclose(found.bold, oracle(values.astype(np.float64), kept), rtol=1e-6)
    np.testing.assert_array_equal(found.coverage, np.ones(4, dtype=np.float32))
    assert found.bold.dtype == np.float32
    assert found.tr_s == pytest.approx(0.72)


def test_absent_and_empty_grayordinates_count_as_not_covered(tmp_path, rng, atlas):
    gone = np.arange(5, 10)  # half of L_A is not in the file
    axis, kept = models(leave_out=gone)
    values = 1000 + rng.normal(size=(30, len(axis)))
    values[:, kept == 45] = 0.0  # the medial wall, in a file that keeps it
    values[3, kept == 46] = np.nan
    values[:, np.isin(kept, np.arange(80, 87))] = 0.0
    found = read(write_dense(tmp_path / "a.dtseries.nii", values, axis), atlas, min_parcel_coverage=0.25)
    np.testing.assert_allclose(found.coverage, [5 / 10, 13 / 15, 1.0, 1 / 8], rtol=1e-6)
    good = values[:, np.isin(kept, np.arange(47, 60))].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(found.bold[:, 1], good.mean(axis=1), rtol=1e-6)
    assert np.isnan(found.bold[:, 3]).all()
    assert not np.isnan(found.bold[:, :3]).any()


def test_scaled_integers_are_read_as_their_values(tmp_path, rng, atlas):
    axis, kept = models()
    values = 1000 + rng.normal(size=(20, len(axis)))
    path = write_dense(tmp_path / "a.dtseries.nii", values, axis, dtype=np.int16)
    stored = np.asarray(nibabel.load(path).dataobj, dtype=np.float64)
    assert np.abs(stored - values).max() < 0.1  # nibabel chose a slope
    np.testing.assert_allclose(read(path, atlas).bold, oracle(stored, kept), rtol=1e-6)


def test_repetition_time_comes_from_the_series_and_must_agree(tmp_path, rng, atlas):
    axis, _ = models()
    values = rng.normal(size=(20, len(axis)))
    path = write_dense(tmp_path / "a.dtseries.nii", values, axis, tr_s=0.8)
    assert read(path, atlas, tr_s=0.8).tr_s == pytest.approx(0.8)
    with pytest.raises(DataError, match=r"2 s by the test, 0\.8 s in the file's series axis"):
        read(path, atlas, tr_s=2.0)
    with pytest.raises(DataError, match="the series axis is in HERTZ, expected SECOND"):
        read(write_dense(tmp_path / "b.dtseries.nii", values, axis, unit="HERTZ"), atlas)
    path = write_dense(tmp_path / "c.dtseries.nii", values, axis, tr_s=0.0)
    with pytest.raises(DataError, match="no repetition time"):
        read(path, atlas)
    assert read(path, atlas, tr_s=2.0).tr_s == 2.0


def test_volume_atlas_is_told_that_it_needs_grayordinates(tmp_path, rng, toy):
    axis, _ = models()
    path = write_dense(tmp_path / "a.dtseries.nii", rng.normal(size=(20, len(axis))), axis)
    volume = load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))
    with pytest.raises(DataError, match=r"set atlas\.image to a \.dlabel\.nii; the atlas toy is a volume"):
        read(path, volume)


def test_cut_off_and_false_cifti_files_are_refused(tmp_path, rng, atlas, toy):
    axis, _ = models()
    path = write_dense(tmp_path / "a.dtseries.nii", rng.normal(size=(20, len(axis))), axis)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cut off: the header promises"):
        read(path, atlas)
    header = bytearray(whole)
    header[16 + 8 * 5 : 16 + 8 * 6] = (10**9).to_bytes(8, "little")  # the length of the series
    path.write_bytes(bytes(header))
    with pytest.raises(DataError, match=r"shape|not a readable CIFTI"):
        read(path, atlas)
    path.write_bytes(whole[:300])
    with pytest.raises(DataError, match=r"not a readable CIFTI|expected a dense series"):
        read(path, atlas)
    volume = toy.write_image(tmp_path / "b.dtseries.nii", toy.paint(toy.write_series(rng, 5)))
    with pytest.raises(DataError, match="expected a dense series"):
        read(volume, atlas)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="expected a parcellated series, axes SeriesAxis by ParcelsAxis; found"):
        read_parcel_series(path, atlas, "from_atlas", tr_s=None, tr_from="")


def write_parcels(path, values, names):
    axis, kept = models()
    parcels = ParcelsAxis.from_brain_models(
        [(name, axis[label_of(kept) == LABELS[number % 4]]) for number, name in enumerate(names)]
    )
    nibabel.save(Cifti2Image(values.astype(np.float32), (SeriesAxis(0, 0.72, len(values), "SECOND"), parcels)), path)
    return path


@pytest.mark.parametrize("claimed", [2**31 - 16, 0, -32])
def test_extension_of_absurd_size_is_refused_before_it_is_read(tmp_path, rng, atlas, claimed):
    axis, _ = models()
    path = write_dense(tmp_path / "a.dtseries.nii", rng.normal(size=(20, len(axis))), axis)
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<i", data, 548) == (32,)  # the code of CIFTI's extension
    struct.pack_into("<i", data, 544, claimed)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"code 32\) claims {claimed} bytes at byte 544: expected 8 to"):
        read(path, atlas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_parcel_series_are_matched_by_name(tmp_path, rng, parcel_atlas):
    values = rng.normal(size=(20, 4)).astype(np.float32)
    order = [2, 0, 3, 1]
    path = write_parcels(tmp_path / "a.ptseries.nii", values[:, order], [NAMES[number] for number in order])
    found = read_parcel_series(path, parcel_atlas, "from_atlas", tr_s=0.72, tr_from="the test")
    np.testing.assert_array_equal(found.bold, values)
    np.testing.assert_array_equal(found.coverage, 1.0)
    path = write_parcels(tmp_path / "b.ptseries.nii", values, [*NAMES[:3], "Pallidum"])
    with pytest.raises(DataError, match=r"1 unknown \(Pallidum\); 1 missing \(Thalamus\)"):
        read_parcel_series(path, parcel_atlas, "from_atlas", tr_s=None, tr_from="")


def test_every_format_of_one_recording_gives_the_same_series(tmp_path, rng, atlas):
    axis, kept = models()
    values = (1000 + rng.normal(size=(30, len(axis)))).astype(np.float32)
    means = oracle(values.astype(np.float64), kept)
    write_dense(tmp_path / "a.dtseries.nii", values, axis)
    write_parcels(tmp_path / "a.ptseries.nii", means, NAMES)
    np.save(tmp_path / "a.npy", means)
    (tmp_path / "a.csv").write_text("\n".join([",".join(NAMES), *(",".join(map(str, row)) for row in means)]))
    for name in ("a.dtseries.nii", "a.ptseries.nii", "a.npy", "a.csv"):
        entry = SourceEntry(recording_id="a", subject="a", file="", source=name, tr_s=0.72, tr_from="the test")
        found = read_recording(tmp_path / name, entry, atlas, "from_atlas", CheckSettings())
        np.testing.assert_allclose(found.bold, means, rtol=1e-6)
        assert found.tr_s == pytest.approx(0.72)
        np.testing.assert_array_equal(found.coverage, 1.0)


@pytest.mark.parametrize(
    ("tr_s", "message"), [(720.0, "720 s by a column; are these milliseconds"), (0.0, "above 0 s")]
)
def test_repetition_times_that_are_no_seconds_are_refused(tmp_path, rng, parcel_atlas, tr_s, message):
    np.save(tmp_path / "a.npy", rng.normal(size=(20, 4)))
    entry = SourceEntry(recording_id="a", subject="a", file="", source="a", tr_s=tr_s, tr_from="a column")
    with pytest.raises(DataError, match=message):
        read_recording(tmp_path / "a.npy", entry, parcel_atlas, "from_atlas", CheckSettings())


def test_series_without_any_repetition_time_are_refused(tmp_path, rng, parcel_atlas):
    np.save(tmp_path / "a.npy", rng.normal(size=(20, 4)))
    entry = SourceEntry(recording_id="a", subject="a", file="", source="a")
    with pytest.raises(DataError, match=r"set source\.columns\.tr_s or source\.tr_s"):
        read_recording(tmp_path / "a.npy", entry, parcel_atlas, "from_atlas", CheckSettings())
