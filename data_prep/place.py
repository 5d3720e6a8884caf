"""Where each prepared recording goes: split, fold, shard, and rows of the archive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pandas as pd

from brainlm.dataset import SPLITS
from brainlm.errors import BrainLMError, ConfigError
from data_prep.held_dataset import HeldDataset
from data_prep.parquet_tables import REJECTED_COLUMNS
from data_prep.process_memory import give_back_memory
from data_prep.read_table import text
from data_prep.settings import PrepareSettings, SplitSettings
from data_prep.source_entry import Source, SourceEntry
from data_prep.splits import SplitItem, assign_splits, find_duplicates, leave_one_out_folds, notes_on_test_sites

SITE = "site"
SPLIT_COLUMNS = ["recording_id", "subject", SITE, "family", "source", "series_sha256"]
ITEMS_AT_ONCE = 1000


class SplitItems(Sequence[SplitItem]):
    """The items of a table's recordings, each made anew when asked for: the table holds all their text already.

    Only series that several recordings have are named. The block that was read last stays open.
    """

    def __init__(self, table: pd.DataFrame, groups: list[str], given: Mapping[str, str]) -> None:
        series = table["series_sha256"].astype("string")
        self._columns = [table["recording_id"], table["subject"], table[SITE]]
        self._columns.append(series.where(series.duplicated(keep=False), ""))
        self._groups, self._given = groups, given
        self._open: tuple[int, list[SplitItem]] = -1, []

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> SplitItem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SplitItem]: ...
    def __getitem__(self, index: int | slice) -> SplitItem | Sequence[SplitItem]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        number, row = divmod(range(len(self))[index], ITEMS_AT_ONCE)
        if self._open[0] != number:
            self._open = number, list(self._block(number))
        return self._open[1][row]

    def __iter__(self) -> Iterator[SplitItem]:
        for number in range(-(-len(self) // ITEMS_AT_ONCE)):
            yield from self._block(number)

    def _block(self, number: int) -> Iterator[SplitItem]:
        rows = slice(number * ITEMS_AT_ONCE, (number + 1) * ITEMS_AT_ONCE)
        columns = [column.iloc[rows].tolist() for column in self._columns]
        for group, recording_id, subject, site, series_sha256 in zip(self._groups[rows], *columns):
            yield SplitItem(
                recording_id=recording_id,
                subject=subject,
                group=group,
                series_sha256=series_sha256,
                site=site,
                given=self._given.get(recording_id, ""),
            )


def place_in_splits(
    settings: PrepareSettings,
    table: pd.DataFrame,
    subjects: pd.DataFrame,
    entries: Sequence[SourceEntry],
    held: HeldDataset | None,
) -> tuple[pd.DataFrame, pd.DataFrame, Sequence[SplitItem]]:
    """Give each recording of a table, which has `SPLIT_COLUMNS`, its split.

    Returns
    -------
    table, refused : DataFrame
        Recordings with their column ``split``, and rows for those that would join what is in different splits already.
    items : sequence of SplitItem
        Of all recordings, those of `held` included.
    """
    given = {entry.recording_id: entry.split for entry in entries if entry.split}
    both = table if held is None else pd.concat([held.recordings[SPLIT_COLUMNS], table], ignore_index=True)
    items = SplitItems(both, _groups(settings, both, subjects), given)
    del both
    placed = {} if held is None else dict(zip(held.recordings["recording_id"], held.recordings["split"]))
    splits, reasons = assign_splits(items, settings.splits, placed)
    splits = splits[len(splits) - len(table) :]
    fine = ~table["recording_id"].isin(list(reasons))
    refused = table.loc[~fine, ["recording_id", "subject", "source"]].copy()
    refused["stage"] = "splits"
    refused["reason"] = [reasons[recording_id] for recording_id in refused["recording_id"]]
    refused = refused.reindex(columns=list(REJECTED_COLUMNS))
    table = (table if fine.all() else table[fine]).reset_index(drop=True)
    table["split"] = pd.Series([split for split in splits if split], dtype="string")
    give_back_memory()
    return table, refused, items if not reasons else [item for item in items if item.recording_id not in reasons]


@dataclass(frozen=True)
class Relations:
    """How recordings belong together: ids of each series that is there several times, folds by id, notes in words."""

    duplicates: list[list[str]]
    folds: pd.DataFrame
    notes: list[str]


def find_relations(items: Sequence[SplitItem], settings: SplitSettings) -> Relations:
    """Return what the data set says about recordings that belong together.

    ``folds`` has columns ``recording_id`` and ``fold`` (the site or sites left out together), by id.
    """
    fold, notes = leave_one_out_folds(items, [item.site for item in items])
    ids = pd.Series([item.recording_id for item, name in zip(items, fold) if name], dtype="string")
    folds = pd.DataFrame({"recording_id": ids, "fold": pd.Series([name for name in fold if name], dtype="string")})
    folds = folds.sort_values("recording_id", ignore_index=True)
    duplicates = find_duplicates(items)
    give_back_memory()
    return Relations(duplicates, folds, [*notes, *notes_on_test_sites(items, settings)])


def splits_in_advance(settings: PrepareSettings, source: Source) -> str:
    """Say in words how the recordings would be divided, equal series unseen, or why they cannot be."""
    columns = ("recording_id", "subject", "family", SITE)
    table = pd.DataFrame({name: [getattr(entry, name) for entry in source.entries] for name in columns})
    table["series_sha256"] = table["recording_id"]
    try:
        divided, _, _ = place_in_splits(settings, table.assign(source=""), source.subjects, source.entries, None)
    except BrainLMError as error:
        return str(error)
    counts = divided["split"].value_counts()
    return ", ".join(f"{split} {int(counts.get(split, 0))}" for split in SPLITS)


def place_in_archive(table: pd.DataFrame, first_row: int, first_place: int) -> None:
    """Fill the columns ``first_row`` and ``archive_row``, in the order of the table."""
    ends = table["num_timepoints"].cumsum()
    table["first_row"] = first_row + ends - table["num_timepoints"]
    table["archive_row"] = first_place + np.arange(len(table), dtype=np.int64)


def _groups(settings: PrepareSettings, table: pd.DataFrame, subjects: pd.DataFrame) -> list[str]:
    group_by = settings.splits.group_by
    if group_by == "subject":
        return [""] * len(table)
    if group_by in ("family", SITE):
        groups = [text(value) for value in table[group_by]]
    elif group_by in subjects.columns:
        of_subject = dict(zip(subjects["subject"], subjects[group_by]))
        groups = [_group_name(of_subject.get(subject)) for subject in table["subject"]]
    else:
        raise ConfigError(
            f"splits.group_by: expected subject, family, site or a phenotype column "
            f"({', '.join(subjects.columns[1:]) or 'there are none'}), found {group_by!r}"
        )
    if not any(groups):
        raise ConfigError(f"splits.group_by: no recording has a {group_by}; set source.columns.{group_by}")
    return groups


def _group_name(value: Any) -> str:
    """Return a phenotype as text: 100.0 is ``100``, as one missing value makes a column of whole numbers float."""
    is_whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value)) if is_whole else text(value)
