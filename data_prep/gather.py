"""Put together what a data set holds, old recordings and new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.input_contract import InputContract
from data_prep.atlas_image import AtlasImage
from data_prep.finish import Contents
from data_prep.held_dataset import HeldDataset
from data_prep.parquet_tables import RECORDING_COLUMNS, REJECTED_COLUMNS, give_back_memory
from data_prep.settings import PrepareSettings
from data_prep.source_entry import Source
from data_prep.sources import inputs_hash
from data_prep.splits import SplitItem, find_duplicates, leave_one_out_folds, notes_on_test_sites


def gather(
    settings: PrepareSettings,
    resolved: PrepareSettings,
    source: Source,
    atlas: AtlasImage,
    held: HeldDataset | None,
    table: pd.DataFrame,
    refused: pd.DataFrame,
    subjects: pd.DataFrame,
    contract: InputContract,
    shards: dict[str, list[dict[str, Any]]],
    items: Sequence[SplitItem],
    notes: list[str],
) -> Contents:
    """Return the contents of the data set: `table` and `refused` are new, `held` is what it had before.
    `resolved` are the settings with what a contract puts into them.

    `items` are all recordings, old and new; `subjects` too; `shards` the new ones; `notes` go into the warnings.
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
    duplicates = find_duplicates(items)
    by_fold, fold_notes = leave_one_out_folds(items, [item.site for item in items])
    folds = folds_table(by_fold)
    del by_fold
    give_back_memory()
    recordings, rejected, cohorts, warnings = (
        table,
        refused,
        [cohort],
        [*notes, *fold_notes, *notes_on_test_sites(items, settings.splits)],
    )
    withdrawn = None
    if held is not None:
        recordings = pd.concat([held.recordings, table], ignore_index=True)[list(RECORDING_COLUMNS)]
        still = held.rejected[
            ~held.rejected["recording_id"].isin(set(table["recording_id"]) | set(refused["recording_id"]))
        ]
        rejected = pd.concat([still, refused], ignore_index=True)
        cohorts = [*held.cohorts, cohort]
        shards = {split: [*held.manifest["shards"].get(split, []), *shards[split]] for split in SPLITS}
        warnings = [*held.manifest["warnings"], *warnings]
        withdrawn = held.manifest.get("withdrawn")
    warnings += find_warnings(table, contract, duplicates, atlas)
    return Contents(
        name=settings.name if held is None else held.manifest["name"],
        recordings=recordings,
        rejected=rejected[list(REJECTED_COLUMNS)],
        subjects=subjects[subjects["subject"].isin(set(recordings["subject"]))].reset_index(drop=True),
        folds=folds,
        contract=contract,
        shards=shards,
        cohorts=cohorts,
        duplicates=duplicates,
        warnings=list(dict.fromkeys(warnings)),
        withdrawn=withdrawn,
    )


def folds_table(folds: dict[str, list[str]]) -> pd.DataFrame:
    """Return columns ``recording_id`` and ``fold`` (the site or sites left out together), by id."""
    fold_of = {recording_id: name for name, ids in folds.items() for recording_id in ids}
    ids = sorted(fold_of)
    columns = {"recording_id": ids, "fold": [fold_of[recording_id] for recording_id in ids]}
    return pd.DataFrame(columns, dtype="string")


def find_warnings(
    table: pd.DataFrame, contract: InputContract, duplicates: list[list[str]], atlas: AtlasImage
) -> list[str]:
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
