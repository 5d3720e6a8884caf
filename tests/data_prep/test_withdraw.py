"""Withdrawn subjects are in no file any more, and do not come back."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import SPLITS, open_dataset
from brainlm.errors import DataError
from brainlm.store import Store
from brainlm.testing import small_model
from data_prep import inspect_dataset
from tests.s3_server import CREDENTIALS, serving

BUCKET = "cohorts"
GONE = ("S_001", "S_004")


@pytest.fixture(params=["float32", "float16"])
def made(toy, rng, request):
    """A data set of eight recordings, and a file that withdraws two of their subjects and two strangers."""
    tree = toy.settings(
        toy.write_table(rng, num_subjects=8), shards={"dtype": request.param, "recordings_per_shard": 3}
    )
    assert toy.prepare(tree) == 0
    (toy.folder / "withdrawn.csv").write_text("# eid\nsub-001\n004,2026-11-20\n999\n998\n")
    return tree, f"withdraw={toy.folder / 'withdrawn.csv'}"


def series(tree):
    dataset = open_dataset(tree["out"])
    return {
        entry.recording_id: dataset.split(split).recording(index)
        for split in SPLITS
        for index, entry in enumerate(dataset.split(split).entries)
    }


def test_withdrawn_subjects_are_in_no_file(toy, made, tree_bytes, capsys):
    tree, command = made
    before = series(tree)
    assert toy.prepare(tree, command) == 0
    assert "4 subjects, 2 of them" in capsys.readouterr().out
    after = series(tree)
    assert set(after) == set(before) - set(GONE)
    for recording_id in after:
        np.testing.assert_array_equal(after[recording_id], before[recording_id])
    originals = [np.load(toy.folder / "table" / "ts" / f"{name}.npy") for name in GONE]
    for name, data in tree_bytes(Path(tree["out"])).items():
        assert not any(gone.encode() in data for gone in GONE), name
        for original in originals:
            assert original[10:12].tobytes() not in data, name
    for table in ("recordings", "subjects", "folds", "rejected"):
        frame = pd.read_parquet(Path(tree["out"]) / f"{table}.parquet")
        assert not {"001", "004", *GONE} & set(frame.astype(str).to_numpy().ravel()), table
    assert inspect_dataset.main([tree["out"]]) == 0, capsys.readouterr().out


def test_copies_in_the_cache_of_this_machine_go_too(toy, rng, monkeypatch):
    cache = toy.folder / "cache"
    with serving(BUCKET) as (host, port), monkeypatch.context() as patch:
        environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "BRAINLM_CACHE": str(cache)}
        for name, value in environment.items():
            patch.setenv(name, value)
        tree = toy.settings(
            toy.write_table(rng, num_subjects=8), out=f"s3://{BUCKET}/toy", shards={"recordings_per_shard": 3}
        )
        s3 = type(Store(tree["out"]).fs)
        s3.clear_instance_cache()
        assert toy.prepare(tree) == 0
        train = open_dataset(tree["out"]).split("train").entries
        gone = train[0].subject
        before = series(tree)
        rows = before[train[0].recording_id][10:12].tobytes()
        assert any(rows in path.read_bytes() for path in cache.rglob("*.tar"))
        (toy.folder / "gone.txt").write_text(f"{gone}\n")
        assert toy.prepare(tree, f"withdraw={toy.folder / 'gone.txt'}") == 0
        after = series(tree)
        assert set(after) == {name for name in before if name != train[0].recording_id}
        for recording_id, values in after.items():
            np.testing.assert_array_equal(values, before[recording_id])
        left = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
        assert left
        assert not any(train[0].recording_id.encode() in data or rows in data for data in left)
        s3.clear_instance_cache()


def test_statistics_stay_and_the_contract_says_so(toy, made):
    tree, command = made
    before = open_dataset(tree["out"])
    assert toy.prepare(tree, command) == 0
    after = open_dataset(tree["out"])
    np.testing.assert_array_equal(after.contract.iqr, before.contract.iqr)
    assert any("2 recordings of 2 subjects were withdrawn" in flag for flag in after.contract.flags)
    assert after.content_hash != before.content_hash


def test_they_do_not_come_back_when_recordings_are_added_or_the_command_is_repeated(toy, made, rng, capsys, tree_bytes):
    tree, command = made
    assert toy.prepare(tree, command) == 0
    done = tree_bytes(Path(tree["out"]))
    assert toy.prepare(tree) == 0
    assert toy.prepare(tree, command) == 0
    assert "0 of them" in capsys.readouterr().out
    assert tree_bytes(Path(tree["out"])) == done
    path = toy.folder / "table" / "list.tsv"
    np.save(path.parent / "ts" / "S_008.npy", toy.write_series(rng).astype(np.float32))
    path.write_text(path.read_text() + "S_008\t008\t31\t1\tsite0\t2.0\n")
    assert toy.prepare(tree, "add=true") == 0
    ids = pd.read_parquet(Path(tree["out"]) / "recordings.parquet")["recording_id"].tolist()
    assert "S_008" in ids
    assert not set(GONE) & set(ids)
    assert inspect_dataset.main([tree["out"]]) == 0


@pytest.mark.parametrize("stop_at", ["recordings.parquet", "dataset.json", "index.json", "tar"])
def test_a_stopped_withdrawal_is_finished_by_the_same_command(toy, made, monkeypatch, tree_bytes, stop_at):
    from brainlm.store import Store

    tree, command = made
    whole = tree | {"out": str(toy.folder / "whole")}
    assert toy.prepare(whole) == 0
    assert toy.prepare(whole, command) == 0
    write_bytes, new_file, seen = Store.write_bytes, Store.new_file, []

    def stop_here(name):
        seen.append(name)
        wanted = [found for found in seen if found.endswith(stop_at)]
        if len(wanted) == (2 if stop_at == "dataset.json" else 1) and name.endswith(stop_at):
            raise KeyboardInterrupt

    def stopped_bytes(store, name, data):
        stop_here(name)
        write_bytes(store, name, data)

    def stopped_file(store, name):
        stop_here(name)
        return new_file(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", stopped_bytes)
        patch.setattr(Store, "new_file", stopped_file)
        assert toy.prepare(tree, command) == 130
    with pytest.raises(DataError, match="withdrawal of subjects was stopped"):
        open_dataset(tree["out"])
    assert toy.prepare(tree) == 1
    assert toy.prepare(tree, command) == 0
    assert tree_bytes(Path(tree["out"])) == tree_bytes(Path(whole["out"]))


def test_checkpoints_that_saw_them_are_listed(toy, made, capsys):
    tree, command = made
    for name, subjects in (("saw", ["001", "002"]), ("did-not", ["002", "003"])):
        model = small_model(open_dataset(tree["out"]).contract)
        save_checkpoint(str(toy.folder / "runs" / name / "step-1"), model, {}, train_subjects=subjects)
    assert toy.prepare(tree, command, f"checkpoints=[{toy.folder / 'runs'}]") == 0
    out = capsys.readouterr().out
    assert f"trained on 1 of them: {toy.folder / 'runs'}/saw/step-1" in out
    assert "did-not" not in out
    assert "1 of 2 checkpoints" in out


def test_nobody_left_and_an_empty_list_are_errors(toy, made, capsys):
    tree, _ = made
    everyone = toy.folder / "all.txt"
    everyone.write_text("\n".join(f"{number:03d}" for number in range(8)))
    assert toy.prepare(tree, f"withdraw={everyone}") == 1
    assert "nobody would be left" in capsys.readouterr().err
    everyone.write_text("# nobody\n")
    assert toy.prepare(tree, f"withdraw={everyone}") == 1
    assert "lists no subjects" in capsys.readouterr().err
    assert "pending" not in json.loads((Path(tree["out"]) / "dataset.json").read_bytes()).get("withdrawn", {})
    assert len(series(tree)) == 8


def test_what_a_stopped_addition_left_of_them_goes_too(toy, made, rng, monkeypatch, tree_bytes, capsys):
    from brainlm.store import Store

    tree, _ = made
    more = toy.settings(toy.write_table(rng, num_subjects=3, name="more", first=20), name="more")
    more["shards"] = tree["shards"]
    real = Store.write_json

    def stopped(store, name, content):
        if name == "dataset.json":
            raise KeyboardInterrupt
        real(store, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", stopped)
        assert toy.prepare(more, "add=true") == 130
    out = Path(tree["out"])
    (out / "shards" / "train-00009.tar.tmp").write_bytes(b"S_021")
    (toy.folder / "late.csv").write_text("021\n")
    assert toy.prepare(tree, f"withdraw={toy.folder / 'late.csv'}") == 0
    original = np.load(toy.folder / "more" / "ts" / "S_021.npy")
    for name, data in tree_bytes(out).items():
        assert b"S_021" not in data, name
        assert original[10:12].tobytes() not in data, name
    capsys.readouterr()
    assert inspect_dataset.main([tree["out"]]) == 0, capsys.readouterr().out
    assert toy.prepare(more, "add=true") == 0
    ids = pd.read_parquet(out / "recordings.parquet")["recording_id"].tolist()
    assert "S_020" in ids
    assert "S_021" not in ids


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_stops_the_withdrawal_before_anything_is_changed(toy, made, tree_bytes, capsys, damage):
    tree, command = made
    out = Path(tree["out"])
    tar = sorted((out / "shards").glob("*.tar"))[0]
    data = tar.read_bytes()
    tar.unlink() if damage == "missing" else tar.write_bytes(data[:3000])
    before = tree_bytes(out)
    assert toy.prepare(tree, command) == 1
    assert tar.stem in capsys.readouterr().err
    assert tree_bytes(out) == before
    tar.write_bytes(data)
    assert toy.prepare(tree, command) == 0


def test_warnings_about_others_stay(toy, rng):
    from data_prep.withdraw import _names_any

    assert _names_any("equal series: S_2, S_3", {"S_2"})
    assert not _names_any("12 recordings are in MNI152NLin2009cAsym", {"2", "12recordings"})
    assert not _names_any("equal series: S_20, S_3", {"S_2"})
