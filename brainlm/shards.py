"""Shards: plain WebDataset tars with an index of member offsets.

::

    shards/train-00000.tar          sub-01_task-rest.npy    (T, P) centred per parcel, not scaled, float32 or float16
                                    sub-01_task-rest.json   ids, TR, scale: series = array * scale
                                    ...
    shards/train-00000.index.json   where each array begins, and what is needed to read it

Anyone can stream the tars. Our reader maps a shard and reads one contiguous slice of rows per window. float16 arrays
hold the series divided by one number per recording, so that rounding is at most 2**-11 of each value (2**-35 of
the largest value near zero). What an index may say is in `brainlm.shard_index`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import kept_timepoints
from brainlm.errors import DataError
from brainlm.recording import Recording
from brainlm.shard_index import (
    FORMAT_VERSION,
    HEAD,
    LONGEST_ID,
    NPY_HEADER,
    ShardEntry,
    StoredDtype,
    check_entry,
    check_member,
    check_shard,
    entry_of,
    read_index,
)
from brainlm.store import Store

__all__ = [
    "FOLDER",
    "ShardEntry",
    "SplitReader",
    "StoredDtype",
    "encode_shard",
    "entry_of",
    "shard_name",
    "write_shard",
]

FOLDER = "shards"
LARGEST_FLOAT16 = 1024.0  # the largest stored magnitude: far from overflow at 65504, far above the subnormals
MAX_MAPS = 128  # shards mapped by one reader: each map holds a file descriptor, of which a process often has 1024


def encode_shard(
    recordings: Iterable[tuple[ShardEntry, NDArray[np.float32]]], dtype: StoredDtype
) -> tuple[bytes, list[ShardEntry]]:
    """Return the bytes of a tar, and the entries with offset, dtype and scale filled in.

    The bytes depend on the arguments alone: no times, no user names.

    Parameters
    ----------
    recordings : iterable of (ShardEntry, ndarray of shape (T, P))
        Taken one after another. Series centred per parcel. Columns of missing parcels are written as 0. Values at
        censored timepoints must be filled in.
    """
    buffer = io.BytesIO()
    entries: list[ShardEntry] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, bold in recordings:
            if bold.shape != (entry.num_timepoints, entry.num_parcels):
                raise DataError(f"{entry.recording_id}: series of shape {bold.shape} against its entry")
            stored = np.array(bold, dtype=np.float32, order="C")
            del bold
            stored[:, list(entry.missing_parcels)] = 0.0
            largest = float(max(stored.max(initial=0.0), -stored.min(initial=0.0)))  # NaN where a value is
            if not math.isfinite(largest):
                raise DataError(f"{entry.recording_id}: values that are not finite cannot be written to a shard")
            scale = 1.0
            if dtype == "float16":
                scale = largest / LARGEST_FLOAT16 or 1.0
            stored /= np.float32(scale)
            stored = stored.astype(np.dtype(dtype).newbyteorder("<"), copy=False)
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(stored))
            assert len(header.getvalue()) == NPY_HEADER
            values = stored.reshape(-1).view(np.uint8).data
            start = _add_member(tar, f"{entry.recording_id}.npy", header.getvalue(), values)
            lists = {"missing_parcels": tuple(entry.missing_parcels), "censored": tuple(map(tuple, entry.censored))}
            final = replace(entry, dtype=dtype, scale=scale, offset=start + NPY_HEADER, **lists)  # type: ignore[arg-type]
            check_entry(final, "written to a shard")
            _add_member(tar, f"{entry.recording_id}.json", (json.dumps(final.to_json()) + "\n").encode())
            entries.append(final)
    return buffer.getvalue(), entries


class _Parts(io.RawIOBase):
    """Pieces of memory that are read like a file, one after the other: joined they would be copied."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._parts = [memoryview(part) for part in parts]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._parts and not len(self._parts[0]):
            del self._parts[0]
        if not self._parts:
            return 0
        piece = self._parts[0][: len(buffer)]
        buffer[: len(piece)] = piece
        self._parts[0] = self._parts[0][len(piece) :]
        return len(piece)


def _add_member(tar: tarfile.TarFile, name: str, *data: bytes | memoryview) -> int:
    member = tarfile.TarInfo(name)
    member.size = sum(map(len, data))
    start = int(tar.offset) + tarfile.BLOCKSIZE
    if len(name) > 100:
        raise DataError(f"{name}: recording ids can have at most {LONGEST_ID} characters")
    tar.addfile(member, io.BufferedReader(_Parts(data)))
    return start


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def write_shard(store: Store, name: str, tar: bytes, entries: Sequence[ShardEntry]) -> dict[str, Any]:
    """Write tar then index, each atomically; return the shard's row for ``dataset.json``."""
    store.write_bytes(f"{FOLDER}/{name}.tar", tar)
    index = {
        "format_version": FORMAT_VERSION,
        "shard": f"{name}.tar",
        "num_bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "recordings": [entry.to_json() for entry in entries],
    }
    store.write_json(f"{FOLDER}/{name}.index.json", index)
    return {
        "name": name,
        "num_recordings": len(entries),
        "num_bytes": len(tar),
        "sha256": index["sha256"],
    }


