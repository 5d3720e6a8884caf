"""Eight faults of published preparation code, each as a test that ours does not have it.

1 scaling that scales nothing, statistics not kept; 2 a file that fails leaves its neighbour's data under its name;
3 no check of orientation, grid and TR; 4 parcels outside of the view are silent zeros; 5 scaling across parcels
at each timepoint, and mixed axis orders; 6 everything in train, and splits by file name; 7 recordings shorter than a
window are kept; 8 everything in memory.
"""

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import zarr

from brainlm.dataset import SPLITS, open_dataset
from brainlm.scaling import centre, scale

from .conftest import LABELS, LAS, SHAPE


def prepared(tree, folder=None):
    """Return the prepared series by recording id, from the archive."""
    out = Path(folder or tree["out"])
    table = pd.read_parquet(out / "recordings.parquet")
    bold = zarr.open_group(str(out / "recordings.zarr"), mode="r")["bold"]
    return {
        row["recording_id"]: np.asarray(bold[row["first_row"] : row["first_row"] + row["num_timepoints"]])
        for row in table.to_dict("records")
    }


def test_1_scaling_divides_by_the_iqr_and_both_numbers_are_kept(toy, rng):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    dataset = open_dataset(tree["out"])
    train = dataset.split("train")
    scaled = scale(np.concatenate([train.recording(index) for index in range(len(train))]), dataset.contract)
    low, middle, high = np.percentile(scaled.astype(np.float64), (25, 50, 75), axis=0)
    np.testing.assert_allclose(high - low, 1, rtol=1e-4)
    np.testing.assert_allclose(middle, 0, atol=1e-4)
    assert (dataset.contract.iqr > 0).all()


def test_2_a_file_that_fails_has_no_data_and_is_listed_with_its_reason(toy, rng):
    root = toy.write_bids(rng, num_subjects=10)
    broken = sorted(root.rglob("*.nii.gz"))[4]
    broken.write_bytes(broken.read_bytes()[:500])
    tree = toy.settings(root)
    assert toy.prepare(tree) == 0
    series = prepared(tree)
    assert "sub-04_task-rest" not in series
    rejected = pd.read_parquet(Path(tree["out"]) / "rejected.parquet")
    assert rejected["recording_id"].tolist() == ["sub-04_task-rest"]
    assert rejected["reason"].str.len().gt(10).all()
    assert len({array.tobytes() for array in series.values()}) == 9


def test_3_orientation_and_grid_do_not_matter_and_the_tr_is_read(toy, rng):
    series = toy.write_series(rng)
    volume = toy.paint(series)
    ras = LAS.copy()
    ras[0] = [-LAS[0, 0], 0, 0, LAS[0, 0] * (SHAPE[0] - 1) + LAS[0, 3]]
    finer = LAS.copy()
    finer[:3, :3] /= 2
    finer[:3, 3] -= np.abs(finer[:3, :3]).sum(axis=1) / 2 * np.sign(np.diag(LAS)[:3])
    images = {
        "00": (volume, LAS),
        "01": (volume[::-1], ras),
        "02": (volume.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2), finer),
    }
    root = toy.folder / "bids"
    for subject, (data, affine) in images.items():
        name = f"sub-{subject}_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
        toy.write_image(root / f"sub-{subject}" / "func" / name, data, affine=affine, tr_s=2.25)
    tree = toy.settings(root, splits={"val": 0.0, "test": 0.0})
    tree["source"] = {"kind": "bids", "path": str(root)}
    assert toy.prepare(tree) == 0
    for found in prepared(tree).values():
        np.testing.assert_allclose(found, series, rtol=1e-5)
    assert open_dataset(tree["out"]).contract.tr_s == 2.25


def test_4_parcels_outside_of_the_field_of_view_are_missing_not_zero(toy, rng):
    root = toy.write_bids(rng)
    series = toy.write_series(rng)
    volume = toy.paint(series)
    volume[toy.labels == LABELS[2]] = 0
    name = "sub-00_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"
    toy.write_image(root / "sub-00" / "func" / name, volume)
    tree = toy.settings(root)
    assert toy.prepare(tree) == 0
    found = prepared(tree)["sub-00_task-rest"]
    assert np.isnan(found[:, 2]).all()
    dataset = open_dataset(tree["out"])
    present = {
        entry.recording_id: dataset.split(split).present(index)
        for split in SPLITS
        for index, entry in enumerate(dataset.split(split).entries)
    }
    assert present["sub-00_task-rest"].tolist() == [True, True, False, True, True, True]
    assert present["sub-01_task-rest"].all()


def test_5_a_change_of_the_whole_brain_is_kept_and_axis_orders_do_not_mix(toy, rng):
    path = toy.write_table(rng)
    series = toy.write_series(rng).astype(np.float32)
    np.save(path.parent / "ts" / "S_000.npy", series)
    np.save(path.parent / "ts" / "S_001.npy", (series + np.sin(np.arange(60))[:, None] * 50).astype(np.float32).T)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    found = prepared(tree)
    np.testing.assert_array_equal(found["S_000"], series)
    difference = centre(found["S_001"]) - centre(found["S_000"])
    np.testing.assert_allclose(difference, np.tile(difference[:, :1], (1, 6)), atol=1e-3)
    assert np.ptp(difference[:, 0]) > 90


def test_6_subjects_are_divided_by_hash_whatever_their_files_are_called(toy, rng):
    path = toy.write_table(rng, num_subjects=20)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    table = pd.read_parquet(Path(tree["out"]) / "recordings.parquet").set_index("subject")
    assert set(table["split"]) == set(SPLITS)
    text = path.read_text()
    for number in range(20):  # the other way round by name
        (path.parent / "ts" / f"S_{number:03d}.npy").rename(path.parent / "ts" / f"Z_{19 - number:03d}.npy")
        text = text.replace(f"S_{number:03d}\t", f"Z_{19 - number:03d}\t")
    path.write_text(text)
    renamed = tree | {"out": str(toy.folder / "renamed")}
    assert toy.prepare(renamed) == 0
    again = pd.read_parquet(Path(renamed["out"]) / "recordings.parquet").set_index("subject")
    assert again["split"].sort_index().tolist() == table["split"].sort_index().tolist()


def test_7_recordings_shorter_than_a_window_are_refused(toy, rng):
    path = toy.write_table(rng, num_subjects=10)
    np.save(path.parent / "ts" / "S_003.npy", toy.write_series(rng, 39).astype(np.float32))
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    dataset = open_dataset(tree["out"])
    assert min(entry.num_timepoints for split in SPLITS for entry in dataset.split(split).entries) >= 40
    rejected = pd.read_parquet(Path(tree["out"]) / "rejected.parquet").set_index("recording_id")
    assert "too short: 39 timepoints" in rejected.loc["S_003", "reason"]


def test_8_memory_does_not_grow_with_the_number_of_recordings(toy, rng):
    peaks: dict[int, list[int]] = {4: [], 10: [], 60: []}
    for number, count in enumerate((4, 10, 60, 10, 60)):
        path = toy.write_table(rng, count, num_timepoints=3000, name=f"table{number}")
        tree = toy.settings(path, out=str(toy.folder / f"out{number}"), splits={"val": 0.0, "test": 0.0})
        tracemalloc.start()
        assert toy.prepare(tree) == 0
        peaks[count].append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    added_bytes = 50 * 3000 * 6 * 4
    # The lower of two: what threads of other tests still do in this process is counted too.
    assert min(peaks[60]) - min(peaks[10]) < added_bytes / 4
