"""Where tasks run: on Ray workers, or in this process; and how their progress is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

from brainlm.ray_session import fan_out, ray_session
from brainlm.store import Store
from data_prep.process_memory import giving_back_memory
from data_prep.settings import RaySettings

IN_FLIGHT_PER_CPU = 2
PLAIN_LINES = 10  # of progress, where the output is no terminal


class Tasks(Sequence[tuple[Any, ...]]):
    """The arguments of many tasks, each made when it is asked for: together they are as large as a data set's tables.

    Parameters
    ----------
    num : int
    make : callable
        Returns the arguments of task 0 to `num` - 1.
    """

    def __init__(self, num: int, make: Callable[[int], tuple[Any, ...]]) -> None:
        self._numbers, self._make = range(num), make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, ...] | Sequence[tuple[Any, ...]]:
        if isinstance(index, slice):
            return [self._make(number) for number in self._numbers[index]]
        return self._make(self._numbers[index])


class Workers:
    """Run a function over many arguments."""

    def __init__(self, ray: Any | None) -> None:
        self._ray = ray

    def share(self, value: Any) -> Any:
        """Return what to pass to tasks instead of `value`, so that it travels once."""
        return value if self._ray is None else self._ray.put(value)

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], label: str) -> list[Any]:
        """Return the results in the order of the tasks."""
        results: list[Any] = [None] * len(tasks)
        for position, result in self.stream(function, tasks, label):
            results[position] = result
        return results

    def stream(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        label: str,
        when_lost: Callable[[int, str], Any] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield position and result of each task as it finishes, so that nobody need hold them all.

        `when_lost` makes the result of a task that kills every worker (`brainlm.ray_session.fan_out`).
        """
        show = _Progress(label, len(tasks))
        for position, result in self._stream(function, tasks, when_lost):
            show.one_more()
            yield position, result
        show.end()

    def _stream(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        when_lost: Callable[[int, str], Any] | None,
    ) -> Iterator[tuple[int, Any]]:
        if self._ray is None:
            yield from ((position, function(*task)) for position, task in enumerate(tasks))
            return
        cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        in_flight = IN_FLIGHT_PER_CPU * cpus
        work = giving_back_memory(function)
        yield from fan_out(self._ray, work, tasks, max_in_flight=in_flight, when_lost=when_lost)


@contextmanager
def workers(settings: RaySettings, out: Store) -> Iterator[Workers]:
    """Start what the settings ask for. What is in memory can be written from this process alone."""
    if settings.address == "off" or out.url.startswith("memory://"):
        yield Workers(None)
        return
    with ray_session(settings.address, settings.num_cpus, settings.object_store_mb) as ray:
        yield Workers(ray)


class _Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, file=sys.stderr)

    def one_more(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._done * PLAIN_LINES // self._total > (self._done - 1) * PLAIN_LINES // self._total:
            print(f"{self._label}: {self._done} of {self._total}", flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
