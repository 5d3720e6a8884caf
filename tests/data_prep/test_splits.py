"""Splits: by group, stable, and never with one series on both sides."""

import pytest

from brainlm.errors import DataError
from data_prep.splits import SplitItem, assign_splits, find_duplicates

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}


def item(subject, run="1", group="", series=""):
    recording_id = f"{subject}_run-{run}"
    return SplitItem(recording_id=recording_id, subject=subject, group=group, series_sha256=series or recording_id)


def cohort(count, prefix="s"):
    return [item(f"{prefix}{number}", run) for number in range(count) for run in "12"]


def test_adding_subjects_moves_nobody():
    before = assign_splits(cohort(100), FRACTIONS, 0)
    after = assign_splits(cohort(100) + cohort(50, "new"), FRACTIONS, 0)
    assert {name: after[name] for name in before} == before


def test_order_of_recordings_does_not_matter():
    assert assign_splits(cohort(60)[::-1], FRACTIONS, 0) == assign_splits(cohort(60), FRACTIONS, 0)


def test_recordings_of_a_subject_are_in_one_split_and_shares_are_near_the_fractions():
    found = assign_splits(cohort(1000), FRACTIONS, 0)
    assert all(found[f"s{number}_run-1"] == found[f"s{number}_run-2"] for number in range(1000))
    assert 0.65 < list(found.values()).count("train") / 2000 < 0.75


def test_another_seed_gives_another_split():
    assert assign_splits(cohort(100), FRACTIONS, 0) != assign_splits(cohort(100), FRACTIONS, 1)


def test_families_and_equal_series_are_united_across_subjects():
    items = [item(f"s{number}", group=f"f{number // 4}") for number in range(200)]
    items[3] = item("s3", group="f0", series="equal")
    items[150] = item("s150", group="f37", series="equal")
    found = assign_splits(items, FRACTIONS, 0)
    for family in range(50):
        assert len({found[f"s{number}_run-1"] for number in range(family * 4, family * 4 + 4)}) == 1
    assert found["s3_run-1"] == found["s150_run-1"] == found["s0_run-1"]
    assert find_duplicates(items) == [["s150_run-1", "s3_run-1"]]


def test_subject_without_a_family_stands_alone():
    items = [item(f"s{number}", group="") for number in range(100)]
    assert assign_splits(items, FRACTIONS, 0) == {
        name: split for name, split in assign_splits(cohort(100), FRACTIONS, 0).items() if name.endswith("1")
    }


def test_empty_split_is_refused_unless_it_was_asked_for():
    with pytest.raises(DataError, match=r"no recordings in val and test.*train 2, val 0, test 0"):
        assign_splits([item("a"), item("b")], {"train": 0.98, "val": 0.01, "test": 0.01}, 0)
    assert set(assign_splits([item("a")], {"train": 1.0, "val": 0.0, "test": 0.0}, 0).values()) == {"train"}
