"""The whole preparation on toy cohorts: what is written, what is refused, what happens when it is run again."""

import json
import os
import shutil
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import zarr

from brainlm.dataset import SPLITS, open_dataset
from brainlm.scaling import centre, robust_statistics
from data_prep import inspect_dataset
from data_prep.prepare import main

from .conftest import MOTION


def recordings(folder):
    return pd.read_parquet(Path(folder) / "recordings.parquet")


class Killed(BaseException):
    """What nothing catches."""


def stop(*arguments):
    raise Killed


def rejected(folder):
    return pd.read_parquet(Path(folder) / "rejected.parquet").set_index("recording_id")


def test_bids_folder_becomes_a_data_set_without_faults(toy, rng, capsys):
    tree = toy.settings(toy.write_bids(rng), clean={"confounds": ["trans_x", "trans_x_derivative1"]})
    assert toy.prepare(tree) == 0
    assert "6 prepared, 0 refused" in capsys.readouterr().out
    dataset = open_dataset(tree["out"])
    assert sum(len(dataset.split(split)) for split in SPLITS) == 6
    assert dataset.contract.atlas.parcel_names[2] == "parcel130"
    assert dataset.contract.atlas.networks == ("net1", "net1", "net0", "net0", "net0", "net1")
    assert dataset.contract.tr_s == 2.0
    assert any("regressed over the whole run" in flag for flag in dataset.contract.flags)
    subjects = pd.read_parquet(Path(tree["out"]) / "subjects.parquet").set_index("subject")
    assert np.isnan(subjects.loc["01", "age"])
    assert subjects.loc["02", "age"] == 22
    table = recordings(tree["out"])
    assert table["mean_fd_mm"].gt(0).all()
    assert table["family"].tolist() == ["fam0", "fam0", "fam1", "fam1", "fam2", "fam2"]
    assert (Path(tree["out"]) / "quality.html").read_text().count("<h2>") == 11
    assert not (Path(tree["out"]) / "staging").exists()
    assert inspect_dataset.main([tree["out"]]) == 0


def test_archive_and_shards_hold_the_series_and_the_contract_their_statistics(toy, rng):
    table_path = toy.write_table(rng)
    tree = toy.settings(table_path)
    assert toy.prepare(tree) == 0
    dataset = open_dataset(tree["out"])
    table = recordings(tree["out"]).set_index("recording_id")
    bold = zarr.open_group(str(Path(tree["out"]) / "recordings.zarr"), mode="r")["bold"]
    train = []
    for split in SPLITS:
        reader = dataset.split(split)
        for index, entry in enumerate(reader.entries):
            original = np.load(table_path.parent / "ts" / f"{entry.recording_id}.npy")
            first = table.loc[entry.recording_id, "first_row"]
            np.testing.assert_array_equal(bold[first : first + 60], original)
            np.testing.assert_array_equal(reader.recording(index), centre(original))
            assert table.loc[entry.recording_id, "split"] == split
            if split == "train":
                train.append(centre(original))
    median, iqr = robust_statistics(np.concatenate(train))
    np.testing.assert_array_equal(dataset.contract.median, median)
    np.testing.assert_array_equal(dataset.contract.iqr, iqr)
    assert dataset.contract.num_statistics_recordings == len(train)


def test_phenotypes_keep_their_names_and_ids_their_zeros(toy, rng):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    subjects = pd.read_parquet(Path(tree["out"]) / "subjects.parquet")
    assert subjects.columns.tolist() == ["subject", "age", "sex(1=M,2=F)"]
    assert subjects["subject"].tolist()[:2] == ["000", "001"]


