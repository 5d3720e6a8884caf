"""Fan-out is bounded, gives every result once, survives a lost worker and passes errors on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from brainlm import ray_session as ray_session_module
from brainlm.errors import BrainLMError, ConfigError, StoreError
from brainlm.ray_session import fan_out, ray_session


class FakeRay:
    """Enough of Ray to count what is in flight; a task runs when it is waited for, the newest first."""

    def __init__(self) -> None:
        self.in_flight: dict[int, Callable[[], Any]] = {}
        self.most_in_flight = 0
        self.started = 0
        self.results: dict[int, Any] = {}
        self.cancelled: list[int] = []
        self.options: dict[str, Any] = {}
        self.exceptions = ray.exceptions

    def remote(self, **options: Any) -> Callable[[Callable], Any]:
        self.options = options

        def wrap(function: Callable) -> Any:
            fake = self

            class Remote:
                @staticmethod
                def remote(*args: Any) -> int:
                    fake.started += 1
                    fake.in_flight[fake.started] = lambda: function(*args)
                    fake.most_in_flight = max(fake.most_in_flight, len(fake.in_flight))
                    return fake.started

            return Remote

        return wrap

    def wait(self, references: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        assert num_returns == 1
        newest = max(references)
        self.results[newest] = self.in_flight.pop(newest)
        return [newest], [r for r in references if r != newest]

    def get(self, reference: int) -> Any:
        return self.results[reference]()

    def cancel(self, reference: int, force: bool) -> None:
        assert force
        self.cancelled.append(reference)


@pytest.mark.parametrize("max_in_flight", [1, 3, 50])
def test_no_more_tasks_are_in_flight_than_allowed(max_in_flight: int) -> None:
    fake = FakeRay()
    tasks = [(i, 10) for i in range(12)]
    found = dict(fan_out(fake, lambda a, b: a * b, tasks, max_in_flight=max_in_flight))
    assert found == {i: 10 * i for i in range(12)}
    assert fake.most_in_flight == min(max_in_flight, 12)
    assert fake.cancelled == []


def test_nothing_to_do_gives_nothing() -> None:
    assert list(fan_out(FakeRay(), print, [], max_in_flight=2)) == []


def test_an_error_is_raised_and_the_rest_is_cancelled() -> None:
    fake = FakeRay()

    def fail(number: int) -> int:
        raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match="task 2"):
        list(fan_out(fake, fail, [(i,) for i in range(9)], max_in_flight=3))
    assert fake.cancelled == [1, 2]
    assert fake.started == 3


def test_a_consumer_that_stops_cancels_the_rest() -> None:
    fake = FakeRay()
    results = fan_out(fake, abs, [(i,) for i in range(9)], max_in_flight=3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert fake.cancelled == [1, 2]


def test_a_missing_ray_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[data\]"'), ray_session():
        pass


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with ray_session("local", num_cpus=2) as started:
        yield started


def test_a_killed_worker_is_replaced_and_what_is_finished_stays_so(session: Any, tmp_path: Path) -> None:
    folder = str(tmp_path)

    def work(number: int) -> tuple[int, int]:
        with open(f"{folder}/started-{number}", "a+") as file:
            print(os.getpid(), file=file)
            file.seek(0)
            starts = len(file.readlines())
        if number == 1 and starts < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number, os.getpid()

    found = dict(fan_out(session, work, [(i,) for i in range(6)], max_in_flight=2))
    assert {position: number for position, (number, _) in found.items()} == {i: i for i in range(6)}
    starts = {number: len((tmp_path / f"started-{number}").read_text().split()) for number in range(6)}
    assert starts == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1, 5: 1}
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_a_task_that_always_loses_its_worker_is_named(session: Any, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def die(name: str, number: int) -> None:
        with open(log, "a") as file:
            print(name, file=file)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(BrainLMError, match=r"^task 1 of 1, die\('sub-07', 3\) lost its worker 2 times") as caught:
        list(fan_out(session, die, [("sub-07", 3)], max_in_flight=1, max_retries=1))
    assert "what is finished stays finished" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert (tmp_path / "log").read_text().split() == ["sub-07"] * 2


def test_a_task_that_always_loses_its_worker_can_have_a_result_of_its_own(session: Any) -> None:
    def die_on(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    told: list[str] = []

    def when_lost(position: int, why: str) -> int:
        told.append(why)
        return -position

    found = dict(fan_out(session, die_on, [(0,), (1,), (2,)], max_in_flight=2, max_retries=1, when_lost=when_lost))
    assert found == {0: 0, 1: -1, 2: 2}
    assert len(told) == 1
    assert "die_on(1) lost its worker 2 times" in told[0]


def test_the_message_of_an_error_is_that_of_the_task(session: Any) -> None:
    def fail() -> None:
        raise StoreError("cannot write s3://cohort/a: the disk is full")

    with pytest.raises(StoreError) as caught:
        list(fan_out(session, fail, [()], max_in_flight=1))
    assert type(caught.value) is StoreError
    assert str(caught.value) == "cannot write s3://cohort/a: the disk is full"


def test_an_error_of_a_task_keeps_its_type(session: Any) -> None:
    def fail(name: str) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="sub-07"):
        list(fan_out(session, fail, [("sub-07",)], max_in_flight=1))


def test_a_session_inside_a_session_is_the_same_one(session: Any) -> None:
    with ray_session("local", num_cpus=1) as inner:
        assert inner.available_resources().get("CPU", 0) <= inner.cluster_resources()["CPU"] == 2
    assert session.is_initialized()


TOO_LARGE = """
import time
from brainlm.errors import BrainLMError
from brainlm.ray_session import fan_out, ray_session

