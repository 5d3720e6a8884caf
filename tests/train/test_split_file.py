"""A split that is given as a file: as strict as a column, and the run knows the file again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from brainlm.checkpoint import save_checkpoint
from brainlm.config import to_tree
from brainlm.dataset import Dataset
from brainlm.errors import ConfigError
from brainlm.input_contract import InputContract
from brainlm.members import Members
from brainlm.store import Store
from brainlm.testing import small_model
from brainlm.train_subjects import TrainSubjects
from brainlm.world import World
from tests.phenotypes import TWINS, write_phenotype_dataset
from train.entry import Call
from train.finetune import load_settings, main
from train.finetune_settings import FinetuneSettings, SplitSettings
from train.launcher import Launcher
from train.phenotypes import read_members
from train.run_files import check_same_run, write_run_files
from train.split_file import read_split_file
from train.subject_split import split_subjects, write_split

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


def rows(source: Members, key: str = "recording_id") -> pd.DataFrame:
    """A third each; the twins are together, in test."""
    roles = [
        "test" if member.subject in TWINS else ("train", "val", "test")[i % 3] for i, member in enumerate(source.all)
    ]
    return pd.DataFrame({key: [getattr(member, key) for member in source.all], "split": roles})


def write(table: pd.DataFrame, path: Path) -> str:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return str(path)


@pytest.mark.parametrize("key", ["recording_id", "subject"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_a_file_gives_the_split(
    key: str, suffix: str, source: Members, contract: InputContract, tmp_path: Path
) -> None:
    table = rows(source, key)
    split = split_subjects(source, SplitSettings(file=write(table, tmp_path / f"s{suffix}")), NOBODY, contract)
    assert not split.left_out
    for role, members in split.roles.items():
        assert {getattr(member, key) for member in members} == set(table[key][table["split"] == role])


def test_a_file_lies_on_any_storage(source: Members, contract: InputContract) -> None:
    Store("memory://splits").write_bytes("s.csv", rows(source).to_csv(index=False).encode())
    split = split_subjects(source, SplitSettings(file="memory://splits/s.csv"), NOBODY, contract)
    assert sum(map(len, split.roles.values())) == 68


def test_who_is_not_listed_or_has_no_role_is_left_out(source: Members, contract: InputContract, tmp_path: Path) -> None:
    table = rows(source)
    gone, empty = table["recording_id"][3], table["recording_id"][4]
    table.loc[4, "split"] = "n/a"
    url = write(table.drop(index=3), tmp_path / "s.tsv")
    split = split_subjects(source, SplitSettings(file=url), NOBODY, contract)
    assert split.left_out == {gone: f"not in split.file={url}", empty: f"split.file={url} is empty"}
    assert sum(map(len, split.roles.values())) == 66


def test_the_split_of_a_run_is_that_of_the_next_one(source: Members, contract: InputContract, tmp_path: Path) -> None:
    first = split_subjects(source, SplitSettings(), TrainSubjects.of("x", ["sub-val001"]), contract)
    write_split(Store(str(tmp_path)), source, first)
    again = split_subjects(source, SplitSettings(file=str(tmp_path / "split.parquet")), NOBODY, contract)
    assert again.roles == first.roles


def test_a_file_may_divide_no_family(source: Members, contract: InputContract, tmp_path: Path) -> None:
    table = rows(source, "subject")
    table.loc[table["subject"] == TWINS[0], "split"] = "train"
    with pytest.raises(ConfigError, match="divides what belongs together"):
        split_subjects(source, SplitSettings(file=write(table, tmp_path / "s.csv")), NOBODY, contract)


def test_pretraining_subjects_in_a_file_must_be_allowed(
    source: Members, contract: InputContract, tmp_path: Path
) -> None:
    url, known = write(rows(source), tmp_path / "s.csv"), TrainSubjects.of("x", [TWINS[0]])
    with pytest.raises(ConfigError, match=r"split\.file=.*s\.csv: the checkpoint was pretrained on 2 of the 68"):
        split_subjects(source, SplitSettings(file=url), known, contract)
    allowed = SplitSettings(file=url, allow_pretraining_subjects=True)
    assert split_subjects(source, allowed, known, contract).num_pretraining_subjects == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: pd.concat([t, t.assign(recording_id="nobody")[:1]]), "the data set has no recording_id nobody$"),
        (lambda t: pd.concat([t, t[:1].assign(split="val")]), "is given 'train' and 'val'"),
        (lambda t: t.replace("val", "validation"), "expected train, val, test or nothing, found 'validation'"),
        (lambda t: t.rename(columns={"split": "role"}), "expected the columns .*; found recording_id, role"),
        (lambda t: t.rename(columns={"recording_id": "id"}), "expected the columns recording_id or subject"),
        (lambda t: t[:0].drop(columns=["recording_id", "split"]), "cannot be read as a table"),
    ],
)
def test_a_wrong_file_is_refused(
    change: object, message: str, source: Members, contract: InputContract, tmp_path: Path
) -> None:
    assert callable(change)
    url = write(change(rows(source)), tmp_path / "s.csv")
    with pytest.raises(ConfigError, match=message):
        split_subjects(source, SplitSettings(file=url), NOBODY, contract)


def test_a_file_is_one_of_three_kinds_and_goes_with_no_column() -> None:
    with pytest.raises(ConfigError, match=r"split\.column or split\.file, not both"):
        SplitSettings(column="mine", file="s.csv")
    with pytest.raises(ConfigError, match=r"expected a \.tsv, \.csv, \.parquet, found s\.txt"):
        SplitSettings(file="s.txt")
    with pytest.raises(ConfigError, match="without split"):
        SplitSettings(file_sha256="0")


def test_a_run_goes_on_with_the_file_it_began_with_alone(
    dataset: Dataset, source: Members, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = write(rows(source), tmp_path / "s.csv")
    save_checkpoint(str(tmp_path / "checkpoint"), small_model(dataset.contract), {"step": 1}, [])
    config = tmp_path / "config.yaml"
    tree = {
        "run": {"out": str(tmp_path / "run")}, "data": {"dataset": dataset.store.url}, "targets": [{"column": "age"}],
        "init_from": str(tmp_path / "checkpoint"), "split": {"file": url}, "engine": {"precision": "fp32"},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(tree))

    def read(*overrides: str) -> FinetuneSettings:
        return load_settings(Call(str(config), list(overrides), World(0, 0, 1), Launcher()))

    begun = read()
    assert begun.split.file_sha256 == read_split_file(url).sha256
    write_run_files(begun, {"config": to_tree(begun), "data_hash": "d"})
    (tmp_path / "moved.csv").write_bytes(Path(url).read_bytes())
    check_same_run(read(f"split.file={tmp_path / 'moved.csv'}"), "d")
    changed = rows(source)
    changed.loc[changed["split"] == "val", "split"] = "test"
    write(changed, Path(url))
    assert main(["--config", str(config)]) == 1
    assert "split.file_sha256" in caplog.text
    with pytest.raises(ConfigError, match="the file is another one than the run began with"):
        read_split_file(url, begun.split.file_sha256)
