"""What is to be prepared: one `SourceEntry` a recording, from a table or from a BIDS folder (`data_prep.bids`)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from brainlm.recording import check_recording_id
from data_prep.settings import ColumnNames, SourceSettings

IMAGE_SUFFIXES = (".nii", ".nii.gz")
MAX_LISTED = 10
MAX_ID_LENGTH = 95  # a member's name in a tar, with its ending, has at most 100


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One recording to prepare.

    ``file`` and ``confounds`` are local paths; ``source`` is the file as a reader of the data set should see it,
    relative to the source's root. ``space`` is the BIDS space entity, "" if unknown. ``refusal`` says what is already
    known to be wrong.
    """

    recording_id: str
    subject: str
    file: str
    source: str
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""
    family: str = ""
    space: str = ""
    tr_s: float | None = None
    tr_from: str = ""
    confounds: str = ""
    mean_fd_mm: float | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Source:
    """All recordings, in the order of their ids, and one row of phenotypes a subject."""

    entries: list[SourceEntry]
    subjects: pd.DataFrame
    description: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def find_recordings(settings: SourceSettings) -> Source:
    """List what is to be prepared.

    Raises
    ------
    DataError
        If the source cannot be read, ids repeat or are unfit, or one subject has two values of a phenotype.
    """
    if settings.kind == "bids":
        from data_prep.bids import find_bids_recordings

        source = find_bids_recordings(settings)
    else:
        source = _find_table_recordings(settings)
    if not source.entries:
        raise DataError(f"no recordings in {settings.path}")
    _check_ids(source.entries, settings.path)
    return Source(
        entries=sorted(source.entries, key=lambda entry: entry.recording_id),
        subjects=source.subjects,
        description={"kind": settings.kind, "path": settings.path, **source.description},
        warnings=source.warnings,
    )


def inputs_hash(entries: list[SourceEntry], subjects: pd.DataFrame) -> str:
    """Identify what goes in by ids, table values and the size of every file."""
    rows = []
    for entry in entries:
        row = asdict(entry)
        for name in ("file", "confounds"):
            path = Path(row.pop(name))
            row[f"{name}_bytes"] = path.stat().st_size if path.is_file() else None
        rows.append(row)
    content = json.dumps(rows, sort_keys=True) + subjects.to_json(orient="records", double_precision=15)
    return hashlib.sha256(content.encode()).hexdigest()


def read_table(path: str | Path, text_columns: list[str]) -> pd.DataFrame:
    """Read .tsv, .csv or .parquet; `text_columns` stay text (``007`` is no number). Missing values stay missing."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no table {path}")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            for name in set(text_columns) & set(table.columns):
                table[name] = table[name].map(lambda value: value if pd.isna(value) else str(value))
            return table
        separator = "," if path.suffix == ".csv" else "\t"
        return pd.read_csv(path, sep=separator, dtype=dict.fromkeys(text_columns, str))
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"cannot read the table {path}: {error}") from error


def text(value: Any) -> str:
    """Return a cell as text; a missing value as ""."""
    return "" if value is None or pd.isna(value) else str(value).strip()


def number(value: Any, what: str) -> float | None:
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    try:
        return float(value)
    except (ValueError, TypeError) as error:  # a sidecar can hold a list
        raise DataError(f"{what}: expected a number, found {value!r}") from error


def subject_rows(table: pd.DataFrame, phenotypes: list[str]) -> pd.DataFrame:
    """Return one row a subject with its phenotypes as given, sorted by subject.

    Parameters
    ----------
    table : DataFrame
        With a column ``subject``, one row a recording.

    Raises
    ------
    DataError
        If two rows of one subject disagree, naming subject, column and values.
    """
    kept = table[["subject", *phenotypes]].drop_duplicates().sort_values("subject", kind="stable")
    twice = kept["subject"].duplicated(keep=False)
    if twice.any():
        lines = []
        for subject, rows in kept[twice].groupby("subject"):
            for name in phenotypes:
                values = rows[name].astype(str).unique().tolist()
                if len(values) > 1:
                    lines.append(f"subject {subject}: {name} is {' and '.join(values)}")
        raise DataError("one subject has several values of one phenotype: " + "; ".join(lines[:MAX_LISTED]))
    return kept.reset_index(drop=True)


def _pattern_columns(pattern: str) -> list[str]:
    """Return the columns that ``{name}`` in a pattern, or a plain column name, stands for."""
    return re.findall(r"\{([^{}]+)\}", pattern) if "{" in pattern else [pattern]


def _fill(pattern: str | None, row: dict[Any, Any]) -> str:
    if pattern is None:
        return ""
    if "{" not in pattern:
        return text(row[pattern])
    return re.sub(r"\{([^{}]+)\}", lambda match: text(row[match.group(1)]), pattern)


def _find_table_recordings(settings: SourceSettings) -> Source:
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


def _check_ids(entries: list[SourceEntry], where: str) -> None:
    unfit = []
    for entry in entries:
        for what, value in (("recording id", entry.recording_id), ("subject", entry.subject)):
            try:
                check_recording_id(value)
            except DataError:
                unfit.append(f"{what} {value!r}")
    if unfit:
        listed = ", ".join(dict.fromkeys(unfit[:MAX_LISTED]))
        raise DataError(
            f"{where}: expected ids of letters, digits, '-' and '_' without dots, slashes or blanks; found {listed}"
        )
    ids = [entry.recording_id for entry in entries]
    if too_long := [value for value in ids if len(value) > MAX_ID_LENGTH]:
        raise DataError(f"{where}: recording ids can have at most {MAX_ID_LENGTH} characters, found {too_long[0]!r}")
    twice = sorted({value for value in ids if ids.count(value) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        files = [f"{entry.recording_id} ({entry.source})" for entry in entries if entry.recording_id in twice]
        raise DataError(
            f"{where}: recording ids must be unique, found twice: {', '.join(sorted(files)[:MAX_LISTED])}. For BIDS, "
            "several spaces or descriptions of one run: set source.bids.space or source.bids.desc"
        )
