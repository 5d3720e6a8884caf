"""Hold the tables and the manifest of a data set against one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.errors import DataError
from brainlm.input_contract import InputContract
from brainlm.shard_index import check_shard, is_plain_name
from brainlm.store import Store
from data_prep.findings import Findings
from data_prep.finish import content_hash
from data_prep.parquet_tables import FOLDS, RECORDING_COLUMNS, RECORDINGS, REJECTED, SUBJECTS
from data_prep.resample import is_same_tr

MAX_ROWS = 5_000_000
MAX_TABLE_MB = 4096
MAX_NAMED = 5  # ids in one line
TEXT = ("recording_id", "subject", "split", "shard", "sha256", "series_sha256")
NEEDED = (
    *TEXT,
    *("session", "task", "run", "site", "family"),
    *("tr_s", "source_tr_s", "resampled", "num_timepoints", "first_row", "num_missing_parcels"),
)
STRANGE_IQR = 1000.0  # times the median one


def read_table(store: Store, name: str) -> pd.DataFrame:
    """Return a parquet table of a size that it can reasonably have; types and index come from its columns alone."""
    import io

    import pyarrow
    import pyarrow.parquet

    where, size = store.url_of(name), store.size(name)
    if size > MAX_TABLE_MB * 1024**2:
        raise DataError(f"{where}: {size} bytes, expected at most {MAX_TABLE_MB} MB")
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(store.read_bytes(name)))
        facts = file.metadata
        unpacked = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        cells = facts.num_rows * facts.num_columns
        if facts.num_rows > MAX_ROWS or unpacked > MAX_TABLE_MB * 1024**2 or cells > 200 * MAX_ROWS:
            raise DataError(
                f"{where}: {facts.num_rows} rows, {facts.num_columns} columns, {unpacked} bytes unpacked; expected at "
                f"most {MAX_ROWS} rows and {MAX_TABLE_MB} MB"
            )
        table: pd.DataFrame = file.read().to_pandas(ignore_metadata=True)
        return table
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} is not a readable parquet table: {error}") from error


def check_manifest(manifest: Any) -> None:
    """Raise `DataError` unless the manifest has the parts that the other checks lean on, each of its type."""
    where = "dataset.json"
    if not isinstance(manifest, dict):
        raise DataError(f"{where}: expected an object, found {type(manifest).__name__}")
    for name, kind in (("counts", dict), ("shards", dict), ("duplicates", list), ("content_hash", str)):
        if not isinstance(manifest.get(name), kind):
            raise DataError(f"{where}: {name} must be a {kind.__name__}, found {manifest.get(name)!r}"[:300])
    if unknown := set(manifest["shards"]) - set(SPLITS):
        raise DataError(f"{where}: shards of unknown splits {sorted(map(str, unknown))}"[:300])
    names = []
    for split, shards in manifest["shards"].items():
        if not isinstance(shards, list):
            raise DataError(f"{where}: shards of {split} must be a list")
        for shard in shards:
            check_shard(shard, where)
            names.append(shard["name"])
    if len(set(names)) < len(names):
        raise DataError(f"{where}: a shard is listed twice: {sorted({n for n in names if names.count(n) > 1})}"[:300])


def check_recordings(table: pd.DataFrame) -> None:
    """Raise `DataError` unless the table of recordings has its columns, each of its type and with possible values."""
    if lacking := [name for name in NEEDED if name not in table.columns]:
        raise DataError(f"{RECORDINGS}: there are no columns {', '.join(lacking)}")
    for name in [name for name in RECORDING_COLUMNS if name in table.columns]:
        kind, values = RECORDING_COLUMNS[name], table[name]
        if kind == "string" and not (pd.api.types.is_string_dtype(values) or values.empty):
            raise DataError(f"{RECORDINGS}: column {name} must hold text, found {values.dtype}")
        if kind == "int64" and not pd.api.types.is_integer_dtype(values):
            raise DataError(f"{RECORDINGS}: column {name} must hold integers, found {values.dtype}")
        if kind == "float64" and not pd.api.types.is_float_dtype(values):
            raise DataError(f"{RECORDINGS}: column {name} must hold numbers, found {values.dtype}")
    ids = table["recording_id"]
    for name in TEXT:
        if table[name].isna().any():
            raise DataError(f"{RECORDINGS}: column {name} has empty cells")
    if bad := [str(name) for name in ids if not is_plain_name(name)]:
        raise DataError(f"{RECORDINGS}: recording ids must be plain names, found {named(bad)}")
    if ids.duplicated().any():
        raise DataError(f"{RECORDINGS}: ids are there twice: {named(ids[ids.duplicated()].unique())}")
    if unknown := sorted(set(table["split"]) - set(SPLITS)):
        raise DataError(f"{RECORDINGS}: expected splits {', '.join(SPLITS)}, found {named(unknown)}")
    for name, least in (("num_timepoints", 1), ("first_row", 0), ("archive_row", 0)):
        if name in table.columns and not table[name].between(least, 2**48).all():
            raise DataError(
                f"{RECORDINGS}: column {name} has impossible numbers, from {table[name].min()} to {table[name].max()}"
            )


class RowsById(Mapping[str, dict[str, Any]]):
    """Rows of a table by recording id, made when asked for: as mappings all at once they are ten times as large."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._position = {str(recording_id): n for n, recording_id in enumerate(table["recording_id"])}
        self._columns = {str(name): table[name].array for name in table.columns}

    def __getitem__(self, recording_id: str) -> dict[str, Any]:
        n = self._position[recording_id]
        return {name: _plain(column[n]) for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._position)

    def __len__(self) -> int:
        return len(self._position)


