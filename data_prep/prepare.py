"""Make a data set from scans or parcel series.

::

    python data_prep/prepare.py --config data_prep/configs/demo.yaml [section.key=value ...] [--dry-run]
    python data_prep/prepare.py --config ... contract=CHECKPOINT       with a checkpoint's atlas, TR, filter, statistics
    python data_prep/prepare.py --config ... add=true                  add recordings to the data set at `out`
    python data_prep/prepare.py --config ... withdraw=FILE             remove the subjects that FILE lists

Find the recordings, prepare each (parcellate, clean, resample), split by subject, freeze the statistics, write archive
and shards, and write ``dataset.json`` last. A run that was stopped goes on where it was; a finished one is left alone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.errors import BrainLMError, ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from data_prep.atlas_image import AtlasImage
from data_prep.finish import QUALITY_PAGE, check_truth, copy_truth, write_dataset
from data_prep.gather import gather
from data_prep.held_dataset import (
    for_addition,
    is_finished,
    merged_subjects,
    new_entries,
    read_held,
)
from data_prep.lock_dataset import check_unchanged_since, locked
from data_prep.make_contract import (
    choose_atlas,
    common_tr_s,
    frozen_contract,
    make_contract,
    read_contract,
    with_contract,
)
from data_prep.one_recording import Recipe, prepare_recording, refused_row
from data_prep.packed_entries import PackedEntries
from data_prep.parquet_tables import (
    PLACE_COLUMNS,
    RECORDING_COLUMNS,
    REJECTED,
    REJECTED_COLUMNS,
    rows_of_subjects,
    write_parquet,
)
from data_prep.place import SPLIT_COLUMNS, find_relations, place_in_archive, place_in_splits, splits_in_advance
from data_prep.resample import SAME_TR
from data_prep.run_log import FOLDER as LOG_FOLDER
from data_prep.run_log import RunLog
from data_prep.settings import PrepareSettings
from data_prep.source_entry import MAX_LISTED, SourceEntry
from data_prep.sources import find_recordings
from data_prep.stored_table import StoredTable
from data_prep.withdraw import withdraw_subjects
from data_prep.work import Tasks, Workers, workers
from data_prep.write_shards import ENTRY_COLUMNS, place_in_shards, remove_unknown_shards, write_shards
from data_prep.zarr_store import ARCHIVE_COLUMNS, next_places, write_archive
from data_prep.zarr_store import FOLDER as ARCHIVE_FOLDER

STAGING = "staging"


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if args.config is None:
            raise ConfigError("give --config PATH, for example data_prep/configs/demo.yaml")
        settings = load_config(PrepareSettings, args.config, args.overrides)
        if args.dry_run:
            return show_plan(settings)
        out = Store(settings.out if "://" in settings.out else os.path.abspath(settings.out))
        with locked(out):
            if settings.withdraw is not None:
                return withdraw_subjects(out, settings.withdraw, settings.checkpoints)
            return prepare(settings, out)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def prepare(settings: PrepareSettings, out: Store) -> int:
    """Make the data set, or add to it; return 0 when it is complete."""
    check_truth(settings)
    asked_for = settings
    given = None if settings.contract is None else read_contract(settings.contract)
    settings = with_contract(settings, given)
    source = find_recordings(settings.source, settings.splits.column)
    atlas = choose_atlas(settings, given)
    held = read_held(out)
    if held is not None and is_finished(held, asked_for, settings, source, atlas):
        out.remove(STAGING)
        print(f"{settings.out}: this data set is complete already (same settings, same inputs); nothing to do")
        return 0
    if held is None and settings.add:
        raise ConfigError(f"add: there is no finished data set at {settings.out} to add to")
    at_start = None if held is None else str(held.manifest["content_hash"])
    known_refused = set() if held is None else set(held.rejected["recording_id"])
    entries, notes = source.entries, [*source.warnings, *atlas.warnings]
    if held is not None:
        settings = for_addition(held, settings)
        fresh, num_withdrawn = new_entries(held, source)
        entries = PackedEntries(fresh)
        del fresh
        if num_withdrawn:
            notes.append(f"{num_withdrawn} recordings of withdrawn subjects were left out")
        if not entries:
            print(f"{settings.out}: every recording is in this data set already; nothing to add")
            return 0
    staging = out.sub(f"{STAGING}/{settings.recording_hash()}-{atlas.fingerprint[:16]}")
    log = RunLog(out, "prepare", asked_for)
    with workers(settings.ray, out) as run:
        listed = out.url_of(REJECTED if held is None else f"{LOG_FOLDER}/{REJECTED}")
        table, refused, tr_s = prepare_recordings(settings, entries, atlas, staging, run, log, listed, known_refused)
        if not len(table):  # what was refused when the data set was made is refused still
            print(f"{settings.out}: every other recording is in this data set already; nothing to add")
            return 0
        subjects = rows_of_subjects(source.subjects, table["subject"])
        subjects = subjects if held is None else merged_subjects(held, subjects)
        placed, unplaced, items = place_in_splits(settings, table[SPLIT_COLUMNS], subjects, entries, held)
        table.remove(table["recording_id"].isin(unplaced["recording_id"]))
        placed = placed[["split"]].assign(num_timepoints=table["num_timepoints"])
        relations = find_relations(items, settings.splits)
        del items
        refused = pd.concat([refused, unplaced], ignore_index=True)
        addition = 0 if held is None else len(held.cohorts)
        for part in (placed, refused):
            part["cohort"] = pd.Series(settings.name, index=part.index, dtype="string")
            part["addition"] = pd.Series(addition, index=part.index, dtype="int64")
        check_refused(settings, entries, refused, listed, known_refused)
        check_unchanged_since(out, at_start)
        place_in_archive(placed, *next_places(out, None if held is None else held.recordings))
        num_parcels = atlas.atlas.num_parcels
        shards = None if held is None else held.manifest["shards"]
        num_before = {split: _num_shards(rows) for split, rows in (shards or {}).items()}
        placed["shard"] = place_in_shards(placed, settings.shards, num_parcels, num_before)
        table.fill(placed[list(PLACE_COLUMNS)])
        del placed, part
        if held is None:
            contract, found = make_contract(settings, atlas, staging, table, tr_s, given, run)
            notes += found
            out.remove(ARCHIVE_FOLDER)  # what a stopped run left
        else:
            contract = frozen_contract(held, settings, table)
            notes += make_contract(settings, atlas, staging, table, tr_s, held.contract, run)[1]
        remove_unknown_shards(out, shards)
        write_archive(out, staging, table[ARCHIVE_COLUMNS], num_parcels, run)
        rows = table[[*ENTRY_COLUMNS, "shard", "split"]]
        added = write_shards(out, staging, rows, num_parcels, settings.shards.dtype, run)
        del rows
    copy_truth(settings, out)
    check_unchanged_since(out, at_start)
    parts = (table, refused, subjects, contract, added, relations, notes)
    contents = gather(asked_for, settings, source, atlas, held, *parts)
    manifest = write_dataset(out, contents)
    out.remove(STAGING)
    log.end(num_prepared=len(table), num_refused=len(refused), content_hash=manifest["content_hash"])
    show_summary(settings, manifest, refused, contract)
    return 0


def prepare_recordings(
    settings: PrepareSettings,
    entries: Sequence[SourceEntry],
    atlas: AtlasImage,
    staging: Store,
    run: Workers,
    log: RunLog,
    listed: str,
    known_refused: set[str],
) -> tuple[StoredTable, pd.DataFrame, float]:
    """Stage every recording that is not staged yet; return the prepared and the refused by id, and their TR.

    Where recordings have several TRs and no target is set, those of shorter TR are resampled to the longest.
    """
    table, refused = _stage_all(settings, settings.target_tr_s, entries, atlas, staging, run, log)
    check_refused(settings, entries, refused, listed, known_refused)
    if not len(table):
        return table, refused, 0.0
    tr_s = common_tr_s(settings, table)
    times = table[["source_tr_s", "resampled"]]
    if settings.target_tr_s is None and (times["resampled"] | (times["source_tr_s"] < tr_s * (1 - SAME_TR))).any():
        counts = sorted({f"{value:g} s" for value in times["source_tr_s"]})
        if len(counts) > 1:
            print(f"several repetition times ({', '.join(counts)}): resampling to the longest, {tr_s:g} s")
        table, refused = _stage_all(settings, tr_s, entries, atlas, staging, run, log)
        check_refused(settings, entries, refused, listed, known_refused)
    table.fill(pd.DataFrame({"tr_s": np.full(len(table), tr_s)}))  # headers and sidecars differ by rounding
    return table, refused, tr_s


def _stage_all(
    settings: PrepareSettings,
    target_tr_s: float | None,
    entries: Sequence[SourceEntry],
    atlas: AtlasImage,
    staging: Store,
    run: Workers,
    log: RunLog,
) -> tuple[StoredTable, pd.DataFrame]:
    recipe = run.share(
        Recipe(
            atlas=atlas,
            clean=settings.clean,
            checks=settings.checks,
            orientation=settings.source.orientation,
            target_tr_s=target_tr_s,
            window_len=settings.windows.window_len,
            staging=staging,
        )
    )
    prepared, refused = StoredTable(RECORDING_COLUMNS), StoredTable(REJECTED_COLUMNS)
    tasks = Tasks(len(entries), lambda position: (recipe, entries[position]))

    def lost(position: int, why: str) -> dict[str, Any]:  # a recording that kills every worker must not end the work
        return refused_row(entries[position], "internal", why) | {"reused": False}

    for position, row in run.stream(prepare_recording, tasks, "recordings", lost):
        (prepared if row["status"] == "prepared" else refused).add(position, row)
        log.count("reused" if row["reused"] else "done")
    return prepared, refused[[name for name in refused.columns if name not in ("cohort", "addition")]]


def check_refused(
    settings: PrepareSettings, entries: Sequence[SourceEntry], refused: pd.DataFrame, listed: str, known: set[str]
) -> None:
    """Raise `DataError` when too many recordings were refused for the data set to be what was asked for.

    Their table is then at `listed`. Recordings that are `known` to be refused were accepted as such before.
    """
    num_entries = sum(entry.recording_id not in known for entry in entries)
    num_refused = int((~refused["recording_id"].isin(known)).sum())
    if num_refused and (num_refused > settings.max_refused_fraction * num_entries or num_refused == num_entries):
        folder, _, name = listed.rpartition("/")
        write_parquet(Store(folder), name, refused)
        raise DataError(
            f"{num_refused} of {num_entries} recordings ({num_refused / num_entries:.0%}) were refused, at most "
            f"{settings.max_refused_fraction:.0%} may be (max_refused_fraction). No data set was made.\n"
            + "\n".join(refusal_lines(refused, listed))
        )


def refusal_lines(refused: pd.DataFrame, listed: str) -> list[str]:
    shown = refused.head(MAX_LISTED)
    lines = [f"  {i} ({stage}): {why}" for i, stage, why in zip(shown["recording_id"], shown["stage"], shown["reason"])]
    if len(refused) > MAX_LISTED:
        lines.append(f"  and {len(refused) - MAX_LISTED} more")
    return [*lines, f"  see {listed}"] if len(refused) else []


def show_plan(settings: PrepareSettings) -> int:
    """Print the resolved settings and what would be done; do nothing."""
    given = None if settings.contract is None else read_contract(settings.contract)
    settings = with_contract(settings, given)
    print(to_yaml(settings))
    source = find_recordings(settings.source, settings.splits.column)
    atlas = choose_atlas(settings, given).atlas
    sizes = [int(entry.file_stamp.partition(":")[0]) for entry in source.entries if entry.file_stamp]
    print(f"# {len(source.entries)} recordings of {len(source.subjects)} subjects, {sum(sizes) / 1e6:.1f} MB to read")
    if len(sizes) < len(source.entries):
        print(f"# {len(source.entries) - len(sizes)} files are not there")
    reasons = [(entry.recording_id, refusal_in_advance(settings, entry)) for entry in source.entries]
    already = [(recording_id, reason) for recording_id, reason in reasons if reason]
    for recording_id, reason in already[:MAX_LISTED]:
        print(f"# would refuse {recording_id}: {reason}")
    if len(already) > MAX_LISTED:
        print(f"# and {len(already) - MAX_LISTED} more")
    print(f"# splits: {splits_in_advance(settings, source)}")
    print(f"# atlas {atlas.name}: {atlas.num_parcels} parcels; to {settings.out}")
    return 0


def refusal_in_advance(settings: PrepareSettings, entry: SourceEntry) -> str:
    """Return what is known to be wrong before anything is read."""
    if entry.refusal:
        return entry.refusal
    if not entry.file_stamp:
        return "the file is not there"
    return "there is no confounds table" if settings.clean.needs_confounds and not entry.confounds_stamp else ""


def show_summary(
    settings: PrepareSettings, manifest: dict[str, Any], refused: pd.DataFrame, contract: InputContract
) -> None:
    counts = manifest["counts"]
    print(f"{settings.name}: {sum(part['recordings'] for part in counts.values())} prepared, {len(refused)} refused")
    print("\n".join(refusal_lines(refused, f"{settings.out}/{REJECTED}")) or "  (none refused)")
    for split, part in counts.items():
        print(f"{split}: {part['recordings']} recordings, {part['subjects']} subjects, {part['timepoints']} timepoints")
    print(f"parcels: {contract.atlas.num_parcels}, usable {int(contract.usable.sum())}; TR {contract.tr_s:g} s")
    print(f"parcels with an IQR of 0: {', '.join(contract.zero_iqr_parcels) or 'none'}")
    for warning in manifest["warnings"]:
        print(f"warning: {warning}")
    for flag in contract.flags:
        print(f"note: {flag}")
    print(f"complete: {settings.out} (content {manifest['content_hash'][:16]}); look at {settings.out}/{QUALITY_PAGE}")


def _num_shards(rows: list[dict[str, Any]]) -> int:
    """Return the number after the last shard's."""
    return max((int(row["name"].rsplit("-", 1)[1]) + 1 for row in rows), default=0)


if __name__ == "__main__":
    sys.exit(main())
