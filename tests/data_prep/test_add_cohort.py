"""Adding recordings to a data set: what is there stays as it is, and nothing is ever a mixture."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from brainlm.dataset import SPLITS, open_dataset
from brainlm.scaling import centre
from data_prep import inspect_dataset, zarr_store

CHANGED_BY_ADDING = {
    "dataset.json", "input_contract.json", "recordings.parquet", "rejected.parquet", "subjects.parquet",
    "folds.parquet", "quality.html", "recordings.zarr/bold/zarr.json", "recordings.zarr/keep_mask/zarr.json",
    "recordings.zarr/coverage/zarr.json",
}  # fmt: skip


@pytest.fixture
def small_objects(monkeypatch):
    """Archive objects of a recording each, so that additions begin at their borders."""
    monkeypatch.setattr(zarr_store, "CHUNK_ROWS", 20)
    monkeypatch.setattr(zarr_store, "SHARD_ROWS", 40)
    monkeypatch.setattr(zarr_store, "CHUNK_RECORDINGS", 4)


def recordings(tree):
    return pd.read_parquet(Path(tree["out"]) / "recordings.parquet").set_index("recording_id")


@pytest.fixture
def two(toy, rng, small_objects):
    """A data set of six recordings, and the settings that add four others to it."""
    first = toy.settings(toy.write_table(rng))
    assert toy.prepare(first) == 0
    second = toy.settings(toy.write_table(rng, num_subjects=4, name="more", first=10), name="more")
    return first, second


def test_adding_only_adds(toy, two, tree_bytes, capsys):
    first, second = two
    before, table = tree_bytes(Path(first["out"])), recordings(first)
    assert toy.prepare(second, "add=true") == 0
    after = tree_bytes(Path(first["out"]))
    assert {name for name in before if after[name] != before[name]} <= CHANGED_BY_ADDING
    both = recordings(first)
    assert len(both) == 10
    shared = [name for name in table.columns if name not in ("cohort", "addition")]
    pd.testing.assert_frame_equal(both.loc[table.index, shared], table[shared])
    assert both["cohort"].tolist() == ["toy"] * 6 + ["more"] * 4
    subjects = pd.read_parquet(Path(first["out"]) / "subjects.parquet")
    assert len(subjects) == 10
    assert subjects["age"].notna().all()
    capsys.readouterr()
    assert inspect_dataset.main([first["out"]]) == 0, capsys.readouterr().out


def test_added_series_are_found_where_the_tables_say(toy, two):
    first, second = two
    toy.prepare(second, "add=true")
    dataset = open_dataset(first["out"])
    group = zarr.open_group(str(Path(first["out"]) / "recordings.zarr"), mode="r")
    for recording_id, row in recordings(first).iterrows():
        folder = "table" if row["cohort"] == "toy" else "more"
        original = np.load(toy.folder / folder / "ts" / f"{recording_id}.npy")
        rows = slice(row["first_row"], row["first_row"] + row["num_timepoints"])
        np.testing.assert_array_equal(group["bold"][rows], original)
        assert np.asarray(group["keep_mask"][rows]).all()
        assert (np.asarray(group["coverage"][row["archive_row"]]) == 1).all()
    seen = {
        entry.recording_id: dataset.split(split).recording(index)
        for split in SPLITS
        for index, entry in enumerate(dataset.split(split).entries)
    }
    assert len(seen) == 10
    original = np.load(toy.folder / "more" / "ts" / "S_012.npy")
    np.testing.assert_array_equal(seen["S_012"], centre(original))


def test_statistics_stay_frozen_and_a_shifted_scale_is_said(toy, two, rng):
    first, second = two
    before = open_dataset(first["out"]).contract
    for path in (toy.folder / "more" / "ts").glob("*.npy"):
        np.save(path, (np.load(path) * 7).astype(np.float32))
    assert toy.prepare(second, "add=true") == 0
    after = open_dataset(first["out"])
    np.testing.assert_array_equal(after.contract.median, before.median)
    np.testing.assert_array_equal(after.contract.iqr, before.iqr)
    assert any("amplitude" in line for line in after.manifest["warnings"])


def test_given_again_nothing_is_done_for_either_command(toy, two, capsys, tree_bytes):
    first, second = two
    assert toy.prepare(second, "add=true") == 0
    done = tree_bytes(Path(first["out"]))
    for tree, options in ((second, ["add=true"]), (first, [])):
        capsys.readouterr()
        assert toy.prepare(tree, *options) == 0
        assert "complete already" in capsys.readouterr().out
    assert tree_bytes(Path(first["out"])) == done


def test_a_stopped_addition_leaves_the_old_data_set_and_ends_in_the_same_bytes(toy, two, monkeypatch, tree_bytes):
    from data_prep import finish

    first, second = two
    whole = first | {"out": str(toy.folder / "whole")}
    assert toy.prepare(whole) == 0
    assert toy.prepare(second | {"out": whole["out"]}, "add=true") == 0
    real = finish.Store.write_json

    def stopped(store, name, tree):
        if name == "dataset.json":
            raise KeyboardInterrupt
        real(store, name, tree)

    with monkeypatch.context() as patch:
        patch.setattr(finish.Store, "write_json", stopped)
        assert toy.prepare(second, "add=true") == 130
    assert json.loads((Path(first["out"]) / "dataset.json").read_bytes())["counts"]["train"]["recordings"] <= 6
    assert sum(len(open_dataset(first["out"]).split(split)) for split in SPLITS) == 6
    assert toy.prepare(second, "add=true") == 0
    assert tree_bytes(Path(first["out"])) == tree_bytes(Path(whole["out"]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clean": {"high_pass_hz": 0.01}}, "clean.high_pass_hz: 0.01 here, None there"),
        ({"windows": {"window_len": 20, "patch_len": 10}}, "windows.window_len: 20 here, 40 there"),
        ({"splits": {"val": 0.3, "test": 0.2, "seed": 12}}, "splits.seed: 12 here, 11 there"),
        ({"target_tr_s": 1.0}, "target_tr_s: 1 here, 2 there"),
    ],
)
def test_another_processing_option_is_refused_and_named(toy, two, capsys, tree_bytes, change, named):
    first, second = two
    before = tree_bytes(Path(first["out"]))
    assert toy.prepare(second | change, "add=true") == 1
    message = capsys.readouterr().err
    assert named in message
    assert "never a mixture" in message
    assert tree_bytes(Path(first["out"])) == before


def test_without_add_another_source_is_refused_and_add_is_offered(toy, two, capsys):
    _, second = two
    assert toy.prepare(second) == 1
    assert "add=true" in capsys.readouterr().err


def test_adding_to_nothing_is_an_error(toy, two, capsys):
    _, second = two
    assert toy.prepare(second | {"out": str(toy.folder / "elsewhere")}, "add=true") == 1
    assert "no finished data set" in capsys.readouterr().err


def test_a_cohort_that_grew_adds_its_new_recordings_alone(toy, rng, small_objects, capsys):
    path = toy.write_table(rng)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    np.save(path.parent / "ts" / "S_006.npy", toy.write_series(rng).astype(np.float32))
    path.write_text(path.read_text() + "S_006\t006\t31\t1\tsite0\t2.0\n")
    assert toy.prepare(tree) == 1
    assert "add=true" in capsys.readouterr().err
    assert toy.prepare(tree, "add=true") == 0
    assert "1 prepared" in capsys.readouterr().out or len(recordings(tree)) == 7
    assert recordings(tree)["addition"].tolist() == [0] * 6 + [1]


def test_a_changed_source_file_is_noticed_when_adding(toy, rng, capsys):
    path = toy.write_table(rng)
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    np.save(path.parent / "ts" / "S_002.npy", toy.write_series(rng, 70).astype(np.float32))
    assert toy.prepare(tree, "add=true") == 1
    assert "S_002" in capsys.readouterr().err


def test_a_recording_that_would_join_train_and_test_is_refused(toy, rng, small_objects):
    tree = toy.settings(toy.write_table(rng, num_subjects=12))
    assert toy.prepare(tree) == 0
    split_of = recordings(tree)["split"]
    train, test = (split_of.index[split_of == split][0] for split in ("train", "test"))
    more = toy.write_table(rng, num_subjects=12, name="more", first=20)
    folder = more.parent / "ts"
    np.save(folder / "S_020.npy", np.load(toy.folder / "table" / "ts" / f"{train}.npy"))
    text = more.read_text().replace("S_020\t020\t", f"S_020\t{int(test.removeprefix('S_')):03d}\t")
    age = 20 + int(test.removeprefix("S_"))
    more.write_text(text.replace("\t40\t1\tsite0\t2.0", f"\t{age}\t{1 + int(test[2:]) % 2}\tsite0\t2.0", 1))
    assert toy.prepare(toy.settings(more, name="more"), "add=true") == 0
    rejected = pd.read_parquet(Path(tree["out"]) / "rejected.parquet").set_index("recording_id")
    assert rejected.loc["S_020", "stage"] == "splits"
    assert "train" in rejected.loc["S_020", "reason"]
    assert "test" in rejected.loc["S_020", "reason"]
    after = recordings(tree)["split"]
    assert (after[split_of.index] == split_of).all()


def test_a_repeated_series_goes_to_the_split_of_its_twin(toy, rng, small_objects):
    tree = toy.settings(toy.write_table(rng, num_subjects=12))
    assert toy.prepare(tree) == 0
    more = toy.write_table(rng, num_subjects=12, name="more", first=20)
    for number, twin in enumerate(recordings(tree).index):
        np.save(more.parent / "ts" / f"S_{20 + number:03d}.npy", np.load(toy.folder / "table" / "ts" / f"{twin}.npy"))
    assert toy.prepare(toy.settings(more, name="more"), "add=true") == 0
    split_of = recordings(tree)["split"]
    for number in range(12):
        assert split_of[f"S_{20 + number:03d}"] == split_of[f"S_{number:03d}"]
    assert len(open_dataset(tree["out"]).manifest["duplicates"]) == 12


def test_a_contract_s_filter_is_processing_too(toy, rng, small_objects, capsys):
    filtered = toy.settings(toy.write_table(rng), name="filtered", out=str(toy.folder / "filtered"))
    assert toy.prepare(filtered, "clean.high_pass_hz=0.02", "target_tr_s=2.0") == 0
    base = toy.settings(toy.write_table(rng, name="base", first=20), name="base")
    contract = f"contract={filtered['out']}"
    assert toy.prepare(base, contract) == 0
    more = toy.settings(toy.write_table(rng, num_subjects=3, name="more", first=40), name="more")
    assert toy.prepare(more, "add=true") == 1
    assert "clean.high_pass_hz: None here, 0.02 there" in capsys.readouterr().err
    assert toy.prepare(more, "add=true", contract) == 0
    plain = toy.settings(
        toy.write_table(rng, 20, name="plain", first=60), name="plain", out=str(toy.folder / "plain-out")
    )
    assert toy.prepare(plain) == 0
    assert toy.prepare(more | {"out": plain["out"]}, "add=true", contract) == 1


def test_two_programs_cannot_write_one_data_set(toy, two, capsys):
    from brainlm.store import Store
    from data_prep.lock_dataset import locked

    _, second = two
    with locked(Store(second["out"])):
        assert toy.prepare(second, "add=true") == 1
    assert "another process is writing" in capsys.readouterr().err
    assert toy.prepare(second, "add=true") == 0


def test_a_data_set_that_changed_meanwhile_is_left_alone(toy, two, monkeypatch, capsys, tree_bytes):
    from data_prep import prepare

    first, second = two
    real = prepare.place_in_splits

    def meanwhile(*arguments):
        path = Path(first["out"]) / "dataset.json"
        path.write_text(path.read_text().replace('"content_hash": "', '"content_hash": "0'))
        return real(*arguments)

    monkeypatch.setattr(prepare, "place_in_splits", meanwhile)
    before = tree_bytes(Path(first["out"]))
    assert toy.prepare(second, "add=true") == 1
    assert "by another process meanwhile" in capsys.readouterr().err
    after = tree_bytes(Path(first["out"]))
    assert {name for name in before if after[name] != before[name]} == {"dataset.json"}


def test_a_cohort_with_refused_recordings_can_grow(toy, rng, small_objects, capsys):
    path = toy.write_table(rng, num_subjects=20)
    for number in (3, 4):
        np.save(path.parent / "ts" / f"S_{number:03d}.npy", rng.normal(size=(10, 6)))
    tree = toy.settings(path)
    assert toy.prepare(tree) == 0
    np.save(path.parent / "ts" / "S_020.npy", toy.write_series(rng).astype(np.float32))
    path.write_text(path.read_text() + "S_020\t020\t31\t1\tsite0\t2.0\n")
    assert toy.prepare(tree, "add=true") == 0
    assert len(recordings(tree)) == 19
    assert len(pd.read_parquet(Path(tree["out"]) / "rejected.parquet")) == 2


def test_the_contract_says_how_old_and_new_recordings_were_made(toy, rng, small_objects):
    tree = toy.settings(toy.write_table(rng))
    assert toy.prepare(tree) == 0
    more = toy.write_table(rng, num_subjects=4, num_timepoints=90, name="more", first=20)
    more.write_text(more.read_text().replace("\t2.0\n", "\t1.5\n"))
    assert toy.prepare(toy.settings(more, name="more"), "add=true") == 0
    contract = open_dataset(tree["out"]).contract
    assert contract.cleaning["resampled_from_tr_s"] == [1.5]
    assert sum("resampled" in flag for flag in contract.flags) == 1
    assert recordings(tree)["resampled"].tolist() == [False] * 6 + [True] * 4
