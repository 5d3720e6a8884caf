"""Check a finished data set: hashes, counts, splits, values, statistics, and whether its parts agree with one another.

::

    python data_prep/inspect_dataset.py URL [--quick] [--json PATH]

Every byte of the shards and every recording of the archive is read, in bounded memory; with `--quick` no tar is hashed
and a sample of the recordings is read. Prints a table of repetition times and sites, then all findings: faults, which
must not be, and notes, which a reader should know. Nothing in the data set is trusted or changed. Exit status 1 if
there is any fault, else 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from brainlm import input_contract
from brainlm.dataset import MANIFEST, SPLITS, open_dataset
from brainlm.input_contract import InputContract
from brainlm.shards import FOLDER as SHARDS_FOLDER
from brainlm.store import TEMPORARY, Store
from data_prep import check_tables
from data_prep.check_archive import Archive, check_gaps, check_places, measure, places
from data_prep.check_shards import Known, check_median, check_shard_files
from data_prep.check_tables import named
from data_prep.findings import Findings, read_bounded_json
from data_prep.finish import QUALITY_PAGE, TRUTH
from data_prep.parquet_tables import FOLDS, RECORDINGS, REJECTED, SUBJECTS
from data_prep.run_log import FOLDER as LOG_FOLDER
from data_prep.zarr_store import FOLDER as ARCHIVE_FOLDER

QUICK_RECORDINGS = 32
FILES = {MANIFEST, input_contract.FILE_NAME, QUALITY_PAGE, RECORDINGS, REJECTED, SUBJECTS, FOLDS}
FOLDERS = {ARCHIVE_FOLDER, SHARDS_FOLDER, TRUTH, LOG_FOLDER}


@dataclass
class Inspection:
    """What was found, and what a reader likes to see of any data set."""

    url: str
    findings: Findings = field(default_factory=Findings)
    repetition_times: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "num_faults": self.findings.num_faults,
            "counts": self.counts,
            "repetition_times": self.repetition_times,
            "findings": self.findings.to_json(),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="folder or URL of the data set")
    parser.add_argument("--quick", action="store_true", help="hash no shard, read a sample of the recordings")
    parser.add_argument("--json", metavar="PATH", help="write counts and findings there too")
    args = parser.parse_args(argv)
    found = Inspection(args.url)
    found.findings.guard("data set", args.url, inspect, found, args.quick)
    show(found, args.quick)
    if args.json:
        try:
            with open(args.json, "w") as file:
                file.write(json.dumps(found.to_json(), indent=1) + "\n")
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 1 if found.findings.num_faults else 0


def inspect(found: Inspection, quick: bool = False) -> None:
    """Fill in what is found; raise only where nothing more can be said."""
    findings = found.findings
    store = Store(found.url)
    if store.exists(MANIFEST):
        check_tables.check_manifest(read_bounded_json(store, MANIFEST))
    dataset = open_dataset(found.url)
    manifest, contract = dataset.manifest, dataset.contract
    table = check_tables.finished(check_tables.read_table(store, RECORDINGS), manifest)
    check_tables.check_recordings(table)
    found.counts = {
        "recordings": len(table),
        "subjects": int(table["subject"].nunique()),
        "timepoints": int(table["num_timepoints"].sum()),
    }
    found.repetition_times = check_tables.repetition_times(table)
    guard = findings.guard
    subjects = guard("subjects", SUBJECTS, check_tables.read_table, store, SUBJECTS)
    if subjects is None or "subject" not in subjects.columns:
        subjects = pd.DataFrame({"subject": table["subject"].unique()})
    guard("counts", MANIFEST, check_tables.check_counts, findings, manifest, contract, table)
    guard("splits", RECORDINGS, check_tables.check_splits, findings, manifest, table, subjects)
    guard("subjects", SUBJECTS, check_tables.check_other_tables, findings, store, manifest, table)
    guard("TR", RECORDINGS, check_tables.check_repetition_times, findings, contract, table)
    guard("statistics", input_contract.FILE_NAME, check_tables.check_statistics, findings, contract, table)
    if store.exists(FOLDS):
        folds = guard("folds", FOLDS, check_tables.read_table, store, FOLDS)
        if folds is not None:
            guard("folds", FOLDS, check_tables.check_folds, findings, manifest, table, subjects, folds)
    archive = guard("archive", ARCHIVE_FOLDER, open_archive, findings, store, contract, table)
    check_series(findings, store, manifest, contract, table, archive, quick)
    if archive is not None and not quick:
        guard("archive", ARCHIVE_FOLDER, check_gaps, findings, archive, table)
    guard("leftovers", found.url, check_leftovers, findings, store, manifest)


def open_archive(findings: Findings, store: Store, contract: InputContract, table: pd.DataFrame) -> Archive:
    archive = Archive(store, contract.atlas.num_parcels)
    check_places(findings, archive, table)
    return archive


def check_series(
    findings: Findings,
    store: Store,
    manifest: dict[str, Any],
    contract: InputContract,
    table: pd.DataFrame,
    archive: Archive | None,
    quick: bool,
) -> None:
    """Walk over the shards, and over the archive with them; then over what the shards do not have."""
    rows = check_tables.RowsById(table)
    where = places(table)
    measured: set[str] = set()

    def read(place: Any) -> Any:
        if archive is None:
            return None
        measured.add(place.recording_id)
        return findings.guard(
            "archive", place.recording_id, measure, findings, archive, place, rows[place.recording_id]
        )

    chosen = frozenset(sample(list(rows), manifest["content_hash"])) if quick else None
    known = Known(
        rows=rows,
        places=where,
        archive=archive,
        measure=read,
        chosen=chosen,
        below=None if quick else np.zeros((4, contract.atlas.num_parcels), dtype=np.int64),
        median=contract.median,
        iqr=contract.iqr,
        in_statistics=in_statistics(contract, table),
    )
    for split in SPLITS:
        inside: list[str] = []
        for shard in manifest["shards"].get(split, []):
            check = partial(check_shard_files, findings, store, split, shard, contract.atlas.num_parcels, known)
            inside += findings.guard("shards", f"{SHARDS_FOLDER}/{shard['name']}", check) or []
        expected = set(table.loc[table["split"] == split, "recording_id"])
        if twice := len(inside) - len(set(inside)):
            findings.fault("shards", split, f"{twice} recordings are in several shards")
        if lacking := sorted(expected - set(inside)):
            findings.fault("shards", split, f"{len(lacking)} recordings are in no shard: {named(lacking)}")
    for recording_id in rows if chosen is None else sorted(chosen):
        if archive is not None and recording_id not in measured:
            read(where[recording_id])
    if known.below is not None and known.in_statistics:
        check_median(findings, known.below, contract.atlas.parcel_names, contract.iqr)


def sample(ids: list[str], seed: str) -> list[str]:
    """Return a few of the recordings; the same ones for the same data set."""
    return sorted(random.Random(seed).sample(sorted(ids), min(QUICK_RECORDINGS, len(ids))))


def in_statistics(contract: InputContract, table: pd.DataFrame) -> frozenset[str]:
    """Return the recordings that median and IQR are of; nobody where they are a checkpoint's or some were withdrawn."""
    train = table[table["split"] == "train"]
    if "addition" in table.columns:
        train = train[train["addition"] == 0]
    if len(train) != contract.num_statistics_recordings or contract.statistics_from.startswith("the contract of"):
        return frozenset()
    return frozenset(map(str, train["recording_id"]))