def work(name):
    data = bytearray(300_000_000)
    time.sleep(60)

if __name__ == "__main__":
    with ray_session("local", num_cpus=1) as ray:
        try:
            list(fan_out(ray, work, [("sub-07",)], max_in_flight=1, max_retries=1))
        except BrainLMError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_task_that_is_killed_for_its_memory_is_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TOO_LARGE)
    variables = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_memory_usage_threshold": "0.01",  # any worker is too large
        "RAY_memory_monitor_refresh_ms": "100",
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("task 1 of 1, work('sub-07') lost its worker 2 times (OutOfMemoryError"), done.stderr


PROGRAM = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it
import os, sys, time
from brainlm.ray_session import fan_out, ray_session

def work(folder, number):
    open(f"{folder}/{number}", "w").close()
    time.sleep(600)

if __name__ == "__main__":
    with ray_session("local", num_cpus=2) as ray:
        list(fan_out(ray, work, [(sys.argv[1], i) for i in range(4)], max_in_flight=4))
"""
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # Ray ends these a minute after the rest


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A program in the middle of its fan-out, and all processes that it has started."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "started").mkdir()
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "started")]
    # In a session of its own, as a shell starts a job: a signal to its group is what Ctrl-C sends.
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 90
        while len(list((tmp_path / "started").iterdir())) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert {"raylet", "gcs_server", "ray::work"} <= {child.name() for child in children}
        yield process, children
        for child in [process, *children]:
            if child.poll() is None if isinstance(child, subprocess.Popen) else child.is_running():
                child.kill()


def test_ctrl_c_ends_everything_promptly(driver: tuple[subprocess.Popen, list[psutil.Process]]) -> None:
    process, children = driver
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    assert time.monotonic() - begin < 20


def test_a_killed_driver_leaves_no_worker_behind(driver: tuple[subprocess.Popen, list[psutil.Process]]) -> None:
    process, children = driver
    process.kill()
    working = [child for child in children if child.name() not in AGENTS]
    _, left = psutil.wait_procs(working, timeout=30)
    assert left == []


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind(driver: tuple[subprocess.Popen, list[psutil.Process]]) -> None:
    process, children = driver
    process.kill()
    _, left = psutil.wait_procs(children, timeout=180)
    assert left == []


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ray_session` connect, though the session of the tests above is there."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def test_an_address_where_nothing_listens_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    begin, port = time.monotonic(), free_port()
    expected = rf"cluster at 127\.0\.0\.1:{port}.* nothing that answers .*`ray status`"
    with pytest.raises(ConfigError, match=expected), ray_session(f"127.0.0.1:{port}"):
        pass
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:70000", "head:port"])
def test_an_address_is_a_host_and_a_port(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    with pytest.raises(ConfigError, match="expected local, auto, or HOST:PORT"), ray_session(address):
        pass


def test_something_else_that_listens_is_an_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    monkeypatch.setattr(ray_session_module, "JOIN_S", 6)
    with socket.create_server(("", 0)) as listener:  # it accepts, and says nothing
        port = listener.getsockname()[1]
        expected = "that this machine can join, found none within 6 s"
        with pytest.raises(ConfigError, match=expected), ray_session(f"localhost:{port}"):
            pass


def test_a_head_that_listens_elsewhere_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes 127.0.0.1 for this machine's other address, where such a head does not listen."""
    alone(monkeypatch)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        head = {
            "num_cpus": 1,
            "object_store_memory": 100 * 1024**2,
            "include_dashboard": False,
            "temp_dir": folder,
            "node_ip_address": "127.0.0.1",
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            begin = time.monotonic()
            with pytest.raises(ConfigError, match="--node-ip-address"), ray_session(cluster.address):
                pass
            assert time.monotonic() - begin < 60
        finally:
            cluster.shutdown()
