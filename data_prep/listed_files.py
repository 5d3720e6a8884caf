"""The table source: a TSV, CSV or parquet table that lists files with ids and phenotypes.

The table, the files, or both may lie on object storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.input_files import file_stamp, folder_of, is_url, join, relative_source, stamps_of
from data_prep.packed_entries import PackedEntries
from data_prep.phenotypes import Participants, join_subjects, read_participants, subject_label, subject_rows
from data_prep.read_table import category, number, read_table, text
from data_prep.settings import ColumnNames, SourceSettings
from data_prep.source_entry import Source, SourceEntry
from data_prep.words import denoised_by, recording_id_of, space_of

ROWS_AT_ONCE = 1000  # as mappings they are ten times as large as in a table


def _pattern_columns(pattern: str) -> list[str]:
    """Return the columns that ``{name}`` in a pattern, or a plain column name, stands for."""
    return re.findall(r"\{([^{}]+)\}", pattern) if "{" in pattern else [pattern]


def _fill(pattern: str | None, row: dict[Any, Any]) -> str:
    if pattern is None:
        return ""
    if "{" not in pattern:
        return text(row[pattern])
    return re.sub(r"\{([^{}]+)\}", lambda match: text(row[match.group(1)]), pattern)


def find_listed_recordings(settings: SourceSettings, split_column: str | None = None) -> Source:
    """List the recordings of a table; phenotypes come from its own columns, or from ``source.participants``."""
    columns = settings.columns
    ids = [columns.recording_id, columns.subject, columns.session, columns.task, columns.run, columns.site]
    ids += [columns.family, columns.file, columns.confounds, columns.denoised]
    text_columns = sorted({name for pattern in ids if pattern for name in _pattern_columns(pattern)})
    phenotypes = [name for name in settings.phenotypes or () if name != "subject"]
    participants = None
    if settings.participants is not None:
        participants = read_participants(settings.participants, settings, split_column)
        phenotypes = []
    numbers = [name for name in (columns.tr_s, columns.mean_fd_mm) if name]
    splits = [split_column] if split_column else []
    table = read_table(settings.path, text_columns + splits, [*text_columns, *numbers, *phenotypes, *splits])
    in_participants = {columns.site, columns.family, columns.mean_fd_mm, split_column} if participants else set()
    absent = [
        name
        for name in [*text_columns, *numbers, *phenotypes, *splits]
        if name not in table.columns
        and not (name in in_participants and participants is not None and participants.has_column(name))
    ]
    if absent:
        has = ", ".join(map(str, read_table(settings.path, text_columns).columns))
        raise DataError(
            f"{settings.path} has no column {', '.join(map(repr, dict.fromkeys(absent)))} (it has {has}): set "
            "source.columns, source.phenotypes and splits.column"
        )
    root = settings.root if settings.root is not None else folder_of(settings.path)
    entries = PackedEntries(_entries(table, columns, settings, root, participants, split_column))
    if any(is_url(name) for entry in entries for name in (entry.file, entry.confounds)):
        entries = PackedEntries(_with_remote_stamps(entries))
    if participants is not None:
        rows, notes = join_subjects((e.subject for e in entries), participants, settings.allow_unlisted)
        return Source(entries, rows, {"num_rows": len(table)}, notes)
    subjects = pd.DataFrame({"subject": [entry.subject for entry in entries]})
    for name in phenotypes:
        subjects[name] = table[name].to_numpy(copy=True) if table[name].dtype != object else table[name].tolist()
    return Source(entries, subject_rows(subjects, phenotypes), {"num_rows": len(table)})


def _entries(
    table: pd.DataFrame,
    columns: ColumnNames,
    settings: SourceSettings,
    root: str,
    participants: Participants | None,
    split_column: str | None,
) -> Iterator[SourceEntry]:
    for first in range(0, len(table), ROWS_AT_ONCE):
        for row in table.iloc[first : first + ROWS_AT_ONCE].to_dict("records"):
            yield _table_entry(row, columns, settings, root, participants, split_column)


def _with_remote_stamps(entries: PackedEntries) -> Iterator[SourceEntry]:
    """Yield the entries with the stamps of what lies on object storage, which is listed before the first."""
    stamps = stamps_of(name for entry in entries for name in (entry.file, entry.confounds) if is_url(name))
    for entry in entries:
        yield replace(
            entry,
            file_stamp=entry.file_stamp or stamps.get(entry.file, ""),
            confounds_stamp=entry.confounds_stamp or stamps.get(entry.confounds, ""),
        )


def _local_stamp(path: str) -> str:
    return "" if is_url(path) else file_stamp(path)


def _table_entry(
    row: dict[Any, Any],
    columns: ColumnNames,
    settings: SourceSettings,
    root: str,
    participants: Participants | None,
    split_column: str | None,
) -> SourceEntry:
    words = {
        name: category(row[column]) if (column := getattr(columns, name)) and column in row else ""
        for name in ("session", "task", "run", "site", "family")
    }
    words["subject"] = subject = subject_label(row[columns.subject])
    recording_id = recording_id_of(words) if columns.recording_id is None else _fill(columns.recording_id, row)
    split = category(row[split_column]) if split_column in row else ""
    mean_fd_mm = number(row[columns.mean_fd_mm], recording_id) if columns.mean_fd_mm in row else None
    if participants is not None:
        words["site"] = words["site"] or participants.site(subject)
        words["family"] = words["family"] or participants.family(subject)
        mean_fd_mm = participants.mean_fd_mm(subject) if mean_fd_mm is None else mean_fd_mm
        if split_column and split_column not in row:
            split = participants.split(split_column, subject)
    file = _fill(columns.file, row)
    path = join(root, file)
    confounds = join(root, _fill(columns.confounds, row))
    denoised = category(row[columns.denoised]) if columns.denoised else ""
    return SourceEntry(
        recording_id=recording_id,
        **words,
        file=path,
        source=relative_source(path, root) if file else "",
        space=space_of(file) or settings.space or "",
        tr_s=number(row[columns.tr_s], f"{recording_id}: {columns.tr_s}") if columns.tr_s else settings.tr_s,
        tr_from=f"column {columns.tr_s}" if columns.tr_s else "source.tr_s",
        confounds=confounds,
        mean_fd_mm=mean_fd_mm,
        denoised=denoised or denoised_by(file) or settings.denoised or "",
        split=split,
        file_stamp=_local_stamp(path),
        confounds_stamp=_local_stamp(confounds),
        refusal="" if file else "the table names no file",
    )
