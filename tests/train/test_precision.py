"""Float32 weights leave a run whatever precision and ZeRO stage it was trained with, and every step is told apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import metrics, run


@pytest.mark.parametrize("stage", [0, 1])
def test_a_bf16_run_exports_weights_that_are_not_rounded(
    stage: int, tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    out = tmp_path / "run"
    result = run(write_config(out), "engine.precision=bf16", f"engine.zero_stage={stage}", "run.steps=3")
    assert result.returncode == 0, result.stderr
    weights = load_file(out / "checkpoints" / "step-3" / "model.safetensors")
    trained = [w for name, w in weights.items() if name.endswith("weight") and w.ndim == 2]
    assert trained
    assert not any(torch.equal(w, w.bfloat16().float()) for w in trained)


def test_the_gradient_norm_does_not_depend_on_the_stage(tmp_path: Path, write_config: Callable[[Path], Path]) -> None:
    norms = []
    for stage in (0, 1):
        out = tmp_path / f"stage-{stage}"
        options = ("data.micro_batch_size=2", "run.steps=3", f"engine.zero_stage={stage}")
        result = run(write_config(out), *options)
        assert result.returncode == 0, result.stderr
        norms.append([row["grad_norm"] for row in metrics(out).values()])
    assert all(math.isfinite(norm) for norm in norms[0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
