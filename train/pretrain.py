"""Pretrain BrainLM on a prepared data set.

    deepspeed --num_accelerators 2 train/pretrain.py --config train/configs/demo.yaml [section.key=value ...]
    python train/pretrain.py --config train/configs/demo.yaml              # one process

A run that was stopped goes on from its newest snapshot when the same command is given again; a finished one says so.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brainlm.config import load_config, parse_entry_args
from brainlm.dataset import Dataset
from brainlm.errors import BrainLMError, StoreError
from brainlm.store import Store
from brainlm.world import World, read_world
from train.checkpoints import Checkpoints
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
from train.engine import Engine
from train.first_weights import FirstWeights, first_weights
from train.held_out import HeldOut
from train.interruption import Interruption
from train.launcher import Launcher
from train.loop import train
from train.mix import Mix
from train.plan import plan
from train.precision import resolve_precision
from train.reporting import Reporter
from train.run_files import (
    check_same_on_all_ranks,
    check_same_run,
    describe,
    lock_folder,
    read_done,
    write_done,
    write_run_files,
)
from train.settings import PretrainSettings, check_settings, num_steps
from train.snapshots import Snapshots, resume_newest
from train.start_up import StartUp
from train.state import TrainState
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
        return run(settings, datasets, world, start, launcher)
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


@dataclass(frozen=True, eq=False)
class Parts:
    """What each rank builds by itself before training."""

    first: FirstWeights
    mix: Mix
    held_out: dict[str, HeldOut]
    num_steps: int
    manifest: dict[str, Any]


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
    return Parts(first, mix, held_out, steps, manifest)


def run(
    settings: PretrainSettings, datasets: Sequence[Dataset], world: World, start: StartUp, launcher: Launcher
) -> int:
    """Train, or go on training, and export the checkpoint. All ranks take part."""
    folder = Path(settings.run.out)
    start.patience_s = max(start.patience_s, settings.engine.timeout_s)
    done = None
    with start.together():
        if world.is_rank_zero:
            check_same_run(settings, data_hash(datasets))
            done = read_done(settings)
    if done := start.from_rank_zero(done):
        logger.info("this run is done: %s", done["checkpoint"])
        return 0
    torch.set_num_threads(settings.engine.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))

    with start.together():
        parts = build(settings, datasets, world)
    told = start.gather((socket.gethostname(), parts.manifest))
    with start.together():
        check_same_on_all_ranks(told)
        if world.is_rank_zero:
            lock = lock_folder(folder)  # held until this process ends
            write_run_files(settings, parts.manifest)
    model, steps = parts.first.model, parts.num_steps
    engine = Engine(settings, model, world)
    engine.barrier()

    store = Store(settings.run.storage or settings.run.out)
    subjects, earlier = train_subjects(datasets), parts.first.earlier
    checkpoints = Checkpoints(store.sub("checkpoints"), model, parts.manifest, subjects, earlier)
    state = resume_newest(engine, store.sub("snapshots"))
    if state is not None:
        logger.info("resumed after step %d", state.step)
        if settings.run.keep_best and engine.from_rank_zero(world.is_rank_zero and checkpoints.best() is None):
            state.best_val_r2 = None  # it was not kept: the next score is the best one that can be
    state = state or TrainState()
    snapshots = Snapshots(engine, store.sub("snapshots"), settings.run.keep_snapshots, checkpoints)
    interruption = Interruption(launcher).install()
    reporter = Reporter(folder, steps, state.step) if world.is_rank_zero else None
    try:
        with engine.naming_the_lost():
            finished = train(
                engine, parts.mix, parts.held_out, state, settings, snapshots, steps, world, reporter, interruption
            )
    finally:
        snapshots.close()
        if reporter is not None:
            reporter.__exit__(None, None, None)
    if not finished:
        logger.warning("stopped after step %d of %d; give the same command to go on", state.step, steps)
        engine.close()
        return 0

    with engine.naming_the_lost():
        weights = engine.whole_weights()
    problem = ""
    if world.is_rank_zero:
        try:
            checkpoint, sha256 = checkpoints.write(f"step-{state.step}", weights, state.to_dict())
            facts = {"checkpoint": checkpoint, "best_checkpoint": checkpoints.best()}
            write_done(settings, {**facts, "weights_sha256": sha256, "step": state.step})
            logger.info("done: %s", checkpoint)
        except StoreError as error:
            problem = f"{error}. The last snapshot is there: the same command writes the checkpoint"
        lock.close()
    problem = engine.from_rank_zero(problem)
    engine.close()
    if problem:
        raise StoreError(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
