"""All ranks begin together, or none does: what one of them cannot do ends the others too, and is said.

Hosts differ in what they reach and hold: the data set, the code, a full disk. Without this, a rank that fails at
start-up leaves the others waiting for it. Ranks meet in a store of torch's at MASTER_ADDR, before there is a process
group.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from brainlm.errors import BrainLMError, ConfigError, TrainingError
from brainlm.world import World

logger = logging.getLogger(__name__)
T = TypeVar("T")

START_WITHIN_S = 600.0
LINGER_S = 30.0
PAUSE_S = 0.05
ANSWER_WITHIN_S = 30.0
FAILED = "failed"


class StartUp:
    """What ranks tell each other before there is a process group. One process alone agrees with itself.

    Parameters
    ----------
    patience_s : float
        How long a rank waits for another one.

    Raises
    ------
    TrainingError
        From every method, on all ranks, naming the rank that is missing or could not go on, and why.
    """

    def __init__(self, world: World, patience_s: float = START_WITHIN_S) -> None:
        self._world, self.patience_s = world, patience_s
        self._num_gathered = 0
        self._name = f"rank {world.rank} on {socket.gethostname()} (process {os.getpid()})"
        self._store = self._connect() if world.size > 1 else None
        if self._store is not None:
            self._store.set(f"name-{world.rank}", self._name)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let each rank do what is in the ``with`` block by itself; what fails on one ends all."""
        try:
            yield
        except Exception as error:
            reason = str(error) if isinstance(error, BrainLMError) else f"{type(error).__name__}: {error}"
            self._fail(f"{self._name} cannot begin: {reason}")
            raise
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank. Values are what JSON can hold."""
        if self._store is None:
            return [value]
        self._num_gathered += 1
        ranks = range(self._world.size)
        said = [f"{self._num_gathered}-said-{rank}" for rank in ranks]
        heard = [f"{self._num_gathered}-heard-{rank}" for rank in ranks]
        with self._store_answers():
            self._store.set(said[self._world.rank], json.dumps(value))
            self._wait(said)
            values = [json.loads(text) for text in self._store.multi_get(said)]
            self._store.set(heard[self._world.rank], "")
            if self._world.is_rank_zero:  # the store ends with this process
                self._wait(heard)
        return values

    def from_rank_zero(self, value: T) -> T:
        """Return rank zero's value on every rank."""
        return self.gather(value)[0]

    def _connect(self) -> Any:
        from torch.distributed import DistNetworkError, TCPStore

        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not address or not port:
            raise ConfigError(
                f"WORLD_SIZE={self._world.size}, but MASTER_ADDR={address} and MASTER_PORT={port}: both are needed for "
                "ranks to find rank 0; the launchers of docs/training.md set them"
            )
        # torchrun has a store at this port already; otherwise rank zero's is used by torch again (multi_tenant).
        ours = self._world.is_rank_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        patience = datetime.timedelta(seconds=self.patience_s)
        try:
            return TCPStore(address, int(port), None, ours, timeout=patience, wait_for_workers=False, multi_tenant=True)
        except DistNetworkError as error:
            what = "cannot listen" if ours else "found no rank 0"
            raise TrainingError(f"{self._name} {what} at {address}:{port}: {str(error).splitlines()[0]}") from error

    @contextmanager
    def _store_answers(self) -> Iterator[None]:
        """Say it if the store's host is gone; if that host is silent, torch waits for ever, and this process ends."""
        from torch.distributed import DistError

        timer = threading.Timer(self.patience_s + LINGER_S + ANSWER_WITHIN_S, self._leave)
        timer.daemon = True
        timer.start()
        try:
            yield
        except DistError as error:
            raise TrainingError(f"rank 0 left before {self._name} could begin: see what it said") from error
        finally:
            timer.cancel()

    def _leave(self) -> None:
        logger.error("%s waited %.0f s for all ranks to begin: rank 0 does not answer", self._name, self.patience_s)
        os._exit(1)  # the main thread cannot be asked: it waits for the store

    def _wait(self, keys: list[str]) -> None:
        assert self._store is not None
        begin = time.monotonic()
        while True:
            if self._store.check([FAILED]):
                reason = self._store.get(FAILED).decode()
                self._linger()
                raise TrainingError(reason)
            if self._store.check(keys):
                return
            if time.monotonic() - begin > self.patience_s:
                reason = f"{self._missing(keys)} within {self.patience_s:.0f} s of the other ranks"
                self._fail(reason)
                raise TrainingError(reason)
            time.sleep(PAUSE_S)

    def _missing(self, keys: list[str]) -> str:
        assert self._store is not None
        said = []
        for rank, key in enumerate(keys):
            if not self._store.check([key]):
                known = self._store.check([f"name-{rank}"])
                name = self._store.get(f"name-{rank}").decode() if known else f"rank {rank}, which never came,"
                said.append(name)
        return f"{' and '.join(said)} was not ready to begin"

    def _fail(self, reason: str) -> None:
        """Tell the others, as far as they can be reached."""
        if self._store is None:
            return
        with suppress(TrainingError), self._store_answers():
            self._store.compare_set(FAILED, "", reason)  # the first one is the cause
            self._linger()

    def _linger(self) -> None:
        """Say that this rank knows of the failure; rank zero, which has the store, stays until the others do."""
        assert self._store is not None
        heard = [f"{FAILED}-heard-{rank}" for rank in range(self._world.size)]
        self._store.set(heard[self._world.rank], "")
        begin = time.monotonic()
        while self._world.is_rank_zero and not self._store.check(heard) and time.monotonic() - begin < LINGER_S:
            time.sleep(PAUSE_S)
