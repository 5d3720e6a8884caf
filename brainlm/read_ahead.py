"""Read what comes next in a thread, while what came before is worked on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
CLOSE_WITHIN_S = 1.0  # then a read that hangs is left behind, in a thread that does not keep the process alive


def read_ahead(
    read: Callable[[int], T], first: int, last: int, waited: Callable[[float], None], prefetch: int = 2
) -> Iterator[T]:
    """Yield ``read(first)`` to ``read(last - 1)``, read by a thread that is up to `prefetch` items ahead.

    Parameters
    ----------
    waited : callable
        Is told, for each item, the seconds that were spent waiting for it.
    """
    ahead: queue.Queue[T | BaseException] = queue.Queue(maxsize=prefetch)
    stopped = threading.Event()

    def work() -> None:
        try:
            for number in range(first, last):
                if stopped.is_set():
                    return
                ahead.put(read(number))
        except BaseException as error:  # handed to the consumer, which raises it
            ahead.put(error)

    thread = threading.Thread(target=work, name="brainlm-loader", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            started = time.perf_counter()
            item = ahead.get()
            waited(time.perf_counter() - started)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        deadline = time.monotonic() + CLOSE_WITHIN_S
        while thread.is_alive() and time.monotonic() < deadline:  # a full queue must not hold it
            with suppress(queue.Empty):
                ahead.get_nowait()
            thread.join(timeout=0.01)
