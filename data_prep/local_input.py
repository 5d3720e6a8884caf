"""Have an input file on local disk for as long as it is read.

A BIDS sidecar that lies beside a table (``.json`` under the same name) comes with it.
"""

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
    sidecar = f"{name.removesuffix('.tsv')}.json"
    with store.local_copy(name) as path:
        if name.endswith(".tsv") and store.exists(sidecar):
            path.with_suffix(".json").write_bytes(store.read_bytes(sidecar))
        yield path
