"""The table source: a TSV, CSV or parquet table that lists files with ids and phenotypes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.read_table import number, read_table, subject_rows, text
from data_prep.settings import ColumnNames, SourceSettings
from data_prep.source_entry import Source, SourceEntry


def _pattern_columns(pattern: str) -> list[str]:
    """Return the columns that ``{name}`` in a pattern, or a plain column name, stands for."""
    return re.findall(r"\{([^{}]+)\}", pattern) if "{" in pattern else [pattern]


def _fill(pattern: str | None, row: dict[Any, Any]) -> str:
    if pattern is None:
        return ""
    if "{" not in pattern:
        return text(row[pattern])
    return re.sub(r"\{([^{}]+)\}", lambda match: text(row[match.group(1)]), pattern)


def find_listed_recordings(settings: SourceSettings) -> Source:
    columns = settings.columns
    ids = [columns.recording_id, columns.subject, columns.session, columns.task, columns.run, columns.site]
    ids += [columns.family, columns.file, columns.confounds]
    text_columns = sorted({name for pattern in ids if pattern for name in _pattern_columns(pattern)})
    table = read_table(settings.path, text_columns)
    phenotypes = [name for name in settings.phenotypes or () if name != "subject"]
    numbers = [name for name in (columns.tr_s, columns.mean_fd_mm) if name]
    absent = [name for name in [*text_columns, *numbers, *phenotypes] if name not in table.columns]
    if absent:
        raise DataError(
            f"{settings.path} has no column {', '.join(map(repr, absent))} (it has "
            f"{', '.join(map(str, table.columns))}): set source.columns and source.phenotypes"
        )
    root = Path(settings.root) if settings.root is not None else Path(settings.path).parent
    entries = [_table_entry(row, columns, settings, root) for row in table.to_dict("records")]
    subjects = pd.DataFrame({"subject": [entry.subject for entry in entries]})
    for name in phenotypes:
        subjects[name] = table[name].to_numpy(copy=True) if table[name].dtype != object else table[name].tolist()
    return Source(entries, subject_rows(subjects, phenotypes), {"num_rows": len(table)})


def _table_entry(row: dict[Any, Any], columns: ColumnNames, settings: SourceSettings, root: Path) -> SourceEntry:
    words = {
        name: text(row[column]) if (column := getattr(columns, name)) else ""
        for name in ("subject", "session", "task", "run", "site", "family")
    }
    words["subject"] = words["subject"].removeprefix("sub-")  # as in BIDS: a person has one name, however it is written
    recording_id = _fill(columns.recording_id, row)
    if columns.recording_id is None:
        pairs = (("sub", "subject"), ("ses", "session"), ("task", "task"), ("run", "run"))
        recording_id = "_".join(f"{key}-{words[name].removeprefix(f'{key}-')}" for key, name in pairs if words[name])
    file = _fill(columns.file, row)
    confounds = _fill(columns.confounds, row)
    tr_s = number(row[columns.tr_s], f"{recording_id}: {columns.tr_s}") if columns.tr_s else settings.tr_s
    space = re.search(r"_space-([A-Za-z0-9]+)", Path(file).name)
    return SourceEntry(
        recording_id=recording_id,
        **words,
        file=str(root / file),
        source=file,
        space=space.group(1) if space else settings.space or "",
        tr_s=tr_s,
        tr_from=f"column {columns.tr_s}" if columns.tr_s else "source.tr_s",
        confounds=str(root / confounds) if confounds else "",
        mean_fd_mm=number(row[columns.mean_fd_mm], recording_id) if columns.mean_fd_mm else None,
        refusal="" if file else "the table names no file",
    )
