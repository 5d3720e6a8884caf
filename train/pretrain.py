"""Pretrain BrainLM on a prepared data set.

    deepspeed --num_accelerators 2 train/pretrain.py --config train/configs/demo.yaml [section.key=value ...]
    python train/pretrain.py --config train/configs/demo.yaml              # one process

A run that was stopped goes on from its newest snapshot when the same command is given again; a finished one says so.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config, parse_entry_args
from brainlm.dataset import Dataset
from brainlm.errors import BrainLMError
from brainlm.world import World, read_world
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
from train.first_weights import first_weights
from train.launcher import Launcher
from train.objective import rebuild_hidden
from train.plan import plan
from train.precision import resolve_precision
from train.run_files import describe
from train.run_training import Parts, run_training
from train.settings import PretrainSettings, check_settings, num_steps
from train.start_up import StartUp
from train.watchdog import EXIT_STATUS, LostRankError

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    launcher = Launcher()  # before it can have ended
    args = parse_entry_args(__doc__ or "", argv)
    world = read_world()
    logging.basicConfig(level=logging.INFO if world.is_rank_zero else logging.ERROR, format="pretrain: %(message)s")
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        if args.dry_run:
            if world.is_rank_zero:
                print(plan(load_settings(args.config, args.overrides, world), world))
            return 0
        start = StartUp(world)
        with start.together():
            settings = load_settings(args.config, args.overrides, world)
            datasets = open_datasets(settings)
        run_training(settings, data_hash(datasets), lambda: build(settings, datasets, world), world, start, launcher)
        return 0
    except LostRankError as error:
        logger.error("%s", error)
        return EXIT_STATUS
    except BrainLMError as error:
        logger.error("%s", error)
        return 1


def load_settings(path: str, overrides: list[str], world: World) -> PretrainSettings:
    """Read and check the settings, which fit each other and the number of ranks."""
    settings = resolve_precision(load_config(PretrainSettings, path, overrides))
    check_settings(settings, world.size)
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
