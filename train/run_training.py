"""A training run from its settings to its checkpoint: what pretraining and fine-tuning share. All ranks take part."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brainlm.errors import StoreError
from brainlm.store import Store
from brainlm.world import World
from train.checkpoints import Checkpoints, Save
from train.engine import Engine
from train.interruption import Interruption
from train.launcher import Launcher
from train.loop import train
from train.objective import Objective
from train.reporting import Reporter
from train.run_files import (
    check_same_on_all_ranks,
    check_same_run,
    lock_folder,
    read_done,
    write_done,
    write_run_files,
)
from train.settings import TrainSettings
from train.snapshots import Snapshots, resume_newest
from train.start_up import StartUp
from train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Parts:
    """What each rank builds by itself before training.

    ``save`` writes a checkpoint (rank zero); ``keeps_last``: one of the last step, besides the best one. ``begin``
    writes what the folder is to hold besides, once it is known to belong to this run (rank zero); ``prepare`` does what
    needs the engine, before it takes up a snapshot (all ranks).
    """

    objective: Objective
    num_steps: int
    manifest: dict[str, Any]
    save: Save
    keeps_last: bool = True
    begin: Callable[[], None] = lambda: None
    prepare: Callable[[Engine], None] = lambda engine: None


def run_training(
    settings: TrainSettings,
    data_hash: str,
    build: Callable[[], Parts],
    world: World,
    start: StartUp,
    launcher: Launcher,
) -> dict[str, Any] | None:
    """Train, or go on training, and export the checkpoint.

    Parameters
    ----------
    data_hash : str
        What identifies the data: a run goes on with no other.
    build : callable
        Called on every rank, after its number of threads was set, unless the run is done already.

    Returns
    -------
    dict or None
        What ``done.json`` says, on every rank; None if the run was stopped before its end.
    """
    folder = Path(settings.run.out)
    start.patience_s = max(start.patience_s, settings.engine.timeout_s)
    done = None
    with start.together():
        if world.is_rank_zero:
            check_same_run(settings, data_hash)
            done = read_done(settings)
    if done := start.from_rank_zero(done):
        logger.info("this run is done: %s", done["checkpoint"])
        return done
    torch.set_num_threads(settings.engine.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))

    with start.together():
        parts = build()
    told = start.gather((socket.gethostname(), parts.manifest))
    with start.together():
        check_same_on_all_ranks(told)
        if world.is_rank_zero:
            lock = lock_folder(folder)  # held until this process ends
            write_run_files(settings, parts.manifest)
            parts.begin()
    objective, steps = parts.objective, parts.num_steps
    engine = Engine(settings, objective.module, world)
    engine.barrier()
    with engine.naming_the_lost():
        parts.prepare(engine)

    store = Store(settings.run.storage or settings.run.out)
    checkpoints = Checkpoints(store.sub("checkpoints"), parts.save)
    state = resume_newest(engine, store.sub("snapshots"))
    if state is not None:
        logger.info("resumed after step %d", state.step)
        if settings.run.keep_best and engine.from_rank_zero(world.is_rank_zero and checkpoints.best() is None):
            state.best_val_r2 = None  # it was not kept: the next score is the best one that can be
            state.since_best = 0
    state = state or TrainState()
    snapshots = Snapshots(engine, store.sub("snapshots"), settings.run.keep_snapshots, checkpoints)
    interruption = Interruption(launcher).install()
    reporter = Reporter(folder, steps, state.step) if world.is_rank_zero else None
    try:
        with engine.naming_the_lost():
            finished = train(engine, objective, state, settings, snapshots, steps, world, reporter, interruption)
    finally:
        snapshots.close()
        if reporter is not None:
            reporter.__exit__(None, None, None)
    if not finished:
        logger.warning("stopped after step %d of %d; give the same command to go on", state.step, steps)
        engine.close()
        return None

    weights = None
    if parts.keeps_last:
        with engine.naming_the_lost():
            weights = engine.whole_weights()
    problem, done = "", {}
    if world.is_rank_zero:
        try:
            done = {"checkpoint": checkpoints.best(), "best_checkpoint": checkpoints.best(), "step": state.step}
            if weights is not None:
                checkpoint, sha256 = checkpoints.write(f"step-{state.step}", weights, state.to_dict())
                done |= {"checkpoint": checkpoint, "weights_sha256": sha256}
            write_done(settings, done)
            logger.info("done: %s", done["checkpoint"])
        except StoreError as error:
            problem = f"{error}. The last snapshot is there: the same command writes the checkpoint"
        lock.close()
    problem, done = engine.from_rank_zero((problem, done))
    engine.close()
    if problem:
        raise StoreError(problem)
    return done
