"""Tables that lie on disk while they are made: memory must not grow with the number of recordings."""

from __future__ import annotations

import sqlite3
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, overload

import pandas as pd

from brainlm.errors import StoreError

ROWS_AT_ONCE = 1000  # as Python objects they are ten times as large as in a table
CELLS_AT_ONCE = 40_000


class StoredTable:
    """Rows in a temporary file (of SQLite's, in ``$TMPDIR``), in the order of their positions.

    ``table[name]`` and ``table[names]`` read some columns of all rows, as of a DataFrame; `blocks` reads all columns
    of some rows at a time.

    Parameters
    ----------
    columns : mapping of str to str
        Names, and the types that they have in a DataFrame.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._kinds = dict(columns)
        self._rows = sqlite3.connect("", isolation_level=None)  # "" is a file that goes with the connection
        weakref.finalize(self, self._rows.close)
        self._insert = f"INSERT INTO rows VALUES (?{', ?' * len(self._kinds)})"
        with _on_disk():
            self._rows.execute("PRAGMA temp_store = FILE")
            self._rows.execute("PRAGMA journal_mode = OFF")  # nothing is ever rolled back
            self._rows.execute(f"CREATE TABLE rows (position INTEGER PRIMARY KEY, {_quoted(self._kinds)})")

    @property
    def columns(self) -> list[str]:
        return list(self._kinds)

    def __len__(self) -> int:
        return int(self._rows.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    def add(self, position: int, row: Mapping[str, Any]) -> None:
        """Add a row; those come in any order. What is not in `row` is missing until `fill` is called."""
        with _on_disk():
            self._rows.execute(self._insert, (position, *(row.get(name) for name in self._kinds)))

    def append(self, rows: pd.DataFrame) -> None:
        """Add rows after all others."""
        first = int(self._rows.execute("SELECT COALESCE(MAX(position) + 1, 0) FROM rows").fetchone()[0])
        with _on_disk():
            values = _plain_rows(rows[self.columns])
            self._rows.executemany(self._insert, ((first + n, *row) for n, row in enumerate(values)))

    def fill(self, values: pd.DataFrame) -> None:
        """Give the columns of `values` new values, a row for each that is there, in their order."""
        positions = self._positions()
        assert len(positions) == len(values)
        change = (
            f"UPDATE rows SET ({_quoted(map(str, values))}) = (?{', ?' * (values.shape[1] - 1)}) WHERE position = ?"
        )
        with _on_disk():
            rows = zip(_plain_rows(values), positions)
            self._rows.executemany(change, ((*row, position) for row, position in rows))

    def remove(self, is_gone: Iterable[bool]) -> None:
        """Remove the rows for which `is_gone` is True."""
        gone = [(position,) for position, yes in zip(self._positions(), is_gone, strict=True) if yes]
        with _on_disk():
            self._rows.executemany("DELETE FROM rows WHERE position = ?", gone)

    @overload
    def __getitem__(self, names: str) -> pd.Series: ...
    @overload
    def __getitem__(self, names: list[str]) -> pd.DataFrame: ...
    def __getitem__(self, names: str | list[str]) -> pd.Series | pd.DataFrame:
        if isinstance(names, str):
            return self[[names]][names]
        whole = pd.concat(list(self._pieces(names, CELLS_AT_ONCE // len(names))), ignore_index=True)
        for name in names:
            whole[name] = _in_one_piece(whole[name])
        return whole

    def blocks(self, num_rows: int) -> Iterator[pd.DataFrame]:
        """Yield `num_rows` rows at a time, a multiple of `ROWS_AT_ONCE`; one empty block where there are none."""
        pieces = self._pieces(self.columns, ROWS_AT_ONCE)
        while found := list(islice(pieces, num_rows // ROWS_AT_ONCE)):
            yield pd.concat(found, ignore_index=True)

    def _pieces(self, names: Sequence[str], num_rows: int) -> Iterator[pd.DataFrame]:
        found = self._rows.execute(f"SELECT {_quoted(names)} FROM rows ORDER BY position")
        is_first = True
        while True:
            with _on_disk():
                rows = found.fetchmany(num_rows)
            if not rows and not is_first:
                return
            is_first = False
            columns: Iterable[Sequence[Any]] = zip(*rows) if rows else [()] * len(names)
            yield pd.DataFrame(
                {name: pd.Series(values, dtype=self._kinds[name]) for name, values in zip(names, columns)}
            )

    def _positions(self) -> array[int]:
        return array("q", (position for (position,) in self._rows.execute("SELECT position FROM rows ORDER BY 1")))


def _in_one_piece(column: pd.Series) -> pd.Series:
    """Return a column of text whose rows lie together: picking rows takes longer the more pieces there are."""
    if not isinstance(column.array, pd.arrays.ArrowStringArray):
        return column
    return pd.Series(pd.arrays.ArrowStringArray(column.array.__arrow_array__().combine_chunks()), column.index)


Table = pd.DataFrame | StoredTable


def blocks_of(table: Table, num_rows: int) -> Iterator[pd.DataFrame]:
    """Yield `num_rows` rows of a table at a time; one empty block where there are none."""
    if isinstance(table, StoredTable):
        yield from table.blocks(num_rows)
        return
    for first in range(0, max(len(table), 1), num_rows):
        yield table.iloc[first : first + num_rows]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _plain_rows(table: pd.DataFrame) -> Iterator[tuple[Any, ...]]:
    for block in blocks_of(table, ROWS_AT_ONCE):
        yield from zip(*([None if value is pd.NA else value for value in block[name].tolist()] for name in block))


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreError(f"cannot keep a table in the temporary folder ($TMPDIR): {error}") from error
