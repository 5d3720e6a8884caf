"""Training by `deepspeed --hostfile` over two hosts, of which one dies, or which no longer hear each other.

The hosts are namespaces of this machine, and ssh's server and ``pdsh`` are stand-ins: `tests.two_hosts` says what is
real.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.train.conftest import Trained, command, environment, metrics, weights
from tests.two_hosts import NAMES, Host, reason_why_not, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Config = Callable[[Path], Path]
OPTIONS = ("run.steps=60", "run.snapshot_every=4", "data.micro_batch_size=1")
TIMEOUT_S = 10.0
ENDS_WITHIN_S = 400.0  # on a busy machine; a minute on an idle one


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    if reason := reason_why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path) as made:
        yield made


class Training:
    """The same training run, to be started on one or both of the hosts. Each writes metrics to its own disk."""

    def __init__(self, folder: Path, hosts: dict[str, Host], write_config: Config) -> None:
        self.folder, self.storage, self.logs = folder, folder / "storage", folder / "logs"
        self.arguments = command(write_config(hosts[NAMES[0]].own / "run"), *OPTIONS)[1:]
        self.arguments += [f"run.storage={self.storage}", f"engine.timeout_s={TIMEOUT_S}"]
        self.logs.mkdir()
        self._num_started = 0
        (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        carried = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PATH")
        here = environment() | {"OMP_NUM_THREADS": "1"}
        (folder / ".deepspeed_env").write_text("".join(f"{k}={here[k]}\n" for k in carried if k in here))

    def start(self, host: Host, *options: str) -> tuple[subprocess.Popen[str], Path]:
        """Give the command of the documentation on a host; return the launcher, and where it writes."""
        self._num_started += 1
        log = self.logs / f"launcher-{self._num_started}.txt"
        launcher = ["deepspeed", "--hostfile", "hostfile", "--enable_each_rank_log", str(host.own / "logs"), *options]
        variables = environment() | {"OMP_NUM_THREADS": "1"}
        return host.start([*launcher, *self.arguments], log, variables, self.folder), log

    def wait_for_snapshot(self, launcher: subprocess.Popen[str], log: Path) -> None:
        deadline = time.monotonic() + ENDS_WITHIN_S
        while not list(self.storage.glob("snapshots/step-*/complete.json")):
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)


@pytest.fixture
def training(tmp_path: Path, hosts: dict[str, Host], write_config: Config) -> Training:
    return Training(tmp_path, hosts, write_config)


def said_on(host: Host) -> str:
    """Return what the ranks of a host have said, in all its runs."""
    return "\n".join(path.read_text() for path in sorted((host.disk / "logs").glob("*.log")))


def wait_until_idle(host: Host, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := host.processes():
        assert time.monotonic() < deadline, f"{left} still run on {host.name}; {said_on(host)}"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("dies", "stays", "said"),
    [
        ("host-b", "host-a", r"rank 0 cannot go on: rank 1 on host-b \(process \d+\) is silent"),
        ("host-a", "host-b", r"rank 1 cannot go on: rank 0 does not answer"),
    ],
    ids=["of rank 1", "of rank 0"],
)
def test_a_host_that_dies_is_named_and_the_other_one_goes_on_alone(
    dies: str, stays: str, said: str, hosts: dict[str, Host], training: Training, trained: Trained
) -> None:
    """With host-a rank zero is lost, and the launcher, and the only disk with metrics and manifest on it."""
    launcher, log = training.start(hosts["host-a"])
    training.wait_for_snapshot(launcher, log)
    hosts[dies].kill()
    wait_until_idle(hosts[stays], ENDS_WITHIN_S)
    assert launcher.wait(timeout=ENDS_WITHIN_S) != 0
    assert re.search(said, said_on(hosts[stays])), said_on(hosts[stays]) + log.read_text()
    assert not (training.storage / "done.json").exists()

    again, log = training.start(hosts[stays], "--include", stays)
    assert again.wait(timeout=ENDS_WITHIN_S) == 0, log.read_text() + said_on(hosts[stays])
    assert "resumed after step" in said_on(hosts[stays])
    undisturbed = trained(*OPTIONS, ranks=2)
    ours, theirs = metrics(hosts[stays].disk / "run"), metrics(undisturbed)
    assert ours[60]["loss"] == pytest.approx(theirs[60]["loss"], rel=1e-3)  # another order of summation, for 56 updates
    assert ours[60]["val_r2"] == pytest.approx(theirs[60]["val_r2"], abs=1e-2)
    expected = weights(undisturbed)
    for name, value in weights(hosts[stays].disk / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)
    if dies == "host-a":
        assert min(ours) > 4  # metrics begin where this host did


def test_a_link_that_goes_silent_ends_both_hosts_and_the_run_goes_on(
    hosts: dict[str, Host], training: Training, trained: Trained
) -> None:
    launcher, log = training.start(hosts["host-a"])
    training.wait_for_snapshot(launcher, log)
    hosts["host-b"].run("ip", "link", "set", "eth0", "down")
    assert launcher.wait(timeout=ENDS_WITHIN_S) != 0
    for host in hosts.values():
        wait_until_idle(host, ENDS_WITHIN_S)
    a, b = said_on(hosts["host-a"]), said_on(hosts["host-b"])
    assert re.search(r"rank 0 has not come on for \d+ s: rank 1 on host-b \(process \d+\) is silent", a), a
    assert re.search(r"rank 1 has not come on for \d+ s: rank 0 does not answer", b), b

    hosts["host-b"].run("ip", "link", "set", "eth0", "up")
    again, log = training.start(hosts["host-a"])
    assert again.wait(timeout=ENDS_WITHIN_S) == 0, log.read_text() + said_on(hosts["host-a"])
    expected = weights(trained(*OPTIONS, ranks=2))
    ours = weights(hosts["host-a"].disk / "run")
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())  # as many ranks: the same bits


def test_a_data_set_that_one_host_does_not_reach_ends_both(
    hosts: dict[str, Host], training: Training, dataset_url: str
) -> None:
    hosts["host-b"].run("mount", "-t", "tmpfs", "tmpfs", dataset_url)
    launcher, _ = training.start(hosts["host-a"])
    assert launcher.wait(timeout=ENDS_WITHIN_S) != 0  # ranks would wait for each other for ten minutes and more
    for host in hosts.values():
        wait_until_idle(host, ENDS_WITHIN_S)
        assert f"{dataset_url} holds no finished data set" in said_on(host)
    assert "rank 1 on host-b (process " in said_on(hosts["host-a"])
