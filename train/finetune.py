"""Fine-tune a checkpoint: to predict phenotypes from recordings, or to forecast.

    python train/finetune.py --config train/configs/finetune_age.yaml [section.key=value ...]
    deepspeed --num_accelerators 2 train/finetune.py --config train/configs/finetune_age.yaml

Writes the best weights, with head and transforms, to ``checkpoints/best-step-N`` of the run's folder, who was trained,
validated and tested on to ``split.parquet``, and what the best weights predict for validation and test subjects to
``predictions.parquet`` and ``scores.json``. A run that was stopped goes on
from its newest snapshot when the same command is given again.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from functools import partial

from brainlm.config import load_config, parse_entry_args
from brainlm.dataset import open_dataset
from brainlm.errors import BrainLMError
from brainlm.published import is_published
from brainlm.world import World, read_world
from train.combinations import check_combination
from train.finetune_parts import build_parts
from train.finetune_plan import plan
from train.finetune_scores import score_run
from train.finetune_settings import FinetuneSettings, check_finetune_settings
from train.launcher import Launcher
from train.precision import resolve_precision
from train.run_training import run_training
from train.start_up import StartUp
from train.watchdog import EXIT_STATUS, LostRankError

logger = logging.getLogger("finetune")


def main(argv: list[str] | None = None) -> int:
    launcher = Launcher()  # before it can have ended
    args = parse_entry_args(__doc__ or "", argv)
    world = read_world()
    logging.basicConfig(level=logging.INFO if world.is_rank_zero else logging.ERROR, format="finetune: %(message)s")
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        if args.dry_run:
            if world.is_rank_zero:
                print(plan(load_settings(args.config, args.overrides, world)))
            return 0
        start = StartUp(world)
        with start.together():
            settings = load_settings(args.config, args.overrides, world)
            dataset = open_dataset(settings.data.datasets[0])
        build = partial(build_parts, settings, dataset, world)
        done = run_training(settings, dataset.content_hash, build, world, start, launcher)
        if done is not None and world.is_rank_zero and settings.targets:
            score_run(settings, dataset, done["checkpoint"])
        return 0
    except LostRankError as error:
        logger.error("%s", error)
        return EXIT_STATUS
    except BrainLMError as error:
        logger.error("%s", error)
        return 1


def load_settings(path: str, overrides: list[str], world: World) -> FinetuneSettings:
    """Read and check the settings, which fit each other and the number of ranks."""
    settings = load_config(FinetuneSettings, path, overrides)
    if settings.engine.precision == "auto" and settings.init_from is not None and is_published(settings.init_from):
        settings = replace(settings, engine=replace(settings.engine, precision="fp32"))
    settings = resolve_precision(settings)
    check_finetune_settings(settings, world.size)
    check_combination(settings.engine)
    return settings


if __name__ == "__main__":
    sys.exit(main())
