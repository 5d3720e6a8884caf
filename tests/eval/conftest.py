"""A small data set with known truth, and a checkpoint on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.testing import small_model, write_synthetic_dataset
from eval.cohort import Cohort

WINDOW_LEN, PATCH_LEN = 40, 10
MISSING = {"sub-test001_task-rest": (3, 7)}
TRAINED_ON = "sub-train000"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(
        str(tmp_path_factory.mktemp("data") / "dataset"),
        num_subjects={"train": 16, "val": 4, "test": 5},
        num_timepoints=90,
        window_len=WINDOW_LEN,
        patch_len=PATCH_LEN,
        missing=MISSING,
        with_truth=True,
    )


@pytest.fixture(scope="session")
def cohort(dataset: Dataset) -> Cohort:
    return Cohort.of(dataset)


@pytest.fixture(scope="session")
def training_run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with two complete checkpoints and a newer one that is not."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    for step in (5, 10):
        model = small_model(dataset.contract, seed=step)
        save_checkpoint(str(folder / "checkpoints" / f"step-{step}"), model, {"step": step}, [TRAINED_ON])
    (folder / "checkpoints" / "step-20").mkdir()
    (folder / "checkpoints" / "step-20" / "model.safetensors").write_bytes(b"half")
    return folder
