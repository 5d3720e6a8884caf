"""What a process keeps of memory that is free: little, so that its size says what it needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import wraps
from typing import Any

M_MMAP_THRESHOLD = -3  # malloc.h: larger pieces are the system's, and go back to it at once
LARGE_BYTES = 8 * 1024**2


def keep_little_memory(larger_than: int = 128 * 1024) -> None:
    """Let what is freed go back to the system for the rest of the process, in pieces above `larger_than` bytes.

    Arrow's own allocator keeps it, so Arrow takes memory from the system's. That of glibc keeps ever larger pieces, up
    to 32 MB, unless it is told a limit.
    """
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, larger_than)


def give_back_memory() -> None:
    """Give what was freed back to the system: the allocator keeps what many small things have left between others."""
    import pyarrow

    pyarrow.system_memory_pool().release_unused()


def giving_back_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a worker that keeps nothing from one task for the next.

    A worker of Ray does many tasks of several kinds. Up to 200 MB of what the longest recording had taken stayed with
    it. Pieces of a few megabytes, which come and go by the thousand, are kept while the function runs.
    """

    @wraps(function)
    def work(*task: Any) -> Any:
        keep_little_memory(LARGE_BYTES)
        try:
            return function(*task)
        finally:
            give_back_memory()

    return work
