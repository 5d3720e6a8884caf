"""The one place where Ray is started, and bounded fan-out over it."""

from __future__ import annotations

import logging
import os
import reprlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from brainlm.errors import BrainLMError, ConfigError

logger = logging.getLogger(__name__)

# Of `ray.exceptions`: the task itself did not fail, where it ran did.
LOST = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError")
GONE = ("LocalRayletDiedError", "RaySystemError", "RpcError")  # nothing more can run

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_S, JOIN_S = 10, 45
JOIN = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='error'); ray.shutdown()"


@contextmanager
def ray_session(address: str = "local", num_cpus: int | None = None, object_store_mb: int = 200) -> Iterator[Any]:
    """Connect to Ray for the length of a ``with`` block and yield the ``ray`` module.

    Parameters
    ----------
    address : str
        ``local`` starts a private Ray on this machine and ends it, also when this process is killed; ``auto`` joins
        the cluster that this program runs in (a submitted job); anything else is the address of a cluster.
    num_cpus, object_store_mb : int
        Of a local Ray: workers at a time, and the bound on shared memory.

    Raises
    ------
    ConfigError
        If Ray is not installed, or there is no cluster at `address` that this machine can join.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError('Ray is not installed: pip install -e ".[data]"') from error
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
    else:
        _check_cluster(ray, address)
    ray.init(**options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_cluster(ray: Any, address: str) -> None:
    """Raise `ConfigError` unless a cluster can be joined: Ray itself would try for hours, and cannot be stopped.

    Whether anything listens is asked first, and then another process joins, which can be ended.
    """
    if address == "auto" and "RAY_ADDRESS" in os.environ:  # a submitted job, which its own cluster has started
        return
    what_to_do = (
        "Look at `ray status` on the cluster's head, and give the address and port that `ray start --head` printed "
        "(not the dashboard's); on this machine, ray.address=local needs no cluster"
    )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"ray.address: expected local, auto, or HOST:PORT of a cluster, found {address!r}")
        host, asked = host.strip("[]"), host
        if host in LOOPBACK and "://" not in address:
            host = ray.util.get_node_ip_address()  # what Ray makes of it
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            meant = "" if host == asked.strip("[]") else f" (which Ray takes for {host}:{port})"
            raise ConfigError(
                f"ray.address: expected a Ray cluster at {address}{meant}, found nothing that answers there ({error}). "
                f"{what_to_do}; a head started with --node-ip-address listens at that address alone"
            ) from error
    try:
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, address], capture_output=True, text=True, errors="replace", timeout=JOIN_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"ray.address: expected a Ray cluster at {address} that this machine can join, found none within {JOIN_S} "
            f"s. {what_to_do}"
        ) from error
    if joined.returncode != 0:
        said = joined.stderr.strip().splitlines() or [f"exit status {joined.returncode}"]
        raise ConfigError(
            f"ray.address: expected a Ray cluster at {address} that this machine can join, found: {said[-1][:300]}. "
            f"{what_to_do}"
        )


def fan_out(
    ray: Any,
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    max_in_flight: int,
    max_retries: int = 2,
    num_gpus: float = 0.0,
    when_lost: Callable[[int, str], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function(*task)`` for every task on Ray workers, a bounded number at a time.

    Parameters
    ----------
    num_gpus : float
        Share of a GPU that each task takes.
    when_lost : callable, optional
        Given the position of a task that loses its worker again and again, and why in words; what it returns is that
        task's result. Default: the work ends with an error.

    Yields
    ------
    (int, result)
        Position of the task and its result, in the order in which they finish.

    Raises
    ------
    BrainLMError
        If a task has lost its worker more than `max_retries` times (killed, out of memory, its machine gone); the
        message names the task. Up to then it is given to another worker.
    Exception
        What the function itself raised, as it raised it: trying again would not help.

    Notes
    -----
    When this ends early, for whatever reason, the tasks in flight are cancelled. Losses are counted here, because Ray
    would repeat a task that it killed for its memory for ever.
    """
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=0)(function)
    lost_kinds = tuple(getattr(ray.exceptions, name) for name in LOST)
    gone_kinds = tuple(getattr(ray.exceptions, name) for name in GONE)
    running: dict[Any, int] = {}
    waiting = iter(range(len(tasks)))
    losses: dict[int, int] = {}
    try:
        while True:
            while len(running) < max_in_flight and (position := next(waiting, None)) is not None:
                running[remote.remote(*tasks[position])] = position
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                position = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # without the worker's traceback in the message
                    raise error.cause from error
                except (*lost_kinds, *gone_kinds) as error:
                    losses[position] = losses.get(position, 0) + 1
                    task = _in_words(function, tasks, position)
                    is_last = losses[position] > max_retries
                    if is_last and when_lost is not None and not isinstance(error, gone_kinds):
                        yield position, when_lost(position, _why_lost(task, losses[position], error))
                        continue
                    if is_last or isinstance(error, gone_kinds):
                        raise BrainLMError(_why_lost(task, losses[position], error)) from error
                    logger.warning("%s lost its worker (%s); it is given to another one", task, type(error).__name__)
                    running[remote.remote(*tasks[position])] = position
                    continue
                yield position, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _in_words(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], position: int) -> str:
    short = reprlib.Repr()
    short.maxother = short.maxstring = 100
    arguments = ", ".join(
        short.repr(argument) for argument in tasks[position] if type(argument).__name__ != "ObjectRef"
    )
    return f"task {position + 1} of {len(tasks)}, {getattr(function, '__name__', function)}({arguments})"


def _why_lost(task: str, times: int, error: Exception) -> str:
    kind = type(error).__name__
    if kind in GONE:
        return f"Ray itself has ended while {task} was running ({kind}): run again; what is finished stays finished"
    reason = (
        "it used too much memory" if kind == "OutOfMemoryError" else "killed, out of memory, or its machine is gone"
    )
    return (
        f"{task} lost its worker {times} times ({kind}: {reason}). Look at its input, or give workers more memory or "
        "fewer CPUs (ray.num_cpus), and run again: what is finished stays finished"
    )
