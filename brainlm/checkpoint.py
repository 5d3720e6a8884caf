"""Portable checkpoints: a folder of safetensors, configuration and input contract that loads without pickle.

::

    model.safetensors      float32 weights
    input_contract.json    what the model must be fed
    train_subjects.json    keyed hashes of the subjects it was trained on: who knows an id can look it up. The key
                           lies beside them, so ids that can be guessed (sub-001, ...) are not secret
    manifest.json          git commit, data hash, versions, step, settings
    README.md              model card, made from all of these
    config.json            sizes, hash of the weights; written last, so a folder that has one is complete

The layout is that of a model repository on the Hugging Face hub, from which a checkpoint loads too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from brainlm import hub, input_contract, model_card
from brainlm.config import build
from brainlm.errors import CheckpointError, ConfigError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from brainlm.train_subjects import FILE_NAME as TRAIN_SUBJECTS
from brainlm.train_subjects import TrainSubjects

if TYPE_CHECKING:
    from brainlm.model import BrainLM, ModelConfig

FORMAT_VERSION = 1
MODEL_TYPE = "brainlm-mae"
WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
FILES = (CONFIG, WEIGHTS, input_contract.FILE_NAME, TRAIN_SUBJECTS, MANIFEST, model_card.FILE_NAME)
LFS_POINTER = b"version https://git-lfs"  # how the file begins where a clone did not fetch the weights


def save_checkpoint(
    folder: str,
    model: BrainLM,
    manifest: dict[str, Any],
    train_subjects: Iterable[str],
    weights: dict[str, torch.Tensor] | None = None,
    earlier: TrainSubjects | None = None,
    beside: Callable[[str], dict[str, bytes]] | None = None,
) -> str:
    """Write a portable checkpoint and return the sha256 of its weights.

    Parameters
    ----------
    folder : str
        Any fsspec URL.
    manifest : mapping
        Where the weights come from. No subject ids.
    train_subjects : iterable of str
        Subjects in the training split; only keyed hashes of them are written.
    weights : mapping, optional
        Float32 weights gathered from a training engine; None takes the module's own.
    earlier : TrainSubjects, optional
        Who the weights that training began with had been trained on.
    beside : callable, optional
        Gives further files, from the sha256 of the weights; they are written before the folder counts as finished.
    """
    data, num_parameters = _serialize(model.state_dict() if weights is None else weights)
    sha256 = hashlib.sha256(data).hexdigest()
    subjects = TrainSubjects.of(sha256, train_subjects) if earlier is None else earlier.with_more(train_subjects)
    _write(folder, model, data, sha256, num_parameters, manifest, subjects, beside(sha256) if beside else {})
    return sha256


def save_pretrained(model: BrainLM, folder: str, more_train_subjects: Iterable[str] = ()) -> str:
    """Write a model as a portable checkpoint, with the manifest and training subjects it was loaded with.

    A model that was never trained has neither; its list of subjects is empty. If the weights are no longer those that
    were loaded, manifest and card say so.

    Parameters
    ----------
    folder : str
        Any fsspec URL.
    more_train_subjects : iterable of str
        Subjects that it was trained on since it was loaded; only keyed hashes of them are written.

    Returns
    -------
    str
        sha256 of the weights.

    Raises
    ------
    CheckpointError
        If subjects are to be added to a list that was not there when the model was loaded.
    """
    data, num_parameters = _serialize(model.state_dict())
    sha256 = hashlib.sha256(data).hexdigest()
    more = list(more_train_subjects)
    manifest, subjects = model.manifest, model.train_subjects
    if not model.weights_sha256:  # built here, not loaded
        subjects = TrainSubjects.of(sha256, more)
    elif subjects is not None:
        subjects = subjects.with_more(more)
    elif more:
        raise CheckpointError(
            f"the checkpoint that was loaded had no {TRAIN_SUBJECTS}: a list of the {len(more)} subjects given here "
            "alone would hide those it was trained on before. Leave more_train_subjects out"
        )
    if model.weights_sha256 and model.weights_sha256 != sha256:
        manifest = {model_card.CHANGED_FROM: model.weights_sha256} | manifest  # the first of several changes stays
    _write(folder, model, data, sha256, num_parameters, manifest, subjects)
    return sha256


def _serialize(state: dict[str, torch.Tensor]) -> tuple[bytes, int]:
    """Return the weights as safetensors in float32, and how many values they are."""
    from safetensors.torch import save

    data: bytes = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()})
    return data, sum(tensor.numel() for tensor in state.values())


def _write(
    folder: str,
    model: BrainLM,
    data: bytes,
    sha256: str,
    num_parameters: int,
    manifest: dict[str, Any],
    subjects: TrainSubjects | None,
    beside: dict[str, bytes] | None = None,
) -> None:
    card = model_card.model_card(model, manifest, sha256, num_parameters, subjects)
    store = Store(folder)
    store.remove(CONFIG)  # until it is back, the folder counts as unfinished
    store.write_bytes(WEIGHTS, data)
    store.write_bytes(input_contract.FILE_NAME, model.contract.dumps().encode())
    if subjects is None:
        store.remove(TRAIN_SUBJECTS)  # of an older checkpoint in the same folder
    else:
        store.write_json(TRAIN_SUBJECTS, subjects.to_json())
    store.write_json(MANIFEST, manifest)
    for name, content in {model_card.FILE_NAME: card.encode(), **(beside or {})}.items():
        store.write_bytes(name, content)
    config = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "num_parameters": num_parameters,
        "weights_sha256": sha256,
        "model": dataclasses.asdict(model.config),
    }
    store.write_json(CONFIG, config)


def load_checkpoint(path_or_hub_id: str, revision: str | None = None) -> BrainLM:
    """Load a portable checkpoint, in float32 and evaluation mode.

    Parameters
    ----------
    path_or_hub_id : str
        A folder (a path, or any fsspec URL), or ``owner/name`` on the Hugging Face hub. A path that exists goes before
        a hub id.
    revision : str, optional
        Branch, tag or commit on the hub.

    Raises
    ------
    CheckpointError
        If the folder is not a finished checkpoint, its weights are damaged, or a weight is missing or unexpected; if
        there is neither such a folder nor such a repository.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from brainlm.model import BrainLM

    folder = hub.local_folder(str(path_or_hub_id), FILES, revision)
    store = Store(folder)
    config, expected_sha256 = _read_config(store)
    contract = InputContract.from_json(
        store.read_json(input_contract.FILE_NAME), store.url_of(input_contract.FILE_NAME)
    )
    data = store.read_bytes(WEIGHTS)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected_sha256:
        if data.startswith(LFS_POINTER):
            raise CheckpointError(
                f"{folder}/{WEIGHTS} is a Git LFS pointer, not the weights: run 'git lfs pull' where it is from"
            )
        raise CheckpointError(f"{folder}/{WEIGHTS} is damaged: its sha256 is not the one in {CONFIG}")
    try:
        state = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{folder}/{WEIGHTS} cannot be read: {error}") from error
    model = BrainLM(config, contract)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{folder}/{WEIGHTS} does not fit its {CONFIG} and input contract: {error}") from error
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{folder}/{WEIGHTS} does not fit its {CONFIG}: missing {result.missing_keys[:5]}, "
            f"unexpected {result.unexpected_keys[:5]}"
        )
    model.manifest = store.read_json(MANIFEST)
    model.weights_sha256 = sha256
    model.train_subjects = _read_train_subjects(store)
    return model.float().eval()


