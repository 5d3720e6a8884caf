"""Have an input file on local disk for as long as it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brainlm.errors import DataError
from brainlm.store import Store


@contextmanager
def local_input(url: str) -> Iterator[Path]:
    """Yield a local path with the bytes of `url`; a remote file is copied to a temporary one, removed afterwards.

    Raises
    ------
    DataError
        If there is no such file.
    StoreError
        If storage cannot be read.
    """
    if "://" not in url:
        yield Path(url)
        return
    folder, _, name = url.rpartition("/")
    store = Store(folder)
    if not store.exists(name):
        raise DataError(f"there is no file {name}")
    with store.local_copy(name) as path:
        yield path
