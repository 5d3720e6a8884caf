"""The parquet tables of a data set. Their bytes depend on their rows alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainlm.errors import DataError
from brainlm.store import Store

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
ROWS_PER_BATCH = 1000  # rows as mappings are ten times as large as in a table


def table_of(rows: Sequence[Mapping[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return chosen columns of rows, with fixed types also where there is no row."""
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()})


class RowBatches:
    """Gather rows that come in any order into a table, in the order of their positions, in little memory."""

    def __init__(self, columns: dict[str, str]) -> None:
        self._columns = columns
        self._rows: list[Mapping[str, Any]] = []
        self._positions: list[int] = []
        self._tables: list[pd.DataFrame] = []

    def add(self, position: int, row: Mapping[str, Any]) -> None:
        self._positions.append(position)
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._pack()

    def table(self) -> pd.DataFrame:
        self._pack()
        order = np.argsort(np.asarray(self._positions, dtype=np.int64))
        return pd.concat(self._tables, ignore_index=True).take(order).reset_index(drop=True)

    def _pack(self) -> None:
        if self._rows or not self._tables:
            self._tables.append(table_of(self._rows, self._columns))
            self._rows = []


def write_parquet(store: Store, name: str, table: pd.DataFrame) -> None:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    pyarrow.parquet.write_table(arrow, buffer)
    store.write_bytes(name, buffer.getvalue())


def read_parquet(store: Store, name: str) -> pd.DataFrame:
    import pyarrow

    try:
        return pd.read_parquet(io.BytesIO(store.read_bytes(name)))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{store.url_of(name)} is not a readable parquet table: {error}") from error