def check_leftovers(findings: Findings, store: Store, manifest: dict[str, Any]) -> None:
    """List files and folders that the manifest does not know: of stopped runs, or somebody's own."""
    shards = {
        f"{shard['name']}.{ending}"
        for rows in manifest["shards"].values()
        for shard in rows
        for ending in ("tar", "index.json")
    }
    for folder, expected in (("", FILES | FOLDERS), (SHARDS_FOLDER, shards)):
        for name in sorted(set(store.names(folder, temporary=True)) - expected):
            told = "left by a stopped run" if name == "staging" or name.endswith(TEMPORARY) else "not of this data set"
            findings.note("leftovers", f"{folder}/{name}" if folder else name, told)
    for name in store.find(ARCHIVE_FOLDER, temporary=True):
        if name.endswith(TEMPORARY):
            findings.note("leftovers", f"{ARCHIVE_FOLDER}/{name}", "of a stopped run")


def show(found: Inspection, quick: bool) -> None:
    """Print the tables and the findings."""
    if found.repetition_times:
        print(f"{'source TR (s)':>13}  {'recordings':>10}  {'subjects':>8}  {'resampled':>9}  site")
        for row in found.repetition_times:
            print(
                f"{row['source_tr_s']:>13g}  {row['recordings']:>10}  {row['subjects']:>8}  {row['resampled']:>9}  "
                f"{row['site'] or '(unknown)'}"
            )
    for line in found.findings.lines():
        print(line)
    counted = f"{found.counts.get('recordings', 0)} recordings of {found.counts.get('subjects', 0)} subjects"
    looked = f" (quick: {QUICK_RECORDINGS} recordings at most were read, no shard was hashed)" if quick else ""
    told = f"{found.findings.num_faults} faults" if found.findings.num_faults else "no fault found"
    print(f"{found.url}: {counted}, {told}{looked}")


if __name__ == "__main__":
    sys.exit(main())
