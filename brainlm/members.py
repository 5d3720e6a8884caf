"""Who is in a data set: its recordings with what is known of each, whatever its splits are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.dataset import SPLITS, Dataset
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.ordering import even_starts
from brainlm.recording import Recording
from brainlm.shard_index import ShardEntry
from brainlm.shards import SplitReader
from brainlm.train_subjects import TrainSubjects

RECORDINGS, SUBJECTS = "recordings.parquet", "subjects.parquet"
Columns = Mapping[str, Sequence[Any]]
ReadColumns = Callable[[bytes], Columns]
"""Takes the bytes of a parquet file; the library itself does not depend on a reader of these."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A recording: where it lies (`split` of the data set, position in it), and what it belongs to."""

    recording_id: str
    subject: str
    group: str
    """The least name of those that it is joined to, by subject, family or equal series."""
    split: str
    index: int
    num_timepoints: int


@dataclass(frozen=True, eq=False)
class _Table:
    """A table whose rows are found by a key; the first one counts where a key comes twice."""

    columns: Columns
    rows: dict[str, int]

    @classmethod
    def read(cls, dataset: Dataset, name: str, key: str, read_columns: ReadColumns) -> _Table:
        if not dataset.store.exists(name):
            raise DataError(f"{dataset.store.url} has no {name}: prepare the data set with data_prep/prepare.py")
        columns = read_columns(dataset.store.read_bytes(name))
        rows: dict[str, int] = {}
        for number, value in enumerate(columns[key]):
            rows.setdefault(value, number)
        return cls(columns, rows)

    def values(self, column: str, keys: Sequence[str]) -> list[Any]:
        """Return a column's values, None where there is no row or no value."""
        found = self.columns[column]
        values = [found[self.rows[key]] if key in self.rows else None for key in keys]
        return [None if value is None or value != value else value for value in values]  # NaN is not itself


class Members:
    """The recordings of a data set, and the tables that describe them.

    Parameters
    ----------
    dataset : Dataset
    read_columns : callable
        Reads a parquet file.

    Raises
    ------
    DataError
        If the data set has no tables, or a recording of its shards is in none.
    """

    def __init__(self, dataset: Dataset, read_columns: ReadColumns) -> None:
        self.dataset = dataset
        self.readers = {split: dataset.split(split) for split in SPLITS}
        self._recordings = _Table.read(dataset, RECORDINGS, "recording_id", read_columns)
        self._subjects = _Table.read(dataset, SUBJECTS, "subject", read_columns)
        rows = [(split, i, entry) for split in SPLITS for i, entry in enumerate(self.readers[split].entries)]
        lacking = [entry.recording_id for _, _, entry in rows if entry.recording_id not in self._recordings.rows]
        if lacking:
            raise DataError(f"{dataset.store.url_of(RECORDINGS)} lacks {len(lacking)} recordings, {lacking[0]} for one")
        groups = self._groups([entry for _, _, entry in rows])
        self.all = [
            Member(
                recording_id=entry.recording_id, subject=entry.subject, group=group, split=split, index=index,
                num_timepoints=entry.num_timepoints,
            )
            for (split, index, entry), group in zip(rows, groups, strict=True)
        ]  # fmt: skip

    def why_unreadable(self, member: Member, contract: InputContract) -> str:
        """Say why a model of this contract cannot be fed a recording, "" if it can."""
        reader, window_len = self.readers[member.split], contract.window_len  # type: ignore[index]
        if member.num_timepoints < window_len:
            return f"{member.num_timepoints} timepoints, a window of the checkpoint has {window_len}"
        every = even_starts(member.num_timepoints, window_len, member.num_timepoints // window_len)
        if not any(reader.kept(member.index, start, window_len).any() for start in every):
            return "no timepoint was kept"
        own = self.dataset.contract
        usable = own.usable if contract.atlas.differences(own.atlas) else own.usable & contract.usable
        if not (reader.present(member.index) & usable).any():
            return "no parcel that the checkpoint can be fed carries signal"
        return ""

    def groups_seen(self, trained_on: TrainSubjects) -> set[str]:
        """Return the groups in which there is somebody that a model was trained on, whatever prefix the ids have."""
        found = set()
        for member in {member.subject: member for member in self.all}.values():
            bare = member.subject.removeprefix("sub-")  # data sets name them either way
            if trained_on.seen({member.subject, bare, f"sub-{bare}"}):
                found.add(member.group)
        return found

    def is_of_subjects(self, column: str) -> bool:
        """Say whether all recordings of a subject have one value."""
        return column in self._subjects.columns

    def has(self, column: str) -> bool:
        """Say whether there is such a column."""
        return column in self._subjects.columns or column in self._recordings.columns

    def values(self, column: str, members: Sequence[Member]) -> list[Any]:
        """Return a column of the subjects, or else of the recordings; None where missing.

        Raises
        ------
        ConfigError
            If neither table has it.
        """
        if self.is_of_subjects(column):
            return self._subjects.values(column, [member.subject for member in members])
        if not self.has(column):
            known = [
                *self._subjects.columns,
                *(c for c in ("site", "task", "session", "run") if c in self._recordings.columns),
            ]
            raise ConfigError(
                f"no column {column!r} in {SUBJECTS} or {RECORDINGS} of {self.dataset.name}; phenotypes there: "
                f"{', '.join(map(str, known)) or 'none (phenotypes are joined by data_prep/prepare.py)'}"
            )
        return self._recordings.values(column, [member.recording_id for member in members])

    def _groups(self, entries: Sequence[ShardEntry]) -> list[str]:
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        joins = []
        kinds = [kind for kind in ("family", "series_sha256") if kind in self._recordings.columns]
        known = {kind: self._recordings.values(kind, [entry.recording_id for entry in entries]) for kind in kinds}
        for number, entry in enumerate(entries):
            names = [f"subject {entry.subject}"]
            for kind in kinds:
                value = known[kind][number]
                if isinstance(value, str) and value:
                    names.append(f"{kind} {value}")
            joins.append(names)
            roots = sorted({root(name) for name in names})
            for other in roots[1:]:
                parent[other] = roots[0]
        return [root(names[0]) for names in joins]


class ChosenRecordings:
    """Some recordings of a data set, of any of its splits, read as those of one split are.

    Parameters
    ----------
    source : Members
    members : sequence of Member
    """

    def __init__(self, source: Members, members: Sequence[Member]) -> None:
        self._places: list[tuple[SplitReader, int]] = [(source.readers[m.split], m.index) for m in members]  # type: ignore[index]
        self.entries = [reader.entries[index] for reader, index in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def gather(self, rows: NDArray[np.int64], window_len: int, /) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Copy windows as they are stored. See `SplitReader.gather`."""
        parts = []
        for number, start in np.asarray(rows, dtype=np.int64).reshape(-1, 2).tolist():
            reader, index = self._places[number]
            parts.append(reader.gather(np.array([[index, start]]), window_len))
        return np.concatenate([raw for raw, _ in parts]), np.concatenate([scale for _, scale in parts])

    def recording(self, index: int, /) -> NDArray[np.float32]:
        reader, own = self._places[index]
        return reader.recording(own)

    def as_recording(self, index: int, /) -> Recording:
        reader, own = self._places[index]
        return reader.as_recording(own)

    def present(self, index: int, /) -> NDArray[np.bool_]:
        reader, own = self._places[index]
        return reader.present(own)

    def kept(self, index: int, start: int, window_len: int, /) -> NDArray[np.bool_]:
        reader, own = self._places[index]
        return reader.kept(own, start, window_len)
