"""Phenotypes of an added cohort beside those that a data set holds."""

import io

import pandas as pd
import pytest

from brainlm.errors import DataError
from brainlm.store import Store
from data_prep.held_dataset import HeldDataset, merged_subjects
from data_prep.parquet_tables import SUBJECTS, read_parquet, write_parquet
from data_prep.read_table import read_table


def subjects(folder, values, first=0):
    """Return phenotypes as a table on disk gives them: `values` are the cells of the column ``score``."""
    path = folder / "participants.tsv"
    path.write_text("subject\tscore\n" + "".join(f"s{first + n:02d}\t{value}\n" for n, value in enumerate(values)))
    return read_table(path, ["subject"])


@pytest.fixture
def merge(tmp_path):
    """Return a function that merges two lists of scores, the second from the given subject on."""

    def merged(old, new, first):
        store = Store(str(tmp_path / "dataset"))
        write_parquet(store, SUBJECTS, subjects(tmp_path, old))
        nothing = pd.DataFrame()
        held = HeldDataset(
            store=store, manifest={}, contract=None, recordings=nothing, rejected=nothing,
            subjects=read_parquet(store, SUBJECTS),
        )  # fmt: skip
        found = merged_subjects(held, subjects(tmp_path, new, first))
        write_parquet(store, SUBJECTS, found)  # a column of two kinds could not be written
        assert found["subject"].tolist() == sorted(found["subject"])
        return found["score"].tolist()

    return merged


def test_whole_numbers_agree_with_the_same_numbers_of_a_column_with_fractions_or_gaps(merge):
    assert merge([20, 21], [20, "n/a"], 0) == [20, 21]  # int64 beside float64, as no subject is new
    assert merge([20, 21], [20, 21, 22.5], 0) == [20, 21, 22.5]
    assert merge([20, 21.5], [20], 0) == [20, 21.5]
    assert merge([20, 21], [21, "n/a", 23], 1)[1::2] == [21, 23]
    assert merge([20, 21], [30], 2) == [20, 21, 30]


def test_other_numbers_are_named_with_their_subject(merge):
    with pytest.raises(DataError, match=r"subject s01: score is 21\.0 in the data set, 21\.5 now"):
        merge([20, 21], [20, 21.5], 0)


@pytest.mark.parametrize(("first", "text_is_new"), [(0, True), (0, False), (2, True), (2, False)])
def test_column_of_text_in_one_and_numbers_in_the_other_is_refused_by_name(merge, first, text_is_new):
    text, numbers = ["20", "unknown"], ["20", "21"]
    old, new = (numbers, text) if text_is_new else (text, numbers)
    said = "score: numbers in the data set, text now" if text_is_new else "score: text in the data set, numbers now"
    with pytest.raises(DataError, match=said):
        merge(old, new, first)


@pytest.mark.parametrize("values", [["a", "b"], [1, 2], [0.5, 2], ["True", "False"]])
def test_column_without_a_value_agrees_with_every_kind(merge, values):
    kept = pd.read_csv(io.StringIO("score\n" + "\n".join(map(str, values))))["score"].tolist()
    assert merge(["n/a", "n/a"], values, 0) == kept
    assert merge(values, ["n/a", "n/a"], 0) == kept
    assert merge(["n/a", "n/a"], values, 2)[2:] == kept


def test_true_and_false_stay_so_beside_a_missing_value(merge):
    assert merge(["True", "False"], ["False", "n/a", "True"], 1)[::3] == [True, True]
    with pytest.raises(DataError, match="subject s01: score is False in the data set, True now"):
        merge(["True", "False"], ["True", "n/a"], 1)
