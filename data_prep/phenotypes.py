"""Phenotypes joined to recordings by subject: nobody is dropped, doubled or filled in without a word."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from brainlm.errors import DataError
from data_prep.read_table import category, number, read_table, text
from data_prep.settings import SourceSettings
from data_prep.source_entry import MAX_LISTED


def subject_label(value: Any) -> str:
    """Return a subject's name as BIDS has it, without ``sub-``: a person has one name, however a table writes it."""
    return text(value).removeprefix("sub-")


@dataclass(frozen=True)
class Participants:
    """A table with one row a subject. ``table`` holds the column ``subject`` and the phenotypes that were asked for."""

    where: str
    table: pd.DataFrame
    of_subject: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For site, family, motion and split: values by column and subject."""
    site_column: str = "site"
    family_column: str = "family"
    mean_fd_column: str = ""
    is_given: bool = True

    def site(self, subject: str) -> str:
        return category(self._value(self.site_column, subject))

    def family(self, subject: str) -> str:
        return category(self._value(self.family_column, subject))

    def mean_fd_mm(self, subject: str) -> float | None:
        return number(self._value(self.mean_fd_column, subject), f"{self.where}: {self.mean_fd_column} of {subject}")

    def has_column(self, column: str) -> bool:
        return column in self.of_subject

    def split(self, column: str, subject: str) -> str:
        return category(self._value(column, subject))

    def _value(self, column: str, subject: str) -> Any:
        return self.of_subject.get(column, {}).get(subject)


def no_participants(where: str) -> Participants:
    """Return a table without subjects, for cohorts that come without phenotypes."""
    return Participants(where, pd.DataFrame({"subject": pd.Series(dtype=str)}), is_given=False)


def read_participants(path: str, settings: SourceSettings, split_column: str | None) -> Participants:
    """Read a table of phenotypes.

    Parameters
    ----------
    path : str
        .tsv, .csv or .parquet, local or at any fsspec URL, with the column `columns.subject`.
    settings : SourceSettings
        ``phenotypes`` None keeps every column.

    Raises
    ------
    DataError
        If a column that the settings name is absent, a row has no subject, or two rows of one subject disagree.
    """
    columns = settings.columns
    texts = [columns.subject, columns.site or "site", columns.family or "family"]
    texts += [split_column] if split_column else []
    wanted = None
    if settings.phenotypes is not None:
        wanted = [*texts, *settings.phenotypes, *([columns.mean_fd_mm] if columns.mean_fd_mm else [])]
    table = read_table(path, texts, wanted)
    return participants_of(table, path, settings, split_column)


def participants_of(
    table: pd.DataFrame, where: str, settings: SourceSettings, split_column: str | None
) -> Participants:
    """Make `Participants` of a table that is read already; see `read_participants`."""
    columns = settings.columns
    if columns.subject not in table.columns:
        raise DataError(
            f"{where}: expected a column {columns.subject}, found {', '.join(map(str, table.columns))}: set "
            "source.columns.subject"
        )
    asked = [columns.mean_fd_mm, *(settings.phenotypes or ())]
    if settings.kind != "table":  # the list of a table has these itself
        asked += [columns.site, columns.family]
    for name in asked:
        if name and name != "subject" and name not in table.columns:
            raise DataError(f"{where} has no column {name!r} (it has {', '.join(map(str, table.columns))})")
    subjects = table[columns.subject].map(subject_label)
    if (subjects == "").any():
        raise DataError(f"{where}: {int((subjects == '').sum())} rows have no {columns.subject}")
    table = table.drop(columns=[columns.subject, *({"subject"} & set(table.columns) - {columns.subject})])
    table.insert(0, "subject", subjects)
    table = subject_rows(table, [str(name) for name in table.columns[1:]])
    site_column, family_column = columns.site or "site", columns.family or "family"
    kept = [str(name) for name in table.columns if name != "subject"]
    if settings.phenotypes is not None:
        kept = [name for name in kept if name in {*settings.phenotypes, site_column, family_column}]
    values = {
        name: dict(zip(table["subject"], table[name]))
        for name in (site_column, family_column, columns.mean_fd_mm, split_column)
        if name and name in table.columns
    }
    return Participants(where, table[["subject", *kept]], values, site_column, family_column, columns.mean_fd_mm or "")


def join_subjects(
    subjects: Iterable[str], participants: Participants, allow_unlisted: bool
) -> tuple[pd.DataFrame, list[str]]:
    """Return one row of phenotypes for each subject with recordings, sorted, and notes about the rest.

    Raises
    ------
    DataError
        If the table does not list a subject, naming it, unless `allow_unlisted`.
    """
    mine = sorted(set(subjects))
    listed = participants.table["subject"]
    notes = []
    unlisted = sorted(set(mine) - set(listed))
    if unlisted and participants.is_given:
        names = ", ".join(unlisted[:MAX_LISTED]) + (" ..." if len(unlisted) > MAX_LISTED else "")
        if not allow_unlisted:
            raise DataError(
                f"{participants.where} does not list {len(unlisted)} of {len(mine)} subjects that have recordings: "
                f"{names}. Add their rows, or keep them without phenotypes by source.allow_unlisted: true"
            )
        notes.append(f"{len(unlisted)} subjects are not in the table of phenotypes: {names}")
    without = len(listed) - (len(mine) - len(unlisted))
    if without:
        notes.append(f"{without} subjects of the table of phenotypes have no recording")
    rows = participants.table.set_index("subject").reindex(pd.Index(mine, name="subject")).reset_index()
    return rows, notes


def subject_rows(table: pd.DataFrame, phenotypes: list[str]) -> pd.DataFrame:
    """Return one row a subject with its phenotypes as given, sorted by subject.

    Parameters
    ----------
    table : DataFrame
        With a column ``subject``, one row a recording or a subject.

    Raises
    ------
    DataError
        If two rows of one subject disagree, naming subject, column and values.
    """
    kept = table[["subject", *phenotypes]].drop_duplicates().sort_values("subject", kind="stable")
    twice = kept["subject"].duplicated(keep=False)
    if twice.any():
        lines: list[str] = []
        for subject, rows in kept[twice].groupby("subject"):
            if len(lines) >= MAX_LISTED:
                break
            for name in phenotypes:
                values = list(dict.fromkeys(_shown(value) for value in rows[name]))
                if len(values) > 1:
                    lines.append(f"subject {subject}: {name} is {' and '.join(values)}")
        raise DataError("one subject has several values of one phenotype: " + "; ".join(lines[:MAX_LISTED]))
    return kept.reset_index(drop=True)


def _shown(value: Hashable) -> str:
    return "missing" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)  # type: ignore[call-overload]
