"""A predictor before its first step: encoder, fitted targets, whitened features; and what of it is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from brainlm.dataset import Dataset
from brainlm.embedding import side_by_side
from brainlm.errors import CheckpointError, ConfigError, DataError
from brainlm.heads import moments
from brainlm.layers import Block
from brainlm.members import ChosenRecordings, Member, Members
from brainlm.model import BrainLM
from brainlm.predictor import Predictor
from brainlm.published import PublishedModel, is_published
from brainlm.targets import Target
from brainlm.train_subjects import TrainSubjects
from brainlm.windows import TR_TOLERANCE_S
from train.engine import Engine
from train.finetune_settings import EncoderSettings, FinetuneSettings
from train.first_weights import adopt
from train.subject_split import SubjectSplit

MAX_WHITENED = 512  # recordings whose windows give mean and covariance of what the head reads
_PERMUTED = 0x9E
logger = logging.getLogger(__name__)

Encoder = BrainLM | PublishedModel


@dataclass(frozen=True, eq=False)
class Origin:
    """An encoder as fine-tuning begins with it.

    ``pretrained_on``: whom the checkpoint was pretrained on, which decides who may be tested, also where a control has
    random weights in place of its own; None = it does not say. ``remembered``: to whose list those are added that the
    head is trained on. ``facts``: for the manifest.
    """

    encoder: Encoder
    pretrained_on: TrainSubjects | None
    remembered: TrainSubjects
    facts: dict[str, Any]


def load_encoder(settings: FinetuneSettings, dataset: Dataset) -> Origin:
    """Load the encoder, with the contract that the data set is read by.

    A checkpoint of ours takes over the contract of the data set; a published one keeps its own.

    Raises
    ------
    CheckpointError
        If its parcels are not those of the data set and it cannot read others, or a published one has another TR.
    """
    name, nobody, seed = settings.checkpoint, TrainSubjects.of("", []), settings.run.seed
    if is_published(name):
        encoder = PublishedModel.from_pretrained(name)
        encoder.contract.check_fits(dataset.contract, ours=name, theirs=f"data set {dataset.name}")
        differs = encoder.contract.adaptable_differences(dataset.contract)
        if abs(encoder.contract.tr_s - dataset.contract.tr_s) > TR_TOLERANCE_S:
            raise CheckpointError(
                f"{name} is fed a TR of {encoder.contract.tr_s:g} s, data set {dataset.name} has "
                f"{dataset.contract.tr_s:g} s: prepare it with contract={name}, or convert the published model for it"
            )
        for line in differs:
            logger.warning("the data set differs from what %s is fed: %s", name, line)
        origin = {"checkpoint": name, "weights_sha256": encoder.weights_sha256, "differs": differs}
        if settings.encoder.untrained:
            encoder = PublishedModel.untrained_like(encoder, seed)
        return Origin(encoder, None, nobody, {"init_from": origin})
    first = adopt(BrainLM.from_pretrained(name), name, dataset)
    assert first.earlier is not None
    if settings.encoder.untrained:
        return Origin(BrainLM.untrained_like(first.model, seed), first.earlier, nobody, first.facts)
    return Origin(first.model, first.earlier, first.earlier, first.facts)


def fit_targets(settings: FinetuneSettings, source: Members, split: SubjectSplit) -> tuple[Target, ...]:
    """Fit the targets to the training subjects; a subject of several recordings counts once.

    Raises
    ------
    DataError
        If a target cannot be learned, or no validation or test subject has it.
    """
    targets = []
    for wanted in settings.targets:
        members = split.roles["train"]
        once = {(m.subject, str(v)): v for m, v in zip(members, source.values(wanted.column, members), strict=True)}
        target = Target.fit(wanted, list(once.values()))
        for role in ("val", "test"):
            _, known = target.encode(source.values(wanted.column, split.roles[role]))
            if not known.any():
                raise DataError(f"target {wanted.column}: all {role} subjects lack a value")
        targets.append(target)
    return tuple(targets)


def target_values(
    targets: Sequence[Target], source: Members, members: Sequence[Member], permute_seed: int | None = None
) -> list[list[Any]]:
    """Return the values of each target, one per member.

    With a seed they are permuted: among the subjects, or among the recordings where each has its own.
    """
    columns = [source.values(target.column, members) for target in targets]
    if permute_seed is None:
        return columns
    rng = np.random.default_rng([_PERMUTED, permute_seed])
    subjects = sorted({member.subject for member in members})
    given_to = dict(zip(subjects, rng.permutation(subjects).tolist(), strict=True))
    first = {member.subject: i for i, member in reversed(list(enumerate(members)))}
    rows = rng.permutation(len(members)).tolist()
    by_subject = [first[given_to[member.subject]] for member in members]
    return [
        [column[i] for i in (by_subject if source.is_of_subjects(target.column) else rows)]
        for target, column in zip(targets, columns, strict=True)
    ]


def whiten(reader: ChosenRecordings, engine: Engine) -> None:
    """Set how the head whitens what it reads, from the windows of training recordings. All ranks take part.

    With the encoder's dropout, as the head will read them: whitening would raise what dropout adds far above the rest.
    """
    predictor = engine.module
    assert isinstance(predictor, Predictor)
    chosen = range(0, len(reader), -(-len(reader) // MAX_WHITENED))
    width = predictor.head.layer1.in_features
    total = torch.zeros(1 + width + width**2, dtype=torch.float64, device=engine.device)
    predictor.train()
    with torch.no_grad():
        for index in chosen[engine.world.rank :: engine.world.size]:
            torch.manual_seed(index)  # the same dropout when the run goes on
            _, _, windows = side_by_side(predictor.contract, reader.as_recording(index), native_tr=True, whole=True)
            num, sums, products = moments(predictor.features(windows.to(engine.device)))
            total += torch.cat([sums.new_tensor([num]), sums, products.flatten()])
    engine.all_reduce(total)
    predictor.head.set_whitening(float(total[0]), total[1 : 1 + width], total[1 + width :].view(width, width))


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
