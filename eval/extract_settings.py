"""What ``eval/extract.py`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eval.table_settings import TableSettings


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(TableSettings):
    """Which recordings are embedded by which checkpoint, and what the table holds."""

    KIND: ClassVar[str] = "extract"

    per_window: bool = False
    """One row a window. Default: one row a recording, the mean over its windows weighted by their kept timepoints."""
    per_parcel: bool = False
    """Also give the mean over the tokens of each parcel."""
