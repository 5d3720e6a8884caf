"""Where recordings go: a group is what a phenotype says, however its column was read."""

import dataclasses

import pandas as pd
import pytest

from brainlm.config import build
from data_prep.place import SplitItems, place_in_splits
from data_prep.read_table import read_table
from data_prep.settings import PrepareSettings, SplitSettings
from data_prep.splits import SplitItem, assign_splits, find_duplicates, leave_one_out_folds


def split_by_scanner(toy, scanners):
    """Return the split of each subject; `scanners` are cells of a table on disk, a subject each."""
    path = toy.folder / "participants.tsv"
    rows = "\n".join(f"s{number:03d}\t{scanner}" for number, scanner in enumerate(scanners))
    path.write_text(f"subject\tscanner\n{rows}\n")
    subjects = read_table(path, ["subject"])
    ids = subjects["subject"].tolist()
    table = pd.DataFrame({"recording_id": ids, "subject": ids, "site": "", "source": ids, "series_sha256": ids})
    tree = toy.settings(toy.folder, splits={"val": 0.3, "test": 0.3, "group_by": "scanner"})
    placed, refused, _ = place_in_splits(build(PrepareSettings, tree, "test"), table, subjects, [], None)
    assert refused.empty
    return dict(zip(placed["subject"], placed["split"]))


@pytest.mark.parametrize("added", ["n/a", "2.5", "unknown"])
def test_a_subject_that_changes_the_type_of_a_column_of_numbers_moves_nobody(toy, added):
    scanners = [100 + number // 2 for number in range(60)]
    before = split_by_scanner(toy, scanners)
    after = split_by_scanner(toy, [*scanners, added])
    assert len(set(before.values())) == 3
    assert {subject: after[subject] for subject in before} == before


def test_numbers_that_are_not_whole_are_groups_of_their_own(toy):
    found = split_by_scanner(toy, [number // 2 + 0.25 * (number % 2) for number in range(120)])
    splits = list(found.values())
    assert any(first != second for first, second in zip(splits[::2], splits[1::2]))


def items_of(count):
    """Return items of a table and, made without it, the same as a plain list; every seventh series is there twice."""
    rows = [
        {"recording_id": f"r{n * 37 % count:03d}", "subject": f"s{n // 2}", "series_sha256": f"{n - (n % 7 == 6):04x}"}
        | {"site": f"site{n % 3}" if n % 5 else ""}
        for n in range(count)
    ]
    groups = [f"g{n // 6}" if n % 4 else "" for n in range(count)]
    plain = [SplitItem(**row, group=group, given="val") for row, group in zip(rows, groups)]
    packed = SplitItems(pd.DataFrame(rows, dtype="string"), groups, {row["recording_id"]: "val" for row in rows})
    return packed, plain


def test_items_of_a_table_are_those_of_a_list_and_name_only_series_that_are_there_twice(monkeypatch):
    monkeypatch.setattr("data_prep.place.ITEMS_AT_ONCE", 6)
    packed, plain = items_of(40)
    shared = {f"{n - 1:04x}" for n in range(6, 40, 7)}
    expected = [item if item.series_sha256 in shared else dataclasses.replace(item, series_sha256="") for item in plain]
    assert len(packed) == 40
    assert list(packed) == expected == [packed[n] for n in range(40)]
    assert [packed[-n] for n in range(1, 41)] == expected[::-1]
    assert list(packed[5:30:4]) == expected[5:30:4]
    with pytest.raises(IndexError):
        packed[40]


def test_splits_folds_and_duplicates_are_those_of_a_list_that_names_every_series():
    packed, plain = items_of(121)
    settings = SplitSettings(val=0.3, test=0.3)
    placed = {item.recording_id: "val" for item in plain[:3]}
    assert assign_splits(packed, settings) == assign_splits(plain, settings)
    assert assign_splits(packed, settings, placed) == assign_splits(plain, settings, placed)
    assert find_duplicates(packed) == find_duplicates(plain) != []
    sites = [item.site for item in plain]
    assert leave_one_out_folds(packed, sites) == leave_one_out_folds(plain, sites)