def _read_config(store: Store) -> tuple[ModelConfig, str]:
    """Return the sizes and the hash of the weights that a finished checkpoint states."""
    from brainlm.model import ModelConfig

    folder, where = store.url, store.url_of(CONFIG)
    if not store.exists(CONFIG):
        raise CheckpointError(_no_config(store))
    tree = store.read_json(CONFIG)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where}: expected a mapping, found {type(tree).__name__}")
    found_type, found_version = tree.get("model_type"), tree.get("format_version")
    if (found_type, found_version) != (MODEL_TYPE, FORMAT_VERSION):
        from brainlm.official import MODEL_TYPE_13M, MODEL_TYPE_VIT

        hint = ""
        if found_type in (MODEL_TYPE_13M, MODEL_TYPE_VIT):
            hint = ". That is a published BrainLM, another architecture: "
            hint += (
                f"brainlm.official.load_official({folder!r}), or brainlm.published.PublishedModel (docs/published.md)"
            )
        elif found_type == MODEL_TYPE:
            hint = ": it was written by another version of brainlm; install the one that its manifest.json names"
        raise CheckpointError(
            f"{where}: expected model_type {MODEL_TYPE!r} of format {FORMAT_VERSION}, "
            f"found {found_type!r} of format {found_version!r}{hint}"
        )
    absent = [key for key in ("model", "weights_sha256") if key not in tree]
    if absent:
        raise CheckpointError(f"{where} lacks {', '.join(absent)}")
    try:
        return build(ModelConfig, tree["model"], where), str(tree["weights_sha256"])
    except ConfigError as error:
        hint = "\nA newer brainlm may have written it: update this one" if "unknown key" in str(error) else ""
        raise CheckpointError(f"{error}{hint}") from error


def _no_config(store: Store) -> str:
    """Say what a folder without configuration is instead."""
    folder = store.url
    if folder.endswith((".safetensors", ".json", ".bin")):
        return f"{folder} is a file: give the folder that it lies in"
    if store.is_local and not store.exists():
        return f"{folder}: there is no such folder, and it does not read as owner/name on the Hugging Face hub"
    candidates = [*store.names(), *(f"checkpoints/{name}" for name in store.names("checkpoints"))]
    nested = [name for name in candidates if store.exists(f"{name}/{CONFIG}")]
    hint = f"; did you mean {folder}/{nested[-1]}?" if nested else ""
    if not hint and hub.is_hub_id(folder):
        hint = "; a local path goes before a repository of the same name on the hub"
    return f"{folder} holds no finished checkpoint (no {CONFIG}){hint}"


def _read_train_subjects(store: Store) -> TrainSubjects | None:
    if not store.exists(TRAIN_SUBJECTS):
        return None
    return TrainSubjects.from_json(store.read_json(TRAIN_SUBJECTS), store.url_of(TRAIN_SUBJECTS))


def train_subjects(path_or_hub_id: str, revision: str | None = None) -> TrainSubjects | None:
    """Return whom a checkpoint was trained on, as keyed hashes; None where it does not say."""
    return _read_train_subjects(Store(hub.local_folder(str(path_or_hub_id), FILES, revision)))


def seen_subjects(path_or_hub_id: str, subjects: list[str], revision: str | None = None) -> set[str]:
    """Return those of `subjects` that the checkpoint was trained on."""
    folder = hub.local_folder(str(path_or_hub_id), FILES, revision)
    known = train_subjects(folder)
    if known is None:
        raise CheckpointError(f"{folder} has no {TRAIN_SUBJECTS}: which subjects it was trained on is not known")
    return known.seen(subjects)
