"""A predictor before its first step: encoder, fitted targets, whitened features; and what of it is trained."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainlm.dataset import Dataset
from brainlm.embedding import side_by_side
from brainlm.errors import ConfigError, DataError
from brainlm.layers import Block
from brainlm.model import BrainLM
from brainlm.predictor import Predictor
from brainlm.published import PublishedModel, is_published
from brainlm.reading import evaluating
from brainlm.targets import Target
from brainlm.train_subjects import TrainSubjects
from train.cohort import ChosenRecordings, Cohort, Member
from train.finetune_settings import EncoderSettings, FinetuneSettings
from train.first_weights import adopt
from train.subject_split import SubjectSplit

MAX_WHITENED = 512  # recordings whose windows give mean and covariance of what the head reads
_PERMUTED = 0x9E

Encoder = BrainLM | PublishedModel


def load_encoder(settings: FinetuneSettings, dataset: Dataset) -> tuple[Encoder, TrainSubjects | None, dict[str, Any]]:
    """Return the encoder with the contract that the data set is read by, whom it was pretrained on, and its origin.

    A checkpoint of ours takes over the contract of the data set; a published one keeps its own.

    Raises
    ------
    CheckpointError, DataError
        If its parcels or TR are not those of the data set.
    """
    name = settings.checkpoint
    if is_published(name):
        encoder = PublishedModel.from_pretrained(name)
        encoder.contract.check_fits(dataset.contract, ours=name, theirs=f"data set {dataset.name}")
        facts: dict[str, Any] = {"init_from": {"checkpoint": name, "weights_sha256": encoder.weights_sha256}}
        known = None
        if settings.encoder.untrained:
            return PublishedModel.untrained_like(encoder, settings.run.seed), TrainSubjects(""), facts
        return encoder, known, facts
    first = adopt(BrainLM.from_pretrained(name), name, dataset)
    if settings.encoder.untrained:
        return BrainLM.untrained_like(first.model, settings.run.seed), TrainSubjects.of("", []), first.facts
    return first.model, first.earlier, first.facts


def fit_targets(settings: FinetuneSettings, cohort: Cohort, split: SubjectSplit) -> tuple[Target, ...]:
    """Fit the targets to the training subjects; a subject of several recordings counts once.

    Raises
    ------
    DataError
        If a target cannot be learned, or no validation or test subject has it.
    """
    targets = []
    for wanted in settings.targets:
        members = split.roles["train"]
        once = {(m.subject, str(v)): v for m, v in zip(members, cohort.values(wanted.column, members), strict=True)}
        target = Target.fit(wanted, list(once.values()))
        for role in ("val", "test"):
            _, known = target.encode(cohort.values(wanted.column, split.roles[role]))
            if not known.any():
                raise DataError(f"target {wanted.column}: all {role} subjects lack a value")
        targets.append(target)
    return tuple(targets)


def target_values(
    targets: Sequence[Target], cohort: Cohort, members: Sequence[Member], permute_seed: int | None = None
) -> list[list[Any]]:
    """Return the values of each target, one per member. With a seed they are permuted among the subjects."""
    columns = [cohort.values(target.column, members) for target in targets]
    if permute_seed is None:
        return columns
    subjects = sorted({member.subject for member in members})
    order = np.random.default_rng([_PERMUTED, permute_seed]).permutation(len(subjects))
    given_to = {subjects[i]: subjects[j] for i, j in enumerate(order.tolist())}
    first = {member.subject: i for i, member in reversed(list(enumerate(members)))}
    return [[column[first[given_to[member.subject]]] for member in members] for column in columns]


def whiten(predictor: Predictor, reader: ChosenRecordings) -> None:
    """Set how the head whitens what it reads, from the windows of training recordings."""
    step = -(-len(reader) // MAX_WHITENED)
    features: list[Tensor] = []
    with evaluating(predictor) as device:
        for index in range(0, len(reader), step):
            _, _, windows = side_by_side(predictor.contract, reader.as_recording(index), native_tr=True)
            features.append(predictor.features(windows.to(device)).float().cpu())
    predictor.head.set_whitening(torch.cat(features))


def whitening_text(predictor: Predictor) -> list[str]:
    """Return mean and matrix as text, exactly: what ranks can tell each other."""
    parts = (predictor.head.feature_mean, predictor.head.whitener)
    return [base64.b64encode(part.numpy().tobytes()).decode() for part in parts]


def set_whitening_text(predictor: Predictor, text: Sequence[str]) -> None:
    """Put back what `whitening_text` gave."""
    mean, whitener = (torch.from_numpy(np.frombuffer(base64.b64decode(part), np.float32).copy()) for part in text)
    predictor.head.feature_mean, predictor.head.whitener = mean, whitener.view(len(mean), len(mean))


def set_trained(encoder: Encoder, settings: EncoderSettings, *, decoder: bool) -> bool:
    """Choose what of an encoder is trained, and set dropout there; say whether any of it is.

    Parameters
    ----------
    decoder : bool
        Train the decoder as well: when a forecaster is fine-tuned.
    """
    body, blocks, last = _parts(encoder)
    could = {id(p) for p in encoder.parameters() if p.requires_grad}  # not the fixed positions of published models
    kept = [p for part in _decoder_parts(encoder) for p in part] if decoder else []
    if settings.trained == "all":
        modules: list[nn.Module] = [*body, *blocks, last]
        parameters = [p for module in modules for p in module.parameters()]
        if isinstance(encoder, BrainLM):
            parameters.append(encoder.cls_token)
        dropped = modules
    elif settings.trained == "none":
        parameters, dropped = [], []
    else:
        if settings.trained > len(blocks):
            raise ConfigError(f"encoder.trained={settings.trained}: this encoder has {len(blocks)} blocks")
        dropped = [*blocks[-settings.trained :], last]
        parameters = [p for module in dropped for p in module.parameters()]
    trained = {id(p) for p in (*parameters, *kept)} & could
    for parameter in encoder.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    in_trained = {id(module) for part in dropped for module in part.modules()}
    for module in encoder.modules():
        p = settings.dropout if id(module) in in_trained else 0.0
        if isinstance(module, Block):
            module.dropout = p
        elif isinstance(module, nn.Dropout):
            module.p = p
    return bool(parameters)


def _parts(encoder: Encoder) -> tuple[list[nn.Module], list[nn.Module], nn.Module]:
    """Return what comes before the blocks of an encoder, the blocks, and the norm after them."""
    if isinstance(encoder, BrainLM):
        before = [encoder.patch_embed, encoder.position]
        before += [encoder.presence_embed] if encoder.presence_embed is not None else []
        return before, list(encoder.encoder), encoder.encoder_norm
    vit = encoder.network.vit
    return [vit.embeddings], list(vit.encoder.layer), vit.layernorm


def _decoder_parts(encoder: Encoder) -> list[list[nn.Parameter]]:
    if not isinstance(encoder, BrainLM):
        raise ConfigError("forecast_patches: published models are not fine-tuned to forecast; take one of our own")
    modules = (encoder.decoder_embed, encoder.decoder_position, encoder.decoder, encoder.decoder_norm)
    return [list(module.parameters()) for module in (*modules, encoder.decoder_pred)] + [[encoder.mask_token]]
