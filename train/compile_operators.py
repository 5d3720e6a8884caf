"""The C++ operator that DeepSpeed's communication loads on CPUs: compiled once, so that the first run need not.

python -m train.compile_operators

Torch lets one process at a time compile or load an operator, by a file named ``lock`` beside it. A process that is
killed meanwhile leaves that file, and every later run would wait for it, forever and in silence. So ours take turns by
a lock that ends with the process that holds it: whoever has it knows that a ``lock`` which stays belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

OPERATOR = "deepspeed_shm_comm"
FOREIGN_S = 60.0  # what a program that is not ours may take, from when it made the file
FOREIGN_UNLOCKED_S = 600.0  # where the storage knows no locks, and others of ours may be compiling
PAUSE_S = 0.1


def load_operator() -> Any:
    """Load the operator, compiling it if need be.

    Returns
    -------
    module or None
        None where DeepSpeed has none for this machine.
    """
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(OPERATOR, False))
    with _turn(folder) as is_ours:
        clear_lock(folder / "lock", FOREIGN_S if is_ours else FOREIGN_UNLOCKED_S)
        return build_shm_op()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Wait for this process's turn; say whether the storage can tell."""
    with open(folder / "turn", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def clear_lock(lock: Path, patience_s: float) -> None:
    """Remove a lock file of torch's that is older than that; wait for one that is not."""
    said = False
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > patience_s:
            logger.warning("removing %s, which a process that was killed has left", lock)
            lock.unlink(missing_ok=True)
            return
        if not said:
            said = True
            logger.warning("waiting for whoever holds %s, at most %.0f s", lock, patience_s - age)
        time.sleep(PAUSE_S)


def main() -> int:
    import torch

    if torch.cuda.is_available():
        return 0  # NCCL is used there
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        operator = load_operator()
    if operator is None:
        print("DeepSpeed has no shared-memory operator for this machine; gloo alone will be used", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
