"""What is to be prepared: recordings of a table, a BIDS folder, a pattern of paths, or an open cohort."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.errors import DataError
from brainlm.recording import check_recording_id
from data_prep.bids import find_bids_recordings
from data_prep.input_files import size_of
from data_prep.listed_files import find_listed_recordings
from data_prep.open_cohorts import find_open_recordings
from data_prep.packed_entries import sorted_by_id
from data_prep.pattern_files import find_pattern_recordings
from data_prep.process_memory import give_back_memory, keep_little_memory
from data_prep.settings import SourceSettings
from data_prep.source_entry import MAX_LISTED, Source, SourceEntry

MAX_ID_LENGTH = 95  # a member's name in a tar, with its ending, has at most 100
ROWS_AT_ONCE = 10_000  # of the table of phenotypes, while it is hashed
PLACES = ("file", "confounds", "warp", "warp_reference")  # where inputs lie says nothing of what they hold

FINDERS: dict[str, Callable[[SourceSettings, str | None], Source]] = {
    "table": find_listed_recordings,
    "bids": find_bids_recordings,
    "pattern": find_pattern_recordings,
    "nilearn": find_open_recordings,
}


def find_recordings(settings: SourceSettings, split_column: str | None = None) -> Source:
    """List what is to be prepared.

    Parameters
    ----------
    settings : SourceSettings
    split_column : str or None
        Column of the table or of the phenotypes that gives the split of each recording.

    Returns
    -------
    Source
        Entries sorted by id, one row of phenotypes for each of their subjects, and notes for the reader.

    Raises
    ------
    DataError
        If the source cannot be read, ids repeat or are unfit, a subject has two values of a phenotype or is not in the
        table of phenotypes, or a given split is none of train, val and test.
    StoreError
        If storage cannot be listed.
    """
    keep_little_memory()
    source = FINDERS[settings.kind](settings, split_column)
    if not source.entries:
        raise DataError(f"no recordings in {settings.path}")
    _check_ids(source.entries, settings.path)
    if split_column is not None:
        _check_splits(source.entries, split_column, settings.path)
    entries = sorted_by_id(source.entries)
    give_back_memory()
    return Source(
        entries=entries,
        subjects=source.subjects,
        description={"kind": settings.kind, "path": settings.path, **source.description},
        warnings=source.warnings,
    )


def inputs_hash(entries: Iterable[SourceEntry], subjects: pd.DataFrame) -> str:
    """Identify what goes in by ids, table values and the size of every file; not by where or how old the files are.

    Memory does not grow with the number of recordings.
    """
    digest = hashlib.sha256()
    for entry in entries:
        row: dict[str, object] = {}
        for column in fields(entry):
            value = getattr(entry, column.name)
            if column.name.endswith("_stamp"):
                row[column.name.removesuffix("_stamp") + "_bytes"] = size_of(value)
            elif column.name not in PLACES:
                row[column.name] = value
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    digest.update(json.dumps(list(map(str, subjects.columns))).encode())
    for first in range(0, len(subjects), ROWS_AT_ONCE):
        rows = subjects.iloc[first : first + ROWS_AT_ONCE]
        digest.update(rows.to_json(orient="values", double_precision=15).encode() + b"\n")
    return digest.hexdigest()


def _check_ids(entries: Sequence[SourceEntry], where: str) -> None:
    unfit: dict[str, None] = {}
    ids = []
    for entry in entries:
        ids.append(entry.recording_id)
        for what, value in (("recording id", entry.recording_id), ("subject", entry.subject)):
            try:
                check_recording_id(value)
            except DataError:
                unfit[f"{what} {value!r} ({entry.source})" if not value else f"{what} {value!r}"] = None
    if unfit:
        raise DataError(
            f"{where}: expected ids of letters, digits, '-' and '_' without dots, slashes or blanks; found "
            f"{', '.join(list(unfit)[:MAX_LISTED])}"
        )
    if too_long := [recording_id for recording_id in ids if len(recording_id) > MAX_ID_LENGTH]:
        raise DataError(f"{where}: recording ids can have at most {MAX_ID_LENGTH} characters, found {too_long[0]!r}")
    if len(set(ids)) < len(ids):
        counts = Counter(ids)
        files = sorted(f"{e.recording_id} ({e.source})" for e in entries if counts[e.recording_id] > 1)
        raise DataError(
            f"{where}: recording ids must be unique, found twice: {', '.join(files[:MAX_LISTED])}. Name the columns or "
            "fields that tell them apart (source.columns, source.pattern)"
        )


def _check_splits(entries: Sequence[SourceEntry], column: str, where: str) -> None:
    wrong = [entry for entry in entries if entry.split not in ("", *SPLITS)]
    if wrong:
        listed = ", ".join(f"{entry.recording_id} ({entry.split!r})" for entry in wrong[:MAX_LISTED])
        raise DataError(
            f"{where}: splits.column {column!r} of {len(wrong)} recordings is none of {', '.join(SPLITS)}: {listed}"
        )
    if not any(entry.split for entry in entries):
        raise DataError(
            f"{where}: splits.column {column!r} gives no recording a split: expected a column of the table or of the "
            f"phenotypes with {', '.join(SPLITS)}"
        )
