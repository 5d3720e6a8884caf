"""Read tables of text and numbers without changing what they say."""

from __future__ import annotations

import io
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.input_files import file_stamp
from data_prep.local_input import local_input

NO_TEXT = ("", "n/a")  # what an empty cell of a name looks like: BIDS writes n/a
MISSING_WORDS = frozenset(
    ["", "n/a", "N/A", "NA", "#N/A", "#NA", "NaN", "nan", "NAN", "-nan", "-NaN", "null", "NULL", "None", "<NA>"]
)


def read_table(path: str | Path, text_columns: Iterable[str], only: Iterable[str] | None = None) -> pd.DataFrame:
    """Read .tsv, .csv or .parquet, on local disk or at any fsspec URL. Missing values stay missing.

    Parameters
    ----------
    path : str or path
    text_columns : iterable of str
        Columns that stay text: ``007`` is no number, and a parcel or subject called ``NA`` is not missing.
    only : iterable of str or None
        Columns to keep, where the table has them; a table of a biobank can have thousands.

    Raises
    ------
    DataError
        If there is no such table, two of its columns share a name, or its rows have other lengths than its header.
    """
    where = str(path)
    if not file_stamp(where):
        raise DataError(f"there is no table {where}")
    with local_input(where) as local:
        try:
            return (
                _read_parquet(local, text_columns, only)
                if local.suffix == ".parquet"
                else _read_text(local, set(text_columns), only)
            )
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except (ValueError, OSError) as error:  # pandas' and pyarrow's parser errors are ValueErrors
            raise DataError(f"cannot read the table {where}: {error}") from error


def _read_parquet(path: Path, text_columns: Iterable[str], only: Iterable[str] | None) -> pd.DataFrame:
    columns: list[str] | None = None
    if only is not None:
        import pyarrow.parquet as parquet

        wanted = set(only)
        columns = [name for name in parquet.read_schema(path).names if name in wanted]
    table = pd.read_parquet(path, columns=columns)
    for name in set(text_columns) & set(table.columns):
        table[name] = table[name].map(_as_text).astype(object)
    return table


def _as_text(value: Any) -> str | None:
    if pd.isna(value):
        return None
    # A column of whole numbers with a gap is one of floats: an id is the same with and without somebody else's gap.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_text(path: Path, text_columns: set[str], only: Iterable[str] | None) -> pd.DataFrame:
    data = path.read_bytes()
    _check_is_text(data)
    separator = "," if path.suffix == ".csv" else "\t"
    header = _header(io.BytesIO(data), separator)
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"several columns are called {', '.join(map(repr, twice))}")
    kept = header if only is None else [name for name in header if name in set(only)]
    missing = {name: list(NO_TEXT if name in text_columns else MISSING_WORDS) for name in kept}
    _check_lengths(data, separator, len(header))
    return pd.read_csv(
        io.BytesIO(data),
        sep=separator,
        usecols=kept,
        dtype=dict.fromkeys(text_columns & set(kept), str),
        index_col=False,
        keep_default_na=False,
        na_values=missing,
        low_memory=False,  # one type a column, however long the table
    )


def _check_is_text(data: bytes) -> None:
    advice = "save the table again as UTF-8 text with tabs (.tsv) or commas (.csv)"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}"
        raise DataError(f"expected text in UTF-8, found {found}: {advice}") from error
    if (zero := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, zero) + 1
        raise DataError(f"expected text in UTF-8, found a zero byte in line {line}: {advice}")


def _check_lengths(data: bytes, separator: str, num_columns: int) -> None:
    """Refuse rows with more cells than the header, which pandas would cut. Lines with quotes are left to it."""
    mark = separator.encode()
    is_quoted = False
    for number, line in enumerate(io.BytesIO(data), start=1):
        num_quotes = line.count(b'"')
        if not is_quoted and not num_quotes:
            num_cells = line.rstrip(mark + b" \r\n").count(mark) + 1
            if num_cells > num_columns:
                raise DataError(f"line {number} has {num_cells} cells, the header {num_columns}")
        is_quoted ^= bool(num_quotes % 2)


def _header(stream: IO[bytes], separator: str) -> list[str]:
    try:
        row = pd.read_csv(stream, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise DataError("the table is empty") from error
    return [str(name) for name in row.iloc[0]]


def text(value: Any) -> str:
    """Return a cell as text; a missing value as ""."""
    return "" if value is None or pd.isna(value) else str(value).strip()


def category(value: Any) -> str:
    """Return a cell that names a kind, such as a site, as text; ``NA`` and its like are "", not a site of that name."""
    found = text(value)
    return "" if found in MISSING_WORDS else found


def number(value: Any, what: str) -> float | None:
    """Return a cell as a number, None where it is missing; text is a `DataError` that begins with `what`."""
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    try:
        if isinstance(value, bool):  # JSON's true, which Python takes for 1
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError) as error:  # a sidecar can hold a list, or a number of 400 digits
        raise DataError(f"{what}: expected a number, found {reprlib.repr(value)}") from error
