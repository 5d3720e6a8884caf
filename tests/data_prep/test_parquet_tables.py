"""The bytes of a table depend on its rows alone: not on how it was gathered, nor on where it lies meanwhile."""

import random

import pandas as pd
import pytest

from brainlm.store import Store
from data_prep.parquet_tables import read_parquet, table_of, write_parquet
from data_prep.stored_table import StoredTable

COLUMNS = {"recording_id": "string", "subject": "string", "num_kept": "int64", "tsnr": "float64", "resampled": "bool"}


def rows_of(count):
    return [
        {"recording_id": f"r{n:05d}", "subject": f"sé{n // 2}", "num_kept": n, "tsnr": None if n % 5 else 0.1 * n}
        | {"resampled": n % 2 == 0, "unused": "x"}
        for n in range(count)
    ]


@pytest.mark.parametrize("rows_per_group", [1000, 5000])
def test_bytes_do_not_depend_on_the_pieces_that_a_table_was_made_of(monkeypatch, tmp_path, rows_per_group):
    monkeypatch.setattr("data_prep.parquet_tables.ROWS_PER_GROUP", rows_per_group)
    rows = [row | {"subject": f"{row['recording_id']:>800}"} for row in rows_of(3000)]  # several pages of a megabyte
    whole = table_of(rows, COLUMNS)
    store, written = Store(tmp_path), []
    for sizes in ([3000], [1000, 1000, 1000], [1, 1700, 1299]):
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        parts = [whole.iloc[end - size : end] for size, end in zip(sizes, ends)]
        write_parquet(store, "table.parquet", pd.concat(parts, ignore_index=True))
        written.append(store.read_bytes("table.parquet"))
    stored = StoredTable(COLUMNS)
    for position in random.Random(1).sample(range(3000), 3000):
        stored.add(position, rows[position])
    write_parquet(store, "table.parquet", stored)
    written.append(store.read_bytes("table.parquet"))
    assert all(data == written[0] for data in written)
    pd.testing.assert_frame_equal(read_parquet(store, "table.parquet"), whole, check_dtype=False)
