"""Training on censored recordings: what is stored at censored timepoints changes no metric and no weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from brainlm.testing import write_synthetic_dataset
from tests.train.conftest import metrics, run

RANGES = ((0, 4), (23, 31), (48, 52))
TIMES = {"time", "windows_per_s", "tokens_per_s", "tflops_per_s", "mfu", "data_wait", "seconds_trained", "memory_gb"}


def test_what_is_stored_at_censored_timepoints_changes_nothing_in_training(
    tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    found = []
    for name, fill in (("interpolated", None), ("nonsense", 1e4)):
        url = str(tmp_path / f"data {name}")
        ids = [f"sub-{split}{i:03d}_task-rest" for split, n in (("train", 8), ("val", 3)) for i in range(n) if i != 1]
        write_synthetic_dataset(
            url, num_subjects={"train": 8, "val": 3, "test": 3}, num_timepoints=60, window_len=40, patch_len=10,
            censored=dict.fromkeys(ids, RANGES), censored_fill=fill,
        )  # fmt: skip
        out = tmp_path / name
        result = run(write_config(out), f"data.dataset={url}", "run.steps=4")
        assert result.returncode == 0, result.stderr
        rows = {step: {k: row[k] for k in row.keys() - TIMES} for step, row in metrics(out).items()}
        found.append((rows, load_file(out / "checkpoints" / "step-4" / "model.safetensors")))
    (rows, weights), (other_rows, other_weights) = found
    assert rows == other_rows
    assert rows[4]["val_r2"] < 1
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
