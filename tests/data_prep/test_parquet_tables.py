"""Rows become one table, whatever order they come in, and the bytes of the table depend on its rows alone."""

import random

import pandas as pd
import pytest

from brainlm.store import Store
from data_prep.parquet_tables import REJECTED_COLUMNS, RowBatches, read_parquet, table_of, write_parquet

COLUMNS = {"recording_id": "string", "subject": "string", "num_kept": "int64", "tsnr": "float64", "resampled": "bool"}


def rows_of(count):
    return [
        {"recording_id": f"r{n:05d}", "subject": f"sé{n // 2}", "num_kept": n, "tsnr": None if n % 5 else 0.1 * n}
        | {"resampled": n % 2 == 0, "unused": "x"}
        for n in range(count)
    ]


def gathered(rows, order):
    batches = RowBatches(COLUMNS)
    for position in order:
        batches.add(position, rows[position])
    return batches.table()


@pytest.mark.parametrize("count", [0, 1, 9, 10, 35])
def test_rows_in_any_order_are_the_table_of_the_rows(monkeypatch, count):
    monkeypatch.setattr("data_prep.parquet_tables.ROWS_PER_BATCH", 10)
    rows, order = rows_of(count), list(range(count))
    random.Random(1).shuffle(order)
    pd.testing.assert_frame_equal(gathered(rows, order), table_of(rows, COLUMNS))


def test_refused_rows_that_are_absent_keep_their_types():
    pd.testing.assert_frame_equal(RowBatches(REJECTED_COLUMNS).table(), table_of([], REJECTED_COLUMNS))


def test_bytes_do_not_depend_on_the_pieces_that_a_table_was_made_of(tmp_path):
    rows = [row | {"subject": f"{row['recording_id']:>800}"} for row in rows_of(3000)]  # several pages of a megabyte
    whole = table_of(rows, COLUMNS)
    store, written = Store(tmp_path), []
    for sizes in ([3000], [1000, 1000, 1000], [1, 1700, 1299]):
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        parts = [whole.iloc[end - size : end] for size, end in zip(sizes, ends)]
        write_parquet(store, "table.parquet", pd.concat(parts, ignore_index=True))
        written.append(store.read_bytes("table.parquet"))
    assert written[0] == written[1] == written[2]
    pd.testing.assert_frame_equal(read_parquet(store, "table.parquet"), whole, check_dtype=False)
