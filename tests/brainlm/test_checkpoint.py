"""Checkpoints load bit for bit or not at all, and do not give away who was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainlm.checkpoint import (
    CONFIG,
    MANIFEST,
    TRAIN_SUBJECTS,
    WEIGHTS,
    load_checkpoint,
    save_checkpoint,
    seen_subjects,
)
from brainlm.errors import CheckpointError, StoreError
from brainlm.input_contract import FILE_NAME as CONTRACT
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.store import Store
from brainlm.testing import small_model, synthetic_atlas

SUBJECTS = ["sub-NDARAA075", "sub-NDARAB188", "sub-0051234"]
MADE_BY = {"git_commit": "abc", "step": 7}


@pytest.fixture
def model(contract: InputContract) -> BrainLM:
    return small_model(contract)


@pytest.fixture
def folder(tmp_path: Path, model: BrainLM) -> Path:
    save_checkpoint(str(tmp_path / "step-7"), model, MADE_BY, SUBJECTS)
    return tmp_path / "step-7"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_gives_back_every_bit(folder: Path, model: BrainLM, rng: np.random.Generator) -> None:
    again = load_checkpoint(str(folder))
    assert again.config == model.config
    assert again.contract.dumps() == model.contract.dumps()
    assert again.manifest == MADE_BY
    assert not again.training
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    windows = torch.from_numpy(rng.normal(size=(2, 6, 20)).astype(np.float32))
    mask = (torch.arange(24) % 2 == 0).expand(2, -1)
    assert torch.equal(again.reconstruct(windows, mask).nan_to_num(), model.reconstruct(windows, mask).nan_to_num())


def test_from_pretrained_is_the_same_as_loading(folder: Path, model: BrainLM) -> None:
    again = BrainLM.from_pretrained(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_a_checkpoint_can_lie_on_any_storage(model: BrainLM) -> None:
    sha256 = save_checkpoint("memory://test_checkpoint/step-1", model, {}, SUBJECTS)
    assert load_checkpoint("memory://test_checkpoint/step-1").weights_sha256 == sha256


def test_weights_of_an_engine_are_written_in_float32(tmp_path: Path, model: BrainLM) -> None:
    gathered = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_checkpoint(str(tmp_path), model, {}, [], weights=gathered)
    loaded = load_checkpoint(str(tmp_path)).state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], value.float()) for name, value in gathered.items())


def test_the_same_weights_have_the_same_hash(tmp_path: Path, model: BrainLM, contract: InputContract) -> None:
    first, again = (save_checkpoint(str(tmp_path / name), model, {}, []) for name in "ab")
    assert first == again != save_checkpoint(str(tmp_path / "c"), small_model(contract, seed=1), {}, [])


def test_a_flipped_bit_is_found(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its sha256 is not the one in config"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(("drop", "add"), [("cls_token", None), (None, "extra.weight")])
def test_a_missing_or_unexpected_weight_is_named(
    tmp_path: Path, model: BrainLM, drop: str | None, add: str | None
) -> None:
    weights = {name: value for name, value in model.state_dict().items() if name != drop}
    if add:
        weights[add] = torch.zeros(1)
    save_checkpoint(str(tmp_path), model, {}, [], weights=weights)
    words = f"missing [{drop!r}]" if drop else f"unexpected [{add!r}]"
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(tmp_path))
    assert words in str(caught.value)


def test_the_contract_of_another_atlas_is_refused(folder: Path, contract: InputContract) -> None:
    other = InputContract(
        atlas=synthetic_atlas(8),
        covered=np.ones(8, dtype=bool),
        median=np.zeros(8, dtype=np.float32),
        iqr=np.ones(8, dtype=np.float32),
        tr_s=contract.tr_s,
        window_len=20,
        patch_len=5,
    )
    (folder / CONTRACT).write_text(other.dumps())
    with pytest.raises(CheckpointError, match=r"(?s)does not fit .* input contract: .*position\.parcel\.weight"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "expected model_type 'brainlm-mae' of format 1, found 'bert' of format 1"),
        ({"format_version": 9}, "found 'brainlm-mae' of format 9"),
        ({"model": {"widht": 32}}, "widht: unknown key"),
        ({"model": {"width": "32"}}, "width: input should be a valid integer, found '32'"),
    ],
)
def test_a_config_of_another_model_is_refused_with_its_path(folder: Path, changes: dict, message: str) -> None:
    edit(folder / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder))
    assert f"{folder}/{CONFIG}" in str(caught.value)


@pytest.mark.parametrize("key", ["model", "weights_sha256"])
def test_a_config_that_lacks_a_part_is_refused(folder: Path, key: str) -> None:
    tree = json.loads((folder / CONFIG).read_text())
    del tree[key]
    (folder / CONFIG).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=f"config.json lacks {key}"):
        load_checkpoint(str(folder))


def test_the_folder_above_is_refused_with_a_hint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds no finished checkpoint .*; did you mean {folder}\\?"):
        load_checkpoint(str(folder.parent))


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no finished checkpoint \(no config\.json\)$"):
        load_checkpoint(str(tmp_path))


def test_a_checkpoint_whose_writing_stopped_does_not_load(
    folder: Path, model: BrainLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.write_json

    def stop_at_manifest(store: Store, name: str, tree: object) -> None:
        if name == MANIFEST:
            raise StoreError("stopped")
        real(store, name, tree)

    monkeypatch.setattr(Store, "write_json", stop_at_manifest)
    with pytest.raises(StoreError, match="stopped"):
        save_checkpoint(str(folder), model, {}, SUBJECTS)  # over the finished one
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        load_checkpoint(str(folder))


def test_subjects_are_recognised(folder: Path) -> None:
    others = ["sub-NDARAA076", "NDARAA075", "sub-0051235", ""]
    assert seen_subjects(str(folder), [*others, *SUBJECTS]) == set(SUBJECTS)
    assert seen_subjects(str(folder), others) == set()


def test_subjects_cannot_be_read_from_the_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        data = path.read_bytes()
        for subject in SUBJECTS:
            assert subject.encode() not in data
            assert subject.removeprefix("sub-").encode() not in data


def test_the_same_subject_has_another_hash_in_another_checkpoint(folder: Path, contract: InputContract) -> None:
    other = folder.parent / "other"
    save_checkpoint(str(other), small_model(contract, seed=1), {}, SUBJECTS)
    first, second = (set(json.loads((f / TRAIN_SUBJECTS).read_text())["subjects"]) for f in (folder, other))
    assert len(first) == len(second) == len(SUBJECTS)
    assert first.isdisjoint(second)


def test_without_the_list_of_subjects_nothing_is_claimed(folder: Path) -> None:
    (folder / TRAIN_SUBJECTS).unlink()
    with pytest.raises(CheckpointError, match="which subjects it was trained on is not known"):
        seen_subjects(str(folder), SUBJECTS)


def test_the_contract_travels_with_the_windows_of_the_model(tmp_path: Path, contract: InputContract) -> None:
    longer = replace(contract, window_len=40)
    save_checkpoint(str(tmp_path), small_model(longer), {}, [])
    found = load_checkpoint(str(tmp_path)).contract
    assert (found.window_len, found.patch_len) == (40, 5)
    np.testing.assert_array_equal(found.iqr, contract.iqr)
