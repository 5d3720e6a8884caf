"""Checkpoints load bit for bit or not at all, and do not give away who was trained on."""

from __future__ import annotations

import hashlib
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
    save_pretrained,
    seen_subjects,
)
from brainlm.errors import CheckpointError, StoreError
from brainlm.input_contract import FILE_NAME as CONTRACT
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.model_card import FILE_NAME as CARD
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


def test_the_folder_holds_these_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, CONTRACT, TRAIN_SUBJECTS, MANIFEST, CARD}
    assert "| steps | 7 |" in (folder / CARD).read_text()


def test_the_number_of_parameters_is_that_of_the_weights(folder: Path, model: BrainLM) -> None:
    assert json.loads((folder / CONFIG).read_text())["num_parameters"] == sum(p.numel() for p in model.parameters())


def test_weights_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, hashed = hashlib.sha256, []

    def counting(data: bytes = b"", **options: bool) -> object:
        hashed.append(len(data))
        return real(data, **options)

    size = (folder / WEIGHTS).stat().st_size
    monkeypatch.setattr(hashlib, "sha256", counting)
    loaded = load_checkpoint(str(folder))
    assert hashed.count(size) == 1
    save_pretrained(loaded, str(folder))
    assert hashed.count(size) == 2


def test_a_pointer_of_git_lfs_is_no_damage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, not the weights: run 'git lfs pull'"):
        load_checkpoint(str(folder))


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
        ({"format_version": 9}, "by another version of brainlm; install the one that its manifest.json names"),
        ({"model_type": "vit_mae"}, r"found 'vit_mae'.*published BrainLM.*brainlm\.official\.load_official\('/"),
        ({"model_type": "brainlm_mae"}, r"found 'brainlm_mae'.*brainlm\.official\.load_official"),
        ({"model": {"widht": 32}}, r"(?s)widht: unknown key.*A newer brainlm may have written it: update this one"),
        ({"model": {"width": "32"}}, "width: input should be a valid integer, found '32'"),
    ],
)
def test_a_config_of_another_model_is_refused_with_its_path(folder: Path, changes: dict, message: str) -> None:
    edit(folder / CONFIG, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder))
    assert f"{folder}/{CONFIG}" in str(caught.value)


def test_a_config_that_is_no_mapping_is_refused(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a mapping, found list"):
        load_checkpoint(str(folder))


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


def test_a_file_is_refused_with_a_hint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the folder that it lies in"):
        load_checkpoint(str(folder / "model.safetensors"))


def test_a_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no finished checkpoint \(no config\.json\)$"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("last", [WEIGHTS, CONTRACT, TRAIN_SUBJECTS, MANIFEST, CARD, CONFIG])
def test_a_checkpoint_whose_writing_stopped_does_not_load(
    folder: Path, model: BrainLM, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    real = Store.write_bytes

    def stop(store: Store, name: str, data: bytes) -> None:
        if name == last:
            raise StoreError("stopped")
        real(store, name, data)

    monkeypatch.setattr(Store, "write_bytes", stop)
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


def test_a_model_that_is_saved_again_is_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    sha256 = save_pretrained(load_checkpoint(str(folder)), str(again))
    assert load_checkpoint(str(again)).weights_sha256 == sha256
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_changed_model_keeps_who_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(str(folder))
    before = loaded.weights_sha256
    for name in ("once", "twice"):
        with torch.no_grad():
            loaded.cls_token.add_(1)
        save_pretrained(loaded, str(tmp_path / name), more_train_subjects=["sub-new"] if name == "twice" else [])
        assert seen_subjects(str(tmp_path / name), [*SUBJECTS, "sub-2"]) == set(SUBJECTS)
        changed = loaded = load_checkpoint(str(tmp_path / name))
        assert changed.weights_sha256 != before
        assert changed.manifest == MADE_BY | {"changed_from_weights_sha256": before}  # that of the training run
        card = (tmp_path / name / CARD).read_text()
        assert f"the weights were changed | after this training, which ended with weights of sha256 {before}" in card
    assert seen_subjects(str(tmp_path / "twice"), ["sub-new", "sub-2"]) == {"sub-new"}
    assert seen_subjects(str(tmp_path / "once"), ["sub-new"]) == set()


def test_a_model_that_was_never_trained_has_seen_nobody(tmp_path: Path, model: BrainLM) -> None:
    save_pretrained(model, str(tmp_path / "new"))
    assert seen_subjects(str(tmp_path / "new"), SUBJECTS) == set()
    assert load_checkpoint(str(tmp_path / "new")).manifest == {}
    save_pretrained(model, str(tmp_path / "trained"), more_train_subjects=SUBJECTS)
    assert seen_subjects(str(tmp_path / "trained"), [*SUBJECTS, "sub-2"]) == set(SUBJECTS)


def test_an_unknown_list_of_subjects_stays_unknown(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_pretrained(load_checkpoint(str(folder)), str(other))  # its list must not survive
    (folder / TRAIN_SUBJECTS).unlink()
    loaded = load_checkpoint(str(folder))
    save_pretrained(loaded, str(other))
    with pytest.raises(CheckpointError, match="which subjects it was trained on is not known"):
        seen_subjects(str(other), SUBJECTS)
    with pytest.raises(CheckpointError, match="would hide those it was trained on before"):
        save_pretrained(loaded, str(other), more_train_subjects=["sub-1"])


@pytest.mark.parametrize("tree", [[], {"key": "zz", "subjects": []}, {"key": "00"}, {"key": 3, "subjects": []}])
def test_a_damaged_list_of_subjects_is_refused(folder: Path, tree: object) -> None:
    (folder / TRAIN_SUBJECTS).write_text(json.dumps(tree))
    for read in (load_checkpoint, lambda path: seen_subjects(path, SUBJECTS)):
        with pytest.raises(CheckpointError, match=r"train_subjects\.json is not what save_checkpoint writes"):
            read(str(folder))
