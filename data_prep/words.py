"""What names of files and folders say: BIDS words, template spaces, what has been denoised."""

from __future__ import annotations

import re
from collections.abc import Mapping

SPACE = re.compile(r"_space-([A-Za-z0-9]+)")
DENOISED = (  # what stands in the name of a file, and what it means
    (re.compile(r"desc-\w*AROMA", re.IGNORECASE), "ICA-AROMA"),  # fMRIPrep up to 23, fMRIPost-AROMA
    (re.compile(r"desc-(denoised|clean)", re.IGNORECASE), "denoised"),  # XCP-D and others
    (re.compile(r"_hp\w*_clean(_rclean\w*|_tclean)?\."), "FIX"),  # the Human Connectome Project's, ICA-FIX
    (re.compile(r"filtered_func_data_clean\b"), "FIX"),  # UK Biobank's, ICA-FIX
    (re.compile(r"denoised_func_data_(non)?aggr"), "ICA-AROMA"),  # ICA-AROMA's own
)


def recording_id_of(words: Mapping[str, str]) -> str:
    """Return the id of a recording made of its subject, session, task and run, as BIDS names files."""
    pairs = (("sub", "subject"), ("ses", "session"), ("task", "task"), ("run", "run"))
    return "_".join(f"{key}-{words[name].removeprefix(f'{key}-')}" for key, name in pairs if words[name])


def space_of(path: str) -> str:
    """Return the space entity in a file's name, "" if it has none."""
    match = SPACE.search(path.rsplit("/", 1)[-1])
    return match.group(1) if match else ""


def denoised_by(path: str) -> str:
    """Return what has denoised a file already by its name, "" if its name says nothing of it."""
    name = path.rsplit("/", 1)[-1]
    return next((meaning for expression, meaning in DENOISED if expression.search(name)), "")
