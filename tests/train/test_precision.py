"""Float32 weights leave a run whatever precision and ZeRO stage it was trained with, and every step is told apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import environment, metrics, run, weights


def test_a_bf16_run_exports_weights_that_are_not_rounded(tmp_path: Path, write_config: Callable[[Path], Path]) -> None:
    out = tmp_path / "run"
    result = run(write_config(out), "engine.precision=bf16", "run.steps=3")
    assert result.returncode == 0, result.stderr
    weights = load_file(out / "checkpoints" / "step-3" / "model.safetensors")
    trained = [w for name, w in weights.items() if name.endswith("weight") and w.ndim == 2]
    assert trained
    assert not any(torch.equal(w, w.bfloat16().float()) for w in trained)


POISONED = """
import sys
from train import pretrain

first_weights = pretrain.first_weights

def poisoned(settings, dataset):
    first = first_weights(settings, dataset)
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * float("nan") if len(calls) == 6 else gradient

    first.model.decoder_pred.weight.register_hook(hook)
    return first

pretrain.first_weights = poisoned
sys.exit(pretrain.main(sys.argv[1:]))
"""


def poisoned_run(out: Path, write_config: Callable[[Path], Path], *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", POISONED, "--config", str(write_config(out)), *overrides]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
)
def test_a_step_that_is_not_finite_is_left_out(
    precision: str, stage: int, tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    out = tmp_path / "run"
    result = poisoned_run(out, write_config, f"engine.precision={precision}", f"engine.zero_stage={stage}")
    assert result.returncode == 0, result.stderr
    assert "the gradient of step 6 is not finite: the weights were not changed by it" in result.stderr
    rows = metrics(out)
    assert [rows[step]["num_skipped"] for step in (5, 7, 12)] == [0, 1, 1]
    assert 6 not in rows or "loss" not in rows[6]  # log_every is 1: there was nothing to log but validation
    assert all(bool(value.isfinite().all()) for value in weights(out).values())


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 2)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(
    precision: str, stage: int, tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    out = tmp_path / "run"
    options = (f"engine.precision={precision}", f"engine.zero_stage={stage}", "run.max_skipped=0")
    result = poisoned_run(out, write_config, *options)
    assert result.returncode == 1, result.stderr
    assert "the gradient of step 6 is not finite" in result.stderr
    assert [p.name for p in (out / "snapshots").glob("step-*")] == ["step-4"]
    again = run(write_config(out), f"engine.precision={precision}", f"engine.zero_stage={stage}")
    assert again.returncode == 0
    assert "resumed after step 4" in again.stderr
