"""Put together what a data set holds, old recordings and new."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.input_contract import InputContract
from data_prep.atlas_image import AtlasImage
from data_prep.finish import Contents
from data_prep.held_dataset import HeldDataset
from data_prep.parquet_tables import RECORDING_COLUMNS, REJECTED_COLUMNS, ROWS_PER_GROUP, rows_of_subjects
from data_prep.place import Relations
from data_prep.settings import PrepareSettings
from data_prep.source_entry import Source
from data_prep.sources import inputs_hash
from data_prep.stored_table import StoredTable, Table


def gather(
    settings: PrepareSettings,
    resolved: PrepareSettings,
    source: Source,
    atlas: AtlasImage,
    held: HeldDataset | None,
    table: StoredTable,
    refused: pd.DataFrame,
    subjects: pd.DataFrame,
    contract: InputContract,
    shards: dict[str, list[dict[str, Any]]],
    relations: Relations,
    notes: list[str],
) -> Contents:
    """Return the contents of the data set: `table` and `refused` are new, `held` is what it had before.
    `resolved` are the settings with what a contract puts into them.

    `relations` are those of all recordings, old and new; `subjects` too; `shards` the new ones; `notes` go into the
    warnings.
    """
    cohort = {
        "name": settings.name,
        "source": source.description,
        "inputs_sha256": inputs_hash(source.entries, source.subjects),
        "atlas_fingerprint": atlas.fingerprint,
        "num_recordings": len(table) + len(refused),
        "num_refused": len(refused),
        "config": settings.data_tree(),
        "processing": resolved.processing_tree(),
    }
    recordings, rejected, cohorts, warnings = table, refused, [cohort], [*notes, *relations.notes]
    withdrawn = None
    if held is not None:
        recordings = StoredTable(RECORDING_COLUMNS)
        recordings.append(held.recordings)
        for block in table.blocks(ROWS_PER_GROUP):
            recordings.append(block)
        now = pd.concat([table["recording_id"], refused["recording_id"]])
        still = held.rejected[~held.rejected["recording_id"].isin(now)]
        rejected = pd.concat([still, refused], ignore_index=True)
        cohorts = [*held.cohorts, cohort]
        shards = {split: [*held.manifest["shards"].get(split, []), *shards[split]] for split in SPLITS}
        warnings = [*held.manifest["warnings"], *warnings]
        withdrawn = held.manifest.get("withdrawn")
    warnings += find_warnings(table, contract, relations.duplicates, atlas)
    return Contents(
        name=settings.name if held is None else held.manifest["name"],
        recordings=recordings,
        rejected=rejected[list(REJECTED_COLUMNS)],
        subjects=rows_of_subjects(subjects, recordings["subject"]),
        folds=relations.folds,
        contract=contract,
        shards=shards,
        cohorts=cohorts,
        duplicates=relations.duplicates,
        warnings=list(dict.fromkeys(warnings)),
        withdrawn=withdrawn,
    )


def find_warnings(table: Table, contract: InputContract, duplicates: list[list[str]], atlas: AtlasImage) -> list[str]:
    """List what a reader should know, in words."""
    warnings = [f"equal series under several ids, kept in one split: {', '.join(ids)}" for ids in duplicates]
    if contract.zero_iqr_parcels:
        warnings.append(f"covered parcels with an IQR of 0, masked out: {', '.join(contract.zero_iqr_parcels)}")
    if contract.atlas.space:
        fitting = {"", contract.atlas.space, *atlas.transforms}
        others = Counter(space for space in table["space"] if space not in fitting)
        warnings += [
            f"{count} recordings are in {space}, the atlas in {contract.atlas.space}: MNI templates differ by "
            "millimetres; atlas.transforms can bring them together"
            for space, count in sorted(others.items())
        ]
    return warnings
