"""Shards: plain WebDataset tars with an index of member offsets.

::

    shards/train-00000.tar          sub-01_task-rest.npy    (T, P) centred per parcel, not scaled, float32 or float16
                                    sub-01_task-rest.json   ids, TR, scale: series = array * scale
                                    ...
    shards/train-00000.index.json   where each array begins, and what is needed to read it

Anyone can stream the tars. Our reader maps a shard and reads one contiguous slice of rows per window. float16 arrays
hold the series divided by one number per recording, so that rounding is at most 2**-11 of each value (2**-35 of
the largest value near zero).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.store import Store

FORMAT_VERSION = 1
FOLDER = "shards"
LARGEST_FLOAT16 = 1024.0  # the largest stored magnitude: far from overflow at 65504, far above the subnormals
StoredDtype = Literal["float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Where one recording lies in its shard, and what is needed to use it.

    ``offset`` is the first byte of the array in the tar; ``missing_parcels`` are column numbers that carry no signal.
    """

    recording_id: str
    subject: str
    tr_s: float
    num_timepoints: int
    num_parcels: int
    dtype: StoredDtype
    scale: float
    offset: int
    missing_parcels: tuple[int, ...] = ()
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""


def encode_shard(
    recordings: Sequence[tuple[ShardEntry, NDArray[np.float32]]], dtype: StoredDtype
) -> tuple[bytes, list[ShardEntry]]:
    """Return the bytes of a tar, and the entries with offset, dtype and scale filled in.

    The bytes depend on the arguments alone: no times, no user names.

    Parameters
    ----------
    recordings : sequence of (ShardEntry, ndarray of shape (T, P))
        Series centred per parcel. Columns of missing parcels are written as 0.
    """
    buffer = io.BytesIO()
    entries: list[ShardEntry] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, bold in recordings:
            if bold.shape != (entry.num_timepoints, entry.num_parcels):
                raise DataError(f"{entry.recording_id}: series of shape {bold.shape} against its entry")
            bold = np.array(bold, dtype=np.float32)
            bold[:, list(entry.missing_parcels)] = 0.0
            if not np.isfinite(bold).all():
                raise DataError(f"{entry.recording_id}: values that are not finite cannot be written to a shard")
            scale = 1.0
            if dtype == "float16":
                scale = float(np.abs(bold).max()) / LARGEST_FLOAT16 or 1.0
            stored = np.ascontiguousarray(bold / np.float32(scale), dtype=np.dtype(dtype).newbyteorder("<"))
            npy = io.BytesIO()
            np.lib.format.write_array(npy, stored, version=(1, 0), allow_pickle=False)
            start = _add_member(tar, f"{entry.recording_id}.npy", npy.getvalue())
            final = ShardEntry(
                **{
                    **asdict(entry),
                    "dtype": dtype,
                    "scale": scale,
                    "offset": start + len(npy.getvalue()) - stored.nbytes,
                    "missing_parcels": tuple(entry.missing_parcels),
                }
            )
            _add_member(tar, f"{entry.recording_id}.json", (json.dumps(_entry_json(final)) + "\n").encode())
            entries.append(final)
    return buffer.getvalue(), entries


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = int(tar.offset) + tarfile.BLOCKSIZE
    if len(name) > 100:
        raise DataError(f"{name}: recording ids can have at most 95 characters")
    tar.addfile(member, io.BytesIO(data))
    return start


def _entry_json(entry: ShardEntry) -> dict[str, Any]:
    tree = asdict(entry)
    tree["missing_parcels"] = list(entry.missing_parcels)
    return tree


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
        "recordings": [_entry_json(entry) for entry in entries],
    }
    store.write_json(f"{FOLDER}/{name}.index.json", index)
    return {
        "name": name,
        "num_recordings": len(entries),
        "num_bytes": len(tar),
        "sha256": index["sha256"],
    }


class SplitReader:
    """Recordings of one split, read at random from mapped shards.

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
    """

    def __init__(self, store: Store, shards: Sequence[dict[str, Any]]) -> None:
        self.store = store
        self.entries: list[ShardEntry] = []
        self._shards = list(shards)
        self._shard_of: list[int] = []
        self._maps: dict[int, NDArray[np.uint8]] = {}
        for number, shard in enumerate(self._shards):
            name = f"{FOLDER}/{shard['name']}.index.json"
            index = store.read_json(name)
            if index.get("format_version") != FORMAT_VERSION or index.get("sha256") != shard["sha256"]:
                raise DataError(
                    f"{store.url_of(name)} does not belong to this data set's manifest (format or sha256 differ): "
                    "prepare the data set again"
                )
            for row in index["recordings"]:
                entry = ShardEntry(**{**row, "missing_parcels": tuple(row["missing_parcels"])})
                nbytes = entry.num_timepoints * entry.num_parcels * np.dtype(entry.dtype).itemsize
                if not 0 <= entry.offset <= shard["num_bytes"] - nbytes:
                    raise DataError(f"{store.url_of(name)}: {entry.recording_id} lies outside its shard")
                self.entries.append(entry)
                self._shard_of.append(number)

    def __len__(self) -> int:
        return len(self.entries)

    def _array(self, index: int) -> NDArray[Any]:
        number, entry = self._shard_of[index], self.entries[index]
        if number not in self._maps:
            shard = self._shards[number]
            path = self.store.local_file(f"{FOLDER}/{shard['name']}.tar", shard["sha256"])
            mapped: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
            if mapped.size != shard["num_bytes"]:
                raise DataError(f"{path}: {mapped.size} bytes, the manifest says {shard['num_bytes']}: prepare again")
            self._maps[number] = mapped
        dtype = np.dtype(entry.dtype).newbyteorder("<")
        count = entry.num_timepoints * entry.num_parcels
        flat = np.ndarray(count, dtype, buffer=self._maps[number], offset=entry.offset)
        return flat.reshape(entry.num_timepoints, entry.num_parcels)

    def window(self, index: int, start: int, window_len: int) -> NDArray[np.float32]:
        """Return rows of one recording: shape (window_len, P), float32, centred per parcel, not scaled."""
        entry = self.entries[index]
        if start < 0 or start + window_len > entry.num_timepoints:
            raise DataError(
                f"{entry.recording_id}: timepoints {start} to {start + window_len} of {entry.num_timepoints} asked for"
            )
        return self._array(index)[start : start + window_len].astype(np.float32) * np.float32(entry.scale)

    def recording(self, index: int) -> NDArray[np.float32]:
        """Return a whole recording: shape (T, P), float32, centred per parcel, not scaled."""
        return self.window(index, 0, self.entries[index].num_timepoints)

    def present(self, index: int) -> NDArray[np.bool_]:
        """Return shape (P,): False where this recording's parcel carries no signal."""
        entry = self.entries[index]
        here = np.ones(entry.num_parcels, dtype=bool)
        here[list(entry.missing_parcels)] = False
        return here
