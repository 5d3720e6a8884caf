"""Only finished data sets open, and opening one loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainlm.dataset import MANIFEST, open_dataset
from brainlm.errors import DataError, StoreError
from brainlm.store import Store
from brainlm.testing import write_synthetic_dataset


def test_a_finished_data_set_opens_with_its_splits(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    write_synthetic_dataset(url, num_subjects={"train": 4, "val": 2, "test": 0})
    found = open_dataset(url)
    assert [len(found.split(split)) for split in ("train", "val", "test")] == [4, 2, 0]
    assert found.name == "synthetic"
    assert len(found.content_hash) == 64
    assert found.split("train").recording(0).shape == (60, found.contract.atlas.num_parcels)
    assert {e.subject for e in found.split("train").entries}.isdisjoint({e.subject for e in found.split("val").entries})


def test_the_same_seed_writes_the_same_data_set(tmp_path: Path) -> None:
    counts = {"train": 2}
    first, same, other = (
        write_synthetic_dataset(str(tmp_path / name), num_subjects=counts, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.content_hash == same.content_hash != other.content_hash
    np.testing.assert_array_equal(first.split("train").recording(1), same.split("train").recording(1))


def test_an_unfinished_data_set_is_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "data")
    write_synthetic_dataset(url, num_subjects={"train": 2})
    Store(url).remove(MANIFEST)  # written last
    with pytest.raises(DataError, match=f"{url} holds no finished data set .*run it again to finish it"):
        open_dataset(url)
    with pytest.raises(DataError, match="holds no finished data set"):
        open_dataset(str(tmp_path / "nowhere"))


def test_another_format_is_refused(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 2})
    dataset.store.write_json(MANIFEST, dataset.manifest | {"format_version": 7})
    with pytest.raises(DataError, match="expected a data set of format 1, found 7"):
        open_dataset(str(tmp_path))


def test_a_data_set_without_its_contract_is_refused(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 2})
    dataset.store.remove("input_contract.json")
    with pytest.raises(StoreError, match=r"input_contract\.json"):
        open_dataset(str(tmp_path))


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path), num_subjects={"train": 2})
    with pytest.raises(DataError, match="expected one of train, val, test, found 'dev'"):
        dataset.split("dev")  # type: ignore[arg-type]


def test_the_model_is_at_hand_and_loaded_when_asked_for() -> None:
    import brainlm
    from brainlm.model import BrainLM

    assert brainlm.BrainLM is BrainLM
    with pytest.raises(AttributeError, match="module 'brainlm' has no attribute 'BrainLN'"):
        brainlm.BrainLN  # noqa: B018


@pytest.mark.parametrize("module", ["brainlm", "brainlm.model"])
def test_importing_the_library_loads_torch_and_numpy_alone(module: str) -> None:
    heavy = "ray deepspeed nilearn nibabel zarr pandas pyarrow scipy sklearn fsspec pydantic webdataset matplotlib"
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
