"""Zarr's files on a store: what Zarr's own stores give is what this one gives."""

import uuid

import numpy as np
import pytest
import zarr

from brainlm.errors import StoreError
from brainlm.store import Store
from data_prep.zarr_files import ZarrFiles


@pytest.fixture(params=["local", "memory"])
def files(request, tmp_path):
    return Store(tmp_path / "a" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def make(root, rng):
    group = zarr.open_group(root, mode="w", zarr_format=3)
    array = group.create_array(
        "bold", shape=(100, 6), dtype="float32", chunks=(10, 6), shards=(50, 6), fill_value=np.nan
    )
    array[5:80] = rng.normal(size=(75, 6)).astype(np.float32)
    group.create_array("inner/mask", shape=(7,), dtype="bool", chunks=(7,), fill_value=False)
    return group


def test_the_same_files_as_by_zarr_itself(files, tmp_path):
    here = make(ZarrFiles(files), np.random.default_rng(0))
    there = make(zarr.storage.LocalStore(tmp_path / "b"), np.random.default_rng(0))
    expected = {
        str(path.relative_to(tmp_path / "b")): path.read_bytes()
        for path in (tmp_path / "b").rglob("*")
        if path.is_file()
    }
    assert {name: files.read_bytes(name) for name in files.find()} == expected
    again = zarr.open_group(ZarrFiles(files), mode="r")
    for rows in (slice(None), slice(3, 9), slice(49, 51), slice(90, 100)):
        np.testing.assert_array_equal(again["bold"][rows], there["bold"][rows])
    assert sorted(again.keys()) == sorted(here.keys()) == ["bold", "inner"]


def test_what_is_opened_to_be_written_anew_is_empty(files):
    make(ZarrFiles(files), np.random.default_rng(0))
    assert list(zarr.open_group(ZarrFiles(files), mode="w", zarr_format=3).keys()) == []
    assert list(files.find()) == ["zarr.json"]


def test_what_is_opened_to_be_read_is_not_written(files):
    make(ZarrFiles(files), np.random.default_rng(0))
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(ZarrFiles(files), mode="r")["bold"][:] = 1


def test_storage_that_fails_is_a_store_error_not_a_missing_chunk(files, monkeypatch):
    make(ZarrFiles(files), np.random.default_rng(0))
    group = zarr.open_group(ZarrFiles(files), mode="r")

    def fail(*_, **__):
        raise PermissionError("access denied")

    monkeypatch.setattr("brainlm.store.Store.read_range", lambda self, *_: self._try("read", "x", fail))
    monkeypatch.setattr("brainlm.store.Store.read_bytes", lambda self, *_: self._try("read", "x", fail))
    with pytest.raises(StoreError, match="access is denied"):
        group["bold"][:]
