"""Shards give back what was put in, are plain tars of plain arrays, and refuse what does not belong to them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
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


# ---------------------------------------------------------------------- censored timepoints


def test_censored_timepoints_come_back(tmp_path: Path, recordings: Recordings) -> None:
    censored = ((0, 2), (5, 6), (28, 30))
    recordings[0] = (replace(recordings[0][0], censored=censored), recordings[0][1])
    reader = SplitReader(*write(tmp_path, recordings))
    assert reader.entries[0].censored == censored
    assert np.flatnonzero(~reader.kept(0, 0, 30)).tolist() == [0, 1, 5, 28, 29]
    assert reader.kept(0, 4, 3).tolist() == [True, False, True]
    assert reader.kept(1, 0, 41).all()
    with pytest.raises(DataError, match="sub-00_task-rest: timepoints 20 to 31 of 30 asked for"):
        reader.kept(0, 20, 11)


def test_shards_from_before_there_was_censoring_are_read(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    edit_rows(store, "train-00000", lambda rows: [row.pop("censored") for row in rows])
    reader = SplitReader(store, rows)
    assert reader.entries[0].censored == ()
    assert reader.kept(0, 0, 30).all()


@pytest.mark.parametrize(
    "censored", [((2, 2),), ((3, 1),), ((0, 3), (2, 5)), ((0, 3), (3, 5)), ((28, 31),), ((-1, 2),)]
)
def test_impossible_ranges_are_refused_in_writing_and_in_reading(
    tmp_path: Path, recordings: Recordings, censored: tuple[tuple[int, int], ...]
) -> None:
    entry, bold = recordings[0]
    with pytest.raises(DataError, match="censored"):
        encode_shard([(replace(entry, censored=censored), bold)], "float32")
    store, rows = write(tmp_path, recordings)
    edit_rows(store, "train-00000", lambda rows: rows[0].update(censored=censored))
    with pytest.raises(DataError, match="censored"):
        SplitReader(store, rows)


# ---------------------------------------------------------------------- batches of windows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_batch_has_the_windows_one_by_one(tmp_path: Path, recordings: Recordings, dtype: StoredDtype) -> None:
    reader = SplitReader(*write(tmp_path, recordings, dtype))
    rows = np.array([[2, 4], [0, 0], [1, 21], [0, 10], [2, 4]])
    raw, scale = reader.gather(rows, 20)
    assert raw.shape == (5, 20, P)
    assert raw.dtype == np.dtype(dtype)
    for i, (index, start) in enumerate(rows):
        np.testing.assert_array_equal(raw[i].astype(np.float32) * scale[i], reader.window(index, start, 20))
    out = np.zeros_like(raw)
    assert reader.gather(rows, 20, out)[0] is out
    np.testing.assert_array_equal(out, raw)


@pytest.mark.parametrize("row", [[3, 0], [-1, 0], [0, -1], [0, 11]])
def test_a_batch_with_a_window_that_does_not_exist_is_refused(
    tmp_path: Path, recordings: Recordings, row: list[int]
) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    with pytest.raises(DataError, match="asked for"):
        reader.gather(np.array([[1, 3], row]), 20)


def test_an_array_that_does_not_fit_the_batch_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    for out in (
        np.zeros((1, 20, P), np.float16),
        np.zeros((2, 20, P), np.float32),
        np.zeros((1, 20, 2 * P))[:, :, ::2],
    ):
        with pytest.raises(DataError, match="gather: expected"):
            reader.gather(np.array([[0, 0]]), 20, out)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_more_shards_than_maps_give_the_same_and_keep_few_files_open(
    tmp_path: Path, recordings: Recordings, dtype: StoredDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainlm.shards.MAX_MAPS", 3)
    store, series = Store(tmp_path), []
    rows = []
    for number in range(12):
        entry, bold = recordings[number % 3]
        entry = replace(entry, recording_id=f"sub-{number:02d}", missing_parcels=())
        series.append((entry, np.nan_to_num(bold) + np.float32(number)))
        rows.append(write_shard(store, shard_name("train", number), *encode_shard(series[-1:], dtype)))
    reader = SplitReader(store, rows)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    for _ in range(2):
        for index, (_, bold) in enumerate(series):
            np.testing.assert_allclose(reader.recording(index), bold, rtol=2e-3, atol=1e-3 * np.abs(bold).max())
            window = reader.window(index, 3, 9)
            np.testing.assert_array_equal(window, reader.recording(index)[3:12])
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


def test_a_reader_travels_to_workers_without_its_maps(tmp_path: Path, recordings: Recordings) -> None:
    reader = SplitReader(*write(tmp_path, recordings))
    first = reader.recording(0)
    sent = pickle.dumps(reader)
    assert len(sent) < 4000
    np.testing.assert_array_equal(pickle.loads(sent).recording(0), first)


def test_a_shard_that_left_the_cache_is_fetched_again(
    tmp_path: Path, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRAINLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("brainlm.shards.MAX_MAPS", 0)
    store = Store("memory://test_a_shard_that_left_the_cache")
    reader = SplitReader(store, [write_shard(store, "train-00000", *encode_shard(recordings, "float32"))])
    first = reader.recording(0)
    for path in (tmp_path / "cache" / "files").iterdir():
        path.unlink()
    np.testing.assert_array_equal(reader.recording(0), first)


# ---------------------------------------------------------------------- hostile and damaged files


def edit_rows(store: Store, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    index = store.read_json(f"shards/{name}.index.json")
    change(index["recordings"])
    store.write_json(f"shards/{name}.index.json", index)


@pytest.mark.parametrize(
    "changes",
    [
        {"recording_id": "../../etc/passwd"},
        {"recording_id": "/etc/passwd"},
        {"recording_id": "a\\b"},
        {"recording_id": ".."},
        {"recording_id": ""},
        {"recording_id": "a\x00b"},
        {"recording_id": "x" * 96},
        {"recording_id": 7},
        {"subject": None},
        {"num_timepoints": 0},
        {"num_timepoints": -30},
        {"num_timepoints": 30.0},
        {"num_timepoints": True},
        {"num_timepoints": 10**30},
        {"num_parcels": 2**62},
        {"num_parcels": "7"},
        {"dtype": "object"},
        {"dtype": "float64"},
        {"dtype": ["float32"]},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": 1e-300},
        {"scale": 1e300},
        {"scale": "1"},
        {"tr_s": 10**400},
        {"tr_s": None},
        {"offset": 1.5},
        {"offset": 10**400},
        {"offset": None},
        {"missing_parcels": [7]},
        {"missing_parcels": [-1]},
        {"missing_parcels": [1, 1]},
        {"missing_parcels": "01"},
        {"missing_parcels": None},
        {"missing_parcels": [[1]]},
        {"censored": [1, 2]},
        {"censored": [[1, 2, 3]]},
        {"censored": [["1", "2"]]},
        {"censored": None},
        {"__class__": "os.system"},
    ],
    ids=str,
)
def test_an_index_with_impossible_facts_is_refused(
    tmp_path: Path, recordings: Recordings, changes: dict[str, Any]
) -> None:
    store, rows = write(tmp_path, recordings)
    edit_rows(store, "train-00000", lambda rows: rows[0].update(changes))
    with pytest.raises(DataError, match=r"train-00000\.index\.json"):
        SplitReader(store, rows)


@pytest.mark.parametrize("constant", ["NaN", "Infinity"])
def test_an_index_with_a_scale_that_is_no_number_is_refused(
    tmp_path: Path, recordings: Recordings, constant: str
) -> None:
    store, rows = write(tmp_path, recordings)
    text = store.read_bytes("shards/train-00000.index.json").decode()
    store.write_bytes("shards/train-00000.index.json", text.replace('"scale": 1.0', f'"scale": {constant}').encode())
    with pytest.raises(DataError, match="positive numbers"):
        SplitReader(store, rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.append(rows[0]),
        lambda rows: rows[0].pop("offset"),
        lambda rows: rows.__setitem__(0, "sub-00_task-rest"),
        lambda rows: rows.__setitem__(1, rows[0]),
        lambda rows: rows[1].update(offset=rows[0]["offset"] + 128),
        lambda rows: rows[0].update(offset=64),
        lambda rows: rows[1].update(num_timepoints=400),
    ],
    ids=["fewer", "more", "no offset", "a text", "twice", "overlap", "in the header", "beyond the end"],
)
def test_an_index_that_contradicts_the_manifest_or_itself_is_refused(
    tmp_path: Path, recordings: Recordings, change: Callable[[list[dict[str, Any]]], Any]
) -> None:
    store, rows = write(tmp_path, recordings)
    edit_rows(store, "train-00000", change)
    with pytest.raises(DataError, match=r"train-00000\.index\.json"):
        SplitReader(store, rows)


@pytest.mark.parametrize("index", [[], "x", None, {}, {"format_version": 1}])
def test_an_index_of_another_form_is_refused(tmp_path: Path, recordings: Recordings, index: object) -> None:
    store, rows = write(tmp_path, recordings)
    store.write_json("shards/train-00000.index.json", index)
    with pytest.raises(DataError, match="does not belong"):
        SplitReader(store, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../train-00000"},
        {"name": "/train-00000"},
        {"name": "..\\train-00000"},
        {"name": None},
        {"num_bytes": 0},
        {"num_bytes": -1},
        {"num_bytes": 1e6},
        {"num_recordings": 0},
        {"num_recordings": "2"},
        {"sha256": None},
    ],
    ids=str,
)
def test_a_manifest_with_impossible_shards_is_refused(
    tmp_path: Path, recordings: Recordings, changes: dict[str, Any]
) -> None:
    store, rows = write(tmp_path, recordings)
    with pytest.raises(DataError, match="expected a shard's name"):
        SplitReader(store, [rows[0] | changes])


def test_a_manifest_of_another_size_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    with pytest.raises(DataError, match="size"):
        SplitReader(store, [rows[0] | {"num_bytes": rows[0]["num_bytes"] + 512}])


def test_the_same_recording_in_two_shards_is_refused(tmp_path: Path, recordings: Recordings) -> None:
    store, _ = write(tmp_path, recordings)
    rows = [write_shard(store, shard_name("train", n), *encode_shard(recordings[:1], "float32")) for n in range(2)]
    with pytest.raises(DataError, match="a recording id is there twice"):
        SplitReader(store, rows)


def test_shards_of_different_types_are_not_read_together(tmp_path: Path, recordings: Recordings) -> None:
    store, rows = write(tmp_path, recordings)
    rows[1] = write_shard(store, "train-00001", *encode_shard(recordings[2:], "float16"))
    with pytest.raises(DataError, match="do not go together"):
        SplitReader(store, rows)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "..", ".a", "a\nb", ""])
def test_ids_that_are_paths_are_not_written(recordings: Recordings, name: str) -> None:
    entry, bold = recordings[0]
    with pytest.raises(DataError, match="recording id"):
        encode_shard([(replace(entry, recording_id=name), bold)], "float32")


@pytest.mark.parametrize("max_maps", [0, 128], ids=["opened", "mapped"])
@pytest.mark.parametrize("what", ["offsets swapped", "ids swapped", "offset moved", "transposed", "halved"])
def test_an_index_cannot_pass_one_recording_off_as_another(
    tmp_path: Path, recordings: Recordings, what: str, max_maps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainlm.shards.MAX_MAPS", max_maps)
    entry, _ = recordings[1]
    same = replace(recordings[0][0], recording_id=entry.recording_id)
    recordings[1] = (same, recordings[0][1] + np.float32(1))  # alike in all but the name

    def change(rows: list[dict[str, Any]]) -> None:
        one, two = rows
        if what == "offsets swapped":
            one["offset"], two["offset"] = two["offset"], one["offset"]
        elif what == "ids swapped":
            one["recording_id"], two["recording_id"] = two["recording_id"], one["recording_id"]
        elif what == "offset moved":
            one["offset"] += 4
        elif what == "transposed":
            one["num_timepoints"], one["num_parcels"] = one["num_parcels"], one["num_timepoints"]
            two["num_timepoints"], two["num_parcels"] = two["num_parcels"], two["num_timepoints"]
        else:
            one["num_timepoints"] -= 1

    store, rows = write(tmp_path, recordings)
    edit_rows(store, "train-00000", change)
    reader = SplitReader(store, rows[:1])
    for _ in range(2):  # also when asked again
        with pytest.raises(DataError, match="the tar does not"):
            reader.window(0, 0, 5)


Member = Callable[[tarfile.TarInfo], Any]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda member: setattr(member, "name", "../" + member.name),
        lambda member: setattr(member, "name", "/" + member.name),
        lambda member: setattr(member, "name", member.name.replace("00", "99")),
        lambda member: setattr(member, "type", tarfile.SYMTYPE),
        lambda member: setattr(member, "type", tarfile.LNKTYPE),
        lambda member: setattr(member, "type", tarfile.DIRTYPE),
        lambda member: setattr(member, "size", member.size + 512),
    ],
    ids=["above", "absolute", "another name", "symbolic link", "hard link", "folder", "another size"],
)
def test_a_member_that_is_not_the_recording_is_refused(tmp_path: Path, recordings: Recordings, tamper: Member) -> None:
    """The header of the first member is rewritten, with a correct checksum; manifest and index know the new bytes."""
    tar, entries = encode_shard(recordings[:2], "float32")
    start = entries[0].offset - 640
    member = tarfile.TarInfo.frombuf(tar[start : start + 512], "utf-8", "strict")
    tamper(member)
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert_refused(tmp_path, tar[:start] + header + tar[start + 512 :], entries)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"'<f4'", b"'|O8'"),
        (b"'<f4'", b"'>f4'"),
        (b"'<f4'", b"'<i4'"),
        (b"False", b"True "),
        (b"(30, 7)", b"(7, 30)"),
        (b"(30, 7)", b"(30,-7)"),
        (b"NUMPY\x01", b"NUMPY\x03"),
        (b"{'descr'", b"(" * 8),
        (b"{'descr': '<f4'", b"__import__('os')"[:15]),
    ],
    ids=str,
)
def test_an_array_header_that_says_something_else_is_refused(
    tmp_path: Path, recordings: Recordings, old: bytes, new: bytes
) -> None:
    tar, entries = encode_shard(recordings[:2], "float32")
    assert len(new) == len(old)
    assert old in tar[: entries[0].offset]
    assert_refused(tmp_path, tar.replace(old, new, 1), entries)


def test_noise_in_the_place_of_headers_is_refused(
    tmp_path: Path, recordings: Recordings, rng: np.random.Generator
) -> None:
    tar, entries = encode_shard(recordings[:2], "float32")
    for number in range(20):
        start = entries[0].offset - 640
        damaged = bytearray(tar)
        length = int(rng.integers(8, 640))
        damaged[start : start + length] = rng.bytes(length)
        assert_refused(tmp_path / str(number), bytes(damaged), entries)


def assert_refused(folder: Path, tar: bytes, entries: list[ShardEntry]) -> None:
    store = Store(folder)
    reader = SplitReader(store, [write_shard(store, "train-00000", tar, entries)])
    for _ in range(2):
        with pytest.raises(DataError, match=r"sub-00_task-rest\.npy .* the tar does not"):
            reader.recording(0)
    reader.recording(1)  # the other one is as it was
