"""Predictors on storage: the checkpoint of an encoder, with a head beside it. Loads without pickle.

::

    head.safetensors    float32 weights of the head, and what whitens its input
    head.json           its sizes, targets with their transforms, and hashes of head and encoder
    README.md           what it predicts, from whom it learned, and what it must be fed
    ...                 the files of `brainlm.checkpoint` (or of a published model): the encoder, which loads alone, too
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from brainlm import checkpoint as encoder_checkpoint
from brainlm import hub
from brainlm.checkpoint import CONFIG, MANIFEST
from brainlm.config import Section, build
from brainlm.errors import CheckpointError, ConfigError
from brainlm.heads import HeadConfig
from brainlm.model import BrainLM
from brainlm.model_card import FILE_NAME as CARD
from brainlm.predictor import Predictor
from brainlm.predictor_card import predictor_card
from brainlm.published import PublishedModel, is_published
from brainlm.reconstruction import STALE_DECODER
from brainlm.store import Store
from brainlm.targets import Target
from brainlm.train_subjects import FILE_NAME as TRAIN_SUBJECTS
from brainlm.train_subjects import TrainSubjects

FORMAT_VERSION = 1
WEIGHTS, HEAD = "head.safetensors", "head.json"
FILES = (*encoder_checkpoint.FILES, WEIGHTS, HEAD)
MEAN, WHITENER = "feature_mean", "whitener"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HeadFile(Section):
    """head.json."""

    format_version: int
    head: HeadConfig
    targets: tuple[Target, ...]
    head_sha256: str
    encoder_sha256: str
    knows_pretraining: bool
    """False: train_subjects.json has those of the head alone."""


def save_predictor(
    folder: str,
    predictor: Predictor,
    manifest: dict[str, Any],
    train_subjects: TrainSubjects | None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """Write a predictor and return what identifies its weights.

    Parameters
    ----------
    folder : str
        Any fsspec URL.
    manifest : mapping
        Where it comes from. No subject ids. If it says ``encoder_trained``, the decoder is marked as one that no longer
        belongs to the encoder.
    train_subjects : TrainSubjects or None
        Everybody that encoder and head were trained on.
    weights : mapping, optional
        Float32 weights of the whole predictor, gathered from a training engine; None takes its own.
    """
    from safetensors.torch import save

    state = dict(predictor.state_dict()) if weights is None else dict(weights)
    parts: dict[str, dict[str, torch.Tensor]] = {"encoder": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.detach().float().cpu().contiguous()
    data = save({**parts["head"], MEAN: predictor.head.feature_mean, WHITENER: predictor.head.whitener})
    encoder, facts = predictor.encoder, dict(manifest)
    if manifest.get("encoder_trained"):
        facts[STALE_DECODER] = [target.column for target in predictor.targets]
    elif STALE_DECODER in encoder.manifest:  # it was trained before
        facts[STALE_DECODER] = encoder.manifest[STALE_DECODER]

    def beside(encoder_sha256: str) -> dict[str, bytes]:
        found = _HeadFile(
            format_version=FORMAT_VERSION, head=predictor.head.config, targets=predictor.targets,
            head_sha256=hashlib.sha256(data).hexdigest(), encoder_sha256=encoder_sha256,
            knows_pretraining=isinstance(encoder, BrainLM),
        )  # fmt: skip
        files = {WEIGHTS: data, CARD: predictor_card(predictor, manifest).encode()}
        if train_subjects is not None:
            files[TRAIN_SUBJECTS] = json.dumps(train_subjects.to_json()).encode()
        return {**files, HEAD: json.dumps(dataclasses.asdict(found)).encode()}

    Store(folder).remove(HEAD)
    if isinstance(encoder, BrainLM):
        encoder_sha256 = encoder_checkpoint.save_checkpoint(
            folder, encoder, facts, [], parts["encoder"], train_subjects, beside
        )
    else:
        encoder_sha256 = encoder.save_pretrained(folder, facts, parts["encoder"], beside)
    return _identity(encoder_sha256, hashlib.sha256(data).hexdigest())


def load_predictor(path_or_hub_id: str, revision: str | None = None) -> Predictor:
    """Load a predictor, in float32 and evaluation mode.

    Parameters
    ----------
    path_or_hub_id : str
        A folder (path or fsspec URL), or ``owner/name`` on the Hugging Face hub.

    Raises
    ------
    CheckpointError
        If the folder is no finished predictor, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = hub.local_folder(str(path_or_hub_id), FILES, revision)
    store = Store(folder)
    found = _read_head(store)
    data = store.read_bytes(WEIGHTS)
    if hashlib.sha256(data).hexdigest() != found.head_sha256:
        raise CheckpointError(f"{store.url_of(WEIGHTS)} is damaged: its sha256 is not the one in {HEAD}")
    encoder = PublishedModel.from_pretrained(folder) if is_published(folder) else BrainLM.from_pretrained(folder)
    if encoder.weights_sha256 != found.encoder_sha256:
        raise CheckpointError(f"{folder} holds another encoder than the one that {HEAD} names: copy all of it again")
    predictor = Predictor(encoder, found.head, found.targets)
    try:
        state = load(data)
        predictor.head.feature_mean, predictor.head.whitener = state.pop(MEAN), state.pop(WHITENER)
        predictor.head.load_state_dict(state)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{store.url_of(WEIGHTS)} does not fit its {HEAD}: {error}") from error
    predictor.manifest = store.read_json(MANIFEST)
    predictor.weights_sha256 = _identity(found.encoder_sha256, found.head_sha256)
    predictor.knows_pretraining = found.knows_pretraining
    if store.exists(TRAIN_SUBJECTS):
        where = store.url_of(TRAIN_SUBJECTS)
        predictor.train_subjects = TrainSubjects.from_json(store.read_json(TRAIN_SUBJECTS), where)
    return predictor.float().eval()


def is_predictor(folder: str) -> bool:
    """Say whether a folder holds a finished predictor."""
    return Store(folder).exists(HEAD) and Store(folder).exists(CONFIG)


def _read_head(store: Store) -> _HeadFile:
    where = store.url_of(HEAD)
    if not (store.exists(HEAD) and store.exists(CONFIG)):
        hint = "a pretrained model predicts nothing until train/finetune.py has given it a head"
        if not store.exists(CONFIG):
            hint = "give the folder of a fine-tuning run, or its checkpoints/best-step-N"
        raise CheckpointError(f"{store.url} holds no finished predictor (no {HEAD}): {hint}")
    tree = store.read_json(HEAD)
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: expected format {FORMAT_VERSION}, found {version!r}: install the brainlm that {MANIFEST} names"
        )
    try:
        return build(_HeadFile, tree, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _identity(encoder_sha256: str, head_sha256: str) -> str:
    return hashlib.sha256(f"{encoder_sha256} {head_sha256}".encode()).hexdigest()
