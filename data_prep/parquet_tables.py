"""The parquet tables of a data set. Their bytes depend on their rows alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pandas as pd

from brainlm.store import Store

RECORDINGS, SUBJECTS, REJECTED = "recordings.parquet", "subjects.parquet", "rejected.parquet"
RECORDING_COLUMNS = {
    **dict.fromkeys(("recording_id", "subject", "session", "task", "run", "site", "family"), "string"),
    "tr_s": "float64",
    "num_timepoints": "int64",
    "split": "string",
    "shard": "string",
    "first_row": "int64",
    "source_tr_s": "float64",
    "resampled": "bool",
    "mean_fd_mm": "float64",
    "dvars_z": "float64",
    "lag1_autocorrelation": "float64",
    "num_missing_parcels": "int64",
    "space": "string",
    "source": "string",
    "source_sha256": "string",
    "confounds_sha256": "string",
    "series_sha256": "string",
    "sha256": "string",
    "status": "string",
}
REJECTED_COLUMNS = dict.fromkeys(("recording_id", "source", "stage", "reason"), "string")


def table_of(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return chosen columns of rows, with fixed types also where there is no row."""
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()})


def write_parquet(store: Store, name: str, table: pd.DataFrame) -> None:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    pyarrow.parquet.write_table(arrow, buffer)
    store.write_bytes(name, buffer.getvalue())


def read_parquet(store: Store, name: str) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(store.read_bytes(name)))
