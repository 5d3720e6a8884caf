"""An evaluation as a job on a cluster that runs already: killed, submitted again, and the same to the last digit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from brainlm.dataset import Dataset
from eval.run import main

ROOT = Path(__file__).resolve().parents[2]
START_S, PATIENCE_S = 180, 450


def free_ports(number: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address that jobs are submitted to, of a head of its own; its processes are ended afterwards."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port, agent_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: the paths of sockets are bounded
        monkeypatch.setenv("RAY_TMPDIR", folder)  # a job looks for its node there, and not at another Ray's
        head = {
            "num_cpus": 2,
            "object_store_memory": 100 * 1024**2,
            "node_ip_address": ray.util.get_node_ip_address(),  # jobs are told this one, whatever it listens on
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "dashboard_agent_listen_port": agent_port,  # the usual one may belong to another Ray of this machine
        }
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            wait_for_jobs(f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            started.shutdown()


def wait_for_jobs(dashboard: str) -> None:
    """Wait until a head that has just started takes jobs."""
    until = time.monotonic() + START_S
    while True:
        try:
            JobSubmissionClient(dashboard).submit_job(entrypoint="true")
        except (RuntimeError, ConnectionError):
            assert time.monotonic() < until
            time.sleep(0.5)
        else:
            return


def submit(dashboard: str, words: list[str]) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-c", "from ray.scripts.scripts import main; main()", "job", "submit", "--address", dashboard,
        "--working-dir", str(ROOT), "--", sys.executable, "eval/run.py", *words,
    ]  # fmt: skip
    env = os.environ | {"RAY_JOB_START_TIMEOUT_SECONDS": str(PATIENCE_S)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def driver_of(out: Path) -> int:
    """Return the process of the evaluation that runs in the job."""
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, NotADirectoryError):
            continue
        if words[1:2] == [b"eval/run.py"] and f"out={out}".encode() in words:
            return int(folder.name)
    raise AssertionError(f"no evaluation into {out} runs")


def tables(out: Path) -> set[Path]:
    """Return the files that are written last: their units are complete."""
    beside = (".parcels.parquet", ".validation.parquet")
    return {path for path in (out / "subjects").glob("*.parquet") if not path.name.endswith(beside)}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # starting a cluster and two jobs, beside other tests
def test_a_killed_job_goes_on_where_it_was(
    dataset: Dataset, training_run: Path, dashboard: str, tmp_path: Path
) -> None:
    def words(out: Path, *more: str) -> list[str]:
        return [
            f"dataset={dataset.store.url}", f"checkpoints=[{training_run}]", f"out={out}", "report=false",
            "tasks=[reconstruction, forecasting]", "intervals={num_bootstrap: 50}",
            "reconstruction={mask_ratios: [0.3], shrinkages: [0.1], own_weights: [], noises: []}",
            "forecasting={horizons: [10], baselines: [mean, persistence, autoregression, LSTM], "
            "forecasters: {orders: [1, 2], fit: {steps: 200}}}",
            *more,
        ]  # fmt: skip

    assert main(words(tmp_path / "here", "ray.workers=0")) == 0
    there = words(tmp_path / "there", "ray.address=auto")
    first = submit(dashboard, there)
    until = time.monotonic() + PATIENCE_S
    while len(tables(tmp_path / "there")) < 2:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(driver_of(tmp_path / "there"), signal.SIGKILL)
    said, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 1, said
    done = {path: path.stat().st_mtime_ns for path in tables(tmp_path / "there")}
    complete = {path.name for path in tables(tmp_path / "here")}
    assert 2 <= len(done) < len(complete)

    second = submit(dashboard, there)
    said, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, said
    assert "units of work" in said
    assert {path.name for path in tables(tmp_path / "there")} == complete
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing was done twice
    assert (tmp_path / "there" / "results.json").read_bytes() == (tmp_path / "here" / "results.json").read_bytes()
