"""What a data set holds already: whether it is the one asked for, and what an added cohort adds to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from brainlm import input_contract
from brainlm.dataset import MANIFEST, check_no_withdrawal
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store, sha256_of_file
from brainlm.subject_hash import keyed_hash
from data_prep.atlas_image import AtlasImage
from data_prep.parquet_tables import RECORDINGS, REJECTED, SUBJECTS, read_parquet, rows_of_subjects
from data_prep.settings import PrepareSettings, differences
from data_prep.source_entry import MAX_LISTED, Source, SourceEntry
from data_prep.sources import inputs_hash

ADVICE = "Choose another `out`, or remove the data set"


@dataclass(frozen=True)
class HeldDataset:
    """A finished data set, as its manifest knows it: rows that a stopped addition left in the tables are left out."""

    store: Store
    manifest: dict[str, Any]
    contract: InputContract
    recordings: pd.DataFrame
    rejected: pd.DataFrame
    subjects: pd.DataFrame

    @property
    def cohorts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.manifest["cohorts"]
        return found

    def is_withdrawn(self, subject: str) -> bool:
        withdrawn = self.manifest.get("withdrawn")
        return withdrawn is not None and keyed_hash(withdrawn["key"], subject) in withdrawn["subjects"]


def read_held(out: Store, *, unfinished: bool = False) -> HeldDataset | None:
    """Return the finished data set at `out`, or None where there is none; one in withdrawal only if `unfinished`."""
    if not out.exists(MANIFEST):
        return None
    manifest = out.read_json(MANIFEST)
    if not unfinished:
        check_no_withdrawal(manifest, out.url)
    if "cohorts" not in manifest:
        raise ConfigError(f"{out.url} holds a data set that an earlier version of this program made. {ADVICE}")
    recordings, rejected = (
        table[table["addition"] < len(manifest["cohorts"])].reset_index(drop=True)
        for table in (read_parquet(out, RECORDINGS), read_parquet(out, REJECTED))
    )
    subjects = read_parquet(out, SUBJECTS)
    return HeldDataset(
        store=out,
        manifest=manifest,
        contract=InputContract.from_json(out.read_json(input_contract.FILE_NAME)),
        recordings=recordings,
        rejected=rejected,
        subjects=rows_of_subjects(subjects, recordings["subject"]),
    )


def is_finished(
    held: HeldDataset, settings: PrepareSettings, resolved: PrepareSettings, source: Source, atlas: AtlasImage
) -> bool:
    """Return whether the data set holds what the settings ask for; False means that `add` has something to add.

    `resolved` are the settings with what a contract puts into them.

    Raises
    ------
    ConfigError
        If it was made with other settings or from other inputs, naming what differs.
    """
    _check_atlas(held, settings, atlas)
    now = inputs_hash(source.entries, source.subjects)
    cohorts = [cohort for cohort in held.cohorts if not differences(settings.data_tree(), cohort["config"])]
    if any(cohort["inputs_sha256"] == now for cohort in cohorts):
        _check_unchanged(held, source.entries)
        return True
    if settings.add:
        _check_processing(held, resolved)
        _check_unchanged(held, source.entries)
        return False
    if not cohorts:
        listed = _listed(differences(settings.data_tree(), held.cohorts[0]["config"]))
        raise ConfigError(
            f"{held.store.url} holds a data set made with other settings:\n{listed}\n{ADVICE}, or give add=true to "
            "add other recordings, processed alike"
        )
    raise ConfigError(
        f"{held.store.url} holds a data set made from other inputs: recordings, their tables or the sizes of files "
        f"have changed ({len(source.entries)} recordings found now). {ADVICE}, or give add=true to add the new ones"
    )


def new_entries(held: HeldDataset, source: Source) -> tuple[list[SourceEntry], int]:
    """Return the entries that the data set does not hold, and how many are of withdrawn subjects and left out."""
    known = set(held.recordings["recording_id"])
    fresh = [entry for entry in source.entries if entry.recording_id not in known]
    kept = [entry for entry in fresh if not held.is_withdrawn(entry.subject)]
    return kept, len(fresh) - len(kept)


def merged_subjects(held: HeldDataset, added: pd.DataFrame) -> pd.DataFrame:
    """Return one row a subject of old and new; columns are those of either.

    Raises
    ------
    DataError
        If a subject has another value of a phenotype now, naming subject and column; if a phenotype is text in one
        and numbers in the other, naming column and kinds. Whole and other numbers are one kind.
    """

    def kind_of(column: pd.Series) -> str:
        found = pd.api.types.infer_dtype(column.astype(object), skipna=True)
        numbers = ("integer", "floating", "mixed-integer-float", "decimal")
        return "numbers" if found in numbers else {"string": "text", "boolean": "true or false"}.get(found, found)

    both = held.subjects.merge(added, on="subject", how="outer", suffixes=("", " (added)"), sort=True)
    twice = [name for name in held.subjects.columns if f"{name} (added)" in both.columns]
    kinds = {name: (kind_of(held.subjects[name]), kind_of(added[name])) for name in twice}
    mixed = [
        f"{name}: {old} in the data set, {new} now"
        for name, (old, new) in kinds.items()
        if old != new and "empty" not in (old, new)
    ]
    if mixed:
        raise DataError(
            f"phenotypes are of another kind than the data set's:\n{_listed(mixed)}\nWrite them as the data set has "
            "them in the table that is added (a missing value is n/a, no other word), or give them other names"
        )
    wrong = []
    for name in twice:
        old, new = both[name], both.pop(f"{name} (added)")
        if "empty" in kinds[name]:  # its type says nothing
            both[name] = new if kinds[name][0] == "empty" else old
            continue
        if old.dtype != new.dtype:  # int64 and float64, or two sets of categories
            as_type: Any = {"numbers": "float64", "text": "string"}.get(kinds[name][0], "object")
            old, new = old.astype(as_type), new.astype(as_type)
        compared = (old, new) if kinds[name][0] == "numbers" else (old.astype("string"), new.astype("string"))
        other = old.notna() & new.notna() & (compared[0] != compared[1])
        wrong += [
            f"subject {subject}: {name} is {a} in the data set, {b} now"
            for subject, a, b in zip(both.loc[other, "subject"], old[other], new[other])
        ]
        both[name] = old.where(old.notna(), new)
    if wrong:
        raise DataError(f"phenotypes disagree with the data set's:\n{_listed(wrong)}")
    return both


def for_addition(held: HeldDataset, settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with the data set's TR and statistics: what is added is resampled and scaled with them."""
    return replace(settings, target_tr_s=held.contract.tr_s, statistics=None)


