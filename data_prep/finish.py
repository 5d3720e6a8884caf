"""Write what makes a data set complete: tables, contract, page, and ``dataset.json`` last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from brainlm import input_contract
from brainlm.atlas import Atlas
from brainlm.dataset import FORMAT_VERSION, MANIFEST, SPLITS
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store, sha256_of_file
from data_prep.parquet_tables import RECORDINGS, SUBJECTS, read_parquet, write_parquet
from data_prep.quality_page import QualityReport, quality_page
from data_prep.settings import PrepareSettings, differences
from data_prep.source_entry import MAX_LISTED, Source
from data_prep.sources import inputs_hash

VERSIONS_OF = ("brainlm", "numpy", "scipy", "nibabel", "nilearn", "pandas", "pyarrow", "zarr")
QUALITY_PAGE = "quality.html"
TRUTH = "truth"


def is_finished(out: Store, settings: PrepareSettings, source: Source, atlas: Atlas) -> bool:
    """Return whether `out` holds this data set already.

    Raises
    ------
    ConfigError
        If it holds one that was made with other settings or from other inputs, naming what differs.
    """
    if not out.exists(MANIFEST):
        return False
    manifest = out.read_json(MANIFEST)
    advice = "Choose another `out`, or remove the data set"
    found = differences(settings.data_tree(), manifest.get("config"))
    if found:
        listed = "\n".join(f"  {line}" for line in found[:MAX_LISTED])
        raise ConfigError(f"{out.url} holds a data set made with other settings:\n{listed}\n{advice}")
    if out.read_json(input_contract.FILE_NAME)["atlas"] != atlas.to_json():
        raise ConfigError(
            f"{out.url} holds a data set made with another atlas: {settings.atlas.image} or its table of labels has "
            f"changed since. {advice}"
        )
    if manifest.get("inputs_sha256") != inputs_hash(source.entries, source.subjects):
        raise ConfigError(
            f"{out.url} holds a data set made from other inputs: recordings, their tables or the sizes of files have "
            f"changed ({len(source.entries)} recordings found now). {advice}"
        )
    changed = _changed_since(out, source)
    if changed:
        raise ConfigError(
            f"{len(changed)} source files have changed since {out.url} was made, for example {changed[0]}. {advice}"
        )
    return True


def _changed_since(out: Store, source: Source) -> list[str]:
    """Return source files that are newer than the data set and do not have the bytes that it was made from."""
    made = out.fs.modified(out.path(MANIFEST)).timestamp()
    pairs = [("source_sha256", entry.file, entry.recording_id) for entry in source.entries]
    pairs += [("confounds_sha256", entry.confounds, entry.recording_id) for entry in source.entries if entry.confounds]
    newer = [pair for pair in pairs if Path(pair[1]).is_file() and Path(pair[1]).stat().st_mtime > made]
    if not newer:
        return []
    table = read_parquet(out, RECORDINGS).set_index("recording_id")
    return [
        Path(file).name
        for column, file, recording_id in newer
        if recording_id not in table.index or table.at[recording_id, column] != sha256_of_file(file)
    ]


def write_dataset(
    out: Store,
    settings: PrepareSettings,
    source: Source,
    *,
    recordings: pd.DataFrame,
    rejected: pd.DataFrame,
    contract: InputContract,
    shards: dict[str, list[dict[str, Any]]],
    duplicates: Sequence[Sequence[str]],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Write everything beside archive and shards, the manifest last, and return the manifest."""
    write_parquet(out, RECORDINGS, recordings)
    prepared = source.subjects["subject"].isin(set(recordings["subject"]))
    write_parquet(out, SUBJECTS, source.subjects[prepared].reset_index(drop=True))
    out.write_bytes(input_contract.FILE_NAME, contract.dumps().encode())
    report = QualityReport(settings.name, recordings, rejected, contract, duplicates, warnings)
    out.write_bytes(QUALITY_PAGE, quality_page(report).encode())
    if settings.truth is not None:
        _copy_folder(Path(settings.truth), out)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": settings.name,
        "content_hash": content_hash(shards, contract, recordings),
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
            for part in [recordings[recordings["split"] == split]]
        },
        "num_refused": len(rejected),
        "shards": shards,
        "duplicates": [list(ids) for ids in duplicates],
        "warnings": list(warnings),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS_OF},
        "config": settings.data_tree(),
        "source": source.description,
        "inputs_sha256": inputs_hash(source.entries, source.subjects),
    }
    out.write_json(MANIFEST, manifest)
    return manifest


def content_hash(shards: dict[str, list[dict[str, Any]]], contract: InputContract, recordings: pd.DataFrame) -> str:
    """Identify what a data set holds: bytes of the shards, contract, and the table of recordings."""
    rows = json.loads(recordings.to_json(orient="records", double_precision=15))
    hashes = {split: [row["sha256"] for row in shards.get(split, [])] for split in SPLITS}
    text = json.dumps([hashes, contract.to_json(), rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_truth(settings: PrepareSettings) -> None:
    if settings.truth is not None and not Path(settings.truth).is_dir():
        raise DataError(f"there is no folder {settings.truth} (truth)")


def _copy_folder(folder: Path, out: Store) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            out.write_bytes(f"{TRUTH}/{path.relative_to(folder).as_posix()}", path.read_bytes())
