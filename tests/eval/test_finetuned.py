"""The readout "fine-tuned": training runs as another program, and its predictions become answers to a problem."""

from __future__ import annotations

import gc
import io
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.errors import TrainingError
from brainlm.store import Store
from brainlm.targets import Target, TargetSettings
from brainlm.testing import small_model
from eval.clinical.finetuned import FineTuned, answer_of
from eval.clinical.people import People, find_people
from eval.clinical.problem import Problem, loss
from eval.clinical.settings import ClinicalSettings
from eval.cohort import Cohort
from tests.phenotypes import write_phenotype_dataset

ONCE_IN_TRAIN, ONCE_IN_TEST = 6, 1  # positions, among the people, of who has a diagnosis that nobody else has


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_phenotype_dataset(str(tmp_path_factory.mktemp("finetuned") / "dataset"))


@pytest.fixture(scope="module")
def checkpoint(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("pretrained") / "checkpoint")
    subjects = [entry.subject for entry in dataset.split("train").entries]
    save_checkpoint(folder, small_model(dataset.contract), {"step": 1}, subjects)
    return folder


@pytest.fixture(scope="module")
def people(dataset: Dataset, checkpoint: str) -> People:
    """Those that the checkpoint was not pretrained on; two of them have a diagnosis of their own."""
    cohort = replace(Cohort.of(dataset), pretrained=(checkpoint,))
    first = find_people(cohort, ClinicalSettings())
    table = pd.read_parquet(io.BytesIO(dataset.store.read_bytes("subjects.parquet")))
    table["diagnosis"] = table["sex"]
    for row, name in ((ONCE_IN_TRAIN, "X"), (ONCE_IN_TEST, "Y")):
        table.loc[table["subject"] == first.members[row].subject, "diagnosis"] = name
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    dataset.store.write_bytes("subjects.parquet", buffer.getvalue())
    return find_people(cohort, ClinicalSettings())


def problem_of(people: People, settings: TargetSettings, seed: int = 0) -> Problem:
    """Every fourth family is to be answered for, in an order that is not the data set's."""
    values = people.values(settings.column)
    names = sorted(set(people.groups.tolist()), key=people.groups.tolist().index)
    tested = set(names[1::4])
    rows = np.array([row for row, value in enumerate(values) if value is not None], dtype=np.int64)
    test = np.array([row for row in rows if people.groups[row] in tested], dtype=np.int64)
    train = np.setdiff1d(rows, test)
    target = Target.fit(settings, [values[row] for row in train])
    y, _ = target.encode([values[row] for row in train])
    return Problem(
        target=target, train=train, y=y.astype(np.float64), groups=people.groups[train], test=test[::-1].copy(),
        seed=seed,
    )  # fmt: skip


