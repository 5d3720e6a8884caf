"""Files on storage: one small class over fsspec for local paths, ``s3://``, ``gs://`` and ``memory://``.

Writes are atomic: a reader sees the old file or the new one. Credentials come from the environment, never from config
files. Remote shards are copied once into a bounded cache on local disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from brainlm.errors import StoreError

DEFAULT_CACHE_BYTES = 50 * 1024**3


class Store:
    """A folder on local disk or object storage.

    Parameters
    ----------
    url : str or path
        Any fsspec URL; a plain path is local.

    Raises
    ------
    StoreError
        From every method, naming the file, when storage cannot be read or written.
    """

    def __init__(self, url: str | Path) -> None:
        from fsspec.core import url_to_fs

        self.url = str(url) if str(url).endswith("://") else str(url).rstrip("/") or "/"
        try:
            # Without fsspec's listings cache: it would hide what other processes write while this one is running.
            self.fs, self.root = url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise StoreError(f"cannot open storage {self.url!r}: {error}") from error
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else tuple(self.fs.protocol)
        self.is_local = "file" in protocols or "local" in protocols

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # workers open their own connections
        return (Store, (self.url,))

    def path(self, name: str = "") -> str:
        """Return the path of a file as the underlying file system knows it."""
        return f"{self.root.rstrip('/')}/{name}" if name else str(self.root)

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def sub(self, name: str) -> Store:
        return Store(self.url_of(name))

    def exists(self, name: str = "") -> bool:
        try:
            return bool(self.fs.exists(self.path(name)))
        except OSError as error:
            raise StoreError(f"cannot look up {self.url_of(name)}: {error}") from error

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted base names of the files and folders directly in `folder` ([] if there is none)."""
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        except (NotADirectoryError, OSError) as error:
            raise StoreError(f"cannot list {self.url_of(folder)}: {error}") from error
        return sorted(base for item in found if (base := item.rstrip("/").rsplit("/", 1)[-1]))

    def size(self, name: str) -> int:
        try:
            return int(self.fs.size(self.path(name)))
        except OSError as error:
            raise StoreError(f"cannot read {self.url_of(name)}: {error}") from error

    def read_bytes(self, name: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except OSError as error:
            raise StoreError(f"cannot read {self.url_of(name)}: {error}") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file atomically, making its folder."""
        path = self.path(name)
        try:
            if self.is_local:
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
                try:
                    with open(temporary, "wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(temporary, path)
                finally:
                    if os.path.exists(temporary):
                        os.unlink(temporary)
            else:  # an object appears only when its upload is complete
                self.fs.pipe_file(path, data)
        except OSError as error:
            raise StoreError(f"cannot write {self.url_of(name)}: {error}") from error

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StoreError(f"{self.url_of(name)} is not valid JSON: {error}") from error

    def write_json(self, name: str, tree: Any) -> None:
        self.write_bytes(name, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is not there."""
        try:
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)
        except OSError as error:
            raise StoreError(f"cannot remove {self.url_of(name)}: {error}") from error

    def local_file(self, name: str, sha256: str = "") -> Path:
        """Return a path on local disk with the file's bytes; a remote file is copied into the cache once.

        The cache is ``$BRAINLM_CACHE`` (default ``~/.cache/brainlm``), bounded by ``$BRAINLM_CACHE_GB`` (default 50);
        the files used longest ago go first. `sha256`, where known, is part of the cached name and is checked.
        """
        if self.is_local:
            path = Path(self.path(name))
            if not path.is_file():
                raise StoreError(f"{self.url_of(name)} is not there")
            return path
        folder = Path(os.environ.get("BRAINLM_CACHE", Path.home() / ".cache" / "brainlm")) / "files"
        key = hashlib.sha256(f"{self.url_of(name)}:{sha256}:{self.size(name)}".encode()).hexdigest()[:32]
        cached = folder / f"{key}-{name.rsplit('/', 1)[-1]}"
        if not cached.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_name(f"{cached.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                self.fs.get_file(self.path(name), str(temporary))
                if sha256 and sha256_of_file(temporary) != sha256:
                    raise StoreError(f"{self.url_of(name)}: its bytes do not have the recorded sha256 {sha256[:12]}...")
                os.replace(temporary, cached)
            except OSError as error:
                raise StoreError(f"cannot copy {self.url_of(name)} to the cache: {error}") from error
            finally:
                temporary.unlink(missing_ok=True)
            _bound_cache(folder, keep=cached)
        os.utime(cached)
        return cached


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bound_cache(folder: Path, keep: Path) -> None:
    limit = int(float(os.environ.get("BRAINLM_CACHE_GB", DEFAULT_CACHE_BYTES / 1024**3)) * 1024**3)
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process bounds the same cache
            if path.suffix != ".tmp":
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        if path != keep:  # a file that is mapped elsewhere stays readable there until it is closed
            total -= size
            path.unlink(missing_ok=True)
