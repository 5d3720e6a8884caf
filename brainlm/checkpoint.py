"""Portable checkpoints: a folder of safetensors, configuration and input contract that loads without pickle.

::

    model.safetensors      float32 weights
    input_contract.json    what the model must be fed
    train_subjects.json    keyed hashes of the subjects it was trained on: who knows an id can look it up. The key
                           lies beside them, so ids that can be guessed (sub-001, ...) are not secret
    manifest.json          git commit, data hash, versions, step, settings
    config.json            sizes, hash of the weights; written last, so a folder that has one is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import torch

from brainlm import input_contract
from brainlm.config import build
from brainlm.errors import CheckpointError, ConfigError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from brainlm.subject_hash import keyed_hash

if TYPE_CHECKING:
    from brainlm.model import BrainLM

FORMAT_VERSION = 1
MODEL_TYPE = "brainlm-mae"
WEIGHTS, CONFIG, MANIFEST, TRAIN_SUBJECTS = "model.safetensors", "config.json", "manifest.json", "train_subjects.json"


def save_checkpoint(
    folder: str,
    model: BrainLM,
    manifest: dict[str, Any],
    train_subjects: list[str],
    weights: dict[str, torch.Tensor] | None = None,
) -> str:
    """Write a portable checkpoint and return the sha256 of its weights.

    Parameters
    ----------
    folder : str
        Any fsspec URL.
    manifest : mapping
        Where the weights come from. No subject ids.
    train_subjects : list of str
        Subjects in the training split; only keyed hashes of them are written.
    weights : mapping, optional
        Float32 weights gathered from a training engine; None takes the module's own.
    """
    from safetensors.torch import save

    store = Store(folder)
    store.remove(CONFIG)  # until it is back, the folder counts as unfinished
    state = model.state_dict() if weights is None else weights
    data = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    key = hashlib.sha256(f"train subjects of {sha256}".encode()).hexdigest()
    subjects = sorted({keyed_hash(key, subject) for subject in train_subjects})
    store.write_bytes(WEIGHTS, data)
    store.write_bytes(input_contract.FILE_NAME, model.contract.dumps().encode())
    store.write_json(TRAIN_SUBJECTS, {"key": key, "subjects": subjects})
    store.write_json(MANIFEST, manifest)
    config = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "num_parameters": model.num_parameters,
        "weights_sha256": sha256,
        "model": dataclasses.asdict(model.config),
    }
    store.write_json(CONFIG, config)
    return sha256


def load_checkpoint(folder: str) -> BrainLM:
    """Load a portable checkpoint, in float32 and evaluation mode.

    Raises
    ------
    CheckpointError
        If the folder is not a finished checkpoint, its weights are damaged, or a weight is missing or unexpected.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from brainlm.model import BrainLM, ModelConfig

    store = Store(folder)
    if not store.exists(CONFIG):
        candidates = [*store.names(), *(f"checkpoints/{name}" for name in store.names("checkpoints"))]
        nested = [name for name in candidates if store.exists(f"{name}/{CONFIG}")]
        hint = f"; did you mean {folder}/{nested[-1]}?" if nested else ""
        raise CheckpointError(f"{folder} holds no finished checkpoint (no {CONFIG}){hint}")
    tree = store.read_json(CONFIG)
    if tree.get("model_type") != MODEL_TYPE or tree.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}/{CONFIG}: expected model_type {MODEL_TYPE!r} of format {FORMAT_VERSION}, "
            f"found {tree.get('model_type')!r} of format {tree.get('format_version')!r}"
        )
    absent = [key for key in ("model", "weights_sha256") if key not in tree]
    if absent:
        raise CheckpointError(f"{folder}/{CONFIG} lacks {', '.join(absent)}")
    try:
        config = build(ModelConfig, tree["model"], f"{folder}/{CONFIG}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    contract = InputContract.from_json(
        store.read_json(input_contract.FILE_NAME), f"{folder}/{input_contract.FILE_NAME}"
    )
    data = store.read_bytes(WEIGHTS)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != tree["weights_sha256"]:
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
    return model.float().eval()


def seen_subjects(folder: str, subjects: list[str]) -> set[str]:
    """Return those of `subjects` that the checkpoint was trained on."""
    store = Store(folder)
    if not store.exists(TRAIN_SUBJECTS):
        raise CheckpointError(f"{folder} has no {TRAIN_SUBJECTS}: which subjects it was trained on is not known")
    tree = store.read_json(TRAIN_SUBJECTS)
    known = set(tree["subjects"])
    return {subject for subject in subjects if keyed_hash(tree["key"], subject) in known}
