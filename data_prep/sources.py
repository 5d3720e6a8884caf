"""What is to be prepared: recordings listed in a table (`data_prep.listed_files`) or found by `data_prep.bids`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from brainlm.errors import DataError
from brainlm.recording import check_recording_id
from data_prep.bids import find_bids_recordings
from data_prep.listed_files import find_listed_recordings
from data_prep.settings import SourceSettings
from data_prep.source_entry import MAX_LISTED, Source, SourceEntry

MAX_ID_LENGTH = 95  # a member's name in a tar, with its ending, has at most 100


def find_recordings(settings: SourceSettings) -> Source:
    """List what is to be prepared.

    Raises
    ------
    DataError
        If the source cannot be read, ids repeat or are unfit, or one subject has two values of a phenotype.
    """
    if settings.kind == "bids":
        source = find_bids_recordings(settings)
    else:
        source = find_listed_recordings(settings)
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
