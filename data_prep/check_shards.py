"""Hold the shards of a data set against index, table and archive, in one pass over each tar and in bounded memory.

The tar is walked header by header, without `tarfile`'s own reading of extended headers (whose size a file may choose):
shards hold plain members alone, and anything else is a fault.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import censored_ranges
from brainlm.errors import DataError
from brainlm.shard_index import HEAD, NPY_HEADER, ShardEntry, check_member, read_index
from brainlm.shards import FOLDER
from brainlm.store import Store
from data_prep.check_archive import Archive, Measured, Place
from data_prep.check_tables import named
from data_prep.findings import Findings, read_bounded_json

BLOCK = tarfile.BLOCKSIZE
READ_BYTES = 4 * 1024**2
MAX_ENTRY_BYTES = 16 * 1024**2  # the JSON beside an array
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
ENTRY_COLUMNS = ("subject", "session", "task", "run", "site", "num_timepoints")

Measure = Callable[[Place], Measured]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a shard is held against. ``archive`` None: the series are not compared."""

    rows: Mapping[str, Mapping[str, Any]]
    places: Mapping[str, Place]
    archive: Archive | None
    measure: Measure | None
    chosen: frozenset[str] | None
    """Recordings whose values are read; None: all, and every byte of the tars is hashed."""
    below: NDArray[np.int64] | None = None
    """Shape (4, P), added to: kept values of train in all, below the median, not above it, within half an IQR."""
    median: NDArray[np.float32] | None = None
    iqr: NDArray[np.float32] | None = None
    in_statistics: frozenset[str] = frozenset()


def check_shard_files(
    findings: Findings, store: Store, split: str, shard: Mapping[str, Any], num_parcels: int, known: Known
) -> list[str]:
    """Check one shard; return the ids that its index lists."""
    name = f"{FOLDER}/{shard['name']}.index.json"
    entries = read_index(read_bounded_json(store, name), shard, store.url_of(name))
    for entry in entries:
        _check_entry(findings, name, split, str(shard["name"]), entry, num_parcels, known)
    tar = f"{FOLDER}/{shard['name']}.tar"
    size = store.size(tar)
    if size != shard["num_bytes"]:
        findings.fault("shards", tar, f"{size} bytes, dataset.json says {shard['num_bytes']}")
        return [entry.recording_id for entry in entries]
    with store.local_copy(tar) as path:
        findings.guard("shards", tar, _check_tar, findings, tar, path, size, str(shard["sha256"]), entries, known)
    return [entry.recording_id for entry in entries]


def _check_entry(
    findings: Findings, where: str, split: str, shard: str, entry: ShardEntry, num_parcels: int, known: Known
) -> None:
    """Compare what the index says of a recording with the table and the archive."""
    row = known.rows.get(entry.recording_id)
    if row is None:
        findings.fault("shards", where, f"{entry.recording_id} is not in recordings.parquet")
        return
    here = {"split": split, "shard": shard} | {name: getattr(entry, name) for name in ENTRY_COLUMNS}
    wrong = [f"{name} {value!r}, the table {row[name]!r}" for name, value in here.items() if row[name] != value]
    if abs(entry.tr_s - row["tr_s"]) > 1e-6:
        wrong.append(f"TR {entry.tr_s}, the table {row['tr_s']}")
    if entry.num_parcels != num_parcels:
        wrong.append(f"{entry.num_parcels} parcels, the contract {num_parcels}")
    if wrong:
        findings.fault("shards", where, f"{entry.recording_id}: the index says {'; '.join(wrong)}")
    place = known.places.get(entry.recording_id)
    is_chosen = known.chosen is None or entry.recording_id in known.chosen
    if known.archive is not None and place is not None and is_chosen:
        keep_mask = known.archive.keep_mask(place)
        if censored_ranges(keep_mask) != tuple(map(tuple, entry.censored)):
            findings.fault("shards", where, f"{entry.recording_id}: its censored timepoints are not the archive's")


