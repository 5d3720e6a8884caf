"""Have an input file on local disk for as long as it is read.

A BIDS sidecar that lies beside a table (``.json`` under the same name) comes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brainlm.errors import DataError
from brainlm.store import Store

MAX_SIDECAR_BYTES = 4 * 1024**2  # fMRIPrep's largest, of hundreds of confounds, take some hundred KB


def check_sidecar_size(name: str, num_bytes: int) -> None:
    """Raise `DataError` where a JSON sidecar is larger than one can be: read, it would take ten times as much."""
    if num_bytes > MAX_SIDECAR_BYTES:
        raise DataError(f"{name} has {num_bytes} bytes: expected a JSON sidecar of at most {MAX_SIDECAR_BYTES}")


@contextmanager
def local_input(url: str) -> Iterator[Path]:
    """Yield a local path with the bytes of `url`; a remote file is copied to a temporary one, removed afterwards.

    Raises
    ------
    DataError
        If there is no such file, or its sidecar is too large for one.
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
    has_sidecar = name.endswith(".tsv") and store.exists(sidecar)
    if has_sidecar:
        check_sidecar_size(sidecar, store.size(sidecar))
    with store.local_copy(name) as path:
        if has_sidecar:
            path.with_suffix(".json").write_bytes(store.read_bytes(sidecar))
        yield path
