"""Pretraining goes on from a checkpoint: its weights, its sizes, and who it was trained on, with another data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from brainlm.checkpoint import seen_subjects
from brainlm.testing import write_synthetic_dataset
from tests.train.conftest import run, weights

Config = Callable[[Path], Path]
TINY_STEPS = ("optimizer.lr=1e-9", "run.steps=3")


def from_checkpoint(write_config: Config, out: Path, checkpoint: Path, dataset: str | None = None) -> Path:
    """Write a config that begins with a checkpoint, and leaves the model's sizes to it."""
    path = write_config(out)
    tree = yaml.safe_load(path.read_text())
    del tree["model"]
    tree["init_from"] = str(checkpoint)
    if dataset is not None:
        tree["data"]["dataset"] = dataset
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def other_cohort(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another cohort in another atlas."""
    url = str(tmp_path_factory.mktemp("other") / "dataset")
    write_synthetic_dataset(
        url, num_subjects={"train": 6, "val": 2, "test": 2}, num_parcels=17, num_timepoints=60, window_len=40,
        patch_len=10,
    )  # fmt: skip
    return url


def test_training_begins_with_the_weights_of_a_checkpoint(finished: Path, tmp_path: Path, write_config: Config) -> None:
    checkpoint = finished / "checkpoints" / "step-12"
    out = tmp_path / "run"
    config = from_checkpoint(write_config, out, checkpoint)
    result = run(config, *TINY_STEPS)
    assert result.returncode == 0, result.stderr
    ours, theirs = weights(out), weights(finished)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["init_from"]["checkpoint"] == str(checkpoint)
    assert manifest["init_from"]["weights_sha256"] == json.loads((finished / "done.json").read_text())["weights_sha256"]
    refused = run(write_config(tmp_path / "sizes"), f"init_from={checkpoint}")
    assert refused.returncode == 1
    assert "the sizes are those of init_from: leave the section model out" in refused.stderr


def test_weights_tied_to_one_atlas_are_not_trained_on_another(
    finished: Path, other_cohort: str, tmp_path: Path, write_config: Config
) -> None:
    config = from_checkpoint(write_config, tmp_path / "run", finished / "checkpoints" / "step-12", other_cohort)
    result = run(config, *TINY_STEPS)
    assert result.returncode == 1
    assert "does not have the parcels that" in result.stderr


def test_a_model_of_coordinates_is_trained_on_another_atlas_and_remembers_both_cohorts(
    other_cohort: str, tmp_path: Path, write_config: Config
) -> None:
    first = tmp_path / "first"
    result = run(write_config(first), "model.parcel_embedding=false", "run.steps=4")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "second"
    result = run(from_checkpoint(write_config, out, first / "checkpoints" / "step-4", other_cohort), *TINY_STEPS)
    assert result.returncode == 0, result.stderr
    assert "the data set differs from what" in result.stderr
    assert "17" in result.stderr
    ours, theirs = weights(out), weights(first)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    checkpoint = str(out / "checkpoints" / "step-3")
    asked = ["sub-train007", "sub-train000", "sub-test000"]  # of the first alone, of both, of none
    assert seen_subjects(checkpoint, asked) == {"sub-train007", "sub-train000"}
