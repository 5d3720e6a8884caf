"""Remove subjects from a data set, as biobanks require when somebody withdraws consent.

::

    python data_prep/prepare.py --config data_prep/configs/<name>.yaml withdraw=withdrawn.csv checkpoints=[runs]

Every file that held them is written again without them: tars and their indexes, archive, tables, quality page; copies
in this machine's cache are removed. The manifest keeps keyed hashes, so that nobody comes back when recordings are
added. Median and IQR stay frozen, and the contract says that the withdrawn were among them. A killed withdrawal is
finished by the same command. Older versions that a bucket or a backup keeps are beyond this program.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.dataset import MANIFEST
from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.shards import FOLDER as SHARDS_FOLDER
from brainlm.shards import ShardEntry, encode_shard, entry_of, write_shard
from brainlm.store import TEMPORARY, Store
from brainlm.subject_hash import keyed_hash
from data_prep.finish import TRUTH, Contents, write_dataset
from data_prep.held_dataset import HeldDataset, read_held
from data_prep.make_contract import WITHDRAWN
from data_prep.parquet_tables import (
    FOLDS,
    RECORDINGS,
    REJECTED,
    SUBJECTS,
    read_parquet,
    rows_of_subjects,
    write_parquet,
)
from data_prep.run_log import FOLDER as LOG_FOLDER
from data_prep.run_log import RunLog
from data_prep.source_entry import MAX_LISTED
from data_prep.write_shards import ShardRows, remove_unknown_shards
from data_prep.zarr_store import erase_recordings, trim_archive

STAGING = "staging"


def withdraw_subjects(out: Store, file: str, checkpoints: Sequence[str]) -> int:
    """Remove the subjects that `file` lists from the data set at `out`; print the checkpoints that saw them."""
    subjects = read_withdrawn(file)
    held = read_held(out, unfinished=True)
    if held is None:
        raise ConfigError(f"withdraw: there is no finished data set at {out.url}")
    stopped = (held.manifest.get("withdrawn") or {}).get("pending", False)
    known = set(held.recordings["subject"]) | set(held.rejected["subject"])
    mine = [subject for subject in subjects if subject in known and not held.is_withdrawn(subject)]
    before = sum(held.is_withdrawn(subject) for subject in subjects)
    print(f"{file}: {len(subjects)} subjects, {len(mine)} of them in {out.url}, {before} withdrawn before")
    if not stopped:
        _check_shards(held)
    discard_stopped_work(held)
    held = _announce(held, subjects, mine, pending=bool(mine or stopped))
    if mine or stopped:
        log = RunLog(out, "withdraw")
        manifest = _remove(held)
        log.end(num_subjects=len(mine), content_hash=manifest["content_hash"])
        print(f"removed {len(mine)} subjects; content {manifest['content_hash'][:16]}")
        if not manifest["counts"]["train"]["recordings"]:
            print("warning: nobody is left in train")
        if out.exists(TRUTH):
            print(f"warning: {out.url_of(TRUTH)} holds the truth of a simulated cohort; nobody was removed from it")
    list_checkpoints(subjects, checkpoints)
    return 0


def discard_stopped_work(held: HeldDataset) -> None:
    """Remove what stopped runs left and the manifest does not know: it may hold anybody."""
    out = held.store
    out.remove(STAGING)
    out.remove(f"{LOG_FOLDER}/{REJECTED}")
    remove_unknown_shards(out, held.manifest["shards"])
    trim_archive(out, held.recordings)
    for name in out.find(temporary=True):
        if name.endswith(TEMPORARY):
            out.remove(name)
    if len(read_parquet(out, RECORDINGS)) > len(held.recordings):
        write_parquet(out, RECORDINGS, held.recordings)
        write_parquet(out, REJECTED, held.rejected)
        write_parquet(out, SUBJECTS, held.subjects)
        folds = read_parquet(out, FOLDS)
        write_parquet(out, FOLDS, folds[folds["recording_id"].isin(set(held.recordings["recording_id"]))])


def read_withdrawn(file: str) -> list[str]:
    """Return the subjects in the first column of a text file, in order; ``sub-`` and lines that begin with # go."""
    folder, slash, name = file.rpartition("/")
    try:
        text = Store(folder or slash or ".").read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"withdraw: {file} is not a text file: {error}") from error
    separator = "\t" if name.endswith(".tsv") else ","
    cells = [row[0].strip() for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
    subjects = [cell.removeprefix("sub-") for cell in cells if cell and not cell.startswith("#")]
    if not subjects:
        raise DataError(f"withdraw: {file} lists no subjects; expected one a line")
    return list(dict.fromkeys(subjects))


def list_checkpoints(subjects: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Print and return the checkpoints below `folders` that were trained on any of the subjects."""
    if not folders:
        print("which checkpoints saw them was not looked up: give checkpoints=[FOLDER, ...]")
        return []
    from brainlm.checkpoint import TRAIN_SUBJECTS, seen_subjects  # with it comes torch, which nothing else here needs

    found, num_looked_at = [], 0
    for folder in folders:
        store = Store(folder)
        for name in store.find():
            inside, _, base = name.rpartition("/")
            if base != TRAIN_SUBJECTS:
                continue
            url = store.url_of(inside) if inside else store.url
            num_looked_at += 1
            try:
                count = len(seen_subjects(url, list(subjects)))
            except (CheckpointError, KeyError, ValueError) as error:
                print(f"warning: {url} cannot be read: {error}")
                continue
            if count:
                found.append(url)
                print(f"checkpoint trained on {count} of them: {url}")
    print(f"{len(found)} of {num_looked_at} checkpoints below {', '.join(folders)} were trained on any of them")
    return found


def _announce(held: HeldDataset, listed: Sequence[str], mine: Sequence[str], *, pending: bool) -> HeldDataset:
    """Say in the manifest who goes, before anything goes: while it is pending nobody reads the data set.

    All that are listed are remembered, also those who are not here: they might be in what is added later.
    """
    before = held.manifest.get("withdrawn")
    if before is None:
        key = hashlib.sha256(f"withdrawn from {held.manifest['content_hash']}".encode()).hexdigest()
        before = {"key": key, "subjects": [], "num_subjects": 0, "num_recordings": 0}
    gone = held.recordings["subject"].isin(list(mine))
    if gone.all():
        raise DataError(f"withdraw: nobody would be left in {held.store.url}; remove the data set instead")
    withdrawn = {
        "key": before["key"],
        "subjects": sorted({*before["subjects"], *(keyed_hash(before["key"], subject) for subject in listed)}),
        "num_subjects": before["num_subjects"] + int(held.recordings.loc[gone, "subject"].nunique()),
        "num_recordings": before["num_recordings"] + int(gone.sum()),
    }
    manifest = held.manifest | {"withdrawn": withdrawn | ({"pending": True} if pending else {})}
    if manifest != held.manifest:
        held.store.write_json(MANIFEST, manifest)
    return replace(held, manifest=manifest)


def _check_shards(held: HeldDataset) -> None:
    """Raise `DataError` if a shard is not what the manifest says: it could not be written again without loss."""
    damaged = [
        shard["name"] for rows in held.manifest["shards"].values() for shard in rows if not _fits(held.store, shard)
    ]
    if damaged:
        raise DataError(
            f"withdraw: shards of {held.store.url} are damaged or missing: {', '.join(damaged[:MAX_LISTED])}. Nothing "
            "was changed; restore them, or prepare the data set again without the subjects"
        )


def _fits(out: Store, shard: Mapping[str, Any]) -> bool:
    tar, index = (f"{SHARDS_FOLDER}/{shard['name']}.{ending}" for ending in ("tar", "index.json"))
    if not (out.exists(tar) and out.exists(index)) or out.size(tar) != shard["num_bytes"]:
        return False
    return bool(out.read_json(index).get("sha256") == shard["sha256"])


def _remove(held: HeldDataset) -> dict[str, Any]:
    out = held.store
    gone = held.recordings["subject"].map(held.is_withdrawn).astype(bool)
    kept, erased = held.recordings[~gone].reset_index(drop=True), held.recordings[gone]
    shards = _rewrite_shards(held, set(erased["shard"]))
    erase_recordings(out, erased)
    ids = set(kept["recording_id"])
    folds = read_parquet(out, FOLDS)
    withdrawn = {name: value for name, value in held.manifest["withdrawn"].items() if name != "pending"}
    flags = [flag for flag in held.contract.flags if not flag.endswith(WITHDRAWN)]
    flags.append(f"{withdrawn['num_recordings']} recordings of {withdrawn['num_subjects']} subjects {WITHDRAWN}")
    named = {*erased["recording_id"], *erased["subject"]}
    _warn_of_copies(kept, erased)
    contents = Contents(
        name=held.manifest["name"],
        recordings=kept,
        rejected=held.rejected[~held.rejected["subject"].map(held.is_withdrawn).astype(bool)].reset_index(drop=True),
        subjects=rows_of_subjects(held.subjects, kept["subject"]),
        folds=folds[folds["recording_id"].isin(ids)].reset_index(drop=True),
        contract=replace(held.contract, flags=tuple(flags)),
        shards=shards,
        cohorts=held.cohorts,
        duplicates=[rest for group in held.manifest["duplicates"] if len(rest := [i for i in group if i in ids]) > 1],
        warnings=[line for line in held.manifest["warnings"] if not _names_any(line, named)],
        withdrawn=withdrawn,
        versions=held.manifest["versions"],
    )
    return write_dataset(out, contents)


def _rewrite_shards(held: HeldDataset, affected: set[str]) -> ShardRows:
    """Write the affected tars again without the withdrawn; a shard that would be empty is removed.

    A shard that does not fit the manifest was being written when a withdrawal was stopped: it is affected too.
    """
    out = held.store
    rows: ShardRows = {}
    for split, shards in held.manifest["shards"].items():
        rows[split] = []
        for shard in shards:
            if shard["name"] not in affected and _fits(out, shard):
                rows[split].append(shard)
                continue
            tar, index = (f"{SHARDS_FOLDER}/{shard['name']}.{ending}" for ending in ("tar", "index.json"))
            out.forget_cached(tar, shard["sha256"], shard["num_bytes"])
            found = [pair for pair in _read_tar(out, tar) if not held.is_withdrawn(pair[0].subject)]
            stay = held.recordings["shard"].eq(shard["name"]) & ~held.recordings["subject"].map(held.is_withdrawn)
            if {entry.recording_id for entry, _ in found} != set(held.recordings.loc[stay, "recording_id"]):
                raise DataError(f"{out.url_of(tar)} does not hold the recordings that the tables say: prepare again")
            if found:
                data, entries = encode_shard(found, found[0][0].dtype)
                rows[split].append(write_shard(out, shard["name"], data, entries))
            else:
                out.remove(tar)
                out.remove(index)
    return rows


def _read_tar(out: Store, name: str) -> Iterator[tuple[ShardEntry, NDArray[np.float32]]]:
    """Yield entries and series of a tar, from the tar alone."""
    if not out.exists(name):
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(out.read_bytes(name)), mode="r:") as tar:
            files = {member.name: member for member in tar if member.isfile()}
            for array in [name for name in files if name.endswith(".npy")]:
                tree, stored = (
                    tar.extractfile(files[member]).read()  # type: ignore[union-attr]
                    for member in (f"{array.removesuffix('.npy')}.json", array)
                )
                entry = entry_of(json.loads(tree), f"{out.url_of(name)}: {array}")
                raw = np.load(io.BytesIO(stored), allow_pickle=False)
                yield entry, raw.astype(np.float32) * np.float32(entry.scale)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{out.url_of(name)} is not a readable shard: {error}") from error


def _names_any(line: str, names: set[str]) -> bool:
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", line) for name in names)


def _warn_of_copies(kept: pd.DataFrame, erased: pd.DataFrame) -> None:
    """Say which recordings that stay hold the very series of one that goes: the same person under another id?"""
    same = kept[kept["series_sha256"].isin(set(erased["series_sha256"]))]["recording_id"].tolist()
    if same:
        more = f" and {len(same) - MAX_LISTED} more" if len(same) > MAX_LISTED else ""
        print(f"warning: the series of withdrawn recordings stay under other ids: {', '.join(same[:MAX_LISTED])}{more}")
