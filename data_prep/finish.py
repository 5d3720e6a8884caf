"""Write what makes a data set complete: tables, contract, page, and ``dataset.json`` last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm import input_contract
from brainlm.dataset import FORMAT_VERSION, MANIFEST, SPLITS
from brainlm.errors import DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from data_prep.parquet_tables import FOLDS, RECORDING_COLUMNS, RECORDINGS, REJECTED, SUBJECTS, write_parquet
from data_prep.quality_page import QualityReport, quality_page
from data_prep.settings import PrepareSettings
from data_prep.stored_table import Table, blocks_of
from data_prep.write_shards import ShardRows
from data_prep.zarr_store import mean_coverage, read_archived

VERSIONS_OF = ("brainlm", "numpy", "scipy", "nibabel", "nilearn", "pandas", "pyarrow", "zarr")
QUALITY_PAGE = "quality.html"
TRUTH = "truth"
HASH_ROWS, HASH_HEADER_EVERY = 1000, 10  # rows of the table at a time; blocks that begin with its header


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a finished data set holds besides archive and shards."""

    name: str
    recordings: Table
    rejected: pd.DataFrame
    subjects: pd.DataFrame
    folds: pd.DataFrame
    contract: InputContract
    shards: ShardRows
    cohorts: list[dict[str, Any]]
    duplicates: Sequence[Sequence[str]]
    warnings: Sequence[str]
    withdrawn: dict[str, Any] | None = None
    versions: dict[str, str] = field(
        default_factory=lambda: (
            {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}
        )
    )


def write_dataset(out: Store, contents: Contents) -> dict[str, Any]:
    """Write everything beside archive and shards, the manifest last, and return the manifest."""
    recordings, contract = contents.recordings, contents.contract
    write_parquet(out, RECORDINGS, recordings)
    write_parquet(out, REJECTED, contents.rejected)
    write_parquet(out, SUBJECTS, contents.subjects)
    write_parquet(out, FOLDS, contents.folds)
    out.write_bytes(input_contract.FILE_NAME, contract.dumps().encode())
    out.write_bytes(QUALITY_PAGE, quality_page(_quality_report(out, contents)).encode())
    placed = recordings[["split", "subject", "num_timepoints"]]
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": contents.name,
        "content_hash": content_hash(contents.shards, contract, recordings),
        "atlas": {
            "name": contract.atlas.name,
            "sha256": contract.atlas.sha256,
            "num_parcels": contract.atlas.num_parcels,
        },
        "counts": {
            split: {
                "recordings": len(part),
                "subjects": int(part["subject"].nunique()),
                "timepoints": int(part["num_timepoints"].sum()),
            }
            for split in SPLITS
            for part in [placed[placed["split"] == split]]
        },
        "num_refused": len(contents.rejected),
        "shards": contents.shards,
        "duplicates": [list(ids) for ids in contents.duplicates],
        "warnings": list(contents.warnings),
        "versions": contents.versions,
        "cohorts": contents.cohorts,
    }
    if contents.withdrawn is not None:
        manifest["withdrawn"] = contents.withdrawn
    out.write_json(MANIFEST, manifest)
    return manifest


def content_hash(shards: ShardRows, contract: InputContract, recordings: Table) -> str:
    """Identify what a data set holds: bytes of the shards, contract, and the table of recordings."""
    hashes = {split: [row["sha256"] for row in shards.get(split, [])] for split in SPLITS}
    digest = hashlib.sha256(json.dumps([hashes, contract.to_json()], sort_keys=True).encode())
    names = [name for name in RECORDING_COLUMNS if name in recordings.columns]
    for number, block in enumerate(blocks_of(recordings, HASH_ROWS) if len(recordings) else ()):
        text = block[names].to_csv(index=False, header=number % HASH_HEADER_EVERY == 0, lineterminator="\n")
        digest.update(text.encode())
    return digest.hexdigest()


def check_truth(settings: PrepareSettings) -> None:
    if settings.truth is not None and not Path(settings.truth).is_dir():
        raise DataError(f"there is no folder {settings.truth} (truth)")


def copy_truth(settings: PrepareSettings, out: Store) -> None:
    """Copy the truth of a simulated cohort into the data set, where there is one."""
    folder = Path(settings.truth) if settings.truth is not None else None
    for path in sorted(folder.rglob("*")) if folder is not None else ():
        if path.is_file():
            out.write_bytes(f"{TRUTH}/{path.relative_to(folder).as_posix()}", path.read_bytes())  # type: ignore[arg-type]


def _quality_report(out: Store, contents: Contents) -> QualityReport:
    rows = contents.recordings[["recording_id", "first_row", "num_timepoints"]]

    def carpet(recording_id: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        found = rows[rows["recording_id"] == recording_id].iloc[0]
        return read_archived(out, int(found["first_row"]), int(found["num_timepoints"]))

    return QualityReport(
        name=contents.name,
        recordings=contents.recordings,
        rejected=contents.rejected,
        contract=contents.contract,
        duplicates=contents.duplicates,
        warnings=contents.warnings,
        carpet=carpet,
        parcel_coverage=mean_coverage(out, contents.recordings),
    )