class Recordings(Protocol):
    """Recordings of a data set that can be read at random: those of a split, or chosen ones. See `SplitReader`."""

    @property
    def entries(self) -> Sequence[ShardEntry]: ...

    def __len__(self) -> int: ...

    def gather(self, rows: NDArray[np.int64], window_len: int, /) -> tuple[NDArray[Any], NDArray[np.float32]]: ...

    def recording(self, index: int, /) -> NDArray[np.float32]: ...

    def as_recording(self, index: int, /) -> Recording: ...

    def present(self, index: int, /) -> NDArray[np.bool_]: ...

    def kept(self, index: int, start: int, window_len: int, /) -> NDArray[np.bool_]: ...


class SplitReader:
    """Recordings of one split, read at random from mapped shards.

    The first `MAX_MAPS` shards that are asked for are mapped; of the others a window is read by opening the file and
    closing it again, at about a third of the speed. A recording's headers in the tar are compared with its entry when
    it is first read.

    Parameters
    ----------
    store : Store
        The data set.
    shards : sequence of mapping
        The rows of ``dataset.json`` of this split: name, num_recordings, num_bytes, sha256.

    Attributes
    ----------
    entries : list of ShardEntry
        In the order of shards and members.

    Raises
    ------
    DataError
        If an index contradicts the manifest or itself, or recordings of one split differ in parcels or type; on
        reading, if the bytes are not what the index says.
    """

    def __init__(self, store: Store, shards: Sequence[dict[str, Any]]) -> None:
        self.store = store
        self.entries: list[ShardEntry] = []
        self._shards = list(shards)
        shard_of: list[int] = []
        self._files: dict[int, _ShardFile] = {}
        for number, shard in enumerate(self._shards):
            check_shard(shard, f"{store.url}, manifest")
            name = f"{FOLDER}/{shard['name']}.index.json"
            found = read_index(store.read_json(name), shard, store.url_of(name))
            self.entries += found
            shard_of += [number] * len(found)
        self._shard_of = np.array(shard_of, dtype=np.int64)
        self._lengths = np.array([entry.num_timepoints for entry in self.entries], dtype=np.int64)
        self._scales = np.array([entry.scale for entry in self.entries], dtype=np.float32)
        ids = {entry.recording_id for entry in self.entries}
        kinds = {(entry.num_parcels, entry.dtype) for entry in self.entries}
        if len(ids) < len(self.entries) or len(kinds) > 1:
            what = "a recording id is there twice" if len(ids) < len(self.entries) else f"parcels and types {kinds}"
            raise DataError(f"{store.url}, shards of one split do not go together ({what}): prepare the data set again")

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:  # workers map for themselves
        return {**self.__dict__, "_files": {}}

    def _file(self, number: int) -> _ShardFile:
        if number not in self._files:
            shard = self._shards[number]
            find = partial(self.store.local_file, f"{FOLDER}/{shard['name']}.tar", shard["sha256"])
            self._files[number] = _ShardFile(find, shard["num_bytes"], len(self._files) < MAX_MAPS)
        return self._files[number]

    def _out_of_range(self, index: int, start: int, window_len: int) -> DataError:
        if not 0 <= index < len(self):
            return DataError(f"recording {index} asked for, this split has {len(self)}")
        entry = self.entries[index]
        stop = start + window_len
        return DataError(f"{entry.recording_id}: timepoints {start} to {stop} of {entry.num_timepoints} asked for")

    def gather(
        self, rows: NDArray[np.int64], window_len: int, out: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Copy windows as they are stored, each once, into one array.

        Parameters
        ----------
        rows : ndarray, shape (B, 2), int64
            Recording index and first timepoint of each window.
        window_len : int
        out : ndarray, shape (B, W, P), stored dtype, optional
            Written to and returned; made where not given.

        Returns
        -------
        raw : ndarray, shape (B, W, P), float16 or float32
        scale : ndarray, shape (B,), float32
            The series is ``raw * scale``, in float32: centred per parcel, not scaled by the contract.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1, 2)
        recordings, starts = rows.T
        if not self.entries:
            raise DataError(f"{self.store.url}: this split has no recordings")
        lengths = self._lengths[np.clip(recordings, 0, len(self) - 1)]
        wrong = (recordings < 0) | (recordings >= len(self)) | (starts < 0) | (starts + window_len > lengths)
        if wrong.any():
            recording, start = rows[int(np.argmax(wrong))].tolist()
            raise self._out_of_range(recording, start, window_len)
        num_parcels, dtype = self.entries[0].num_parcels, self.entries[0].stored_dtype
        shape = (len(rows), window_len, num_parcels)
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise DataError(f"gather: expected {shape}, {dtype}, in C order, found {out.shape}, {out.dtype}")
        shards = self._shard_of[recordings].tolist()
        for i, (recording, start) in enumerate(rows.tolist()):
            self._file(shards[i]).read(self.entries[recording], start, out[i])
        return out, self._scales[recordings]

    def window(self, index: int, start: int, window_len: int) -> NDArray[np.float32]:
        """Return rows of one recording: shape (window_len, P), float32, centred per parcel, not scaled."""
        raw, scale = self.gather(np.array([[index, start]]), window_len)
        return raw[0].astype(np.float32) * scale[0]

    def recording(self, index: int) -> NDArray[np.float32]:
        """Return a whole recording: shape (T, P), float32, centred per parcel, not scaled."""
        return self.window(index, 0, self.entries[index].num_timepoints)

    def as_recording(self, index: int) -> Recording:
        """Return a whole recording as a model is given it: ids, TR, series, kept timepoints, missing parcels."""
        entry = self.entries[index]
        return Recording(
            recording_id=entry.recording_id,
            subject=entry.subject,
            session=entry.session,
            task=entry.task,
            run=entry.run,
            site=entry.site,
            bold=self.recording(index),
            tr_s=entry.tr_s,
            keep_mask=kept_timepoints(entry.censored, entry.num_timepoints),
            coverage=self.present(index).astype(np.float32),
        )

    def present(self, index: int) -> NDArray[np.bool_]:
        """Return shape (P,): False where this recording's parcel carries no signal."""
        entry = self.entries[index]
        here = np.ones(entry.num_parcels, dtype=bool)
        here[list(entry.missing_parcels)] = False
        return here

    def kept(self, index: int, start: int, window_len: int) -> NDArray[np.bool_]:
        """Return shape (window_len,): False at censored timepoints, whose values are interpolated."""
        entry = self.entries[index]
        if start < 0 or start + window_len > entry.num_timepoints:
            raise self._out_of_range(index, start, window_len)
        return kept_timepoints(entry.censored, entry.num_timepoints)[start : start + window_len]


