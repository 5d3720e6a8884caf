"""Zarr's files on a `brainlm.store.Store`: written whole, tried again when storage fails, errors as `StoreError`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from brainlm.errors import StoreError
from brainlm.store import Store as Files


class ZarrFiles(Store):
    """What ``zarr.open_group`` needs of a folder of a data set.

    Parameters
    ----------
    files : brainlm.store.Store
        The folder.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(self, files: Files, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.files = files

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and other.files.url == self.files.url

    def __repr__(self) -> str:
        return f"ZarrFiles({self.files.url!r})"

    def with_read_only(self, read_only: bool = False) -> ZarrFiles:
        return ZarrFiles(self.files, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.files.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(self.files.write_bytes, key, value.to_bytes())

    async def delete(self, key: str) -> None:
        self._check_writable()
        await asyncio.to_thread(self.files.remove, key)

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        await asyncio.to_thread(self.files.remove, prefix)

    async def list(self) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self.files.find):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self.files.find):
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self.files.names, prefix.rstrip("/")):
            yield name

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        try:
            if wanted is None:
                return self.files.read_bytes(key)
            if isinstance(wanted, RangeByteRequest):
                return self.files.read_range(key, wanted.start, wanted.end)
            size = self.files.size(key)
            if isinstance(wanted, OffsetByteRequest):
                return self.files.read_range(key, min(wanted.offset, size), size)
            assert isinstance(wanted, SuffixByteRequest)
            return self.files.read_range(key, max(0, size - wanted.suffix), size)
        except StoreError as error:
            if _is_missing(error):
                return None
            raise


def _is_missing(error: Any) -> bool:
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError | IsADirectoryError)
