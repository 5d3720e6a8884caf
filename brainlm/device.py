"""Where networks run: ``auto`` is a GPU where there is one, and Ray workers share the GPUs of their cluster."""

from __future__ import annotations

from typing import Any, Literal

from brainlm.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def find_device(asked: str) -> str:
    """Return ``cuda`` or ``cpu`` for what was asked, as this process has it.

    Raises
    ------
    ConfigError
        If ``cuda`` is asked for, and PyTorch sees no GPU here.
    """
    import torch

    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError(
            "device=cuda: PyTorch sees no GPU in this process; look at torch.cuda.is_available() and "
            "CUDA_VISIBLE_DEVICES there, or set device=cpu"
        )
    return "cpu"


def gpus_of_each(ray: Any, device: str, workers: int) -> float:
    """Return the share of a GPU that each of `workers` tasks is given: Ray shows a task the GPUs of its share alone.

    Up to one each; where there are fewer GPUs than workers, an equal part, so that all workers have work.

    Raises
    ------
    ConfigError
        If ``cuda`` is asked for, and the cluster has no GPU.
    """
    if device == "cpu":
        return 0.0
    gpus = float(ray.cluster_resources().get("GPU", 0.0))
    if gpus < 1 and device == "cuda":
        raise ConfigError("device=cuda: the Ray cluster has no GPU (see `ray status`); set device=cpu or auto")
    if gpus >= workers:
        return 1.0
    parts = -(-workers // int(gpus)) if gpus >= 1 else 0  # workers on each GPU
    return int(10_000 / parts) / 10_000 if parts else 0.0
