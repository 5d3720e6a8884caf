"""What a fine-tuning run trains, feeds and scores: a predictor of phenotypes, or a forecaster."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.errors import ConfigError
from brainlm.input_contract import InputContract
from brainlm.loader import MaskSettings, WindowLoader
from brainlm.members import ChosenRecordings, Members
from brainlm.model import BrainLM
from brainlm.predictor import Predictor
from brainlm.predictor_checkpoint import save_predictor
from brainlm.presets import flops_per_window
from brainlm.published import is_published
from brainlm.store import Store
from brainlm.train_subjects import TrainSubjects
from brainlm.world import World
from train.finetune_settings import FinetuneSettings
from train.first_weights import adopt, load_for_rebuilding
from train.held_out import HeldOut
from train.mix import Mix
from train.objective import Objective, rebuild_hidden
from train.phenotypes import read_members
from train.predictor_parts import (
    Encoder,
    fit_targets,
    load_encoder,
    set_trained,
    target_values,
    whiten,
)
from train.run_files import describe
from train.run_training import Parts
from train.settings import ValidationSettings, micro_batches, num_steps
from train.subject_split import SubjectSplit, split_subjects, write_split
from train.target_batches import HeldOutTargets, TargetLoader, encode_all

logger = logging.getLogger(__name__)


def build_parts(settings: FinetuneSettings, dataset: Dataset, world: World) -> Parts:
    """Build what is trained, what feeds it and what scores it."""
    return (predictor_parts if settings.targets else forecaster_parts)(settings, dataset, world)


def predictor_parts(settings: FinetuneSettings, dataset: Dataset, world: World) -> Parts:
    """Build a predictor with its batches and validation."""
    origin = load_encoder(settings, dataset)
    encoder, source = origin.encoder, read_members(dataset)
    split = choose_subjects(settings, source, origin.pretrained_on, encoder.contract)
    readers = {role: ChosenRecordings(source, split.roles[role]) for role in ("train", "val")}
    predictor = Predictor(encoder, settings.head, fit_targets(settings, source, split))
    predictor.head.init_weights(torch.Generator().manual_seed(settings.run.seed))
    encoder_trained = set_trained(encoder, settings.encoder, decoder=False)
    seed = settings.run.seed if settings.permute_targets else None
    train_columns = target_values(predictor.targets, source, split.roles["train"], seed)
    wanted, known = encode_all(predictor.targets, train_columns)
    learned = [i for i in range(len(known)) if bool(known[i].any())]
    loader = TargetLoader(
        ChosenRecordings(source, [split.roles["train"][i] for i in learned]), encoder.contract,
        MaskSettings(), **loading(settings, world, encoder), wanted=wanted[learned], known=known[learned],
    )  # fmt: skip
    val = encode_all(predictor.targets, target_values(predictor.targets, source, split.roles["val"]))
    held_out = HeldOutTargets(readers["val"], *val, max_recordings=settings.validation.max_recordings)
    mix = Mix({dataset.name: loader})
    steps = num_steps(settings, mix.steps_per_epoch)
    trained = sum(p.numel() for p in predictor.parameters() if p.requires_grad)
    logger.info(
        "%s of %s parameters are trained; %d recordings to train on, %d to validate on; at most %d steps of %d "
        "windows on %d rank(s)", f"{trained:,}", f"{predictor.num_parameters:,}", len(loader.reader), len(held_out),
        steps, settings.data.batch_size, world.size,
    )  # fmt: skip
    manifest = facts_of(settings, dataset, world, predictor, steps) | origin.facts
    manifest |= {
        "targets": [asdict(target) for target in predictor.targets],
        "encoder_trained": encoder_trained,
        "permuted": settings.permute_targets,
        "pretraining_subjects": split.num_pretraining_subjects,
        "num_subjects": {role: split.num_subjects(role) for role in split.roles},
    }
    subjects = origin.remembered.with_more(member.subject for member in split.roles["train"])

    def save(url: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> str:
        return save_predictor(url, predictor, manifest | facts, subjects, weights)

    if isinstance(encoder, BrainLM):
        flops: int | None = flops_per_window(encoder.config, encoder.num_parcels, 0.0) * (3 if encoder_trained else 1)
        tokens = encoder.num_rows * encoder.config.num_patches
    else:
        flops, tokens = None, encoder.num_tokens
    return Parts(
        Objective(predictor, mix, held_out.score, flops, tokens), steps, manifest, save, keeps_last=False,
        begin=lambda: write_split(home(settings), source, split),
        prepare=lambda engine: whiten(readers["train"], engine),
    )  # fmt: skip


def forecaster_parts(settings: FinetuneSettings, dataset: Dataset, world: World) -> Parts:
    """Build a forecaster with its batches and validation.

    Raises
    ------
    ConfigError, CheckpointError
        If the checkpoint cannot be trained on as a masked autoencoder.
    """
    name = settings.checkpoint
    if is_published(name):
        raise ConfigError("forecast_patches: published models are not fine-tuned to forecast; take one of our own")
    first = adopt(load_for_rebuilding(name), name, dataset)
    model, remembered = first.model, first.earlier
    if settings.encoder.untrained:
        model, remembered = BrainLM.untrained_like(model, settings.run.seed), TrainSubjects.of("", [])
    source = read_members(dataset)
    split = choose_subjects(settings, source, first.earlier, model.contract)
    masks = settings.masks(model.config.num_patches)
    encoder_trained = set_trained(model, settings.encoder, decoder=True)
    options = loading(settings, world, model)
    reader = ChosenRecordings(source, split.roles["train"])
    mix = Mix({dataset.name: WindowLoader(reader, model.contract, masks, **options)})
    checked = ValidationSettings(
        mask_ratio=masks.ratios[0], kind="future", windows_per_recording=4,
        max_recordings=settings.validation.max_recordings or len(source.all),
    )  # fmt: skip
    held_out = HeldOut(
        ChosenRecordings(source, split.roles["val"]), model.contract, checked, model.config.patch_parcels
    )
    steps = num_steps(settings, mix.steps_per_epoch)
    manifest = facts_of(settings, dataset, world, model, steps) | first.facts
    manifest |= {
        "forecast_patches": settings.forecast_patches, "encoder_trained": encoder_trained,
        "pretraining_subjects": split.num_pretraining_subjects,
    }  # fmt: skip
    subjects = [member.subject for member in split.roles["train"]]

    def save(url: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> str:
        return save_checkpoint(url, model, manifest | facts, subjects, weights, remembered)

    objective = rebuild_hidden(model, mix, masks, {dataset.name: held_out})
    return Parts(
        objective, steps, manifest, save, keeps_last=False,
        begin=lambda: write_split(home(settings), source, split),
    )  # fmt: skip


def home(settings: FinetuneSettings) -> Store:
    """Return the folder that the run is known by."""
    return Store(settings.run.storage or settings.run.out)


def choose_subjects(
    settings: FinetuneSettings, source: Members, pretrained_on: TrainSubjects | None, contract: InputContract
) -> SubjectSplit:
    """Split the recordings, and say how."""
    split = split_subjects(source, settings.split, pretrained_on, contract)
    counts = ", ".join(f"{split.num_subjects(role)} {role}" for role in split.roles)
    logger.info("subjects: %s; %d recordings left out", counts, len(split.left_out))
    reasons = list(split.left_out.values())
    for reason in sorted(set(reasons)):
        logger.info("left out: %d recordings: %s", reasons.count(reason), reason)
    return split


def loading(settings: FinetuneSettings, world: World, encoder: Encoder) -> dict[str, Any]:
    """Return how windows are drawn and divided among ranks."""
    return {
        "batch_size": settings.data.batch_size,
        "windows_per_recording": settings.data.windows_per_recording,
        "seed": settings.run.seed,
        "rank": world.rank,
        "world_size": world.size,
        "micro_batches": micro_batches(settings, world.size),
        "patch_parcels": encoder.config.patch_parcels if isinstance(encoder, BrainLM) else 1,
    }


def facts_of(
    settings: FinetuneSettings, dataset: Dataset, world: World, module: nn.Module, steps: int
) -> dict[str, Any]:
    """Return what every manifest of fine-tuning says."""
    return {
        **describe(settings, module, world),
        "dataset": dataset.name,
        "data_hash": dataset.content_hash,
        "num_steps": steps,
        "peak_lr": settings.optimizer.peak_lr(settings.data.batch_size),
        "num_warmup_steps": settings.optimizer.num_warmup_steps(steps),
        "untrained": settings.encoder.untrained,
    }