def _check_atlas(held: HeldDataset, settings: PrepareSettings, atlas: AtlasImage) -> None:
    fingerprints = {cohort["atlas_fingerprint"] for cohort in held.cohorts}
    if held.contract.atlas.to_json() != atlas.atlas.to_json() or atlas.fingerprint not in fingerprints:
        image = "the contract's" if settings.atlas is None else settings.atlas.image or settings.atlas.name
        raise ConfigError(
            f"{held.store.url} holds a data set made with another atlas: {image}, its table of labels or a "
            f"transform has changed since. {ADVICE}"
        )


def _check_processing(held: HeldDataset, settings: PrepareSettings) -> None:
    found = differences(settings.processing_tree(), held.cohorts[0]["processing"])
    if settings.target_tr_s is not None and abs(settings.target_tr_s - held.contract.tr_s) > 1e-9:
        found.append(f"target_tr_s: {settings.target_tr_s:g} here, {held.contract.tr_s:g} there")
    if found:
        raise ConfigError(
            f"add: {held.store.url} was made with other processing, and a data set is never a mixture:\n"
            f"{_listed(found)}\nUse the same settings, or choose another `out`"
        )


def _check_unchanged(held: HeldDataset, entries: Iterable[SourceEntry]) -> None:
    """Raise `ConfigError` if a source file does not have the bytes that the data set was made from."""
    made = held.store.modified(MANIFEST).timestamp()
    table = held.recordings.set_index("recording_id")
    known = {
        column: dict(zip(table.index, table[column]))
        for column in ("source_bytes", "source_etag", "source_sha256", "confounds_sha256")
    }
    changed = []
    for entry in entries:
        if entry.recording_id not in known["source_sha256"]:
            continue
        size = int(entry.file_stamp.partition(":")[0] or 0)
        if size != known["source_bytes"][entry.recording_id]:
            changed.append(entry.source)
            continue
        if "://" in entry.file and entry.file_stamp.partition(":")[2] != known["source_etag"][entry.recording_id]:
            changed.append(entry.source)
            continue
        for column, file in (("source_sha256", entry.file), ("confounds_sha256", entry.confounds)):
            path = Path(file)
            newer = bool(file) and "://" not in file and path.is_file() and path.stat().st_mtime > made
            if newer and known[column][entry.recording_id] != sha256_of_file(path):
                changed.append(path.name)
    if changed:
        raise ConfigError(
            f"{len(changed)} source files have changed since {held.store.url} was made, for example {changed[0]}. "
            f"{ADVICE}"
        )


def _listed(lines: list[str]) -> str:
    more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n".join([*(f"  {line}" for line in lines[:MAX_LISTED]), *more])
