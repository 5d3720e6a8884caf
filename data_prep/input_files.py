"""Which input files there are, how large they are, and whether they changed: nothing is read, nothing asked twice.

A stamp is ``size:modified`` (local) or ``size:etag`` (object storage), "" where there is no file.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from brainlm.errors import DataError, StoreError
from brainlm.store import Store

FIELD = re.compile(r"\{([^{}]*)\}")
ANYTHING = re.compile(r"\*\*/|\*|\?|\{[^{}]*\}")  # what a pattern's part can hold besides plain text
AT_ONCE = 16  # folders of object storage that are listed at the same time
FIELD_NAMES = ("subject", "session", "task", "run", "site")


@dataclass(frozen=True, slots=True)
class Found:
    """A file below a folder: its path relative to the folder, its stamp, and the pattern's fields in its path."""

    path: str
    stamp: str
    fields: dict[str, str]


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, path: str) -> str:
    """Return `path` starting from the folder `root`, unless it starts somewhere of its own."""
    if not path or is_url(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.join(root, path)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def relative_source(path: str, root: str) -> str:
    """Return how a data set names an input: relative to `root`; elsewhere, by its folder's and its own name.

    Where a user keeps the data is nobody's business who reads the data set.
    """
    inside = f"{root.rstrip('/')}/"
    if path.startswith(inside):
        return path.removeprefix(inside)
    if not is_url(path) and not os.path.isabs(path):
        path = posixpath.normpath(path.replace(os.sep, "/"))
        if not path.startswith("../"):
            return path
    return "/".join(path.partition("://")[2 if is_url(path) else 0].split("/")[-2:]).lstrip("/")


def file_stamp(url: str) -> str:
    """Return ``size:modified`` of a local file, ``size:etag`` of a remote one, "" where there is none.

    Raises
    ------
    StoreError
        If remote storage cannot be asked.
    """
    if not url:
        return ""
    if not is_url(url):
        try:
            stat = os.stat(url)
        except (FileNotFoundError, NotADirectoryError):
            return ""
        except OSError as error:
            raise StoreError(f"cannot look up {url}: {error}") from error
        return f"{stat.st_size}:{stat.st_mtime_ns}"
    folder, _, name = url.rpartition("/")
    store = _store(folder)
    try:
        return _remote_stamp(store.info(name))
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return ""
        raise


def stamps_of(urls: Iterable[str]) -> dict[str, str]:
    """Return the stamp of every file; remote folders are listed once each, not asked file by file."""
    stamps: dict[str, str] = {}
    by_folder: dict[str, list[str]] = {}
    for url in urls:
        if not is_url(url):
            stamps[url] = file_stamp(url)
        elif url:
            by_folder.setdefault(url.rpartition("/")[0], []).append(url)
    for folder, inside in by_folder.items():
        if len(inside) == 1:
            stamps[inside[0]] = file_stamp(inside[0])
            continue
        listed = {found.path: found.stamp for found in list_remote(folder, depth=1)}
        stamps |= {url: listed.get(url.rpartition("/")[2], "") for url in inside}
    return stamps


def size_of(stamp: str) -> int | None:
    """Return the size in bytes that a stamp holds, None where there is no file."""
    return int(stamp.partition(":")[0]) if stamp else None


def list_remote(url: str, depth: int | None = None) -> list[Found]:
    """List the files below a folder of object storage, sorted.

    Raises
    ------
    StoreError
        If storage cannot be listed.
    """
    return [Found(name, _remote_stamp(info), {}) for name, info in Store(url).find(max_depth=depth).items()]


def find_files(root: str, pattern: str) -> list[Found]:
    """Find the files below `root` whose path fits a pattern, sorted by path.

    Parameters
    ----------
    root : str
        Folder: a path, or any fsspec URL. It is walked part by part: plain parts cost nothing, and what lies beside
        the pattern is not listed.
    pattern : str
        Relative path with ``{field}`` (the fields are `FIELD_NAMES`; one that stands twice must be the same text),
        ``*`` and ``?`` inside a part, and ``**/`` for any folders.

    Raises
    ------
    DataError
        If the pattern is wrong, or there is no such folder.
    StoreError
        If storage cannot be listed.
    """
    check_pattern(pattern)
    if not is_url(root):
        if not os.path.isdir(root):
            raise DataError(f"there is no folder {root}")
        listed = [Found(path, "", {}) for path in sorted(set(_walk(root, "", pattern.split("/"))))]
    else:
        listed = sorted(_walk_remote(Store(root), "", pattern.split("/"), AT_ONCE), key=lambda item: item.path)
    whole = re.compile(_expression(pattern))
    hidden = _is_hidden(pattern)  # a Mac leaves a hidden ._name beside each file
    return [
        Found(item.path, item.stamp or file_stamp(join(root, item.path)), match.groupdict())
        for item in listed
        if (match := whole.fullmatch(item.path)) and (hidden or not _is_hidden(item.path))
    ]


def check_pattern(pattern: str) -> None:
    """Raise `DataError` unless every field of a pattern is known and the pattern stays below its folder."""
    unknown = [name for name in FIELD.findall(pattern) if name not in FIELD_NAMES]
    if unknown or re.search(r"[{}]", FIELD.sub("", pattern)):
        raise DataError(
            f"the pattern {pattern!r} has {', '.join(f'{{{name}}}' for name in unknown) or 'a single brace'}: expected "
            f"the fields {', '.join(f'{{{name}}}' for name in FIELD_NAMES)}"
        )
    if pattern.startswith("/") or is_url(pattern) or ".." in pattern.split("/"):
        raise DataError(f"the pattern {pattern!r} must be relative to source.path and stay below it")
    if "}{" in pattern:
        raise DataError(f"the pattern {pattern!r} has two fields with nothing between them: nobody can tell them apart")


def fields_of(pattern: str) -> tuple[str, ...]:
    """Return the fields of a pattern, each once, in order."""
    return tuple(dict.fromkeys(FIELD.findall(pattern)))


def _expression(pattern: str, named: bool = True) -> str:
    """Return a regular expression for a pattern; a field takes as little as it can, and never a slash."""
    out, last, seen = "", 0, set[str]()
    for match in ANYTHING.finditer(pattern):
        out += re.escape(pattern[last : match.start()])
        last = match.end()
        token = match.group()
        name = token[1:-1]
        if token == "**/":
            out += "(?:[^/]+/)*"
        elif token == "*":
            out += "[^/]*"
        elif token == "?":
            out += "[^/]"
        elif not named:
            out += "[^/]+"
        elif name in seen:
            out += f"(?P={name})"
        else:
            seen.add(name)
            out += f"(?P<{name}>[^/]+?)"
    return out + re.escape(pattern[last:])


def _walk(root: str, below: str, parts: list[str]) -> Iterator[str]:
    """Yield the relative paths that may fit, going into no folder that cannot lead to one."""
    here = os.path.join(root, below)
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _walk(root, below, rest)
        for name in _folders(here):
            yield from _walk(root, f"{below}{name}/", parts)
        return
    if ANYTHING.search(part):
        expression = re.compile(_expression(part, named=False))
        try:
            names = [name for name in os.listdir(here) if expression.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"cannot list {here}: {error}") from error
    else:
        names = [part]
    for name in names:
        if rest:
            yield from _walk(root, f"{below}{name}/", rest)
        elif os.path.isfile(os.path.join(here, name)):
            yield f"{below}{name}"


def _walk_remote(store: Store, below: str, parts: list[str], at_once: int = 1) -> list[Found]:
    """List what may fit on object storage, folder by folder: a tree of a biobank has far more files than recordings.

    The folders of the first part that is no plain text, such as subjects, are looked into `at_once`.
    """
    part, rest = parts[0], parts[1:]
    if part == "**":
        return [Found(f"{below}{name}", _remote_stamp(info), {}) for name, info in store.find(below).items()]
    expression = re.compile(_expression(part, named=False))
    if not rest:
        here = store.find(below, max_depth=1).items()
        return [Found(f"{below}{name}", _remote_stamp(info), {}) for name, info in here if expression.fullmatch(name)]
    if not ANYTHING.search(part):
        return _walk_remote(store, f"{below}{part}/", rest, at_once)
    folders = [f"{below}{name}/" for name in store.names(below) if expression.fullmatch(name)]
    with ThreadPoolExecutor(at_once) as pool:
        return [item for found in pool.map(lambda folder: _walk_remote(store, folder, rest), folders) for item in found]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as items:
            return [item.name for item in items if item.is_dir() and not item.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"cannot list {path}: {error}") from error


@lru_cache(maxsize=64)
def _store(url: str) -> Store:
    return Store(url)


def _remote_stamp(info: dict[str, Any]) -> str:
    """Return ``size:etag``; the time of the last change where storage keeps no etag."""
    for key in ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created"):
        if value := info.get(key):
            value = value.timestamp() if isinstance(value, datetime) else value
            return f"{info.get('size') or 0}:{str(value).strip(chr(34))}"
    return f"{info.get('size') or 0}:"
