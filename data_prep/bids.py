"""Recordings of a BIDS derivatives folder, in the layout that fMRIPrep writes.

::

    participants.tsv                                                      (here or in the folder above derivatives)
    sub-01/ses-1/func/sub-01_ses-1_task-rest_run-1_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz
                      sub-01_ses-1_task-rest_run-1_space-MNI152NLin6Asym_desc-preproc_bold.json    RepetitionTime
                      sub-01_ses-1_task-rest_run-1_desc-confounds_timeseries.tsv
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.read_table import number, read_table, subject_rows, text
from data_prep.settings import SourceSettings
from data_prep.source_entry import Source, SourceEntry

SPATIAL_ENTITIES = ("space", "res", "den", "desc", "hemi", "cohort")  # of a derivative, not of the acquisition


def find_bids_recordings(settings: SourceSettings) -> Source:
    """List the runs under ``sub-*``; a run that exists in native space only becomes a refusal, not a gap."""
    from nilearn.interfaces.bids import get_bids_files

    root = Path(settings.path)
    if not root.is_dir():
        raise DataError(f"there is no BIDS folder {root}")
    files = get_bids_files(root, file_tag="bold", file_type="nii*", modality_folder="func")
    if not files:
        inside = sorted({str(path.parent.relative_to(root)) for path in root.glob("derivatives/*/sub-*")})
        hint = f"; set source.path to {root / inside[0]}" if inside else ""
        raise DataError(f"no sub-*/[ses-*/]func/*_bold.nii[.gz] under {root}{hint}")
    participants, notes = _participants(root, settings)
    rows = {row["subject"]: row for row in participants.to_dict("records")}
    runs: dict[str, list[SourceEntry]] = {}
    for file in files:
        entry = _entry(Path(file), root, settings, rows)
        if entry is not None:
            runs.setdefault(entry.recording_id, []).append(entry)
    entries = []
    for found in runs.values():
        fit = [entry for entry in found if not entry.refusal]
        entries += fit or found[:1]
    seen = pd.DataFrame({"subject": sorted({entry.subject for entry in entries})})
    subjects = seen.merge(participants, on="subject", how="left")
    unknown = sorted(set(seen["subject"]) - set(participants["subject"]))
    if unknown and len(participants):
        notes.append(f"{len(unknown)} subjects are not in participants.tsv, for example {unknown[0]}")
    phenotypes = [name for name in subjects.columns if name != "subject"]
    return Source(entries, subject_rows(subjects, phenotypes), {"num_images": len(files)}, notes)


def _participants(root: Path, settings: SourceSettings) -> tuple[pd.DataFrame, list[str]]:
    """Return phenotypes with the column ``subject`` (label without ``sub-``), and notes about what is missing."""
    for folder in (root, *root.resolve().parents[:2]):
        path = folder / "participants.tsv"
        if path.is_file():
            break
    else:
        return pd.DataFrame({"subject": pd.Series(dtype=str)}), [f"there is no participants.tsv for {root}"]
    names = [settings.columns.site or "site", settings.columns.family or "family"]
    table = read_table(path, ["participant_id", *names])
    if "participant_id" not in table.columns:
        raise DataError(f"{path}: expected a column participant_id, found {', '.join(map(str, table.columns))}")
    subjects = table.pop("participant_id").map(lambda value: text(value).removeprefix("sub-"))
    table = table.drop(columns="subject", errors="ignore")
    table.insert(0, "subject", subjects)
    for wanted in (settings.columns.site, settings.columns.family, *(settings.phenotypes or ())):
        if wanted and wanted not in table.columns:
            raise DataError(f"{path} has no column {wanted!r} (it has {', '.join(map(str, table.columns))})")
    if settings.phenotypes is not None:
        keep = ["subject", *settings.phenotypes, *(name for name in names if name in table.columns)]
        table = table[list(dict.fromkeys(keep))]
    return table, []


def _entry(path: Path, root: Path, settings: SourceSettings, rows: dict[str, Any]) -> SourceEntry | None:
    """Return the entry of one image, or None where the settings do not ask for it."""
    from nilearn.interfaces.bids import parse_bids_filename

    entities: dict[str, str | None] = parse_bids_filename(path)["entities"]
    wanted = settings.bids
    if wanted.task and entities.get("task") not in wanted.task:
        return None
    space = entities.get("space") or ""
    native = not space.startswith("MNI")
    if not native and (
        (wanted.space and space not in wanted.space) or (wanted.desc and entities.get("desc") not in wanted.desc)
    ):
        return None
    recording_id = "_".join(f"{k}-{v}" for k, v in entities.items() if k not in SPATIAL_ENTITIES and v is not None)
    subject = entities.get("sub") or ""
    row: dict[str, Any] = rows.get(subject, {})
    columns = settings.columns
    entry = SourceEntry(
        recording_id=recording_id,
        subject=subject,
        session=entities.get("ses") or "",
        task=entities.get("task") or "",
        run=entities.get("run") or "",
        site=text(row.get(columns.site or "site")),
        family=text(row.get(columns.family or "family")),
        file=str(path),
        source=str(path.relative_to(root)),
        space=space,
        confounds=_confounds(path, recording_id),
        mean_fd_mm=number(row.get(columns.mean_fd_mm), recording_id) if columns.mean_fd_mm else None,
    )
    if native:
        found = f"its name says space-{space}" if space else "its name has no space entity (a raw scan)"
        return replace(entry, refusal=f"native space: expected an image in an MNI template space, {found}")
    try:
        tr_s = _repetition_time(path, root, entities)
    except DataError as error:
        return replace(entry, refusal=str(error))
    if tr_s is None:
        return replace(entry, tr_s=settings.tr_s, tr_from="source.tr_s")
    return replace(entry, tr_s=tr_s, tr_from="RepetitionTime of the sidecar")


def _confounds(path: Path, recording_id: str) -> str:
    for suffix in ("desc-confounds_timeseries.tsv", "desc-confounds_regressors.tsv"):  # since, and before fMRIPrep 20.2
        table = path.parent / f"{recording_id}_{suffix}"
        if table.is_file():
            return str(table)
    return ""


def _repetition_time(path: Path, root: Path, entities: dict[str, str | None]) -> float | None:
    """Return RepetitionTime by the BIDS inheritance principle: the sidecar nearest to the image wins."""
    from nilearn.interfaces.bids import parse_bids_filename

    folders = [root]
    for part in path.parent.relative_to(root).parts:
        folders.append(folders[-1] / part)
    tr_s: float | None = None
    for folder in folders:
        sidecars = sorted(folder.glob("*bold.json"), key=lambda item: len(item.name))
        for sidecar in sidecars:
            theirs = {} if "_" not in sidecar.name else parse_bids_filename(sidecar)["entities"]
            if any(entities.get(key) != value for key, value in theirs.items()):
                continue
            try:
                value = json.loads(sidecar.read_bytes()).get("RepetitionTime")
            except (ValueError, AttributeError, OSError) as error:
                raise DataError(f"{sidecar.name} is not a readable JSON sidecar: {error}") from error
            if value is not None:
                tr_s = number(value, f"{sidecar.name}: RepetitionTime")
    return tr_s