def _check_tar(
    findings: Findings,
    where: str,
    path: Path,
    size: int,
    sha256: str,
    entries: Sequence[ShardEntry],
    known: Known,
) -> None:
    arrays = {f"{entry.recording_id}.npy": entry for entry in entries}
    texts = {f"{entry.recording_id}.json": entry for entry in entries}
    seen: set[str] = set()
    with open(path, "rb") as file:
        if known.chosen is None:
            digest = hashlib.sha256()
            while data := file.read(READ_BYTES):
                digest.update(data)
            if digest.hexdigest() != sha256:
                findings.fault("hashes", where, "its bytes have changed (sha256)")
            file.seek(0)
        for start, member, head in _members(findings, where, file, size):
            name = member.name
            if problem := _unsafe(member):
                findings.fault("shards", where, f"member {name!r} {problem}")
                continue
            if name in seen:
                findings.fault("shards", where, f"member {name!r} is there twice")
                continue
            seen.add(name)
            if name in arrays:
                entry = arrays[name]
                if start + HEAD != entry.offset:
                    findings.fault("shards", where, f"{name} begins at byte {start + HEAD}, not at {entry.offset}")
                check_member(head, entry, where)
                if known.chosen is None or entry.recording_id in known.chosen:
                    _check_series(findings, where, file, start + HEAD, entry, known)
            elif name in texts:
                _check_text(findings, where, file, start + BLOCK, member.size, texts[name])
            else:
                findings.fault("shards", where, f"member {name!r} is not in the index")
    if lacking := sorted({*arrays, *texts} - seen):
        findings.fault("shards", where, f"members that the index lists are not there: {named(lacking)}")