def test_bad_recordings_are_refused_with_their_reason_while_the_rest_goes_on(toy, rng, capsys):
    root = toy.write_bids(rng, num_subjects=14)
    images = sorted(root.rglob("*.nii.gz"))
    images[0].write_bytes(images[0].read_bytes()[:-2000])
    toy.write_image(images[1], toy.paint(toy.write_series(rng, 30)))
    confounds = sorted(root.rglob("*_timeseries.tsv"))
    confounds[1].write_text("\n".join(confounds[1].read_text().splitlines()[:31]) + "\n")
    toy.write_image(images[2], toy.paint(toy.write_series(rng)), tr_s=2.5)
    toy.write_image(images[3], toy.paint(toy.write_series(rng))[..., 0])
    images[4].rename(str(images[4]).replace("_space-MNI152NLin6Asym", "_space-T1w"))
    confounds[5].write_text("\n".join(confounds[5].read_text().splitlines()[:-1]) + "\n")
    tree = toy.settings(root, clean={"confounds": ["trans_x"]}, max_refused_fraction=0.5)
    assert toy.prepare(tree) == 0
    assert "8 prepared, 6 refused" in capsys.readouterr().out
    found = rejected(tree["out"])
    reasons = found["reason"].tolist()
    assert "volume" in reasons[0]
    assert "too short: 30 timepoints, a window needs 40" in reasons[1]
    assert "2 s by RepetitionTime" in reasons[2]
    assert "2.5 s in the image's header" in reasons[2]
    assert "4-D" in reasons[3]
    assert "space-T1w" in reasons[4]
    assert "has 59 rows of confounds, the recording 60 timepoints" in reasons[5]
    assert len(recordings(tree["out"])) == 8
    assert "space-T1w" in (Path(tree["out"]) / "quality.html").read_text()


def test_wrong_columns_are_refused_with_the_numbers(toy, rng):
    path = toy.write_table(rng, num_subjects=10)
    np.save(path.parent / "ts" / "S_000.npy", rng.normal(size=(60, 5)).astype(np.float32))
    (path.parent / "ts" / "S_001.npy").unlink()
    tree = toy.settings(path, max_refused_fraction=0.2, splits={"val": 0.0, "test": 0.0})
    assert toy.prepare(tree) == 0
    assert (
        "expected 6 columns, one for each parcel of the atlas; found 5 columns of 60 timepoints"
        in rejected(tree["out"]).loc["S_000", "reason"]
    )
    assert "no file S_001.npy" in rejected(tree["out"]).loc["S_001", "reason"]


def test_too_many_refusals_end_without_a_data_set_but_with_the_list(toy, rng, capsys):
    path = toy.write_table(rng, num_subjects=6)
    for number in range(2):
        np.save(path.parent / "ts" / f"S_00{number}.npy", rng.normal(size=(20, 6)))
    tree = toy.settings(path)
    assert toy.prepare(tree) == 1
    message = capsys.readouterr().err
    assert "2 of 6 recordings (33%) were refused, at most 10%" in message
    assert "too short: 20 timepoints, a window needs 40" in message
    assert rejected(tree["out"]).index.tolist() == ["S_000", "S_001"]
    assert not (Path(tree["out"]) / "dataset.json").exists()


def test_missing_parcels_are_nan_in_the_archive_and_left_out_of_statistics(toy, rng):
    path = toy.write_table(rng)
    series = toy.write_series(rng).astype(np.float32)
    series[:, 1] = 5.0
    series[3, 2] = np.nan
    np.save(path.parent / "ts" / "S_000.npy", series)
    tree = toy.settings(path, splits={"val": 0.0, "test": 0.0})
    assert toy.prepare(tree) == 0
    group = zarr.open_group(str(Path(tree["out"]) / "recordings.zarr"), mode="r")
    np.testing.assert_array_equal(group["coverage"][0], [1, 0, 0, 1, 1, 1])
    assert np.isnan(group["bold"][:60, 1:3]).all()
    assert np.isfinite(group["bold"][60:]).all()
    dataset = open_dataset(tree["out"])
    np.testing.assert_array_equal(dataset.split("train").present(0), [True, False, False, True, True, True])
    others = [np.load(path.parent / "ts" / f"S_{number:03d}.npy") for number in range(1, 6)]
    median, _ = robust_statistics(np.concatenate([centre(bold) for bold in others]))
    np.testing.assert_array_equal(dataset.contract.median[1:3], median[1:3])
    assert inspect_dataset.main([tree["out"]]) == 0


def test_equal_series_are_reported_and_stay_in_one_split(toy, rng, capsys):
    path = toy.write_table(rng, num_subjects=12)
    shutil.copy(path.parent / "ts" / "S_000.npy", path.parent / "ts" / "S_007.npy")
    shutil.copy(path.parent / "ts" / "S_000.npy", path.parent / "ts" / "S_011.npy")
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    assert "equal series under several ids, kept in one split: S_000, S_007, S_011" in capsys.readouterr().out
    table = recordings(tree["out"]).set_index("recording_id")
    assert table.loc[["S_000", "S_007", "S_011"], "split"].nunique() == 1
    manifest = json.loads((Path(tree["out"]) / "dataset.json").read_text())
    assert manifest["duplicates"] == [["S_000", "S_007", "S_011"]]
    assert "S_000, S_007, S_011" in (Path(tree["out"]) / "quality.html").read_text()


