"""Who is trained on, validated on and tested on: disjoint, together where they belong, never seen in pretraining."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.members import ChosenRecordings, Members
from brainlm.train_subjects import TrainSubjects
from tests.phenotypes import TWINS, write_phenotype_dataset
from train.finetune_settings import SplitSettings
from train.phenotypes import read_members
from train.subject_split import SPLIT, SubjectSplit, split_subjects, write_split

NOBODY = TrainSubjects.of("x", [])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_phenotype_dataset(str(tmp_path_factory.mktemp("split") / "dataset"))


@pytest.fixture(scope="module")
def source(dataset: Dataset) -> Members:
    return read_members(dataset)


@pytest.fixture(scope="module")
def contract(dataset: Dataset) -> InputContract:
    return dataset.contract


def subjects(split: SubjectSplit) -> dict[str, set[str]]:
    return {role: {member.subject for member in members} for role, members in split.roles.items()}


def test_fractions_are_of_subjects_and_roles_are_disjoint(source: Members, contract: InputContract) -> None:
    found = subjects(split_subjects(source, SplitSettings(), NOBODY, contract))
    assert len(found["train"] | found["val"] | found["test"]) == 68
    assert not found["train"] & found["val"] | found["train"] & found["test"] | found["val"] & found["test"]
    for role, share in SplitSettings().fractions.items():
        assert len(found[role]) == pytest.approx(68 * share, abs=2)
    assert subjects(split_subjects(source, SplitSettings(seed=1), NOBODY, contract)) != found


def test_folds_test_everybody_once(source: Members, contract: InputContract) -> None:
    tested: list[str] = []
    for fold in range(5):
        found = subjects(split_subjects(source, SplitSettings(folds=5, fold=fold), NOBODY, contract))
        assert not found["train"] & (found["val"] | found["test"])
        tested += sorted(found["test"])
    assert len(tested) == len(set(tested)) == 68


@pytest.mark.parametrize("settings", [SplitSettings(seed=seed) for seed in range(8)] + [SplitSettings(folds=3)])
def test_a_family_stays_together(settings: SplitSettings, source: Members, contract: InputContract) -> None:
    found = subjects(split_subjects(source, settings, NOBODY, contract))
    assert len({role for role, people in found.items() if people & set(TWINS)}) == 1


def test_equal_series_stay_together(dataset: Dataset, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(dataset.store.url, tmp_path / "copy")
    table = pd.read_parquet(tmp_path / "copy" / "recordings.parquet")
    table.loc[[10, 30, 50], "series_sha256"] = "the same"
    table.to_parquet(tmp_path / "copy" / "recordings.parquet")
    members = read_members(open_dataset(str(tmp_path / "copy"))).all
    assert len({members[i].group for i in (10, 30, 50)}) == 1
    assert len({member.group for member in members}) == 68 - 2 - 1


def test_who_was_pretrained_on_is_left_out_with_the_family(source: Members, contract: InputContract) -> None:
    known = TrainSubjects.of("x", [TWINS[0], "val001"])  # the second without sub-
    split = split_subjects(source, SplitSettings(), known, contract)
    gone = {"sub-val001", *TWINS}
    assert set().union(*subjects(split).values()).isdisjoint(gone)
    assert {name.split("_")[0] for name in split.left_out} == gone
    assert split.num_pretraining_subjects == 0
    allowed = split_subjects(source, SplitSettings(allow_pretraining_subjects=True), known, contract)
    assert (allowed.num_pretraining_subjects, len(allowed.left_out)) == (3, 0)  # with the twin
    with pytest.raises(ConfigError, match="pretrained on 3 of the 68 subjects, by their ids, or on their families"):
        split_subjects(source, SplitSettings(column="mine"), known, contract)


def test_an_unknown_past_must_be_allowed(source: Members, contract: InputContract) -> None:
    with pytest.raises(ConfigError, match="does not say whom it was pretrained on"):
        split_subjects(source, SplitSettings(), None, contract)
    split = split_subjects(source, SplitSettings(allow_pretraining_subjects=True), None, contract)
    assert split.num_pretraining_subjects is None


def test_a_column_gives_the_split(source: Members, contract: InputContract) -> None:
    split = split_subjects(source, SplitSettings(column="mine"), NOBODY, contract)
    table = pd.read_parquet(io.BytesIO(source.dataset.store.read_bytes("subjects.parquet")))
    for role, people in subjects(split).items():
        assert people == set(table["subject"][table["mine"] == role])


def test_short_recordings_are_left_out_with_the_reason(source: Members, contract: InputContract) -> None:
    with pytest.raises(
        ConfigError, match=r"no subjects in train and val and test .* 68 recordings were left out \(60 time"
    ):
        split_subjects(source, SplitSettings(), NOBODY, replace(contract, window_len=80))


def test_the_split_is_written_down(source: Members, contract: InputContract) -> None:
    known = TrainSubjects.of("x", ["sub-val001"])
    split = split_subjects(source, SplitSettings(), known, contract)
    write_split(source.dataset.store.sub("elsewhere"), source, split)
    table = pd.read_parquet(io.BytesIO(source.dataset.store.read_bytes(f"elsewhere/{SPLIT}")))
    assert len(table) == 68
    (row,) = table[table["split"] == ""].to_dict("records")
    assert (row["subject"], row["left_out"][:31]) == ("sub-val001", "the checkpoint was pretrained o")


def test_chosen_recordings_are_those_of_the_splits(source: Members) -> None:
    members = [source.all[i] for i in (60, 3, 20)]
    reader = ChosenRecordings(source, members)
    assert [entry.recording_id for entry in reader.entries] == [member.recording_id for member in members]
    raw, scale = reader.gather(np.array([[2, 5], [0, 0], [2, 20]]), 40)
    for row, (number, start) in enumerate([(2, 5), (0, 0), (2, 20)]):
        np.testing.assert_array_equal(raw[row] * scale[row], reader.recording(number)[start : start + 40])
    assert reader.as_recording(1).recording_id == members[1].recording_id


def test_a_data_set_without_tables_is_refused(tmp_path: Path) -> None:
    from brainlm.testing import write_synthetic_dataset

    with pytest.raises(DataError, match=r"has no recordings\.parquet: prepare the data set with data_prep"):
        read_members(write_synthetic_dataset(str(tmp_path / "plain")))
