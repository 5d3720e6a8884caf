"""Shards give back what was put in, are plain tars of plain arrays, and refuse what does not belong to them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainlm.errors import DataError, StoreError
from brainlm.shards import ShardEntry, SplitReader, StoredDtype, encode_shard, shard_name, write_shard
from brainlm.store import Store, sha256_of_file

P = 7
Recordings = list[tuple[ShardEntry, np.ndarray]]


@pytest.fixture
def recordings(rng: np.random.Generator) -> Recordings:
    """Three recordings of different lengths and loudness; the second has two missing parcels."""
    found = []
    for number, (num_timepoints, gain) in enumerate([(30, 1.0), (41, 1e-4), (25, 3e5)]):
        entry = ShardEntry(
            recording_id=f"sub-{number:02d}_task-rest",
            subject=f"sub-{number:02d}",
            tr_s=2.0,
            num_timepoints=num_timepoints,
            num_parcels=P,
            dtype="float32",
            scale=1.0,
            offset=0,
            missing_parcels=(0, 4) if number == 1 else (),
            task="rest",
            site="here",
        )
        found.append((entry, (gain * rng.normal(size=(num_timepoints, P))).astype(np.float32)))
    found[1][1][:, 4] = np.nan  # a missing parcel may hold anything
    return found


def write(folder: Path, recordings: Recordings, dtype: StoredDtype = "float32") -> tuple[Store, list[dict[str, Any]]]:
    """Two shards: two recordings and one."""
    store = Store(folder)
    rows = [
        write_shard(store, shard_name("train", number), *encode_shard(part, dtype))
        for number, part in enumerate([recordings[:2], recordings[2:]])
    ]
    return store, rows


def expected(recordings: Recordings, index: int) -> np.ndarray:
    bold = recordings[index][1].copy()
    bold[:, list(recordings[index][0].missing_parcels)] = 0
    return bold


def test_float32_gives_back_every_bit(tmp_path: Path, recordings: Recordings) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    assert len(reader) == 3
    for index, (entry, _) in enumerate(recordings):
        np.testing.assert_array_equal(reader.recording(index), expected(recordings, index))
        assert asdict(reader.entries[index]) == asdict(entry) | {"offset": reader.entries[index].offset}


def test_float16_rounds_within_the_stated_bound(tmp_path: Path, recordings: Recordings) -> None:
    reader = SplitReader(*write(tmp_path, recordings, "float16"))
    for index in range(3):
        bold = expected(recordings, index).astype(np.float64)
        error = np.abs(reader.recording(index) - bold)
        largest = np.abs(bold).max()
        bound = 2.0**-11 * np.abs(bold) + 2.0**-35 * largest + 2.0**-22 * np.abs(bold)  # last: the division in float32
        assert (error <= bound).all()
        assert error.max() > 2.0**-14 * largest  # it is float16 that was written, not something finer


def test_float16_of_silence_is_silence(tmp_path: Path, recordings: Recordings) -> None:
    entry, bold = recordings[0]
    reader = SplitReader(*write(tmp_path, [(entry, np.zeros_like(bold)), *recordings[1:]], "float16"))
    np.testing.assert_array_equal(reader.recording(0), np.zeros_like(bold))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_window_is_a_slice_of_its_recording(tmp_path: Path, recordings: Recordings, dtype: StoredDtype) -> None:
    reader = SplitReader(*write(tmp_path, recordings, dtype))
    for index, (entry, _) in enumerate(recordings):
        whole = reader.recording(index)
        for start in (0, 3, entry.num_timepoints - 20):
            window = reader.window(index, start, 20)
            np.testing.assert_array_equal(window, whole[start : start + 20])
            assert window.dtype == np.float32


@pytest.mark.parametrize(("start", "window_len"), [(-1, 20), (11, 20), (0, 31), (30, 1)])
def test_timepoints_outside_a_recording_are_refused(
    tmp_path: Path, recordings: Recordings, start: int, window_len: int
) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    with pytest.raises(DataError, match=f"sub-00_task-rest: timepoints {start} to {start + window_len} of 30"):
        reader.window(0, start, window_len)


def test_windows_can_be_changed_without_touching_the_shard(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    reader = SplitReader(store, rows)
    reader.window(0, 0, 20)[:] = 7
    np.testing.assert_array_equal(reader.recording(0), expected(recordings, 0))
    assert sha256_of_file(store.local_file("shards/train-00000.tar")) == rows[0]["sha256"]


def test_missing_parcels_are_zero_and_not_present(tmp_path: Path, recordings: Recordings) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    assert reader.present(0).all()
    assert reader.present(1).tolist() == [False, True, True, True, False, True, True]
    assert (reader.recording(1)[:, [0, 4]] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_anyone_can_read_the_tar(tmp_path: Path, recordings: Recordings, dtype: StoredDtype) -> None:
    store, rows = write(tmp_path, recordings, dtype)
    reader = SplitReader(store, rows)
    index = 0
    for row in rows:
        with tarfile.open(tmp_path / "shards" / f"{row['name']}.tar") as tar:
            names = tar.getnames()
            assert [name.split(".", 1)[1] for name in names] == ["npy", "json"] * row["num_recordings"]
            for npy, facts in zip(names[::2], names[1::2]):
                assert npy.split(".")[0] == facts.split(".")[0] == recordings[index][0].recording_id
                array = np.load(io.BytesIO(tar.extractfile(npy).read()), allow_pickle=False)  # type: ignore[union-attr]
                tree = json.load(tar.extractfile(facts))  # type: ignore[arg-type]
                assert array.dtype == np.dtype(dtype)
                np.testing.assert_array_equal(
                    array.astype(np.float32) * np.float32(tree["scale"]), reader.recording(index)
                )
                index += 1
    assert index == 3


def test_bytes_depend_on_the_recordings_alone(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [bold.copy() for _, bold in recordings]
    first, entries = encode_shard(recordings, "float16")
    monkeypatch.setattr("time.time", lambda: 4e9)
    monkeypatch.setenv("USER", "somebody-else")
    again, same_entries = encode_shard(recordings, "float16")
    assert again == first
    assert same_entries == entries
    for (_, bold), untouched in zip(recordings, before):
        np.testing.assert_array_equal(bold, untouched)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_arrays_are_aligned_to_their_numbers(recordings: Recordings) -> None:
    for dtype in ("float32", "float16"):
        _, entries = encode_shard(recordings, dtype)
        assert all(entry.offset % 64 == 0 for entry in entries)


def test_values_that_are_not_finite_are_refused(recordings: Recordings) -> None:
    recordings[0][1][2, 3] = np.inf
    with pytest.raises(DataError, match="sub-00_task-rest: values that are not finite"):
        encode_shard(recordings, "float32")


def test_a_series_that_does_not_fit_its_entry_is_refused(recordings: Recordings) -> None:
    entry, bold = recordings[0]
    with pytest.raises(DataError, match=r"sub-00_task-rest: series of shape \(29, 7\) against its entry"):
        encode_shard([(entry, bold[1:])], "float32")


def test_an_id_too_long_for_a_tar_is_refused(recordings: Recordings) -> None:
    entry, bold = recordings[0]
    with pytest.raises(DataError, match="at most 95 characters"):
        encode_shard([(replace(entry, recording_id="x" * 96), bold)], "float32")
    encode_shard([(replace(entry, recording_id="x" * 95), bold)], "float32")


def edit_index(store: Store, name: str, **changes: Any) -> None:
    index = store.read_json(f"shards/{name}.index.json")
    store.write_json(f"shards/{name}.index.json", index | changes)


@pytest.mark.parametrize("changes", [{"sha256": "0" * 64}, {"format_version": 2}])
def test_an_index_of_another_data_set_is_refused(tmp_path: Path, recordings: Recordings, changes: dict) -> None:
    store, rows = write(tmp_path, recordings)
    edit_index(store, "train-00001", **changes)
    with pytest.raises(DataError, match=r"train-00001\.index\.json does not belong to this data set's manifest"):
        SplitReader(store, rows)


def test_a_shard_of_another_preparation_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    _, old_rows = write(tmp_path, recordings)
    store, _ = write(tmp_path, recordings, "float16")
    with pytest.raises(DataError, match="prepare the data set again"):
        SplitReader(store, old_rows)


@pytest.mark.parametrize("offset", [-1, 10_000_000])
def test_an_offset_outside_the_file_is_refused(tmp_path: Path, recordings: Recordings, offset: int) -> None:
    store, rows = write(tmp_path, recordings)
    index = store.read_json("shards/train-00000.index.json")
    index["recordings"][1]["offset"] = offset
    store.write_json("shards/train-00000.index.json", index)
    with pytest.raises(DataError, match="sub-01_task-rest lies outside its shard"):
        SplitReader(store, rows)


def test_a_truncated_shard_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    tar = store.read_bytes("shards/train-00000.tar")
    store.write_bytes("shards/train-00000.tar", tar[:-512])
    with pytest.raises(DataError, match=f"{len(tar) - 512} bytes, the manifest says {len(tar)}"):
        SplitReader(store, rows).recording(0)


def test_a_shard_that_is_not_there_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    store.remove("shards/train-00001.tar")
    reader = SplitReader(store, rows)
    reader.recording(0)
    with pytest.raises(StoreError, match=r"train-00001\.tar is not there"):
        reader.recording(2)


def test_remote_shards_are_read_through_the_cache(
    tmp_path: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    store = Store("memory://test_remote_shards")
    row = write_shard(store, "train-00000", *encode_shard(recordings, "float32"))
    reader = SplitReader(store, [row])
    for index in range(3):
        np.testing.assert_array_equal(reader.recording(index), expected(recordings, index))
    assert len(list((tmp_path / "cache" / "files").iterdir())) == 1
    store.write_bytes("shards/train-00000.tar", bytes(row["num_bytes"]))  # other bytes under the same name
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(StoreError, match="do not have the recorded sha256"):
        SplitReader(store, [row]).recording(0)