def test_finished_data_set_is_left_alone(toy, rng, capsys, tree_bytes):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    before = tree_bytes(Path(tree["out"]))
    assert toy.prepare(tree) == 0
    assert "complete already" in capsys.readouterr().out
    assert tree_bytes(Path(tree["out"])) == before


@pytest.mark.parametrize(
    ("override", "named"), [("splits.seed=9", "splits.seed: 9 here, 11 there"), ("clean.detrend=true", "clean.detrend")]
)
def test_other_settings_for_a_finished_data_set_are_refused_and_named(toy, rng, capsys, override, named):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    assert toy.prepare(tree, override) == 1
    assert named in capsys.readouterr().err


def test_changed_inputs_of_a_finished_data_set_are_refused(toy, rng, capsys):
    path = toy.write_table(rng)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    later = (Path(tree["out"]) / "dataset.json").stat().st_mtime + 10
    os.utime(path.parent / "ts" / "S_000.npy", (later, later))
    assert toy.prepare(tree) == 0  # touched, not changed
    np.save(path.parent / "ts" / "S_000.npy", rng.normal(size=(60, 6)).astype(np.float32))
    os.utime(path.parent / "ts" / "S_000.npy", (later, later))
    assert toy.prepare(tree) == 1
    assert "1 source files have changed" in capsys.readouterr().err
    np.save(path.parent / "ts" / "S_000.npy", rng.normal(size=(70, 6)).astype(np.float32))
    assert toy.prepare(tree) == 1
    assert "other inputs" in capsys.readouterr().err


def test_interrupted_run_does_only_what_is_missing(toy, rng, monkeypatch, tree_bytes):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    out = Path(tree["out"])
    expected = tree_bytes(out)
    (out / "dataset.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.write_shards", stop)
        with pytest.raises(Killed):
            toy.prepare(tree)
    staged = list(out.glob("staging/*/*.npz"))
    assert len(staged) == 6
    staged[0].with_suffix(".json").unlink()
    read = []
    import data_prep.one_recording as one_recording

    original = one_recording.read_recording
    monkeypatch.setattr(one_recording, "read_recording", lambda path, *rest: read.append(path) or original(path, *rest))
    assert toy.prepare(tree) == 0
    assert [Path(path).stem for path in read] == [staged[0].stem]
    assert tree_bytes(out) == expected


def test_unexpected_exception_of_one_recording_is_a_counted_refusal(toy, rng, monkeypatch):
    import data_prep.one_recording as one_recording

    original = one_recording.read_recording

    def strange(path, *rest):
        if "S_003" in str(path):
            raise ZeroDivisionError("oh")
        return original(path, *rest)

    monkeypatch.setattr(one_recording, "read_recording", strange)
    tree = toy.settings(toy.write_table(rng), max_refused_fraction=0.5)
    assert toy.prepare(tree) == 0
    assert rejected(tree["out"]).loc["S_003", "reason"] == "internal: ZeroDivisionError: oh"


def test_several_repetition_times_are_resampled_to_the_longest_or_to_the_target(toy, rng, tree_bytes, capsys):
    path = toy.write_table(rng)
    path.write_text(path.read_text().replace("site1\t2.0", "site1\t1.5"))
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    assert "several repetition times (1.5 s, 2 s): resampling to the longest, 2 s" in capsys.readouterr().out
    table = recordings(tree["out"])
    assert table["tr_s"].eq(2.0).all()
    assert sorted(table["num_timepoints"].unique()) == [45, 60]
    assert table["resampled"].sum() == 3
    assert any("resampled" in flag for flag in open_dataset(tree["out"]).contract.flags)
    asked_for = tree | {"out": str(toy.folder / "asked"), "target_tr_s": 2.0}
    assert toy.prepare(asked_for) == 0
    assert open_dataset(asked_for["out"]).content_hash == open_dataset(tree["out"]).content_hash
    assert toy.prepare(tree | {"out": str(toy.folder / "fast")}, "target_tr_s=1.0") == 0
    assert recordings(toy.folder / "fast")["resampled"].all()


