"""What a source gives: one `SourceEntry` a recording, and one row of phenotypes a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

IMAGE_SUFFIXES = (".nii", ".nii.gz")
CIFTI_SUFFIXES = (".dtseries.nii", ".ptseries.nii")  # these are no volumes, although they end like them
MAX_LISTED = 10  # how many things a message spells out


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    """One recording to prepare.

    ``file``, ``confounds``, ``warp`` (FSL's, from the image's own space to the template) and ``warp_reference`` (the
    image that gives the grid) are local paths or fsspec URLs; ``source`` is the file as a reader of the data set should
    see it, relative to the source's root. Stamps tell without reading whether the bytes may have changed:
    ``size:modified`` or ``size:etag``, "" where there is no file. ``space`` is the
    BIDS space entity, "" if unknown. ``denoised`` names what has cleaned the recording already (``FIX``,
    ``ICA-AROMA``), "" = nothing. ``split`` is given or "". ``refusal`` says what is already known to be wrong.
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
    denoised: str = ""
    warp: str = ""
    warp_reference: str = ""
    split: str = ""
    file_stamp: str = ""
    confounds_stamp: str = ""
    warp_stamp: str = ""
    warp_reference_stamp: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Source:
    """All recordings, in the order of their ids, and one row of phenotypes a subject."""

    entries: Sequence[SourceEntry]
    subjects: pd.DataFrame
    description: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
