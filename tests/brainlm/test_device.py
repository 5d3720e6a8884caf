"""Networks run where there is a GPU, and tasks share what there is; Ray is told of GPUs that this machine lacks."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from brainlm.device import find_device, gpus_of_each
from brainlm.errors import ConfigError
from brainlm.ray_session import fan_out, ray_session


class FakeRay:
    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_device("auto") == found
        assert find_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="PyTorch sees no GPU in this process"):
        find_device("cuda")


def test_workers_share_the_gpus_of_the_cluster() -> None:
    for gpus, workers, share in ((8, 8, 1), (8, 2, 1), (1, 2, 0.5), (2, 4, 0.5), (2, 3, 0.5), (3, 4, 0.5)):
        found = gpus_of_each(FakeRay(GPU=gpus), "auto", workers)
        assert found == share, (gpus, workers)
        assert int(1 / found) * gpus >= workers  # there is room for all of them at once
    assert gpus_of_each(FakeRay(GPU=8), "cpu", 8) == 0
    assert gpus_of_each(FakeRay(CPU=8), "auto", 8) == 0
    assert int(1 / gpus_of_each(FakeRay(GPU=1), "auto", 3)) == 3
    with pytest.raises(ConfigError, match="the Ray cluster has no GPU"):
        gpus_of_each(FakeRay(CPU=8), "cuda", 8)


def _shown(_: int) -> str:
    import time

    time.sleep(1)  # so that two tasks run at a time
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


def test_each_worker_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: the paths of sockets are bounded
        head: dict[str, Any] = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 100 * 1024**2}
        head |= {"include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            with ray_session(cluster.address) as ray:
                share = gpus_of_each(ray, "auto", 2)
                shown = dict(fan_out(ray, _shown, [(i,) for i in range(4)], max_in_flight=2, num_gpus=share))
        finally:
            cluster.shutdown()
    assert set(shown.values()) == {"0", "1"}
