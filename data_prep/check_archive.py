"""Hold the archive ``recordings.zarr`` against the table: shapes, places, values, hashes, what lies in between.

Its metadata come from storage that others may write to. They are read and judged as plain JSON before the Zarr library
sees them: types, codecs (some run code), and how large a chunk is once unpacked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.store import Store
from data_prep.findings import Findings, read_bounded_json
from data_prep.zarr_store import FOLDER, zarr_root
from data_prep.zstd_size import HEADER_BYTES, unpacked_size

DTYPES = {"bold": ("float32", 4), "keep_mask": ("bool", 1), "coverage": ("float32", 4)}
CODECS = {"bytes", "zstd", "crc32c", "sharding_indexed"}
NOT_WRITTEN = 2**64 - 1  # in the index of a stored object
MAX_CHUNK_MB = 128  # one unpacked chunk
MAX_OBJECT_MB = 8192  # one stored object of many chunks
BLOCK_MB = 16  # of a series in memory at a time
CHUNKS_KEPT = 3  # of keep_mask and of coverage: neighbours share them
MAX_GAP_ROWS = 10_000_000  # rows of no recording that are looked at


@dataclass(frozen=True)
class Place:
    """Where the archive holds a recording."""

    recording_id: str
    first_row: int
    num_timepoints: int
    archive_row: int


class Archive:
    """The arrays of a data set's archive, for reading in blocks.

    Raises
    ------
    DataError
        If the metadata are not those that `data_prep.zarr_store` writes, in kind and size.
    """

    def __init__(self, store: Store, num_parcels: int) -> None:
        import zarr

        self._store = store
        width = {"bold": num_parcels, "coverage": num_parcels, "keep_mask": None}
        self.shapes = {name: _check_metadata(store, name, width[name]) for name in DTYPES}
        try:
            group = zarr.open_group(zarr_root(store), mode="r", use_consolidated=False)
            self._arrays = {name: group[name] for name in DTYPES}
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise DataError(f"{store.url_of(FOLDER)} cannot be opened: {error}") from error
        self._kept: dict[str, dict[int, NDArray[Any]]] = {"keep_mask": {}, "coverage": {}}
        self._last: tuple[Place, NDArray[np.float32], NDArray[np.bool_]] | None = None
        self._checked: set[tuple[str, int]] = set()
        self._indexes: dict[str, NDArray[np.uint64]] = {}
        self._block_rows = max(1, int(BLOCK_MB * 1024**2) // (4 * num_parcels))

    @property
    def num_rows(self) -> int:
        return self.shapes["bold"][0]

    def blocks(self, place: Place) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.bool_]]]:
        """Yield ``bold`` and ``keep_mask`` of a recording in blocks of rows; the slice counts from its first.

        The recording that was read last is kept where it is one block, because it is read twice.
        """
        if self._last is not None and self._last[0] == place:
            yield slice(0, place.num_timepoints), self._last[1], self._last[2]
            return
        if place.num_timepoints <= self._block_rows:
            self._last = (place, *self.rows(place.first_row, place.first_row + place.num_timepoints))
            yield slice(0, place.num_timepoints), self._last[1], self._last[2]
            return
        for start in range(0, place.num_timepoints, self._block_rows):
            stop = min(start + self._block_rows, place.num_timepoints)
            yield (slice(start, stop), *self.rows(place.first_row + start, place.first_row + stop))

    def rows(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return ``bold (N, P)`` and ``keep_mask (N,)`` of a range of rows, which may be of several recordings."""
        self._check_chunks("bold", start, stop)
        bold = np.ascontiguousarray(self._arrays["bold"][start:stop], dtype="<f4")
        return bold, self._from_chunks("keep_mask", start, stop)

    def coverage(self, archive_row: int) -> NDArray[np.float32]:
        return np.asarray(self._from_chunks("coverage", archive_row, archive_row + 1)[0])

    def keep_mask(self, place: Place) -> NDArray[np.bool_]:
        return self._from_chunks("keep_mask", place.first_row, place.first_row + place.num_timepoints)

    def _from_chunks(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a small array, by whole chunks, the last few of which are kept."""
        rows = int(self._arrays[name].chunks[0])
        parts = []
        for chunk in range(start // rows, -(-stop // rows)):
            block = self._kept[name].pop(chunk, None)
            if block is None:
                self._check_chunks(name, chunk * rows, chunk * rows + 1)
                block = np.asarray(self._arrays[name][chunk * rows : (chunk + 1) * rows])
                for oldest in list(self._kept[name])[: 1 - CHUNKS_KEPT]:
                    del self._kept[name][oldest]
            self._kept[name][chunk] = block  # the newest last
            first = max(start - chunk * rows, 0)
            parts.append(block[first : stop - chunk * rows])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_chunks(self, name: str, start: int, stop: int) -> None:
        """Raise `DataError` if a chunk with any of these rows says that it unpacks to more than a chunk."""
        array = self._arrays[name]
        rows = int(array.chunks[0])
        for chunk in range(start // rows, -(-stop // rows)):
            if (name, chunk) not in self._checked:
                size = rows * math.prod(array.chunks[1:]) * DTYPES[name][1]
                self._check_chunk(name, chunk, rows, size)
                self._checked.add((name, chunk))

    def _check_chunk(self, name: str, chunk: int, rows: int, size: int) -> None:
        array = self._arrays[name]
        per_object = 1 if array.shards is None else int(array.shards[0]) // rows
        file = f"{FOLDER}/{name}/c/{chunk // per_object}" + ("/0" if array.ndim == 2 else "")
        if not self._store.exists(file):
            return  # never written: the array's fill value
        start, stop = 0, self._store.size(file)
        if array.shards is not None:
            if file not in self._indexes:
                self._indexes = {file: self._index(file, stop, per_object)}  # one is enough: rows are read in order
            offset, length = (int(value) for value in self._indexes[file][chunk % per_object])
            if offset == length == NOT_WRITTEN:
                return
            if offset + length > stop:
                raise DataError(f"{file}: a chunk lies at bytes {offset} to {offset + length} of {stop}")
            start, stop = offset, offset + length
        try:
            found = unpacked_size(self._store.read_range(file, start, min(stop, start + HEADER_BYTES)))
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        if found != size:
            raise DataError(f"{file}: a chunk unpacks to {found} bytes, expected {size}")

    def _index(self, file: str, size: int, per_object: int) -> NDArray[np.uint64]:
        """Return offset and length of each chunk of a stored object, which lie at its end before a checksum."""
        start = size - 16 * per_object - 4
        if start < 0:
            raise DataError(f"{file}: {size} bytes, too few for the index of its chunks")
        data = self._store.read_range(file, start, size - 4)
        return np.frombuffer(data, dtype="<u8").reshape(per_object, 2)


@dataclass(frozen=True)
class Measured:
    """What the archive holds of one recording: mean over kept timepoints, and which parcels are missing."""

    mean: NDArray[np.float64]
    missing: NDArray[np.bool_]


def places(table: pd.DataFrame) -> dict[str, Place]:
    """Return where each recording lies, by id; without ``archive_row``, the row of coverage is the table's."""
    rows = table["archive_row"] if "archive_row" in table.columns else range(len(table))
    columns = (table["first_row"], table["num_timepoints"], rows)
    return {
        str(recording_id): Place(str(recording_id), int(first), int(count), int(row))
        for recording_id, first, count, row in zip(table["recording_id"], *columns)
    }


def check_places(findings: Findings, archive: Archive, table: pd.DataFrame) -> None:
    """Find recordings that lie outside of the arrays or upon one another; raise `DataError` if any does."""
    found = sorted(places(table).values(), key=lambda place: place.first_row)
    num_rows, num_places = archive.num_rows, archive.shapes["coverage"][0]
    if archive.shapes["keep_mask"][0] != num_rows:
        findings.fault("archive", FOLDER, f"{num_rows} rows of bold, {archive.shapes['keep_mask'][0]} of keep_mask")
    for place, follower in zip(found, [*found[1:], None]):
        stop = place.first_row + place.num_timepoints
        if stop > min(num_rows, archive.shapes["keep_mask"][0]):
            raise DataError(f"{place.recording_id} ends at row {stop}, the archive has {num_rows}")
        if follower is not None and follower.first_row < stop:
            raise DataError(f"{place.recording_id} and {follower.recording_id} share rows of the archive")
        if place.archive_row >= num_places:
            raise DataError(f"{place.recording_id}: no row {place.archive_row} of coverage, there are {num_places}")
    if len({place.archive_row for place in found}) < len(found):
        raise DataError("two recordings share a row of coverage (archive_row)")


def measure(findings: Findings, archive: Archive, place: Place, row: dict[str, Any]) -> Measured:
    """Read one recording of the archive and hold it against its row of the table."""
    where, check = place.recording_id, "archive"
    digest: Any = None
    total: Any = 0.0
    num_nan: Any = 0
    num_kept = num_infinite = 0
    for part, bold, keep_mask in archive.blocks(place):
        if part.start == 0:
            digest = hashlib.sha256(repr((place.num_timepoints, bold.shape[1])).encode())
            num_nan, total = np.zeros(bold.shape[1], dtype=np.int64), np.zeros(bold.shape[1])
        digest.update(bold.tobytes())
        num_nan += np.isnan(bold).sum(axis=0)
        num_infinite += int(np.isinf(bold).sum())
        total += bold[keep_mask].sum(axis=0, dtype=np.float64)
        num_kept += int(keep_mask.sum())
    missing: NDArray[np.bool_] = num_nan > 0
    if digest.hexdigest() != row["sha256"]:
        findings.fault(check, where, "its series in the archive has changed (sha256)")
    if num_infinite:
        findings.fault(check, where, f"{num_infinite} infinite values in the archive")
    partly = np.flatnonzero(missing & (num_nan < place.num_timepoints))
    if len(partly):
        findings.fault(check, where, f"values that are not numbers in columns {partly[:5].tolist()} of the archive")
    if int(missing.sum()) != row["num_missing_parcels"]:
        findings.fault(
            check, where, f"{missing.sum()} parcels are missing, the table says {row['num_missing_parcels']}"
        )
    if num_kept == 0 or ("num_kept" in row and num_kept != row["num_kept"]):
        findings.fault(check, where, f"{num_kept} timepoints are kept, the table says {row.get('num_kept', 'nothing')}")
    coverage = archive.coverage(place.archive_row)
    if not ((coverage >= 0) & (coverage <= 1)).all():
        findings.fault(check, where, "coverage that is no fraction")
    elif (coverage[~missing] <= 0).any():
        columns = np.flatnonzero(~missing & (coverage <= 0))[:5].tolist()
        findings.fault(check, where, f"values and coverage contradict each other: signal without coverage in {columns}")
    elif not math.isclose(
        row.get("mean_coverage", coverage.mean(dtype=float)), coverage.mean(dtype=float), abs_tol=1e-5
    ):
        findings.fault(check, where, f"mean coverage {coverage.mean():.4f}, the table says {row['mean_coverage']:.4f}")
    return Measured(total / max(num_kept, 1), missing)


def check_gaps(findings: Findings, archive: Archive, table: pd.DataFrame) -> None:
    """Find values in rows that belong to no recording: what was withdrawn must be gone."""
    found = sorted(places(table).values(), key=lambda place: place.first_row)
    edges = [0, *(place.first_row + place.num_timepoints for place in found)]
    left = MAX_GAP_ROWS
    for start, stop in zip(edges, [*(place.first_row for place in found), archive.num_rows]):
        for first in range(start, min(stop, start + left), archive._block_rows):
            last = min(first + archive._block_rows, stop)
            bold, keep_mask = archive.rows(first, last)
            if keep_mask.any() or not np.isnan(bold).all():
                findings.fault("archive", FOLDER, f"rows {first} to {last} belong to no recording and hold values")
        left -= min(max(stop - start, 0), left)
    if left == 0:
        findings.note("archive", FOLDER, f"more than {MAX_GAP_ROWS} rows of no recording; the rest was not looked at")
    used = np.zeros(min(archive.shapes["coverage"][0], MAX_GAP_ROWS), dtype=bool)
    used[[place.archive_row for place in found if place.archive_row < len(used)]] = True
    held = [row for row in np.flatnonzero(~used).tolist() if archive.coverage(row).any()]
    if held:
        findings.fault("archive", FOLDER, f"rows of coverage of no recording hold values: {held[:5]}")


def _check_metadata(store: Store, name: str, num_parcels: int | None) -> tuple[int, ...]:
    """Return the shape of an array whose metadata are in order."""
    file = f"{FOLDER}/{name}/zarr.json"
    tree = read_bounded_json(store, file)
    where = store.url_of(file)

    def refuse(what: str) -> DataError:
        return DataError(f"{where}: {what}"[:400])

    if not isinstance(tree, dict) or (tree.get("zarr_format"), tree.get("node_type")) != (3, "array"):
        raise refuse("expected an array of Zarr format 3")
    dtype, itemsize = DTYPES[name]
    if tree.get("data_type") != dtype:
        raise refuse(f"expected {dtype}, found {tree.get('data_type')!r}")
    shape: Any = tree.get("shape")
    num_axes = 1 if num_parcels is None else 2
    if not _are_counts(shape, num_axes) or (num_parcels is not None and shape[1] != num_parcels):
        raise refuse(f"expected shape (rows{'' if num_parcels is None else f', {num_parcels}'}), found {shape!r}")
    if tree.get("storage_transformers"):
        raise refuse("storage transformers are not expected")
    grid = tree.get("chunk_grid")
    chunk = grid.get("configuration", {}).get("chunk_shape") if isinstance(grid, dict) else None
    _check_codecs(tree.get("codecs"), chunk, num_axes, itemsize, refuse)
    return tuple(shape)


def _check_codecs(codecs: Any, chunk: Any, num_axes: int, itemsize: int, refuse: Any) -> None:
    if not isinstance(codecs, list) or not all(isinstance(codec, dict) for codec in codecs):
        raise refuse("expected a list of codecs")
    names = [codec.get("name") for codec in codecs]
    if not all(isinstance(name, str) for name in names) or set(names) - CODECS:
        raise refuse(f"codecs must be among {', '.join(sorted(CODECS))}, found {names}")
    is_sharded = "sharding_indexed" in names
    if not _are_counts(chunk, num_axes) or not all(chunk):
        raise refuse(f"impossible chunks {chunk!r}")
    if not is_sharded and names != ["bytes", "zstd"]:
        raise refuse(f"expected the codecs bytes and zstd, found {names}")
    size_mb = math.prod(chunk) * itemsize / 1024**2
    if size_mb > (MAX_OBJECT_MB if is_sharded else MAX_CHUNK_MB):
        raise refuse(f"chunks of {size_mb:.0f} MB; expected at most {MAX_CHUNK_MB} MB (objects {MAX_OBJECT_MB} MB)")
    if is_sharded:
        inner = codecs[0].get("configuration")
        if len(codecs) > 1 or not isinstance(inner, dict):
            raise refuse("expected sharding as the only codec")
        if inner.get("index_location", "end") != "end":
            raise refuse("expected the index of the sharding at the end")
        index = [codec.get("name") for codec in inner.get("index_codecs", []) if isinstance(codec, dict)]
        if index != ["bytes", "crc32c"] or "sharding_indexed" in [c.get("name") for c in inner.get("codecs", [])]:
            raise refuse(f"unexpected codecs inside of the sharding: {index}")
        small: Any = inner.get("chunk_shape")
        if not _are_counts(small, num_axes) or not all(small) or any(a % b for a, b in zip(chunk, small)):
            raise refuse(f"chunks {small!r} do not divide objects of {chunk!r}")
        if math.prod(chunk) // math.prod(small) > 2**20:
            raise refuse(f"objects of {math.prod(chunk) // math.prod(small)} chunks")
        _check_codecs(inner.get("codecs"), small, num_axes, itemsize, refuse)


def _are_counts(values: Any, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**48 for v in values)
    )