def test_atlas_and_images_in_two_templates_are_a_warning(toy, rng, capsys):
    tree = toy.settings(toy.write_bids(rng))
    tree["atlas"]["space"] = "MNI152NLin2009cAsym"
    assert toy.prepare(tree) == 0
    assert "6 recordings are in MNI152NLin6Asym, the atlas in MNI152NLin2009cAsym" in capsys.readouterr().out


@pytest.mark.parametrize("group_by", ["family", "site", "age"])
def test_splits_can_be_by_family_site_or_a_phenotype(toy, rng, group_by):
    tree = toy.settings(toy.write_bids(rng), splits={"val": 0.0, "test": 0.5, "seed": 5, "group_by": group_by})
    assert toy.prepare(tree) == 0
    table = recordings(tree["out"])
    table["age"] = table["subject"]
    assert table.groupby(group_by)["split"].nunique().eq(1).all()


def test_unknown_group_is_named_beside_the_known(toy, rng, capsys):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree, "splits.group_by=clinic") == 1
    assert "phenotype column (age, sex(1=M,2=F)), found 'clinic'" in capsys.readouterr().err


def test_empty_split_is_an_error_with_counts(toy, rng, capsys):
    tree = toy.settings(toy.write_table(rng, num_subjects=2), splits={"val": 0.3, "test": 0.3, "seed": 0})
    assert toy.prepare(tree) == 1
    assert "no recordings in" in capsys.readouterr().err


def test_unknown_setting_is_named_with_its_path(toy, rng, capsys):
    tree = toy.settings(toy.write_table(rng))
    tree["clean"] = {"low_pass": 0.1}
    assert toy.prepare(tree) == 1
    assert "clean.low_pass: unknown key" in capsys.readouterr().err


def test_dry_run_shows_the_plan_and_writes_nothing(toy, rng, capsys):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree, "--dry-run") == 0
    assert "6 recordings of 6 subjects" in capsys.readouterr().out
    assert not Path(tree["out"]).exists()


def test_memory_storage_holds_a_data_set(toy, rng):
    url = f"memory://{uuid.uuid4().hex}/dataset"
    tree = toy.settings(toy.write_table(rng), out=url, ray={"address": "local"})
    assert toy.prepare(tree) == 0
    dataset = open_dataset(url)
    assert len(dataset.split("train")) > 0
    assert inspect_dataset.main([url]) == 0
    fsspec.filesystem("memory").rm(url.removeprefix("memory://").split("/")[0], recursive=True)


def test_inspection_finds_a_changed_shard(toy, rng, capsys):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    shard = Path(tree["out"]) / "shards" / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    assert inspect_dataset.main([tree["out"]]) == 1
    assert "train-00000.tar: its bytes have changed" in capsys.readouterr().out


def test_truth_of_a_simulated_cohort_is_carried_along(toy, rng):
    truth = toy.folder / "truth" / "inner"
    truth.mkdir(parents=True)
    (truth / "system.json").write_text("{}")
    tree = toy.settings(toy.write_table(rng), truth=str(toy.folder / "truth"))
    assert toy.prepare(tree) == 0
    assert (Path(tree["out"]) / "truth" / "inner" / "system.json").read_text() == "{}"


def test_config_is_asked_for(capsys):
    assert main([]) == 1
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-2.0, 0.0, 2000.0, np.inf])
def test_repetition_time_that_cannot_be_seconds_is_refused(toy, rng, value):
    path = toy.write_table(rng)
    text = path.read_text()
    path.write_text(text[: text.rindex("2.0")] + f"{value}\n")
    tree = toy.settings(path, max_refused_fraction=0.5, splits={"val": 0.0, "test": 0.2, "seed": 11})
    assert toy.prepare(tree) == 0
    refused = rejected(toy.folder / "dataset")
    assert refused.index.tolist() == ["S_005"]
    assert "above 0 s and at most 30 s" in refused["reason"].iloc[0]
    assert "by column tr" in refused["reason"].iloc[0]


def test_sidecar_in_milliseconds_without_a_time_in_the_header_is_refused(toy, rng):
    root = toy.write_bids(rng)
    image = next((root / "sub-03" / "func").glob("*bold.nii.gz"))
    toy.write_image(image, toy.paint(toy.write_series(rng)), tr_s=0.0)
    Path(str(image).replace(".nii.gz", ".json")).write_text('{"RepetitionTime": 2000}')
    assert toy.prepare(toy.settings(root, max_refused_fraction=0.5)) == 0
    refused = rejected(toy.folder / "dataset")
    assert refused.index.tolist() == ["sub-03_task-rest"]
    assert "are these milliseconds?" in refused["reason"].iloc[0]


