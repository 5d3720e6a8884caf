"""Fine-tune a checkpoint: to predict phenotypes from recordings, or to forecast.

    python train/finetune.py --config train/configs/finetune_age.yaml [section.key=value ...]
    deepspeed --num_accelerators 2 train/finetune.py --config train/configs/finetune_age.yaml

Writes the best weights, with head and transforms, to ``checkpoints/best-step-N`` of the run's folder, who was trained,
validated and tested on to ``split.parquet``, and what the best weights predict for validation and test subjects to
``predictions.parquet`` and ``scores.json``. A run that was stopped goes on from its newest snapshot when the same
command is given again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from brainlm.config import load_config
from brainlm.dataset import open_dataset
from brainlm.published import is_published
from train.combinations import check_combination
from train.entry import Call, run_entry
from train.finetune_parts import build_parts
from train.finetune_plan import plan
from train.finetune_scores import score_run
from train.finetune_settings import FinetuneSettings, check_finetune_settings
from train.precision import resolve_precision
from train.run_training import run_training
from train.split_file import with_sha256
from train.start_up import StartUp


def main(argv: list[str] | None = None) -> int:
    return run_entry("finetune", __doc__, argv, lambda call: plan(load_settings(call)), finetune)


def finetune(call: Call) -> None:
    """Train, and score the best weights."""
    world, start = call.world, StartUp(call.world)
    with start.together():
        settings = load_settings(call)
        dataset = open_dataset(settings.data.datasets[0])
    build = partial(build_parts, settings, dataset, world)
    done = run_training(settings, dataset.content_hash, build, world, start, call.launcher)
    if done is not None and world.is_rank_zero and settings.targets:
        score_run(settings, dataset, done["checkpoint"])


def load_settings(call: Call) -> FinetuneSettings:
    """Read and check the settings, which fit each other and the number of ranks."""
    settings = load_config(FinetuneSettings, call.config, call.overrides)
    if settings.engine.precision == "auto" and settings.init_from is not None and is_published(settings.init_from):
        settings = replace(settings, engine=replace(settings.engine, precision="fp32"))
    settings = resolve_precision(replace(settings, split=with_sha256(settings.split)))
    check_finetune_settings(settings, call.world.size)
    check_combination(settings.engine)
    return settings


if __name__ == "__main__":
    sys.exit(main())
