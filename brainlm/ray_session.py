"""The one place where Ray is started, and bounded fan-out over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from brainlm.errors import ConfigError


@contextmanager
def ray_session(address: str = "local", num_cpus: int | None = None, object_store_mb: int = 200) -> Iterator[Any]:
    """Connect to Ray for the length of a ``with`` block and yield the ``ray`` module.

    Parameters
    ----------
    address : str
        ``local`` starts a private Ray on this machine and ends it; ``auto`` joins the cluster that this program runs
        in (a submitted job); anything else is the address of a cluster.
    num_cpus, object_store_mb : int
        Of a local Ray: workers at a time, and the bound on shared memory.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError('Ray is not installed: pip install "brainlm[data]"') from error
    if ray.is_initialized():
        yield ray
        return
    # Ray's own usage reports and colours help nobody in a job's log.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options |= {
            "num_cpus": num_cpus or os.cpu_count(),
            "object_store_memory": object_store_mb * 1024**2,
            "include_dashboard": False,
        }
    ray.init(**options)
    try:
        yield ray
    finally:
        ray.shutdown()


def fan_out(
    ray: Any,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    max_in_flight: int,
    max_retries: int = 2,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for every task on Ray workers, a bounded number at a time.

    Yields
    ------
    (int, result)
        Position of the task and its result, in the order in which they finish. A lost worker is retried; an exception
        of the function itself is raised here, after the tasks in flight have been cancelled.
    """
    remote = ray.remote(num_cpus=1, max_retries=max_retries)(function)
    running: dict[Any, int] = {}
    waiting = iter(range(len(tasks)))
    try:
        while True:
            while len(running) < max_in_flight and (position := next(waiting, None)) is not None:
                running[remote.remote(*tasks[position])] = position
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield running.pop(reference), ray.get(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
