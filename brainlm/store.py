"""Files on storage: one small class over fsspec for local paths, ``s3://``, ``gs://`` and ``memory://``.

Writes are atomic: a reader sees the old file or the new one, and what a killed process leaves behind is never listed.
Credentials come from the environment, never from config files.

Remote storage fails now and then. What can pass (refused and reset connections, timeouts, 429 and 5xx answers,
``SlowDown``, bodies shorter than announced) is tried again with growing pauses for ``$BRAINLM_STORE_RETRY_S`` seconds
(default 300); what cannot (no such file or bucket, forbidden, no credentials) is raised at once. Every error is a
`StoreError`. On ``s3://`` one attempt waits at most 10 s for a connection and 60 s for an answer;
``FSSPEC_S3_CONFIG_KWARGS='{"read_timeout": 120}'`` changes that.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import ssl
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from brainlm.errors import StoreError

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_CACHE_BYTES = 50 * 1024**3
DEFAULT_RETRY_S = 300.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 20.0
QUIET_S = 5.0  # what passes sooner is not worth a line in the log
PART_BYTES = 32 * 1024**2  # a larger file is read in parts of this size, each tried again by itself
TEMPORARY = ".tmp"
STALE_S = 24 * 3600.0

PASSING_STATUS = {408, 429, 500, 502, 503, 504}
PASSING_CODES = {  # of S3 where the status alone does not say it: the request was damaged, slow, or done already
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",  # the answer to a finished upload was lost
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
# By name: these libraries are there only where their storage is used.
PASSING_ERRORS = {
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "ChecksumError",  # botocore
    "ConnectTimeoutError",
    "CredentialRetrievalError",
    "EndpointConnectionError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "IncompleteRead",  # http.client, urllib3
    "IncompleteReadError",
    "ProxyConnectionError",
    "ResponseParserError",
    "SSLError",
    "TransportError",  # google.auth
}
PASSING_ERRNO = {
    getattr(errno, name, errno.EAGAIN)
    for name in ("EAGAIN", "EBUSY", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "EREMOTEIO")
}
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_LOCKS = {errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}

_pauses = random.Random()  # its own, so that a failing network moves nobody's seeded numbers


class _TooShort(Exception):
    """Fewer bytes came than were announced."""


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
            self.fs, self.root = url_to_fs(self.url, use_listings_cache=False, **_client_options(self.url))
        except (ValueError, ImportError) as error:
            raise StoreError(f"cannot open storage {self.url!r}: {error}") from error
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else tuple(self.fs.protocol)
        if "s3" in protocols:
            self.fs.retries = 2  # of one part of a large upload; the whole is tried again here
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
        try:  # fsspec's own `exists` says no where it could not find out
            self.info(name)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return False
            raise
        return True

    def names(self, folder: str = "", *, temporary: bool = False) -> list[str]:
        """Return the sorted base names of the files and folders directly in `folder` ([] if there is none).

        What killed writers left (``*.tmp``) is shown only if `temporary`.
        """

        def ls() -> list[str]:
            try:
                return list(self.fs.ls(self.path(folder), detail=False))
            except FileNotFoundError:
                return []

        found = (item.rstrip("/").rsplit("/", 1)[-1] for item in self._try("list", folder, ls))
        return sorted(base for base in found if base and (temporary or not base.endswith(TEMPORARY)))

    def find(
        self, folder: str = "", max_depth: int | None = None, *, temporary: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Return all files below `folder`, by their names within it, sorted, with what storage knows of each.

        What killed writers left (``*.tmp``) is among them only if `temporary`.
        """

        def find() -> dict[str, dict[str, Any]]:
            try:
                return dict(self.fs.find(self.path(folder), maxdepth=max_depth, detail=True))
            except FileNotFoundError:
                return {}

        inside = f"{self.path(folder).rstrip('/')}/"
        found = sorted(self._try("list", folder, find).items())
        return {
            path.removeprefix(inside): info
            for path, info in found
            if path.startswith(inside) and (temporary or not path.endswith(TEMPORARY))
        }

    def info(self, name: str = "") -> dict[str, Any]:
        """Return what storage knows of a file or folder: ``size``, ``type``, and more by its kind."""
        return self._info(name, "look up")

    def size(self, name: str) -> int:
        return int(self._info(name, "read")["size"])

    def modified(self, name: str) -> datetime:
        """Return when a file was last written, with its time zone."""
        found: datetime = self._try("look up", name, lambda: self.fs.modified(self.path(name)))
        return found

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file, checked to be as long as storage says."""
        if self.is_local:
            return self._try("read", name, lambda: Path(self.path(name)).read_bytes())
        return b"".join(self._parts(name))

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return many small files; remote ones are asked for at once, and those that fail again one by one."""
        if self.is_local:
            return {name: self.read_bytes(name) for name in names}
        paths = {name: self.path(name) for name in names}

        def cat() -> dict[str, Any]:
            return dict(self.fs.cat(list(paths.values()), on_error="return")) if paths else {}

        found = self._try("read", "", cat)
        return {
            name: self.read_bytes(name) if isinstance(found.get(path), Exception | None) else bytes(found[path])
            for name, path in paths.items()
        }

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` (excluded) of a file that has them."""

        def read() -> bytes:
            data = bytes(self.fs.cat_file(self.path(name), start=start, end=stop)) if stop > start else b""
            if len(data) != stop - start:
                size = self.fs.info(self.path(name))["size"]
                if size is not None and size < stop:
                    raise EOFError(f"it has {size} bytes, bytes {start} to {stop} were asked for")
                raise _TooShort(f"{len(data)} bytes came of bytes {start} to {stop}")
            return data

        return self._try("read", name, read)

    def write_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write a whole file atomically, making its folder."""
        path = self.path(name)
        if self.is_local:
            self._try("write", name, lambda: _write_local(path, data))
        else:  # an object appears only when its upload is complete
            whole = data if isinstance(data, bytes) else bytes(data)
            self._try("write", name, lambda: self.fs.pipe_file(path, whole))

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """Give a path on local disk to write a large file to, which appears in the store when the block ends.

        What is written is never whole in memory. A block that ends with an error leaves nothing. A remote file waits in
        a temporary folder (``$TMPDIR``) for its upload.
        """
        path = self.path(name)
        if self.is_local:
            with self._try("write", name, lambda: _open_temporary(path)) as file:
                try:
                    file.truncate(0)
                    yield Path(file.name)
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException as error:
                    with suppress(OSError):
                        os.unlink(file.name)
                    if isinstance(error, OSError) and not isinstance(error, StoreError):
                        raise StoreError(f"cannot write {self.url_of(name)}: {_in_words(error)}") from error
                    raise
            return
        with tempfile.TemporaryDirectory(prefix="brainlm-") as folder:
            local = Path(folder) / name.rsplit("/", 1)[-1]
            yield local
            self._try("write", name, lambda: self.fs.put_file(str(local), path))

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StoreError(f"{self.url_of(name)} is not valid JSON: {error}") from error

    def write_json(self, name: str, tree: Any) -> None:
        self.write_bytes(name, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is not there."""

        def rm() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm(self.path(name), recursive=True)

        if self.exists(name):
            self._try("remove", name, rm)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """Give a path on local disk with the file's bytes for the length of a ``with`` block.

        A local file is used where it is. A remote one is copied, in bounded memory, to a temporary folder (``$TMPDIR``)
        under its own name, and removed afterwards; unlike `local_file`, nothing is kept for the next time.
        """
        if self.is_local:
            yield self._local(name)
            return
        with tempfile.TemporaryDirectory(prefix="brainlm-") as folder:
            copy = Path(folder) / name.rsplit("/", 1)[-1]
            self._download(name, copy)
            yield copy

    def local_file(self, name: str, sha256: str = "") -> Path:
        """Return a path on local disk with the file's bytes; a remote file is copied into the cache once.

        The cache is ``$BRAINLM_CACHE`` (default ``~/.cache/brainlm``), bounded by ``$BRAINLM_CACHE_GB`` (default 50);
        the files used longest ago go first. `sha256`, where known, is part of the cached name and is checked.
        """
        if self.is_local:
            return self._local(name)
        cached = self._cached(name, sha256, self.size(name))
        folder = cached.parent
        if not cached.is_file():
            temporary = cached.with_name(f"{cached.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._download(name, temporary)
                if sha256 and sha256_of_file(temporary) != sha256:
                    raise StoreError(f"{self.url_of(name)}: its bytes do not have the recorded sha256 {sha256[:12]}...")
                os.replace(temporary, cached)
            except StoreError:
                raise
            except OSError as error:
                raise StoreError(f"cannot copy {self.url_of(name)} to the cache: {_in_words(error)}") from error
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            _bound_cache(folder, keep=cached)
        os.utime(cached)
        return cached

    def forget_cached(self, name: str, sha256: str, num_bytes: int) -> None:
        """Remove this machine's cached copy of the file that had this hash and size, if there is one."""
        self._cached(name, sha256, num_bytes).unlink(missing_ok=True)

    def _cached(self, name: str, sha256: str, num_bytes: int) -> Path:
        folder = Path(os.environ.get("BRAINLM_CACHE", Path.home() / ".cache" / "brainlm")) / "files"
        key = hashlib.sha256(f"{self.url_of(name)}:{sha256}:{num_bytes}".encode()).hexdigest()[:32]
        return folder / f"{key}-{name.rsplit('/', 1)[-1]}"

    def _local(self, name: str) -> Path:
        path = Path(self.path(name))
        if not path.is_file():
            raise StoreError(f"{self.url_of(name)} is not there")
        return path

    def _info(self, name: str, verb: str) -> dict[str, Any]:
        found: dict[str, Any] = self._try(verb, name, lambda: self.fs.info(self.path(name)))
        return found

    def _parts(self, name: str) -> Iterator[bytes]:
        """Give a remote file piece by piece; all pieces are of the same version of the file."""
        path, info = self.path(name), self._info(name, "read")
        size = info["size"]
        if size is None:  # some web servers do not say
            yield self._try("read", name, lambda: bytes(self.fs.cat_file(path)))
            return
        if size <= PART_BYTES:
            # One request to the end of the file, which cannot mix an old version with a new one that replaces it now.
            def read() -> bytes:
                data = bytes(self.fs.cat_file(path, start=0)) if size else b""
                if len(data) < size:
                    raise _TooShort(f"{len(data)} bytes came, {size} were announced")
                return data

            yield self._try("read", name, read)
            return
        for start in range(0, size, PART_BYTES):
            yield self.read_range(name, start, min(start + PART_BYTES, size))
        if _version(self._info(name, "read")) != _version(info):
            raise StoreError(f"cannot read {self.url_of(name)}: it was replaced while it was being read; try again")

    def _download(self, name: str, target: Path) -> None:
        try:
            with open(target, "wb") as file:
                for part in self._parts(name):
                    file.write(part)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot copy {self.url_of(name)} to {target}: {_in_words(error)}") from error

    def _try(self, verb: str, name: str, operation: Callable[[], T]) -> T:
        """Call until it succeeds, the time is over, or an error comes that trying again does not mend."""
        patience_s = _patience_s()
        begin, attempt = time.monotonic(), 0
        while True:
            try:
                return operation()
            except Exception as error:  # botocore, aiohttp and others have families of their own
                where = f"cannot {verb} {self.url_of(name) if name else self.url}"
                attempt += 1
                if self.is_local or not _can_pass(error):
                    raise StoreError(f"{where}: {_in_words(error)}") from error
                waited_s = time.monotonic() - begin
                pause_s = min(FIRST_PAUSE_S * 2.0 ** (attempt - 1), LONGEST_PAUSE_S) * _pauses.uniform(0.5, 1.0)
                if waited_s + pause_s > patience_s:
                    raise StoreError(
                        f"{where}: tried {attempt} times in {waited_s:.0f} s (BRAINLM_STORE_RETRY_S is "
                        f"{patience_s:g}); the last error was {_in_words(error)}"
                    ) from error
                level = logging.WARNING if waited_s > QUIET_S else logging.DEBUG
                logger.log(level, "%s: %s; trying again for %.0f s", where, _in_words(error), patience_s - waited_s)
                time.sleep(pause_s)


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _patience_s() -> float:
    text = os.environ.get("BRAINLM_STORE_RETRY_S", "")
    try:
        return float(text) if text else DEFAULT_RETRY_S
    except ValueError as error:
        raise StoreError(f"BRAINLM_STORE_RETRY_S: expected a number of seconds, found {text!r}") from error


def _client_options(url: str) -> dict[str, Any]:
    """Return timeouts for S3, and one attempt a call: botocore's own attempts would multiply with ours."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    from fsspec.config import conf

    chosen: dict[str, Any] = {}
    for protocol in ("s3", "s3a"):  # of the user: FSSPEC_S3='{"config_kwargs": {...}}' or FSSPEC_S3_CONFIG_KWARGS
        found = conf.get(protocol, {}).get("config_kwargs")
        chosen |= json.loads(found) if isinstance(found, str) else found or {}
    return {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"total_max_attempts": 1},
            **chosen,
        }
    }


def _can_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed later, by the error and those behind it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
        return False
    answers = [_answer_of(link) for link in chain]  # what the server said counts before what a library made of it
    if any(status in PASSING_STATUS or code in PASSING_CODES for code, status in answers):
        return True
    for link, (_, status) in zip(chain, answers):
        if status is not None or isinstance(link, FileNotFoundError | PermissionError | FileExistsError):
            return False
        if isinstance(link, ConnectionError | TimeoutError | _TooShort):
            return True
        if isinstance(link, OSError) and link.errno in PASSING_ERRNO:
            return True
        if any(kind.__name__ in PASSING_ERRORS for kind in type(link).__mro__):
            return True
    return False


def _answer_of(error: BaseException) -> tuple[str, int | None]:
    """Return the code and the HTTP status of what a server answered, as botocore, aiohttp and gcsfs keep them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return str(response.get("Error", {}).get("Code", "")), status if isinstance(status, int) else None
    for name in ("status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int | str) and str(status).isdigit() and 400 <= int(status) < 600:
            return "", int(status)
    return "", None


def _in_words(error: BaseException) -> str:
    text = str(error) or repr(error)
    if isinstance(error, FileNotFoundError):
        return f"it is not there ({text})"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full ({text}); free some space and run again"
    if isinstance(error, PermissionError):
        return f"access is denied ({text})"
    return text if isinstance(error, OSError | _TooShort) else f"{type(error).__name__}: {text}"


def _version(info: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(info.get(key) for key in ("size", "ETag", "etag", "LastModified", "mtime", "updated", "generation"))


def _write_local(path: str, data: bytes | bytearray | memoryview) -> None:
    """Write beside the file, then rename.

    The name beside it is always the same, so that a re-run takes over what a killed process left; a lock keeps two
    writers of one file apart. Where there are no locks, each writer has a name of its own.
    """
    with _open_temporary(path) as file:
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _open_temporary(path: str) -> Any:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        return _open_locked(path + TEMPORARY)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return open(f"{path}.{uuid.uuid4().hex[:8]}{TEMPORARY}", "wb")


def _open_locked(path: str) -> Any:
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:  # the writer before us has renamed it
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _bound_cache(folder: Path, keep: Path) -> None:
    limit = int(float(os.environ.get("BRAINLM_CACHE_GB", DEFAULT_CACHE_BYTES / 1024**3)) * 1024**3)
    found: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process bounds the same cache
            stat = path.stat()
            if path.suffix != TEMPORARY:
                found.append((stat.st_mtime, stat.st_size, path))
            elif time.time() - stat.st_mtime > STALE_S:  # of a process that was killed while it copied
                path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        if path != keep:  # a file that is mapped elsewhere stays readable there until it is closed
            total -= size
            path.unlink(missing_ok=True)
