"""Open a prepared data set: its manifest, input contract and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from brainlm import input_contract
from brainlm.errors import DataError
from brainlm.input_contract import InputContract
from brainlm.shards import SplitReader
from brainlm.store import Store

FORMAT_VERSION = 1
MANIFEST = "dataset.json"
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Dataset:
    """A prepared data set on storage.

    ``manifest`` is ``dataset.json`` as read: name, content_hash, atlas, counts per split, shards per split, resolved
    config, versions. It is written last, so a data set that has one is complete.
    """

    store: Store
    manifest: dict[str, Any]
    contract: InputContract

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def content_hash(self) -> str:
        return str(self.manifest["content_hash"])

    def split(self, split: Split) -> SplitReader:
        """Return the reader of one split; it may be empty."""
        if split not in SPLITS:
            raise DataError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
        return SplitReader(self.store, self.manifest["shards"].get(split, []))


def open_dataset(url: str) -> Dataset:
    """Open a data set that `data_prep/prepare.py` has finished.

    Raises
    ------
    DataError
        If there is no finished data set at `url`, or it has another format.
    """
    store = Store(url)
    if not store.exists(MANIFEST):
        raise DataError(
            f"{url} holds no finished data set (no {MANIFEST}): run data_prep/prepare.py, or run it again to finish it"
        )
    manifest = store.read_json(MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{url}: expected a data set of format {FORMAT_VERSION}, found {manifest.get('format_version')!r}"
        )
    check_no_withdrawal(manifest, url)
    contract = InputContract.from_json(
        store.read_json(input_contract.FILE_NAME), store.url_of(input_contract.FILE_NAME)
    )
    return Dataset(store=store, manifest=manifest, contract=contract)


def check_no_withdrawal(manifest: dict[str, Any], url: str) -> None:
    """Raise `DataError` if subjects were being removed when the program was stopped: nothing fits together then."""
    if (manifest.get("withdrawn") or {}).get("pending"):
        raise DataError(
            f"{url}: the withdrawal of subjects was stopped before its end; give the same command with withdraw=FILE "
            "again"
        )
