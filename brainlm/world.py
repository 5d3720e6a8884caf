"""Which process this is among how many. The only place that reads the launcher's environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Rank of this process, and number of processes, as the launcher set them; 0 of 1 without a launcher."""

    rank: int
    local_rank: int
    size: int
    local_size: int = 1
    """Processes on this host."""

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, which `deepspeed`, `torchrun` and `srun` wrappers set.

    The number of processes on this host is LOCAL_WORLD_SIZE (`torchrun`) or LOCAL_SIZE (`deepspeed`); without either,
    all of them are taken to be here.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    return World(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        size=int(size),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size),
    )


def set_single_process_environment() -> None:
    """Describe a world of one process, where no launcher did: otherwise DeepSpeed looks for MPI."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
