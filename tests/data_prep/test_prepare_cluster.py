"""Preparation joins a Ray cluster that runs already, by its address, and leaves it running."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from brainlm.dataset import open_dataset
from data_prep import work

NUM_CPUS = 2


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head of its own, in a folder of its own; its processes are ended afterwards."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: the paths of sockets are bounded
        head = {
            "num_cpus": NUM_CPUS,
            "object_store_memory": 100 * 1024**2,
            "include_dashboard": False,
            "temp_dir": folder,
        }
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield started
        finally:
            started.shutdown()


def test_a_running_cluster_prepares_the_same_bytes(toy, rng, cluster, tree_bytes, monkeypatch):
    joined = []
    fan_out = work.fan_out

    def watched(session: Any, *arguments: Any, **more: Any) -> Any:
        joined.append((session.get_runtime_context().gcs_address, int(session.cluster_resources()["CPU"])))
        return fan_out(session, *arguments, **more)

    monkeypatch.setattr(work, "fan_out", watched)
    here = toy.settings(toy.write_table(rng), out=str(toy.folder / "here"))
    there = here | {"out": str(toy.folder / "there")}
    assert toy.prepare(here, "ray.address=off") == 0
    assert joined == []
    assert toy.prepare(there, f"ray.address={cluster.address}") == 0
    assert set(joined) == {(cluster.address, NUM_CPUS)}
    assert not ray.is_initialized()
    assert {"raylet", "gcs_server"} <= {kind for kind, _ in cluster.head_node.live_processes()}
    assert open_dataset(there["out"]).content_hash == open_dataset(here["out"]).content_hash
    assert tree_bytes(Path(there["out"])) == tree_bytes(Path(here["out"]))