def write_config(path: Path, **sections: Any) -> str:
    """A user's configuration, with a split, targets and a folder that are none of the readout's."""
    tree: dict[str, Any] = {
        "run": {"out": "nowhere", "steps": 60, "log_every": 10},
        "data": {"dataset": "nowhere", "batch_size": 8, "windows_per_recording": 4},
        "init_from": "nowhere",
        "targets": [{"column": "nothing"}],
        "split": {"column": "mine"},
        "head": {"pooling": "mean", "dropout": 0.1},
        "encoder": {"dropout": 0.1},
        "optimizer": {"lr": 3e-3, "warmup_steps": 1},
        "engine": {"precision": "fp32"},
        "validation": {"every": 20, "patience": None},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def no_program(*arguments: object, **options: object) -> None:
    raise AssertionError("training was started")


def test_answers_are_the_predictions_in_the_order_of_the_problem(
    people: People, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(people, TargetSettings(column="score", transform="log1p_minmax"))
    method = FineTuned(people, checkpoint, write_config(tmp_path / "c.yaml"), str(tmp_path / "runs"))
    answer = method.answer(problem)
    (folder,) = (tmp_path / "runs").iterdir()
    table = pd.read_parquet(folder / "predictions.parquet").set_index("recording_id")

    def standardised(rows: Any) -> Any:
        x = np.array([table.loc[people.members[row].recording_id, "predicted_score"] for row in rows])
        target = problem.target
        return ((np.log1p(x) - target.offset) / target.scale - target.mean) / target.sd

    np.testing.assert_allclose(answer.values[:, 0], standardised(problem.test))
    _, val = problem.inner()[0]
    expected = loss(problem.target, problem.y[val], standardised(problem.train[val])[:, None])
    assert answer.validation_loss == pytest.approx(expected)
    assert answer.validation_loss < 0.7
    assert answer.chosen in {"step 20", "step 40", "step 60"}
    truth = problem.target.encode([people.values("score")[row] for row in problem.test])[0]
    assert np.corrcoef(answer.values[:, 0], truth)[0, 1] > 0.6

    split = pd.read_csv(folder / "split.tsv", sep="\t").set_index("recording_id")["split"]
    assert set(split.index[split == "test"]) == {people.members[row].recording_id for row in problem.test}
    assert set(split.index[split == "val"]) == {people.members[row].recording_id for row in problem.train[val]}
    assert len(split) == len(people)
    assert not (folder / "snapshots").exists()

    monkeypatch.setattr(subprocess, "run", no_program)
    again = method.answer(problem)
    np.testing.assert_array_equal(again.values, answer.values)
    with pytest.raises(AssertionError, match="training was started"):
        method.answer(replace(problem, seed=1))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on an S3 server over HTTP on the loopback interface."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    from tests.s3_server import CREDENTIALS

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("results")
    yield "s3://results"
    S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():  # s3fs leaves its connections to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    server.stop()


def test_an_unfinished_run_goes_on_and_rare_classes_have_answers(
    people: People, checkpoint: str, bucket: str, tmp_path: Path
) -> None:
    settings = TargetSettings(column="diagnosis", kind="classification", class_weights="balanced")
    for seed in range(20):  # until nobody that is trained on first has what a validation row has
        problem = problem_of(people, settings, seed)
        fit, val = problem.inner()[0]
        if set(problem.y[val]) - set(problem.y[fit]):
            break
    assert problem.target.classes == ("F", "M", "X")
    assert ONCE_IN_TEST in problem.test
    config = write_config(tmp_path / "c.yaml", run={"steps": 2, "max_hours": 1e-9, "log_every": 1})
    method = FineTuned(people, checkpoint, config, f"{bucket}/runs", untrained=True)
    with pytest.raises(TrainingError, match=r"(?s)stopped before its end; the same command goes on.*stopped after"):
        method.answer(problem)
    answer = method.answer(problem)
    store = Store(f"{bucket}/runs")
    (name,) = store.names()
    store = store.sub(name)
    assert "resumed after step 1" in store.read_bytes("finetune.log").decode()
    scores = store.read_json("scores.json")
    assert scores["untrained"] is True
    assert answer.chosen == f"step {scores['step']}"
    table = pd.read_parquet(io.BytesIO(store.read_bytes("predictions.parquet"))).set_index("recording_id")
    for row, found in zip(problem.test, answer.values, strict=True):
        recording_id = people.members[row].recording_id
        assert (recording_id in table.index) == (row != ONCE_IN_TEST)
        if row != ONCE_IN_TEST:
            expected = [table.loc[recording_id, f"probability_diagnosis_{label}"] for label in ("F", "M", "X")]
            np.testing.assert_array_equal(found, expected)
    assert answer.values.shape == (len(problem.test), 3)
    np.testing.assert_allclose(answer.values.sum(axis=1), 1, rtol=1e-5)
    split = pd.read_csv(io.BytesIO(store.read_bytes("split.tsv")), sep="\t").set_index("recording_id")["split"]
    assert split[people.members[ONCE_IN_TRAIN].recording_id] == "train"


def test_a_program_that_fails_is_repeated_in_its_own_words(people: People, checkpoint: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", head={"pooling": "most"})
    method = FineTuned(people, checkpoint, config, str(tmp_path / "runs"))
    with pytest.raises(
        TrainingError, match=r"(?s)age ended with exit status 1\. .*finetune\.log.*head\.pooling"
    ) as error:
        method.answer(problem_of(people, TargetSettings(column="age")))
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(folder / "finetune.log") in str(error.value)
    assert "head.pooling" in (folder / "finetune.log").read_text()


def test_what_training_cannot_learn_is_refused(people: People, checkpoint: str, tmp_path: Path) -> None:
    method = FineTuned(people, checkpoint, write_config(tmp_path / "c.yaml"), str(tmp_path / "runs"))
    problem = problem_of(people, TargetSettings(column="age"))
    with pytest.raises(ValueError, match="confounds cannot be removed"):
        method.answer(replace(problem, nuisance=np.zeros((len(people), 1))))
    with pytest.raises(ValueError, match="the training rows have other values of age than the data set"):
        method.answer(replace(problem, y=problem.y[::-1].copy()))


def test_a_class_that_training_did_not_know_has_no_probability() -> None:
    target = Target.fit(TargetSettings(column="d", kind="classification"), ["a", "b", "c"])
    found = answer_of(target, {"probability_d_a": 0.25, "probability_d_c": 0.75})
    assert found.tolist() == [0.25, 0.0, 0.75]
