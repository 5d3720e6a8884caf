"""A small data set, and training runs on it through the real entry in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from brainlm.testing import write_synthetic_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("train") / "dataset")
    write_synthetic_dataset(
        url, num_subjects={"train": 8, "val": 3, "test": 3}, num_timepoints=60, window_len=40, patch_len=10,
        missing={"sub-train001_task-rest": (2, 5)},
    )  # fmt: skip
    return url


@pytest.fixture(scope="session")
def base_config(dataset_url: str) -> dict[str, dict[str, object]]:
    return {
        "run": {"steps": 12, "seed": 3, "log_every": 1, "snapshot_every": 4},
        "data": {"dataset": dataset_url, "batch_size": 4, "windows_per_recording": 2},
        "model": {
            "preset": "tiny", "width": 16, "mlp_width": 32, "decoder_width": 16, "decoder_mlp_width": 32,
            "window_len": 40, "patch_len": 10,
        },
        "masks": {"ratios": [0.5, 0.75], "num_decoded": 20},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "engine": {"threads": 1, "precision": "fp32"},
        "validation": {"every": 6},
    }  # fmt: skip


@pytest.fixture(scope="session")
def write_config(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, dict[str, object]]
) -> Callable[[Path], Path]:
    def write(out: Path) -> Path:
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        tree = {**base_config, "run": {**base_config["run"], "out": str(out)}}
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def command(config: Path, *overrides: str, ranks: int | None = None) -> list[str]:
    """Return the command of a run: plain Python, or the DeepSpeed launcher with some ranks."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_accelerators", str(ranks), "--master_port", str(29600 + os.getpid() % 1000),
        ]  # fmt: skip
    return [*launcher, str(ROOT / "train" / "pretrain.py"), "--config", str(config), *overrides]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def run(config: Path, *overrides: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *overrides, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=300
    )


def process_of_rank(rank: int, config: Path) -> int:
    """Return the process id of a rank of the training run with this config."""
    for folder in Path("/proc").iterdir():
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config).encode() in arguments and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"there is no rank {rank}")


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def metrics(out: Path) -> dict[int, dict[str, float]]:
    """Return the logged metrics by step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[[Path], Path]) -> Trained:
    """Give undisturbed training runs of 12 steps, each made once: overrides, and the number of ranks."""
    made: dict[tuple[object, ...], Path] = {}

    def train(*overrides: str, ranks: int | None = None) -> Path:
        key = (*overrides, ranks)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / "undisturbed"
            result = run(write_config(out), *overrides, ranks=ranks)
            assert (out / "done.json").is_file(), result.stdout + result.stderr
            made[key] = out
        return made[key]

    return train


@pytest.fixture(scope="session")
def finished(trained: Trained) -> Path:
    """An undisturbed run of 12 steps in one process."""
    return trained()


def stopped_after(finished: Path, step: int, out: Path) -> Path:
    """Make `out` look as if the run in `finished` had been killed after the snapshot of a step."""
    shutil.copytree(finished, out)
    (out / "done.json").unlink()
    shutil.rmtree(out / "checkpoints")
    for path in (out / "snapshots").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    assert (out / "snapshots" / f"step-{step}" / "complete.json").is_file()
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a finished run has written."""
    return load_file(Path(json.loads((out / "done.json").read_text())["checkpoint"]) / "model.safetensors")