def check_counts(
    findings: Findings, manifest: dict[str, Any], contract: InputContract | None, table: pd.DataFrame
) -> None:
    """Compare counts, atlas and content hash of the manifest with the table and the contract."""
    for split in SPLITS:
        part = table[table["split"] == split]
        counted = {"recordings": len(part), "subjects": int(part["subject"].nunique())}
        counted["timepoints"] = int(part["num_timepoints"].sum())
        if counted != manifest["counts"].get(split):
            findings.fault("counts", split, f"dataset.json says {manifest['counts'].get(split)}, the table {counted}")
    if contract is None:
        return
    if "cohorts" not in manifest:
        findings.note("hashes", "dataset.json", "made by an earlier version, whose content hash is not checked")
    elif manifest["content_hash"] != content_hash(manifest["shards"], contract, table):
        findings.fault(
            "hashes", "dataset.json", "the content hash does not fit contract, shards and recordings.parquet"
        )
    atlas = {"name": contract.atlas.name, "sha256": contract.atlas.sha256, "num_parcels": contract.atlas.num_parcels}
    if manifest.get("atlas") != atlas:
        findings.fault("counts", "dataset.json", f"atlas {manifest.get('atlas')}, the contract has {atlas}")


def check_splits(findings: Findings, manifest: dict[str, Any], table: pd.DataFrame, subjects: pd.DataFrame) -> None:
    """Find subjects, groups and equal series in several splits, and equal series that nobody was told of."""
    for subject, where in _spread(table["subject"], table["split"]):
        findings.fault("splits", f"subject {subject}", f"in several splits: {where}")
    group_by = group_by_of(manifest)
    for name in dict.fromkeys(("family", group_by)):
        groups = groups_of(table, subjects, name)
        if name == "subject" or groups is None:
            continue
        for group, where in _spread(groups, table["split"]):
            if name == group_by:
                findings.fault("splits", f"{name} {group}", f"in several splits: {where}")
            else:
                findings.note("splits", f"{name} {group}", f"in several splits ({where}): relatives are alike")
    known = {tuple(ids) for ids in manifest["duplicates"] if isinstance(ids, list)}
    for part in _equal_series(table):
        ids = tuple(sorted(part["recording_id"]))
        if part["split"].nunique() > 1:
            findings.fault("duplicates", named(ids), "equal series in several splits")
        elif ids not in known:
            findings.fault("duplicates", named(ids), "equal series that dataset.json does not list")
        else:
            findings.note("duplicates", named(ids), "equal series, in one split")
        known.discard(ids)
    for ids in sorted(known):
        findings.fault("duplicates", named(ids), "dataset.json says that these series are equal; they are not")


