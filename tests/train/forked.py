"""Training runs in processes forked from one that has imported everything: they begin in a second, not in six.

What runs is the `main` of an entry of `train`, as under a launcher, one process a rank. No launcher watches over them:
a rank that loses another one has to notice it by itself.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.train.conftest import environment

PRELOADED = [
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "torch.utils.tensorboard",
    "safetensors.torch", "s3fs", "train.pretrain", "train.finetune",
]  # fmt: skip


@dataclass
class Run:
    """The ranks of one training run, and the file that all of them write what they say to."""

    ranks: list[ForkServerProcess]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def is_alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def pids(self) -> list[int]:
        """Return the process id of every rank."""
        return [rank.pid or 0 for rank in self.ranks]

    def kill(self, *numbers: int) -> None:
        """Kill these ranks, or all, with SIGKILL; wait until they are gone."""
        chosen = [self.ranks[number] for number in numbers] or self.ranks
        for rank in chosen:
            rank.kill()
        for rank in chosen:
            rank.join()

    def finish(self, timeout_s: float = 300.0) -> list[int | None]:
        """Wait for the end; return the exit statuses. What is not over in time is killed, and has status -9."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(timeout=max(deadline - time.monotonic(), 0.0))
        self.kill()
        return [rank.exitcode for rank in self.ranks]


def start(log: Path, config: Path, *overrides: str, ranks: int = 1, entry: str = "pretrain", **variables: str) -> Run:
    """Start an entry with these overrides on the command line and these variables in its environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # of the process that all are forked from
        for name, value in environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    places: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
        names = ("RANK", "LOCAL_RANK")
        places = [master | {"WORLD_SIZE": str(ranks)} | dict.fromkeys(names, str(rank)) for rank in range(ranks)]
    arguments = ["--config", str(config), *overrides]
    log.write_text("")
    made = [
        context.Process(target=_rank, args=(entry, arguments, environment() | variables | place, str(log)), daemon=True)
        for place in places
    ]
    for process in made:
        process.start()
    return Run(made, log)


def _rank(entry: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    sys.exit(importlib.import_module(f"train.{entry}").main(arguments))
