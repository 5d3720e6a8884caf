"""The parquet tables of a data set. Their bytes depend on their rows alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from brainlm.store import Store
from data_prep.process_memory import give_back_memory
from data_prep.stored_table import Table

RECORDINGS, SUBJECTS, REJECTED, FOLDS = "recordings.parquet", "subjects.parquet", "rejected.parquet", "folds.parquet"
MEASURED_COLUMNS = {
    **dict.fromkeys(("recording_id", "subject", "session", "task", "run", "site", "family"), "string"),
    "tr_s": "float64",
    "num_timepoints": "int64",
    "num_kept": "int64",
    "duration_s": "float64",
    "source_tr_s": "float64",
    "resampled": "bool",
    "num_dummy_scans": "int64",
    "num_degrees_of_freedom": "int64",
    "denoised": "string",
    "mean_fd_mm": "float64",
    "dvars_z": "float64",
    "lag1_autocorrelation": "float64",
    "tsnr": "float64",
    "mean_coverage": "float64",
    "num_missing_parcels": "int64",
    "num_constant_parcels": "int64",
    "space": "string",
    "source": "string",
    "source_bytes": "int64",
    "source_etag": "string",
    "source_sha256": "string",
    "confounds_sha256": "string",
    "series_sha256": "string",
    "sha256": "string",
    "status": "string",
}
PLACE_COLUMNS = {
    "split": "string",
    "shard": "string",
    "first_row": "int64",
    "archive_row": "int64",
    "cohort": "string",
    "addition": "int64",
}
RECORDING_COLUMNS = MEASURED_COLUMNS | PLACE_COLUMNS
REJECTED_COLUMNS = dict.fromkeys(("recording_id", "subject", "source", "stage", "reason", "cohort"), "string") | {
    "addition": "int64"
}
ROWS_PER_GROUP = 2000  # of a file: what is in memory at once


def table_of(rows: Sequence[Mapping[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return chosen columns of rows, with fixed types also where there is no row."""
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()})


def rows_of_subjects(table: pd.DataFrame, subjects: Iterable[str]) -> pd.DataFrame:
    """Return the rows of a table whose ``subject`` is one of these."""
    wanted = set(subjects)  # pandas' own test takes ten times as much memory
    return table[[subject in wanted for subject in table["subject"]]].reset_index(drop=True)


def write_parquet(store: Store, name: str, table: Table) -> None:
    """Write a table, in little memory if it is a `StoredTable`."""
    import pyarrow
    import pyarrow.parquet

    writer = None
    with store.new_file(name) as path:
        # What is in memory is converted as one: a part of a column need not show its type.
        for block in [table] if isinstance(table, pd.DataFrame) else table.blocks(ROWS_PER_GROUP):
            arrow = pyarrow.Table.from_pandas(block, preserve_index=False).replace_schema_metadata(None)
            # Pages end where a piece of a column ends, and pieces tell how the table was gathered.
            arrow = arrow.combine_chunks()
            writer = writer or pyarrow.parquet.ParquetWriter(path, arrow.schema)
            writer.write_table(arrow, row_group_size=ROWS_PER_GROUP)
            del block, arrow
            give_back_memory()
        assert writer is not None
        writer.close()


def read_parquet(store: Store, name: str) -> pd.DataFrame:
    import pyarrow

    try:
        return pd.read_parquet(io.BytesIO(store.read_bytes(name)))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{store.url_of(name)} is not a readable parquet table: {error}") from error
