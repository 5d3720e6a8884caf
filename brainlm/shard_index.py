"""The index of a shard: what it may say, and how it is held against the bytes of the tar.

An index comes from storage that others may write to. Nothing in it is used before it is checked: types, ranges, names,
overlaps, agreement with the manifest; and before a recording's numbers are given out, the two headers that lie just
before them in the tar must say what the index says. So a wrong index cannot pass one recording off as another.
"""

from __future__ import annotations

import ast
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from brainlm.censoring import Ranges
from brainlm.errors import DataError

FORMAT_VERSION = 1
StoredDtype = Literal["float16", "float32"]
NPY_HEADER = 128  # bytes of a version 1.0 header, padded by numpy
HEAD = tarfile.BLOCKSIZE + NPY_HEADER  # bytes of both headers before an array
LONGEST_ID = 95  # with its suffix it fits the name of a tar header

_TEXTS = ("recording_id", "subject", "session", "task", "run", "site")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Where one recording lies in its shard, and what is needed to use it.

    ``offset`` is the first byte of the array in the tar; ``missing_parcels`` are column numbers that carry no signal;
    ``censored`` are ranges [start, stop) of timepoints whose values are interpolated (see `brainlm.censoring`).
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
    censored: Ranges = ()
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return self.num_timepoints * self.num_parcels * np.dtype(self.dtype).itemsize

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        return tree | {"missing_parcels": list(self.missing_parcels), "censored": [list(r) for r in self.censored]}


def is_plain_name(name: object) -> bool:
    """Tell whether a name can stand for one file in one folder: no separators, no ``..``, nothing unprintable."""
    return (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and not name.startswith((".", " "))
        and not any(part in name for part in ("/", "\\", ".."))
    )


def check_entry(entry: ShardEntry, where: str) -> None:
    """Raise `DataError` unless every field has its type and a possible value."""

    def refuse(what: str) -> NoReturn:
        raise DataError(f"{where}: {what}. Prepare the data set again, or fetch an undamaged copy")

    texts = [getattr(entry, name) for name in _TEXTS]
    if not all(isinstance(text, str) for text in texts):
        refuse(f"ids must be texts, found {texts!r}"[:300])
    name = entry.recording_id
    if not is_plain_name(name) or len(name.encode()) > LONGEST_ID:
        refuse(f"expected a recording id without separators of at most {LONGEST_ID} characters, found {name!r}"[:300])
    if not (_is_count(entry.num_timepoints) and _is_count(entry.num_parcels)):
        refuse(f"{name}: impossible shape ({entry.num_timepoints!r}, {entry.num_parcels!r})"[:300])
    if entry.dtype not in get_args(StoredDtype):
        refuse(f"{name}: expected dtype float16 or float32, found {entry.dtype!r}"[:300])
    if not (_is_positive(entry.scale) and _is_positive(entry.tr_s)):
        refuse(f"{name}: scale and TR must be positive numbers, found {entry.scale!r} and {entry.tr_s!r}"[:300])
    if not (_is_int(entry.offset) and entry.offset >= 0):
        refuse(f"{name} lies outside its shard (offset {entry.offset!r})"[:300])
    missing = entry.missing_parcels
    if not all(_is_int(p) and 0 <= p < entry.num_parcels for p in missing) or len(set(missing)) < len(missing):
        refuse(f"{name}: missing_parcels are no distinct columns of {entry.num_parcels}")
    end = 0
    for number, pair in enumerate(entry.censored):
        if len(pair) != 2 or not all(map(_is_int, pair)) or not end + bool(number) <= pair[0] < pair[1]:
            refuse(f"{name}: censored must be ascending ranges [start, stop), found {pair!r}"[:300])
        end = pair[1]
    if end > entry.num_timepoints:
        refuse(f"{name}: censored until timepoint {end} of {entry.num_timepoints}")


