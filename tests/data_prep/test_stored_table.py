"""A table on disk says what one in memory says, whatever order its rows come in."""

import random

import numpy as np
import pandas as pd
import pytest

from brainlm.errors import StoreError
from data_prep import stored_table
from data_prep.parquet_tables import REJECTED_COLUMNS, table_of
from data_prep.stored_table import StoredTable, blocks_of

COLUMNS = {"recording_id": "string", "run": "string", "num_kept": "int64", "tsnr": "float64", "resampled": "bool"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stored_table, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(stored_table, "CELLS_AT_ONCE", 30)


def rows_of(count):
    return [
        {"recording_id": f"r{n:05d}", "run": None if n % 7 == 0 else f"é{n}", "num_kept": n * 2**40}
        | {"tsnr": None if n % 5 else 0.1 * n, "resampled": n % 2 == 0, "unused": "x"}
        for n in range(count)
    ]


def stored(rows, order=None):
    table = StoredTable(COLUMNS)
    for position in range(len(rows)) if order is None else order:
        table.add(position, rows[position])
    return table


@pytest.mark.parametrize("count", [0, 1, 9, 10, 35])
def test_rows_in_any_order_are_the_table_of_the_rows(count):
    rows, order = rows_of(count), list(range(count))
    random.Random(1).shuffle(order)
    table, expected = stored(rows, order), table_of(rows, COLUMNS)
    assert len(table) == count
    assert table.columns == list(COLUMNS)
    pd.testing.assert_frame_equal(table[list(COLUMNS)], expected)
    pd.testing.assert_series_equal(table["tsnr"], expected["tsnr"])
    for lies in (table, expected):
        blocks = list(blocks_of(lies, 20))
        assert [len(block) for block in blocks] == ([20, 15] if count == 35 else [count])
        pd.testing.assert_frame_equal(pd.concat(blocks, ignore_index=True), expected)


def test_a_table_without_rows_keeps_its_types():
    found = StoredTable(REJECTED_COLUMNS)[list(REJECTED_COLUMNS)]
    pd.testing.assert_frame_equal(found, table_of([], REJECTED_COLUMNS))


def test_rows_are_filled_removed_and_appended_as_in_a_dataframe():
    table, expected = stored(rows_of(35), range(34, -1, -1)), table_of(rows_of(35), COLUMNS)
    is_gone = expected["num_kept"] % 3 == 0
    table.remove(is_gone)
    expected = expected[~is_gone].reset_index(drop=True)
    new = pd.DataFrame({"tsnr": np.arange(len(expected)) / 3, "run": "x"})
    new.loc[3, "tsnr"] = np.nan
    table.fill(new)
    expected["tsnr"], expected["run"] = new["tsnr"], new["run"].astype("string")
    more = table_of(rows_of(12), COLUMNS)
    table.append(more)
    pd.testing.assert_frame_equal(table[list(COLUMNS)], pd.concat([expected, more], ignore_index=True))


def test_an_unusable_temporary_folder_is_a_failure_of_storage(monkeypatch):
    table = stored(rows_of(3))
    table._rows.execute("PRAGMA query_only = ON")  # as a full disk does, this makes SQLite refuse to write
    with pytest.raises(StoreError, match="temporary folder"):
        table.add(3, rows_of(4)[3])
