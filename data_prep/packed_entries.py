"""Entries of many recordings in little memory: 100,000 take a few megabytes, where they would take a hundred."""

from __future__ import annotations

import heapq
import pickle
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, overload

from data_prep.source_entry import SourceEntry

ENTRIES_PER_BLOCK = 1000
ENTRIES_PER_RUN = 10_000  # that are sorted as they are
FIELD_NAMES = tuple(column.name for column in fields(SourceEntry))


class PackedEntries(Sequence[SourceEntry]):
    """Entries as they stay for the whole preparation. Each is made anew when asked for.

    They are compressed a block at a time, field by field, as those of one cohort say much the same. The block that was
    read last stays open, so that going through by position opens each block once.
    """

    def __init__(self, entries: Iterable[SourceEntry]) -> None:
        self._length = 0
        self._blocks: list[bytes] = []
        self._open: tuple[int, list[SourceEntry]] = -1, []
        left = iter(entries)
        while block := list(islice(left, ENTRIES_PER_BLOCK)):
            self._blocks.append(_packed(block))
            self._length += len(block)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> SourceEntry: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceEntry]: ...
    def __getitem__(self, index: int | slice) -> SourceEntry | Sequence[SourceEntry]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        number, row = divmod(range(len(self))[index], ENTRIES_PER_BLOCK)
        if self._open[0] != number:
            self._open = number, list(_unpacked(self._blocks[number]))
        return self._open[1][row]

    def __iter__(self) -> Iterator[SourceEntry]:
        for block in self._blocks:
            yield from _unpacked(block)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": (-1, [])}


def sorted_by_id(entries: Iterable[SourceEntry]) -> PackedEntries:
    """Return the entries in the order of their ids; those of one id stay in the order in which they come."""
    left = iter(entries)
    runs = []
    while run := list(islice(left, ENTRIES_PER_RUN)):
        run.sort(key=_id)
        runs.append(PackedEntries(run))
    return PackedEntries(heapq.merge(*runs, key=_id))


def _id(entry: SourceEntry) -> str:
    return entry.recording_id


def _packed(entries: Sequence[SourceEntry]) -> bytes:
    columns = [[getattr(entry, name) for entry in entries] for name in FIELD_NAMES]
    return zlib.compress(pickle.dumps(columns), level=1)


def _unpacked(block: bytes) -> Iterator[SourceEntry]:
    for values in zip(*pickle.loads(zlib.decompress(block))):
        yield SourceEntry(**dict(zip(FIELD_NAMES, values)))
