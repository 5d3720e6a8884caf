"""The parquet tables of a data set. Their bytes depend on their rows alone."""

from __future__ import annotations

import io
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainlm.errors import DataError
from brainlm.store import Store
from data_prep.packed_values import pack, unpack

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


def keep_arrow_small() -> None:
    """Let Arrow take memory from the system's allocator for the rest of the process.

    Its own keeps what was freed, which doubles the memory of the tables of 100,000 recordings.
    """
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())


def give_back_memory() -> None:
    """Give what was freed back to the system: the allocator keeps what many small things have left between others."""
    import pyarrow

    pyarrow.system_memory_pool().release_unused()


def table_of(rows: Sequence[Mapping[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """Return chosen columns of rows, with fixed types also where there is no row."""
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in columns.items()})


class RowBatches:
    """Gather rows that come in any order into a table, in the order of their positions, in little memory."""

    def __init__(self, columns: dict[str, str]) -> None:
        self._columns = columns
        self._rows: list[Mapping[str, Any]] = []
        self._positions = array("q")
        self._packed: dict[str, list[bytes]] = {name: [] for name in columns}

    def add(self, position: int, row: Mapping[str, Any]) -> None:
        self._positions.append(position)
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._pack()

    def table(self) -> pd.DataFrame:
        """Return all rows. Nothing can be added afterwards: what was gathered is given up, not held twice."""
        self._pack()
        order = np.argsort(np.asarray(self._positions, dtype=np.int64), kind="stable").tolist()
        table = {}
        for name, kind in self._columns.items():  # one by one, so that only one of them is there twice
            values = [value for packed in self._packed.pop(name) for value in unpack(packed)]
            table[name] = pd.Series([values[row] for row in order], dtype=kind)
            del values
        give_back_memory()
        return pd.DataFrame(table)

    def _pack(self) -> None:
        for name, packed in self._packed.items():
            packed.append(pack([row[name] for row in self._rows]))
        self._rows = []


def write_parquet(store: Store, name: str, table: pd.DataFrame) -> None:
    import pyarrow
    import pyarrow.parquet

    arrow = pyarrow.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    # Pages end where a piece of a column ends, and pieces tell in which order recordings were finished.
    arrow = arrow.combine_chunks()
    with tempfile.TemporaryFile() as file:  # in memory, what is written would be there twice while it grows
        pyarrow.parquet.write_table(arrow, file)
        del arrow
        file.seek(0)
        store.write_bytes(name, file.read())


def read_parquet(store: Store, name: str) -> pd.DataFrame:
    import pyarrow

    try:
        return pd.read_parquet(io.BytesIO(store.read_bytes(name)))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{store.url_of(name)} is not a readable parquet table: {error}") from error
