"""Make a data set from scans or parcel series.

::

    python data_prep/prepare.py --config data_prep/configs/demo.yaml [section.key=value ...] [--dry-run]

Find the recordings, prepare each (parcellate, clean, resample), split by subject, freeze the statistics, write archive
and shards, and write ``dataset.json`` last. A run that was stopped goes on where it was; a finished one is left alone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from typing import Any

from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.errors import BrainLMError, ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.shards import FOLDER as SHARDS_FOLDER
from brainlm.store import Store
from data_prep.atlas_image import AtlasImage, load_atlas
from data_prep.clean import leak_flags
from data_prep.contract_statistics import compute_statistics
from data_prep.finish import QUALITY_PAGE, check_truth, is_finished, write_dataset
from data_prep.one_recording import Recipe, prepare_recording
from data_prep.parquet_tables import RECORDING_COLUMNS, REJECTED, REJECTED_COLUMNS, table_of, write_parquet
from data_prep.read_table import text
from data_prep.resample import SAME_TR, future_s
from data_prep.settings import PrepareSettings
from data_prep.source_entry import MAX_LISTED, Source
from data_prep.sources import find_recordings
from data_prep.splits import SplitItem, assign_splits, find_duplicates
from data_prep.work import Workers, workers
from data_prep.write_shards import place_in_shards, write_shards
from data_prep.zarr_store import FOLDER as ARCHIVE_FOLDER
from data_prep.zarr_store import write_archive

STAGING = "staging"
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if args.config is None:
            raise ConfigError("give --config PATH, for example data_prep/configs/demo.yaml")
        settings = load_config(PrepareSettings, args.config, args.overrides)
        if args.dry_run:
            return show_plan(settings)
        return prepare(settings)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def prepare(settings: PrepareSettings) -> int:
    """Make the data set; return 0 when it is complete."""
    out = Store(settings.out if "://" in settings.out else os.path.abspath(settings.out))
    check_truth(settings)
    source = find_recordings(settings.source)
    atlas = load_atlas(settings.atlas)
    if is_finished(out, settings, source, atlas.atlas):
        out.remove(STAGING)
        print(f"{settings.out}: this data set is complete already (same settings, same inputs); nothing to do")
        return 0
    staging = out.sub(f"{STAGING}/{settings.recording_hash()}-{atlas.atlas.sha256[:16]}")
    with workers(settings.ray, out) as run:
        rows, refused = prepare_recordings(settings, source, atlas, staging, run)
        write_parquet(out, REJECTED, table_of(refused, REJECTED_COLUMNS))
        check_refused(settings, len(source.entries), refused)
        tr_s = common_tr_s(settings, rows)
        duplicates = place(settings, source, rows)
        placed = place_in_shards(rows, settings.shards.recordings_per_shard)
        for name, inside in placed.items():
            for row in inside:
                row["shard"] = name
        contract = make_contract(settings, atlas, staging, rows, tr_s, run)
        for folder in (ARCHIVE_FOLDER, SHARDS_FOLDER):  # what a stopped run left
            out.remove(folder)
        num_parcels = atlas.atlas.num_parcels
        write_archive(out, staging, rows, num_parcels, run)
        shards = write_shards(out, staging, placed, num_parcels, settings.shards.dtype, run)
    manifest = write_dataset(
        out,
        settings,
        source,
        recordings=table_of(rows, RECORDING_COLUMNS),
        rejected=table_of(refused, REJECTED_COLUMNS),
        contract=contract,
        shards=shards,
        duplicates=duplicates,
        warnings=find_warnings(source, atlas, rows, contract, duplicates),
    )
    out.remove(STAGING)
    show_summary(settings, manifest, refused, contract)
    return 0


def prepare_recordings(
    settings: PrepareSettings, source: Source, atlas: AtlasImage, staging: Store, run: Workers
) -> tuple[list[Row], list[Row]]:
    """Stage every recording that is not staged yet; return rows of the prepared and of the refused, by id."""
    recipe = run.share(
        Recipe(
            atlas=atlas,
            clean=settings.clean,
            checks=settings.checks,
            orientation=settings.source.orientation,
            target_tr_s=settings.target_tr_s,
            window_len=settings.windows.window_len,
            staging=staging,
        )
    )
    results = run.run(prepare_recording, [(recipe, entry) for entry in source.entries], "recordings")
    rows = [row for row in results if row["status"] == "prepared"]
    return rows, [row for row in results if row["status"] == "refused"]


def check_refused(settings: PrepareSettings, num_recordings: int, refused: list[Row]) -> None:
    """Raise `DataError` when too many recordings were refused for the data set to be what was asked for."""
    fraction = len(refused) / num_recordings
    if fraction > settings.max_refused_fraction or len(refused) == num_recordings:
        raise DataError(
            f"{len(refused)} of {num_recordings} recordings ({fraction:.0%}) were refused, at most "
            f"{settings.max_refused_fraction:.0%} may be (max_refused_fraction). No data set was made.\n"
            + "\n".join(refusal_lines(settings, refused))
        )


def common_tr_s(settings: PrepareSettings, rows: list[Row]) -> float:
    """Return the TR of the data set; several need `target_tr_s`."""
    if settings.target_tr_s is not None:
        return settings.target_tr_s
    counts = Counter(row["tr_s"] for row in rows)
    tr_s = counts.most_common(1)[0][0]
    if any(abs(other - tr_s) > SAME_TR * tr_s for other in counts):
        listed = ", ".join(f"{value:g} s ({count} recordings)" for value, count in sorted(counts.items()))
        raise ConfigError(f"recordings have several repetition times: {listed}. Set target_tr_s to resample them")
    for row in rows:
        row["tr_s"] = tr_s
    return float(tr_s)


def place(settings: PrepareSettings, source: Source, rows: list[Row]) -> list[list[str]]:
    """Give each row its split and its place in the archive; return recordings with equal series."""
    group_by = settings.splits.group_by
    if group_by in ("subject", "family", "site"):
        groups = {row["recording_id"]: "" if group_by == "subject" else row[group_by] for row in rows}
    elif group_by in source.subjects.columns:
        of_subject = dict(zip(source.subjects["subject"], source.subjects[group_by]))
        groups = {row["recording_id"]: text(of_subject[row["subject"]]) for row in rows}
    else:
        raise ConfigError(
            f"splits.group_by: expected subject, family, site or a phenotype column "
            f"({', '.join(source.subjects.columns[1:]) or 'there are none'}), found {group_by!r}"
        )
    if group_by != "subject" and not any(groups.values()):
        raise ConfigError(f"splits.group_by: no recording has a {group_by}; set source.columns.{group_by}")
    items = [
        SplitItem(
            recording_id=row["recording_id"],
            subject=row["subject"],
            group=groups[row["recording_id"]],
            series_sha256=row["series_sha256"],
        )
        for row in rows
    ]
    split_of = assign_splits(items, settings.splits.fractions, settings.splits.seed)
    first_row = 0
    for row in rows:
        row["split"] = split_of[row["recording_id"]]
        row["first_row"] = first_row
        first_row += row["num_timepoints"]
    return find_duplicates(items)


def make_contract(
    settings: PrepareSettings, atlas: AtlasImage, staging: Store, rows: list[Row], tr_s: float, run: Workers
) -> InputContract:
    """Freeze what a model must be fed, with statistics of the train recordings alone."""
    train = [row for row in rows if row["split"] == "train"]
    covered, median, iqr = compute_statistics(
        staging, train, atlas.atlas.num_parcels, settings.statistics_memory_mb, run
    )
    resampled_from = sorted({row["source_tr_s"] for row in rows if row["resampled"]})
    flags = leak_flags(settings.clean)
    if resampled_from:
        reach_s = max(future_s(value, tr_s) for value in resampled_from)
        flags.append(f"resampled with a symmetric kernel: a timepoint depends on up to {reach_s:.1f} s after it")
    who = f"{len(train)} train recordings ({len({row['subject'] for row in train})} subjects) of {settings.name}"
    return InputContract(
        atlas=atlas.atlas,
        covered=covered,
        median=median,
        iqr=iqr,
        tr_s=tr_s,
        window_len=settings.windows.window_len,
        patch_len=settings.windows.patch_len,
        high_pass_hz=settings.clean.high_pass_hz,
        low_pass_hz=settings.clean.low_pass_hz,
        cleaning={
            "confounds": None if settings.clean.confounds is None else list(settings.clean.confounds),
            "detrend": settings.clean.detrend,
            "order": "detrend, filter, regress filtered confounds (nilearn.signal.clean), resample",
            "resampled_from_tr_s": resampled_from,
            "min_parcel_coverage": settings.checks.min_parcel_coverage,
        },
        statistics_from=f"all kept timepoints of the {who}",
        num_statistics_recordings=len(train),
        flags=tuple(flags),
    )


def find_warnings(
    source: Source, atlas: AtlasImage, rows: list[Row], contract: InputContract, duplicates: list[list[str]]
) -> list[str]:
    """List what a reader should know, in words."""
    warnings = [*source.warnings, *atlas.warnings]
    warnings += [f"equal series under several ids, kept in one split: {', '.join(ids)}" for ids in duplicates]
    if contract.zero_iqr_parcels:
        warnings.append(f"covered parcels with an IQR of 0, masked out: {', '.join(contract.zero_iqr_parcels)}")
    if atlas.atlas.space:
        others = Counter(row["space"] for row in rows if row["space"] not in ("", atlas.atlas.space))
        warnings += [
            f"{count} recordings are in {space}, the atlas in {atlas.atlas.space}: MNI templates differ by millimetres"
            for space, count in sorted(others.items())
        ]
    return warnings


def refusal_lines(settings: PrepareSettings, refused: list[Row]) -> list[str]:
    lines = [f"  {row['recording_id']} ({row['stage']}): {row['reason']}" for row in refused[:MAX_LISTED]]
    if len(refused) > MAX_LISTED:
        lines.append(f"  and {len(refused) - MAX_LISTED} more")
    return [*lines, f"  see {settings.out}/{REJECTED}"] if refused else []


def show_plan(settings: PrepareSettings) -> int:
    """Print the resolved settings and what would be done; do nothing."""
    print(to_yaml(settings))
    source = find_recordings(settings.source)
    atlas = load_atlas(settings.atlas).atlas
    files = [entry.file for entry in source.entries if os.path.isfile(entry.file)]
    num_bytes = sum(os.path.getsize(file) for file in files)
    print(f"# {len(source.entries)} recordings of {len(source.subjects)} subjects, {num_bytes / 1e6:.1f} MB to read")
    if len(files) < len(source.entries):
        print(f"# {len(source.entries) - len(files)} files are not there")
    already = [entry for entry in source.entries if entry.refusal]
    for entry in already[:MAX_LISTED]:
        print(f"# would refuse {entry.recording_id}: {entry.refusal}")
    print(f"# atlas {atlas.name}: {atlas.num_parcels} parcels; to {settings.out}")
    return 0


def show_summary(settings: PrepareSettings, manifest: Row, refused: list[Row], contract: InputContract) -> None:
    counts = manifest["counts"]
    print(f"{settings.name}: {sum(part['recordings'] for part in counts.values())} prepared, {len(refused)} refused")
    print("\n".join(refusal_lines(settings, refused)) or "  (none refused)")
    for split, part in counts.items():
        print(f"{split}: {part['recordings']} recordings, {part['subjects']} subjects, {part['timepoints']} timepoints")
    print(f"parcels: {contract.atlas.num_parcels}, usable {int(contract.usable.sum())}; TR {contract.tr_s:g} s")
    print(f"parcels with an IQR of 0: {', '.join(contract.zero_iqr_parcels) or 'none'}")
    for warning in manifest["warnings"]:
        print(f"warning: {warning}")
    for flag in contract.flags:
        print(f"note: {flag}")
    print(f"complete: {settings.out} (content {manifest['content_hash'][:16]}); look at {settings.out}/{QUALITY_PAGE}")


if __name__ == "__main__":
    sys.exit(main())
