"""Check a finished data set: hashes, counts, subjects in two splits, values that are not finite, equal series.

::

    python data_prep/inspect_dataset.py URL

Exit status 0 if everything holds, else 1; every finding is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys

import numpy as np
import pandas as pd

from brainlm.dataset import SPLITS, Dataset, open_dataset
from brainlm.errors import BrainLMError
from brainlm.shards import FOLDER as SHARDS_FOLDER
from data_prep.finish import content_hash
from data_prep.one_recording import series_sha256
from data_prep.parquet_tables import RECORDINGS, read_parquet
from data_prep.zarr_store import zarr_root


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="folder or URL of the data set")
    args = parser.parse_args(argv)
    try:
        dataset = open_dataset(args.url)
        table = read_parquet(dataset.store, RECORDINGS)
        found = [*check_manifest(dataset, table), *check_shards(dataset, table), *check_archive(dataset, table)]
    except BrainLMError as error:
        found = [str(error)]
    for line in found:
        print(f"fault: {line}")
    if not found:
        print(f"{args.url}: {len(table)} recordings of {table['subject'].nunique()} subjects, no fault found")
    return 1 if found else 0


def check_manifest(dataset: Dataset, table: pd.DataFrame) -> list[str]:
    """Compare table, contract and manifest with one another."""
    found = []
    if dataset.content_hash != content_hash(dataset.manifest["shards"], dataset.contract, table):
        found.append("the content hash of dataset.json does not fit contract, shards and recordings.parquet")
    for split in SPLITS:
        part = table[table["split"] == split]
        counted = {"recordings": len(part), "subjects": int(part["subject"].nunique())}
        counted["timepoints"] = int(part["num_timepoints"].sum())
        if counted != dataset.manifest["counts"][split]:
            found.append(f"{split}: dataset.json counts {dataset.manifest['counts'][split]}, the table {counted}")
    splits_of = table.groupby("subject")["split"].nunique()
    found += [f"subject {subject} is in {count} splits" for subject, count in splits_of[splits_of > 1].items()]
    for _, part in table.groupby("series_sha256"):
        ids = ", ".join(part["recording_id"])
        if part["split"].nunique() > 1:
            found.append(f"equal series in several splits: {ids}")
        elif len(part) > 1 and sorted(part["recording_id"]) not in dataset.manifest["duplicates"]:
            found.append(f"equal series that dataset.json does not list: {ids}")
    return found


def check_shards(dataset: Dataset, table: pd.DataFrame) -> list[str]:
    """Compare the tars with their hashes and with the table."""
    found = []
    for split in SPLITS:
        for shard in dataset.manifest["shards"].get(split, []):
            name = f"{SHARDS_FOLDER}/{shard['name']}.tar"
            if hashlib.sha256(dataset.store.read_bytes(name)).hexdigest() != shard["sha256"]:
                found.append(f"{name}: its bytes have changed (sha256)")
        reader = dataset.split(split)
        expected = set(table[table["split"] == split]["recording_id"])
        inside = {entry.recording_id for entry in reader.entries}
        if inside != expected or len(reader) != len(expected):
            found.append(f"{split}: the shards hold {len(inside)} recordings, the table {len(expected)}")
        for index, entry in enumerate(reader.entries):
            if not np.isfinite(reader.recording(index)).all():
                found.append(f"{entry.recording_id}: values that are not finite in its shard")
    return found


def check_archive(dataset: Dataset, table: pd.DataFrame) -> list[str]:
    """Compare the archive with the hashes of the table."""
    import zarr

    group = zarr.open_group(zarr_root(dataset.store), mode="r")
    found = []
    for number, row in enumerate(table.to_dict("records")):
        bold = np.asarray(group["bold"][row["first_row"] : row["first_row"] + row["num_timepoints"]])
        missing = np.asarray(group["coverage"][number]) <= 0
        if series_sha256(bold) != row["sha256"]:
            found.append(f"{row['recording_id']}: its series in the archive has changed (sha256)")
        if not np.isfinite(bold[:, ~missing]).all() or not np.isnan(bold[:, missing]).all():
            found.append(f"{row['recording_id']}: values and coverage contradict each other in the archive")
    return found


if __name__ == "__main__":
    sys.exit(main())
