"""What a source gives: one `SourceEntry` a recording, and one row of phenotypes a subject."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

IMAGE_SUFFIXES = (".nii", ".nii.gz")
MAX_LISTED = 10  # how many things a message spells out


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