def _members(
    findings: Findings, where: str, file: IO[bytes], size: int
) -> Iterator[tuple[int, tarfile.TarInfo, bytes]]:
    """Yield position and header of each member, and the first bytes: tar header and header of an array."""
    position = 0
    while position + BLOCK <= size:
        file.seek(position)
        head = file.read(HEAD)
        if not any(head[:BLOCK]):
            break
        try:
            member = tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"no tar member at byte {position}: {error}") from error
        stop = position + BLOCK + -(-member.size // BLOCK) * BLOCK
        if member.size < 0 or stop > size:
            raise DataError(f"member {member.name!r} claims {member.size} bytes at byte {position} of {size}")
        yield position, member, head
        position = stop
    file.seek(position)
    while data := file.read(READ_BYTES):
        if any(data):
            findings.fault("shards", where, f"bytes after the end of the archive, from {position} on")
            return


def _unsafe(member: tarfile.TarInfo) -> str:
    """Return what makes a member one that no shard has and that nobody should unpack, "" if nothing does."""
    parts = member.name.replace("\\", "/").split("/")
    if member.type not in PLAIN:
        return f"is no plain file but of type {member.type!r} (link, device, folder or extended header)"
    if member.name.startswith(("/", "\\")):
        return "has an absolute name"
    if ".." in parts:
        return "has .. in its name"
    return "lies in a folder" if len(parts) > 1 else ""


def _check_text(findings: Findings, where: str, file: IO[bytes], position: int, size: int, entry: ShardEntry) -> None:
    if size > MAX_ENTRY_BYTES:
        findings.fault("shards", where, f"{entry.recording_id}.json has {size} bytes")
        return
    file.seek(position)
    try:
        tree = json.loads(file.read(size))
    except (ValueError, RecursionError):
        tree = None
    expected = entry.to_json()
    if not isinstance(tree, dict) or {"censored": [], **tree} != expected:
        findings.fault("shards", where, f"{entry.recording_id}.json does not say what the index says")


def _check_series(
    findings: Findings, where: str, file: IO[bytes], position: int, entry: ShardEntry, known: Known
) -> None:
    """Hold an array against the archive, block by block; its values must be finite wherever there is no archive."""
    place = known.places.get(entry.recording_id)
    measured = None
    if known.measure is not None and place is not None and place.num_timepoints == entry.num_timepoints:
        measured = known.measure(place)
    if measured is None or place is None or known.archive is None or len(measured.mean) != entry.num_parcels:
        for _, stored in _stored_blocks(file, position, entry):
            if not np.isfinite(stored).all():
                findings.fault("shards", where, f"{entry.recording_id}: values that are not finite")
                return
        return
    listed = np.zeros(entry.num_parcels, dtype=bool)
    listed[list(entry.missing_parcels)] = True
    if (listed != measured.missing).any():
        columns = np.flatnonzero(listed != measured.missing)[:5].tolist()
        findings.fault("shards", where, f"{entry.recording_id}: index and archive miss different parcels {columns}")
    row_bytes = entry.num_parcels * entry.stored_dtype.itemsize
    for part, bold, keep_mask in known.archive.blocks(place):
        stored = _read_rows(file, position + part.start * row_bytes, len(bold), entry)
        if not np.isfinite(stored).all():
            findings.fault("shards", where, f"{entry.recording_id}: values that are not finite")
            return
        series = stored * np.float32(entry.scale)
        expected = (bold - measured.mean).astype(np.float32)
        expected[:, measured.missing] = 0.0
        if not _is_rounded(series, expected, entry):
            worst = float(np.abs(series - expected).max())
            findings.fault(
                "shards", where, f"{entry.recording_id}: its series is not the archive's, centred (off by {worst:.4g})"
            )
            return
        if known.below is not None and entry.recording_id in known.in_statistics:
            _count(known, expected[keep_mask], ~measured.missing)


def _count(known: Known, kept: NDArray[np.float32], present: NDArray[np.bool_]) -> None:
    assert known.below is not None
    assert known.median is not None
    assert known.iqr is not None
    away = kept - known.median
    counts = (
        np.full(kept.shape[1], len(kept)),
        (away < 0).sum(axis=0),
        (away <= 0).sum(axis=0),
        (np.abs(away) <= known.iqr / 2).sum(axis=0),
    )
    known.below[:, present] += np.stack(counts)[:, present]


def check_median(findings: Findings, below: NDArray[np.int64], names: Sequence[str], iqr: NDArray[np.float32]) -> None:
    """Compare the contract's median and IQR with counts of the train values.

    Half of the values lie on either side of a median; between a quarter and all of them lie within half an IQR of it,
    whatever the distribution. Wider limits are allowed for what float16 rounds.
    """
    where = "input_contract.json"
    num, less, not_more, within = below.astype(np.float64)
    there = num > 0
    slack = 0.001 * num + 1
    off = there & ((less > num / 2 + slack) | (not_more < num / 2 - slack))
    if off.any():
        findings.fault(
            "statistics", where, f"{off.sum()} medians are not those of the train series: {named(_of(names, off))}"
        )
    varied = there & (iqr > 0)
    share = within / np.maximum(num, 1)
    strange = varied & ((share < 0.2) | (share > 0.98)) & (num >= 100)
    if strange.any():
        findings.fault(
            "statistics",
            where,
            f"{strange.sum()} IQRs cannot be those of the train series: {named(_of(names, strange))}",
        )


def _of(names: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [names[p] for p in np.flatnonzero(chosen).tolist()]


def _is_rounded(series: NDArray[np.float32], expected: NDArray[np.float32], entry: ShardEntry) -> bool:
    """Return whether two series differ by no more than storing one of them as float16 or float32 explains."""
    relative = 2.0**-10.9 if entry.dtype == "float16" else 2.0**-22
    size = np.abs(expected)
    floor = 1e-6 * float(size.max(initial=0.0)) + 1e-30
    return bool((np.abs(series - expected) <= relative * size + floor).all())


def _stored_blocks(file: IO[bytes], position: int, entry: ShardEntry) -> Iterator[tuple[int, NDArray[np.float32]]]:
    row_bytes = entry.num_parcels * entry.stored_dtype.itemsize
    step = max(1, READ_BYTES // row_bytes)
    for first in range(0, entry.num_timepoints, step):
        count = min(step, entry.num_timepoints - first)
        yield first, _read_rows(file, position + first * row_bytes, count, entry)


def _read_rows(file: IO[bytes], position: int, count: int, entry: ShardEntry) -> NDArray[np.float32]:
    file.seek(position)
    data = file.read(count * entry.num_parcels * entry.stored_dtype.itemsize)
    return np.frombuffer(data, entry.stored_dtype).reshape(count, entry.num_parcels).astype(np.float32)


assert HEAD == BLOCK + NPY_HEADER
