"""Fan-out is bounded, gives every result once, survives a lost worker and passes errors on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from brainlm.errors import ConfigError
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

    def remote(self, **options: Any) -> Callable[[Callable], Any]:
        self.options = options

        def wrap(function: Callable) -> Any:
            ray = self

            class Remote:
                @staticmethod
                def remote(*args: Any) -> int:
                    ray.started += 1
                    ray.in_flight[ray.started] = lambda: function(*args)
                    ray.most_in_flight = max(ray.most_in_flight, len(ray.in_flight))
                    return ray.started

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
    ray = FakeRay()
    tasks = [(i, 10) for i in range(12)]
    found = dict(fan_out(ray, lambda a, b: a * b, tasks, max_in_flight=max_in_flight, max_retries=5))
    assert found == {i: 10 * i for i in range(12)}
    assert ray.most_in_flight == min(max_in_flight, 12)
    assert ray.options == {"num_cpus": 1, "max_retries": 5}
    assert ray.cancelled == []


def test_nothing_to_do_gives_nothing() -> None:
    assert list(fan_out(FakeRay(), print, [], max_in_flight=2)) == []


def test_an_error_is_raised_and_the_rest_is_cancelled() -> None:
    ray = FakeRay()

    def fail(number: int) -> int:
        raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match="task 2"):
        list(fan_out(ray, fail, [(i,) for i in range(9)], max_in_flight=3))
    assert ray.cancelled == [1, 2]
    assert ray.started == 3


def test_a_consumer_that_stops_cancels_the_rest() -> None:
    ray = FakeRay()
    results = fan_out(ray, abs, [(i,) for i in range(9)], max_in_flight=3)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert ray.cancelled == [1, 2]


def test_a_missing_ray_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "brainlm\[data\]"'), ray_session():
        pass


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with ray_session("local", num_cpus=2) as ray:
        yield ray


def test_a_lost_worker_is_replaced(session: Any, tmp_path: Path) -> None:
    died = str(tmp_path / "died")

    def die_once(number: int) -> tuple[int, int]:
        if number == 1 and not os.path.exists(died):
            open(died, "w").close()
            os._exit(1)
        return number, os.getpid()

    found = dict(fan_out(session, die_once, [(i,) for i in range(4)], max_in_flight=2))
    assert {position: number for position, (number, _) in found.items()} == {i: i for i in range(4)}
    assert os.path.exists(died)
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_an_error_of_a_task_keeps_its_type(session: Any) -> None:
    def fail(name: str) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="sub-07"):
        list(fan_out(session, fail, [("sub-07",)], max_in_flight=1))


def test_a_session_inside_a_session_is_the_same_one(session: Any) -> None:
    with ray_session("local", num_cpus=1) as inner:
        assert inner.available_resources().get("CPU", 0) <= inner.cluster_resources()["CPU"] == 2
    assert session.is_initialized()