def check_folds(
    findings: Findings, manifest: dict[str, Any], table: pd.DataFrame, subjects: pd.DataFrame, folds: pd.DataFrame
) -> None:
    """Find recordings that are in no table or in two folds, and what belongs together but is in two folds."""
    if list(folds.columns) != ["recording_id", "fold"]:
        raise DataError(f"expected the columns recording_id and fold, found {', '.join(map(str, folds.columns))}")
    ids = folds["recording_id"]
    if ids.duplicated().any():
        findings.fault("folds", FOLDS, f"in two folds: {named(ids[ids.duplicated()].unique())}")
    if unknown := sorted(set(ids) - set(table["recording_id"])):
        findings.fault("folds", FOLDS, f"{len(unknown)} recordings are not in {RECORDINGS}: {named(unknown)}")
    both = table.merge(folds.drop_duplicates("recording_id"), on="recording_id")
    together = {"subject": both["subject"], "series": both["series_sha256"]}
    group_by = group_by_of(manifest)
    groups = groups_of(both, subjects, group_by)
    if groups is not None:
        together[group_by] = groups
    for name, values in together.items():
        for value, where in _spread(values, both["fold"]):
            findings.fault("folds", f"{name} {value}", f"in several folds: {where}")


def check_other_tables(findings: Findings, store: Store, manifest: dict[str, Any], table: pd.DataFrame) -> None:
    """Compare subjects and refusals with the recordings."""
    subjects = read_table(store, SUBJECTS)
    if subjects["subject"].duplicated().any():
        twice = subjects.loc[subjects["subject"].duplicated(), "subject"]
        findings.fault("subjects", SUBJECTS, f"subjects are there twice: {named(twice.unique())}")
    if lacking := sorted(set(table["subject"]) - set(subjects["subject"])):
        findings.fault("subjects", SUBJECTS, f"{len(lacking)} subjects are not there: {named(lacking)}")
    if more := sorted(set(subjects["subject"]) - set(table["subject"])):
        findings.note("subjects", SUBJECTS, f"{len(more)} subjects have no recording here: {named(more)}")
    rejected = finished(read_table(store, REJECTED), manifest)
    if both := sorted(set(rejected["recording_id"]) & set(table["recording_id"])):
        findings.fault("refusals", REJECTED, f"{len(both)} recordings are refused and prepared: {named(both)}")
    if manifest.get("num_refused") != len(rejected):
        findings.fault("refusals", REJECTED, f"{len(rejected)} rows, dataset.json says {manifest.get('num_refused')}")


def check_repetition_times(findings: Findings, contract: InputContract, table: pd.DataFrame) -> None:
    """Compare the TR of each recording with the contract's, and with whether it was resampled."""
    other = table.loc[~np.isclose(table["tr_s"], contract.tr_s, rtol=1e-3), "recording_id"]
    if len(other):
        findings.fault(
            "TR", RECORDINGS, f"{len(other)} recordings do not have the TR {contract.tr_s:g} s: {named(other)}"
        )
    changed = [not is_same_tr(a, b) for a, b in zip(table["source_tr_s"], table["tr_s"])]
    wrong = table.loc[table["resampled"] != np.array(changed, dtype=bool), "recording_id"]
    if len(wrong):
        findings.fault("TR", RECORDINGS, f"resampled contradicts source_tr_s and tr_s: {named(wrong)}")


