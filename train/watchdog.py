"""Ends a rank that waits for another in vain, and says for which.

A peer that hangs, or whose link goes silent, holds every rank in a collective, and neither gloo nor the launcher ends
that. Here a thread of each rank tells the others, through a store of rank zero, how far it is. A rank that has not come
on for too long looks who is behind, or silent, and leaves; the launcher then ends the rest.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from brainlm.errors import TrainingError
from brainlm.world import World

logger = logging.getLogger(__name__)

EXIT_STATUS = 75  # "temporary failure": the same command goes on from the newest snapshot
PARTS = 10  # of the time allowed: how often a rank tells of itself
MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 10.0
ANSWER_WITHIN_S = 5.0
CLOSE_WITHIN_S = 1.0  # beyond the time that the store may take


class LostRankError(TrainingError):
    """Another rank is gone; the same command goes on from the newest snapshot."""


def is_of_a_link(error: RuntimeError) -> bool:
    """Whether torch says by this error that a connection to another rank is gone; gloo's have no type of their own."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


class Watchdog:
    """Watches this process. `beat` is called whenever it comes on.

    Parameters
    ----------
    timeout_s : float
        How long this process may go without a beat.
    from_rank_zero : callable
        Gives rank zero's value to every rank; called once, here, by all ranks together.
    """

    def __init__(self, world: World, timeout_s: float, from_rank_zero: Callable[[Any], Any]) -> None:
        self._world, self._timeout_s = world, timeout_s
        self._pause_s = min(max(timeout_s / PARTS, MIN_PAUSE_S), MAX_PAUSE_S)
        self._num_beats, self._beat_s = 0, time.monotonic()
        self._stopped = threading.Event()
        self._store = self._connect(from_rank_zero)
        self._tell()  # before anything can happen to this process
        # A store that does not answer holds whoever asks: who decides must not ask.
        self._threads = [
            threading.Thread(target=work, name="brainlm-watchdog", daemon=True)
            for work in (self._keep_telling, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def beat(self) -> None:
        """Say that this process has come on."""
        self._num_beats += 1
        self._beat_s = time.monotonic()

    def close(self) -> None:
        """Stop watching, and wait for what is being told.

        A thread that comes back from torch's store while the interpreter is ending aborts the process ("terminate
        called without an active exception"), and a run that was done would have failed.
        """
        self._stopped.set()
        deadline = time.monotonic() + max(self._pause_s, 1.0) + CLOSE_WITHIN_S  # a store that is gone takes its timeout
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def who_is_lost(self, error: Exception) -> str:
        """Say which ranks are silent, now that a connection is gone; it takes twice the time in which each tells."""
        reason = str(error).splitlines()[0]
        return f"rank {self._world.rank} cannot go on: {self._find_out()} ({reason}). See what was said there"

    def _connect(self, from_rank_zero: Callable[[Any], Any]) -> Any:
        from torch.distributed import TCPStore

        wait = datetime.timedelta(seconds=max(self._pause_s, 1.0))

        def store(port: int, *, is_master: bool) -> Any:
            # Rank zero speaks to its own store, whatever becomes of its link to the others.
            host = "127.0.0.1" if is_master else os.environ.get("MASTER_ADDR", "127.0.0.1")
            return TCPStore(host, port, None, is_master, timeout=wait, wait_for_workers=False)

        ours = store(0, is_master=True) if self._world.is_rank_zero else None
        port = from_rank_zero(ours.port if ours is not None else 0)
        return ours if ours is not None else store(port, is_master=False)

    def _tell(self) -> None:
        try:
            self._store.set(f"rank-{self._world.rank}", json.dumps(self._status()))
        except RuntimeError as error:  # rank zero is gone: the time that is over decides
            logger.debug("%s", error)

    def _keep_telling(self) -> None:
        while not self._stopped.wait(self._pause_s):
            self._tell()

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause_s):
            waited_s = time.monotonic() - self._beat_s
            if waited_s > self._timeout_s:
                logger.error("rank %d has not come on for %.0f s: %s", self._world.rank, waited_s, self._find_out())
                for handler in logging.getLogger().handlers:
                    handler.flush()
                os._exit(EXIT_STATUS)  # the main thread cannot be asked: it waits in a collective

    def _status(self) -> dict[str, Any]:
        return {"beats": self._num_beats, "host": socket.gethostname(), "pid": os.getpid(), "told_s": time.time()}

    def _find_out(self) -> str:
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._who()), daemon=True)
        asking.start()
        asking.join(timeout=4 * self._pause_s + ANSWER_WITHIN_S)
        return found[0] if found else "rank 0 does not answer"

    def _who(self) -> str:
        """Say which ranks are silent, or have come on less far than this one."""
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        try:
            never = [
                f"rank {rank} has never told of itself" for rank in others if not self._store.check([f"rank-{rank}"])
            ]
            if never:
                return "; ".join(never)
            before = {rank: json.loads(self._store.get(f"rank-{rank}")) for rank in others}
            time.sleep(2 * self._pause_s)
            after = {rank: json.loads(self._store.get(f"rank-{rank}")) for rank in others}
        except RuntimeError:  # of torch's store: a timeout, or a connection that is gone
            return "rank 0 does not answer"
        names = {rank: f"rank {rank} on {told['host']} (process {told['pid']})" for rank, told in before.items()}
        silent = [f"{names[rank]} is silent" for rank in others if before[rank]["told_s"] == after[rank]["told_s"]]
        behind = [f"{names[rank]} is behind" for rank in others if after[rank]["beats"] < self._num_beats]
        return "; ".join(silent or behind) or "no rank is silent or behind: a link between them may be"