def entry_of(row: Any, where: str) -> ShardEntry:
    """Return the entry that a recording's JSON holds, in an index or beside the array in the tar.

    Raises
    ------
    DataError
        Naming `where`, if a field is missing, unknown, or has an impossible value.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object for each recording, found {row!r}"[:300])
    unknown = set(row) - {field.name for field in fields(ShardEntry)}
    if unknown:
        raise DataError(f"{where}: unknown fields {sorted(unknown)}: written by another version of brainlm?"[:300])
    try:
        lists = {
            "missing_parcels": tuple(row.get("missing_parcels", ())),
            "censored": tuple(tuple(pair) for pair in row.get("censored", ())),
        }
        entry = ShardEntry(**{**row, **lists})
        check_entry(entry, where)
    except TypeError as error:  # a field is missing, or is no list
        raise DataError(f"{where}: {str(row.get('recording_id'))[:100]} is no complete recording: {error}") from error
    return entry


def read_index(index: Any, shard: Any, where: str) -> list[ShardEntry]:
    """Return the entries of a shard.

    Parameters
    ----------
    index : as read from JSON
        The index of one shard.
    shard : as read from JSON
        The row of ``dataset.json`` about that shard, checked by `check_shard`.
    where : str
        The index's URL, for messages.

    Raises
    ------
    DataError
        If anything has a wrong type or value, contradicts the manifest, lies outside of the tar, or overlaps.
    """
    if not isinstance(index, Mapping) or any(index.get(k) != v for k, v in _expected(shard).items()):
        raise DataError(
            f"{where} does not belong to this data set's manifest (format, name, size or sha256 differ): "
            "prepare the data set again"
        )
    rows = index.get("recordings")
    if not isinstance(rows, list) or len(rows) != shard["num_recordings"]:
        found = len(rows) if isinstance(rows, list) else "no list"
        raise DataError(f"{where}: {shard['num_recordings']} recordings in the manifest, {found} in the index")
    entries = [entry_of(row, where) for row in rows]
    end, before = 0, ""
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset - HEAD < end or entry.offset + entry.num_bytes > shard["num_bytes"]:
            beyond = f"overlaps {before}" if before and entry.offset - HEAD < end else "lies outside its shard"
            raise DataError(
                f"{where}: {entry.recording_id} {beyond} (bytes {entry.offset} to {entry.offset + entry.num_bytes} of "
                f"{shard['num_bytes']}): prepare the data set again, or fetch an undamaged copy"
            )
        end, before = entry.offset + entry.num_bytes, entry.recording_id
    return entries


def check_shard(shard: Any, where: str) -> None:
    """Raise `DataError` unless a row of ``dataset.json`` names a shard: name, counts, size, sha256."""
    good = (
        isinstance(shard, Mapping)
        and is_plain_name(shard.get("name"))
        and _is_count(shard.get("num_recordings"))
        and _is_count(shard.get("num_bytes"))
        and isinstance(shard.get("sha256"), str)
    )
    if not good:
        raise DataError(f"{where}: expected a shard's name, num_recordings, num_bytes, sha256, found {shard!r}"[:500])


def check_member(head: bytes, entry: ShardEntry, where: str) -> None:
    """Raise `DataError` unless the bytes before an array are the two headers that its entry promises.

    Parameters
    ----------
    head : bytes
        The `HEAD` bytes that end where the array begins: tar header, then header of the ``.npy``.
    """
    name, shape = f"{entry.recording_id}.npy", (entry.num_timepoints, entry.num_parcels)
    try:
        member = tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        found: tuple[Any, ...] = (member.isreg(), member.name, member.size, *_npy_header(head[tarfile.BLOCKSIZE :]))
    except (tarfile.TarError, ValueError) as error:
        found = (str(error),)
    expected = (True, name, NPY_HEADER + entry.num_bytes, entry.stored_dtype.str, False, shape)
    if found != expected:
        raise DataError(
            f"{where}: the index says that {name} with {shape} {entry.dtype} begins at byte {entry.offset}, the tar "
            f"does not (found {found!r}): prepare the data set again, or fetch an undamaged copy"[:600]
        )


def _npy_header(head: bytes) -> tuple[Any, Any, Any]:
    if head[:8] != b"\x93NUMPY\x01\x00" or struct.unpack("<H", head[8:10])[0] != NPY_HEADER - 10:
        raise ValueError("no header of a .npy, version 1.0")
    try:
        facts = ast.literal_eval(head[10:].decode("latin1").strip())
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("a damaged header of a .npy") from error
    if not isinstance(facts, dict) or set(facts) != {"descr", "fortran_order", "shape"}:
        raise ValueError("a damaged header of a .npy")
    return facts["descr"], facts["fortran_order"], facts["shape"]


def _expected(shard: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "shard": f"{shard['name']}.tar",
        "num_bytes": shard["num_bytes"],
        "sha256": shard["sha256"],
    }


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _is_positive(value: object) -> bool:
    """Tell whether a value is a finite number above 0; float32 must hold it, because the series is multiplied by it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-45 < value < 3e38
