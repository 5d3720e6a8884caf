"""Pretrain BrainLM on a prepared data set.

    deepspeed --num_accelerators 2 train/pretrain.py --config train/configs/demo.yaml [section.key=value ...]
    python train/pretrain.py --config train/configs/demo.yaml              # one process

A run that was stopped goes on from its newest snapshot when the same command is given again; a finished one says so.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config
from brainlm.dataset import Dataset
from brainlm.world import World
from train.combinations import check_combination
from train.data import (
    build_held_out,
    build_mix,
    check_parcels,
    data_hash,
    describe_data,
    open_datasets,
    train_subjects,
)
from train.entry import Call, run_entry
from train.first_weights import first_weights
from train.objective import rebuild_hidden
from train.plan import plan
from train.precision import resolve_precision
from train.run_files import describe
from train.run_training import Parts, run_training
from train.settings import PretrainSettings, check_settings, num_steps
from train.start_up import StartUp

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    return run_entry("pretrain", __doc__, argv, lambda call: plan(load_settings(call), call.world), pretrain)


def pretrain(call: Call) -> None:
    """Train on the data sets of the settings."""
    start = StartUp(call.world)
    with start.together():
        settings = load_settings(call)
        datasets = open_datasets(settings)
    build_these = partial(build, settings, datasets, call.world)
    run_training(settings, data_hash(datasets), build_these, call.world, start, call.launcher)


def load_settings(call: Call) -> PretrainSettings:
    """Read and check the settings, which fit each other and the number of ranks."""
    settings = resolve_precision(load_config(PretrainSettings, call.config, call.overrides))
    check_settings(settings, call.world.size)
    check_combination(settings.engine)
    return settings


def build(settings: PretrainSettings, datasets: Sequence[Dataset], world: World) -> Parts:
    """Build the model, what feeds it and what scores it, and describe them."""
    first = first_weights(settings, datasets[0])
    model = first.model
    check_parcels(datasets, model.config)
    mix = build_mix(datasets, model, settings, world)
    steps = num_steps(settings, mix.steps_per_epoch)
    held_out = build_held_out(datasets, model, settings)
    logger.info(
        "%s parameters; %d recordings to train on, %d windows to validate on; %d steps of %d windows on %d rank(s)",
        f"{model.num_parameters:,}", sum(len(loader.reader) for loader in mix.loaders),
        sum(len(part.windows) for part in held_out.values()), steps, settings.data.batch_size, world.size,
    )  # fmt: skip
    manifest = {
        **describe(settings, model, world),
        **describe_data(datasets, mix),
        **first.facts,
        "num_steps": steps,
        "peak_lr": settings.optimizer.peak_lr(settings.data.batch_size),
        "num_warmup_steps": settings.optimizer.num_warmup_steps(steps),
    }
    subjects = train_subjects(datasets)

    def save(url: str, weights: dict[str, Tensor], facts: dict[str, Any]) -> str:
        return save_checkpoint(url, model, manifest | facts, subjects, weights, first.earlier)

    return Parts(rebuild_hidden(model, mix, settings.masks, held_out), steps, manifest, save)


if __name__ == "__main__":
    sys.exit(main())
