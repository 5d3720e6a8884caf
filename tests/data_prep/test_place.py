"""Where recordings go: a group is what a phenotype says, however its column was read."""

import pandas as pd
import pytest

from brainlm.config import build
from data_prep.place import place_in_splits
from data_prep.read_table import read_table
from data_prep.settings import PrepareSettings


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