class _ShardFile:
    """One shard on local disk, mapped or opened for each read, and which of its recordings were checked."""

    def __init__(self, find: Callable[[], Path], num_bytes: int, is_mapped: bool) -> None:
        self._find, self._num_bytes, self.is_mapped = find, num_bytes, is_mapped
        self._path: Path | None = None
        self._identity: tuple[int, ...] = ()
        self._bytes: mmap.mmap | None = None
        self._arrays: dict[str, NDArray[Any]] = {}
        self._checked: set[str] = set()

    def read(self, entry: ShardEntry, start: int, out: NDArray[Any]) -> None:
        """Copy rows of a recording from `start` on into `out (W, P)`, stored dtype, C order."""
        if not self.is_mapped:
            self._read_from_disk(entry, start, out)
            return
        array = self._arrays.get(entry.recording_id)
        if array is None:
            array = self._arrays[entry.recording_id] = self._view(entry)
        out[...] = array[start : start + len(out)]

    def _view(self, entry: ShardEntry) -> NDArray[Any]:
        if self._bytes is None:
            with self._opened() as fd:
                self._bytes = mmap.mmap(fd, self._num_bytes, access=mmap.ACCESS_READ)  # keeps a descriptor of its own
        check_member(self._bytes[entry.offset - HEAD : entry.offset], entry, str(self._path))
        shape = (entry.num_timepoints, entry.num_parcels)
        return np.ndarray(shape, entry.stored_dtype, buffer=self._bytes, offset=entry.offset)

    def _read_from_disk(self, entry: ShardEntry, start: int, out: NDArray[Any]) -> None:
        with self._opened() as fd:
            if entry.recording_id not in self._checked:
                check_member(os.pread(fd, HEAD, entry.offset - HEAD), entry, str(self._path))
                self._checked.add(entry.recording_id)
            left = out.data.cast("B")
            offset = entry.offset + start * entry.num_parcels * out.itemsize
            while left:
                count = os.preadv(fd, [left], offset)
                if count == 0:
                    raise DataError(f"{self._path} was cut short while it was read: prepare again")
                left, offset = left[count:], offset + count

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open the file that was first found; one that left the cache since is fetched again."""
        try:
            if self._path is None:
                raise FileNotFoundError
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._path = self._find()
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if found.st_size != self._num_bytes:
                raise DataError(
                    f"{self._path}: {found.st_size} bytes, the manifest says {self._num_bytes}: prepare again"
                )
            if self._identity != (found.st_dev, found.st_ino):  # another file under the same name
                self._identity = (found.st_dev, found.st_ino)
                self._checked.clear()
            yield fd
        finally:
            os.close(fd)
