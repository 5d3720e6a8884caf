"""Who is in a data set: its recordings with what is known of each, whatever its splits are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.dataset import SPLITS, Dataset
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.ordering import even_starts
from brainlm.recording import Recording
from brainlm.shard_index import ShardEntry
from brainlm.shards import SplitReader

RECORDINGS, SUBJECTS = "recordings.parquet", "subjects.parquet"


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


class Cohort:
    """The recordings of a data set, and the tables that describe them.

    Raises
    ------
    DataError
        If the data set has no tables, or a recording of its shards is in none.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.readers = {split: dataset.split(split) for split in SPLITS}
        self._recordings = _table(dataset, RECORDINGS, "recording_id")
        self._subjects = _table(dataset, SUBJECTS, "subject")
        rows = [(split, i, entry) for split in SPLITS for i, entry in enumerate(self.readers[split].entries)]
        lacking = [entry.recording_id for _, _, entry in rows if entry.recording_id not in self._recordings.index]
        if lacking:
            raise DataError(f"{dataset.store.url_of(RECORDINGS)} lacks {len(lacking)} recordings, {lacking[0]} for one")
        self.members = [
            Member(
                recording_id=entry.recording_id, subject=entry.subject, group=group, split=split, index=index,
                num_timepoints=entry.num_timepoints,
            )
            for (split, index, entry), group in zip(rows, self._groups([entry for _, _, entry in rows]), strict=True)
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

    def is_of_subjects(self, column: str) -> bool:
        """Say whether all recordings of a subject have one value."""
        return column in self._subjects.columns

    def values(self, column: str, members: Sequence[Member]) -> list[Any]:
        """Return a column of the subjects, or else of the recordings; None where missing.

        Raises
        ------
        ConfigError
            If neither table has it.
        """
        if self.is_of_subjects(column):
            table, keys = self._subjects, [member.subject for member in members]
        elif column in self._recordings.columns:
            table, keys = self._recordings, [member.recording_id for member in members]
        else:
            known = [*self._subjects.columns, *(c for c in ("site", "task", "session", "run") if c in self._recordings)]
            raise ConfigError(
                f"no column {column!r} in {SUBJECTS} or {RECORDINGS} of {self.dataset.name}; phenotypes there: "
                f"{', '.join(map(str, known)) or 'none (phenotypes are joined by data_prep/prepare.py)'}"
            )
        found = table[column].to_dict()
        return [None if pd.isna(value := found.get(key)) else value for key in keys]

    def _groups(self, entries: Sequence[ShardEntry]) -> list[str]:
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        joins = []
        for entry in entries:
            row = self._recordings.loc[entry.recording_id]
            names = [f"subject {entry.subject}"]
            for kind in ("family", "series_sha256"):
                value = row.get(kind)
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
    cohort : Cohort
    members : sequence of Member
    """

    def __init__(self, cohort: Cohort, members: Sequence[Member]) -> None:
        self._places: list[tuple[SplitReader, int]] = [(cohort.readers[m.split], m.index) for m in members]  # type: ignore[index]
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


def _table(dataset: Dataset, name: str, key: str) -> pd.DataFrame:
    if not dataset.store.exists(name):
        raise DataError(
            f"{dataset.store.url} has no {name}: fine-tuning needs a data set as data_prep/prepare.py writes it"
        )
    table = pd.read_parquet(io.BytesIO(dataset.store.read_bytes(name)))
    return table.drop_duplicates(key).set_index(key, drop=False)
