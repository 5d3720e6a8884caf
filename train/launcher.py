"""Notices that the launcher of this process is gone: who ended it meant the training run, too.

`deepspeed` starts ``deepspeed.launcher.launch`` on each host, and that starts the ranks. A signal to `deepspeed` alone
ends it, and leaves the others running. So ranks look at both: at their parent, and at the parent of that one.
"""

from __future__ import annotations

import os
from pathlib import Path

INNER = b"deepspeed.launcher.launch"
OUTER = (b"deepspeed", b"sshd")  # on this host, or what runs the inner one for another host


class Launcher:
    """The processes that this one was started by, as they are now. A shell or scheduler is none that counts."""

    def __init__(self) -> None:
        self._parent = os.getppid() if "LOCAL_RANK" in os.environ else None
        self._above: int | None = None
        if self._parent is not None and INNER in _command(self._parent):
            above = _parent_of(self._parent)
            if above and any(word in _command(above) for word in OUTER):
                self._above = above

    def is_gone(self) -> bool:
        if self._parent is None:
            return False
        if os.getppid() != self._parent:
            return True
        return self._above is not None and _parent_of(self._parent) != self._above


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended, or this is not Linux
        return b""


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
