"""Read tables of text and numbers without changing what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.source_entry import MAX_LISTED


def read_table(path: str | Path, text_columns: list[str]) -> pd.DataFrame:
    """Read .tsv, .csv or .parquet; `text_columns` stay text (``007`` is no number). Missing values stay missing."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no table {path}")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            for name in set(text_columns) & set(table.columns):
                table[name] = table[name].map(lambda value: value if pd.isna(value) else str(value))
            return table
        separator = "," if path.suffix == ".csv" else "\t"
        return pd.read_csv(path, sep=separator, dtype=dict.fromkeys(text_columns, str))
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"cannot read the table {path}: {error}") from error


def text(value: Any) -> str:
    """Return a cell as text; a missing value as ""."""
    return "" if value is None or pd.isna(value) else str(value).strip()


def number(value: Any, what: str) -> float | None:
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    try:
        return float(value)
    except (ValueError, TypeError) as error:  # a sidecar can hold a list
        raise DataError(f"{what}: expected a number, found {value!r}") from error


def subject_rows(table: pd.DataFrame, phenotypes: list[str]) -> pd.DataFrame:
    """Return one row a subject with its phenotypes as given, sorted by subject.

    Parameters
    ----------
    table : DataFrame
        With a column ``subject``, one row a recording.

    Raises
    ------
    DataError
        If two rows of one subject disagree, naming subject, column and values.
    """
    kept = table[["subject", *phenotypes]].drop_duplicates().sort_values("subject", kind="stable")
    twice = kept["subject"].duplicated(keep=False)
    if twice.any():
        lines = []
        for subject, rows in kept[twice].groupby("subject"):
            for name in phenotypes:
                values = rows[name].astype(str).unique().tolist()
                if len(values) > 1:
                    lines.append(f"subject {subject}: {name} is {' and '.join(values)}")
        raise DataError("one subject has several values of one phenotype: " + "; ".join(lines[:MAX_LISTED]))
    return kept.reset_index(drop=True)
