"""Keep two programs from writing one data set at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from brainlm.dataset import MANIFEST
from brainlm.errors import ConfigError
from brainlm.store import Store

LOCK = "log/lock"


@contextmanager
def locked(out: Store) -> Iterator[None]:
    """Hold the data set at `out` for the length of a ``with`` block.

    On local disk only; object storage has no lock that dies with its process, so that there `check_unchanged_since` is
    what keeps a second writer from finishing.

    Raises
    ------
    ConfigError
        If another process holds it.
    """
    if not out.is_local:
        yield
        return
    path = out.path(LOCK)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is writing {out.url}: wait for it, or end it") from error
        yield


def check_unchanged_since(out: Store, content_hash: str | None) -> None:
    """Raise `ConfigError` unless the manifest is the one that was read at the start; None = there was none."""
    now = out.read_json(MANIFEST)["content_hash"] if out.exists(MANIFEST) else None
    if now != content_hash:
        raise ConfigError(f"{out.url} was written by another process meanwhile; nothing was changed. Run again")