def repetition_times(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each TR of the sources and site, with counts."""
    groups = table.groupby([table["source_tr_s"].round(4), table["site"].fillna("")], sort=True)
    return [
        {
            "source_tr_s": float(str(tr_s)),
            "site": str(site),
            "recordings": len(part),
            "subjects": int(part["subject"].nunique()),
            "resampled": int(part["resampled"].sum()),
        }
        for (tr_s, site), part in groups
    ]


def check_statistics(findings: Findings, contract: InputContract, table: pd.DataFrame) -> None:
    """Find parcels that cannot be scaled, or whose scale is far from that of the others."""
    where = "input_contract.json"
    if not contract.usable.any():
        findings.fault("statistics", where, "no parcel is usable: none is covered and varies")
        return
    names = np.array(contract.atlas.parcel_names)
    if contract.zero_iqr_parcels:
        findings.note("statistics", where, f"IQR 0, masked out: {named(contract.zero_iqr_parcels)}")
    if not contract.covered.all():
        findings.note("statistics", where, f"covered by no train recording: {named(names[~contract.covered])}")
    if ((contract.iqr > 0) & ~contract.covered).any():
        findings.fault("statistics", where, "a parcel that nothing covers has an IQR")
    iqr = contract.iqr[contract.usable].astype(np.float64)
    far = (iqr > STRANGE_IQR * np.median(iqr)) | (iqr < np.median(iqr) / STRANGE_IQR)
    if far.any():
        findings.note(
            "statistics", where, f"IQR {STRANGE_IQR:g} times off the median one: {named(names[contract.usable][far])}"
        )
    num_train = int((table["split"] == "train").sum())
    if contract.num_statistics_recordings != num_train:
        findings.note(
            "statistics",
            where,
            f"median and IQR are of {contract.num_statistics_recordings} recordings ({contract.statistics_from}), "
            f"train has {num_train}",
        )


def finished(table: pd.DataFrame, manifest: dict[str, Any]) -> pd.DataFrame:
    """Return the rows that the manifest knows of, without those that a stopped addition left."""
    if "addition" not in table.columns or not isinstance(manifest.get("cohorts"), list):
        return table
    return table[table["addition"] < len(manifest["cohorts"])].reset_index(drop=True)


def groups_of(table: pd.DataFrame, subjects: pd.DataFrame, group_by: str) -> pd.Series | None:
    """Return the group of each recording, "" where it is not known; None where there is no such column."""
    if group_by in ("family", "site"):
        return table[group_by].fillna("").astype(str)
    if group_by not in subjects.columns or group_by == "subject":
        return None
    of_subject = dict(zip(subjects["subject"], subjects[group_by]))
    values = table["subject"].map(of_subject)
    return values.astype(object).where(values.notna(), "").astype(str)


def group_by_of(manifest: dict[str, Any]) -> str:
    """Return what the recordings were grouped by, as the first cohort's settings say."""
    cohorts = manifest.get("cohorts")
    config = cohorts[0].get("config") if isinstance(cohorts, list) and cohorts else manifest.get("config")
    splits = config.get("splits") if isinstance(config, dict) else None
    return str(splits.get("group_by", "subject")) if isinstance(splits, dict) else "subject"


def named(names: Any) -> str:
    """Return a few names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _spread(values: pd.Series, places: pd.Series) -> Iterator[tuple[str, str]]:
    """Yield the values, not "", that are in more than one place, and where."""
    pairs = pd.DataFrame({"value": values.to_numpy(), "place": places.to_numpy()}).drop_duplicates()
    pairs = pairs[(pairs["value"] != "") & pairs["value"].duplicated(keep=False)]
    for value, part in pairs.groupby("value", sort=True):
        yield str(value), named(sorted(map(str, part["place"])))


def _equal_series(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    several = table[table["series_sha256"].duplicated(keep=False)]
    for _, part in several.groupby("series_sha256", sort=True):
        yield part


def _plain(value: Any) -> Any:
    """Return Python's own number for one of numpy's."""
    return value.item() if isinstance(value, np.generic) else value