@pytest.mark.parametrize("changed", ["image", "table"])
def test_finished_data_set_of_a_changed_atlas_is_an_error(toy, rng, capsys, changed):
    tree = toy.settings(toy.write_bids(rng))
    assert toy.prepare(tree) == 0
    if changed == "image":
        toy.write_atlas(labels=np.where(toy.labels == 3, 4, toy.labels))
        names = toy.folder / "atlas.tsv"
        names.write_text(names.read_text() + "4\tparcel4\tnet0\n")
    else:
        names = toy.folder / "atlas.tsv"
        names.write_text(names.read_text().replace("net1", "other"))
    assert toy.prepare(tree) == 1
    assert "another atlas" in capsys.readouterr().err


def test_series_staged_with_another_atlas_image_are_not_used_again(toy, rng, monkeypatch):
    tree = toy.settings(toy.write_bids(rng))

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.write_shards", stop)
        with pytest.raises(Killed):
            toy.prepare(tree)
    swapped = np.where(toy.labels == 3, 1001, np.where(toy.labels == 1001, 3, toy.labels))
    toy.write_atlas(labels=swapped)
    assert toy.prepare(tree) == 0
    found = zarr.open_group(toy.folder / "dataset" / "recordings.zarr", mode="r")["bold"][:]
    shutil.rmtree(toy.folder / "dataset")
    assert toy.prepare(tree) == 0
    again = zarr.open_group(toy.folder / "dataset" / "recordings.zarr", mode="r")["bold"][:]
    np.testing.assert_array_equal(found, again)


def test_stopped_runs_of_several_repetition_times_do_nothing_twice(toy, rng, monkeypatch, tree_bytes):
    path = toy.write_table(rng)
    path.write_text(path.read_text().replace("site1\t2.0", "site1\t1.5"))
    whole = toy.settings(path, out=str(toy.folder / "whole"))
    assert toy.prepare(whole) == 0
    tree = toy.settings(path)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.make_contract", stop)
        with pytest.raises(Killed):
            toy.prepare(tree)
    read = []
    import data_prep.one_recording as one_recording

    original = one_recording.read_recording
    monkeypatch.setattr(one_recording, "read_recording", lambda path, *rest: read.append(path) or original(path, *rest))
    assert toy.prepare(tree) == 0
    assert read == []
    assert tree_bytes(Path(tree["out"])) == tree_bytes(Path(whole["out"]))


def test_a_refusal_for_want_of_a_sidecar_is_looked_at_again(toy, rng):
    root = toy.write_bids(rng)
    tree = toy.settings(root, clean={"strategy": "aCompCor"})
    assert toy.prepare(tree) == 1
    reasons = rejected(tree["out"])["reason"]
    for table in root.rglob("*_timeseries.tsv"):
        frame = pd.read_csv(table, sep="\t", na_values="n/a")
        for name in MOTION:
            for what in ("derivative1", "power2", "derivative1_power2"):
                frame[f"{name}_{what}"] = rng.normal(size=len(frame))
        frame["a_comp_cor_00"], frame["cosine00"] = rng.normal(size=(2, len(frame)))
        frame.to_csv(table, sep="\t", na_rep="n/a", index=False)
        component = {"a_comp_cor_00": {"Mask": "combined", "Method": "aCompCor", "Retained": True}}
        table.with_suffix(".json").write_text(json.dumps(component))
    assert toy.prepare(tree) == 0, reasons.tolist()


def test_staged_rows_of_another_target_do_not_show(toy, rng, monkeypatch, tree_bytes):
    path = toy.write_table(rng)
    path.write_text(path.read_text().replace("\t2.0\n", "\t2.001\n"))
    whole = toy.settings(path, out=str(toy.folder / "whole"))
    assert toy.prepare(whole) == 0

    tree = toy.settings(path)
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.make_contract", stop)
        with pytest.raises(Killed):
            toy.prepare(tree, "target_tr_s=2.0")
    assert toy.prepare(tree) == 0
    assert tree_bytes(Path(tree["out"])) == tree_bytes(Path(whole["out"]))
