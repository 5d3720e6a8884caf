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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainlm.atlas import Atlas
from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import BrainLMError, ConfigError, DataError, StoreError
from brainlm.input_contract import InputContract
from brainlm.loader import WindowLoader
from brainlm.model import BrainLM, ModelConfig
from brainlm.presets import flops_per_window
from brainlm.store import Store
from brainlm.world import World, read_world
from train.engine import Engine
from train.first_weights import FirstWeights, first_weights, load_source
from train.held_out import HeldOut
from train.interruption import Interruption
from train.launcher import Launcher
from train.loop import train
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
from train.settings import PretrainSettings, check_settings, micro_batches, num_steps
from train.snapshots import Snapshots, resume_newest
from train.start_up import StartUp
from train.state import TrainState
from train.watchdog import EXIT_STATUS, LostRankError

logger = logging.getLogger("pretrain")
DEFAULT_NUM_PARCELS = 424  # of A424, the atlas of the paper; for --dry-run without a data set


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
            dataset = open_dataset(settings.data.dataset)
        return run(settings, dataset, world, start, launcher)
    except LostRankError as error:
        logger.error("%s", error)
        return EXIT_STATUS
    except BrainLMError as error:
        logger.error("%s", error)
        return 1


def load_settings(path: str, overrides: list[str], world: World) -> PretrainSettings:
    settings = resolve_precision(load_config(PretrainSettings, path, overrides))
    check_settings(settings, world.size)
    return settings


def plan(settings: PretrainSettings, world: World) -> str:
    """Return the resolved settings and what they amount to, as text; for 424 parcels where there is no data set yet."""
    config = settings.model.resolved if settings.init_from is None else load_source(settings).config
    dataset: Dataset | None = None
    try:
        dataset = open_dataset(settings.data.dataset)
    except (DataError, StoreError) as error:
        contract = blank_contract(DEFAULT_NUM_PARCELS, config)
        data = f"not there yet, {DEFAULT_NUM_PARCELS} parcels assumed ({error})"
    else:
        contract = dataset.contract
        data = f"{dataset.name}, content {dataset.content_hash[:12]}"
    with torch.device("meta"):  # sizes alone, whatever they are
        model = BrainLM(config, contract)
    tokens = model.num_rows * config.num_patches
    batch = settings.data.batch_size
    ratio = sum(settings.masks.ratios) / len(settings.masks.ratios)
    flops = 3 * flops_per_window(config, model.num_parcels, ratio, settings.masks.num_decoded)
    parameters = model.num_parameters
    groups = f" in {model.num_rows} groups" if config.patch_parcels > 1 else ""
    grid = f"{model.num_parcels} parcels{groups} x {config.num_patches} patches"
    lines = [
        to_yaml(settings).rstrip(),
        "",
        f"parameters            {parameters:,}",
        f"tokens per window     {tokens:,} ({grid})",
        f"tokens per step       {tokens * batch:,} ({batch} windows on {world.size} ranks)",
        f"FLOP per step         {flops * batch:.3g} (forward and backward, mask ratio {ratio:.2f})",
        f"windows in the run    {_windows_in_run(settings, dataset)}",
        f"bytes of weights      {4 * parameters:,} float32; with gradients and AdamW {16 * parameters:,}",
        f"data set              {data}",
    ]
    return "\n".join(lines)


def _windows_in_run(settings: PretrainSettings, dataset: Dataset | None) -> str:
    data = settings.data
    if dataset is None and settings.run.epochs is not None:
        return f"{settings.run.epochs:g} epochs"
    per_epoch = 0 if dataset is None else len(dataset.split("train")) * data.windows_per_recording // data.batch_size
    steps = num_steps(settings, per_epoch)
    return f"{steps * data.batch_size:,} in {steps:,} steps"


def blank_contract(num_parcels: int, config: ModelConfig) -> InputContract:
    """Return a contract that knows nothing but sizes, for counting."""
    ones = np.ones(num_parcels, dtype=np.float32)
    atlas = Atlas(
        name="none",
        sha256="",
        labels=np.arange(num_parcels),
        parcel_names=tuple(str(i) for i in range(num_parcels)),
        coords_mm=np.zeros((num_parcels, 3), dtype=np.float32),
    )
    return InputContract(
        atlas=atlas, covered=ones > 0, median=0 * ones, iqr=ones, tr_s=1.0,
        window_len=config.window_len, patch_len=config.patch_len,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Parts:
    """What each rank builds by itself before training."""

    first: FirstWeights
    loader: WindowLoader
    held_out: HeldOut
    num_steps: int
    manifest: dict[str, Any]
    train_subjects: list[str]


def build(settings: PretrainSettings, dataset: Dataset, world: World) -> Parts:
    """Build the model, what feeds it and what scores it, and describe them."""
    first = first_weights(settings, dataset)
    model, contract = first.model, first.model.contract
    reader, validation = dataset.split("train"), dataset.split("val")
    for split, part in (("train", reader), ("val", validation)):
        if len(part) == 0:
            raise ConfigError(f"{dataset.store.url}: the {split} split is empty; prepare with other split fractions")
    loader = WindowLoader(
        reader,
        contract,
        settings.masks,
        batch_size=settings.data.batch_size,
        windows_per_recording=settings.data.windows_per_recording,
        seed=settings.run.seed,
        rank=world.rank,
        world_size=world.size,
        micro_batches=micro_batches(settings, world.size),
        patch_parcels=model.config.patch_parcels,
    )
    steps = num_steps(settings, loader.steps_per_epoch)
    held_out = HeldOut(validation, contract, settings.validation, model.config.patch_parcels)
    logger.info(
        "%s parameters; %d recordings to train on, %d windows to validate on; %d steps of %d windows on %d rank(s)",
        f"{model.num_parameters:,}", len(reader), len(held_out.windows), steps,
        settings.data.batch_size, world.size,
    )  # fmt: skip
    manifest = describe(settings, dataset, model, world) | {
        **first.facts,
        "num_steps": steps,
        "peak_lr": settings.optimizer.peak_lr(settings.data.batch_size),
        "num_warmup_steps": settings.optimizer.num_warmup_steps(steps),
    }
    subjects = sorted({entry.subject for entry in reader.entries})
    return Parts(first, loader, held_out, steps, manifest, subjects)


def run(settings: PretrainSettings, dataset: Dataset, world: World, start: StartUp, launcher: Launcher) -> int:
    """Train, or go on training, and export the checkpoint. All ranks take part."""
    folder = Path(settings.run.out)
    start.patience_s = max(start.patience_s, settings.engine.timeout_s)
    done = None
    with start.together():
        if world.is_rank_zero:
            check_same_run(settings, dataset)
            done = read_done(settings)
    if done := start.from_rank_zero(done):
        logger.info("this run is done: %s", done["checkpoint"])
        return 0
    torch.set_num_threads(settings.engine.threads or max(1, len(os.sched_getaffinity(0)) // world.local_size))

    with start.together():
        parts = build(settings, dataset, world)
    told = start.gather((socket.gethostname(), parts.manifest))
    with start.together():
        check_same_on_all_ranks(told)
        if world.is_rank_zero:
            lock = lock_folder(folder)  # held until this process ends
            write_run_files(settings, parts.manifest)
    model, steps = parts.first.model, parts.num_steps
    engine = Engine(settings, model, world)
    engine.barrier()

    store = Store(f"{settings.run.storage or settings.run.out}/snapshots")
    state = resume_newest(engine, store)
    if state is not None:
        logger.info("resumed after step %d", state.step)
    state = state or TrainState()
    snapshots = Snapshots(engine, store, settings.run.keep_snapshots)
    interruption = Interruption(launcher).install()
    reporter = Reporter(folder, steps, state.step) if world.is_rank_zero else None
    try:
        with engine.naming_the_lost():
            finished = train(
                engine, parts.loader, parts.held_out, state, settings, snapshots, steps, world, reporter, interruption
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
    if world.is_rank_zero:
        checkpoint = f"{settings.run.storage or settings.run.out}/checkpoints/step-{state.step}"
        manifest = parts.manifest | {
            "step": state.step,
            "windows_seen": state.windows_seen,
            "val_r2": state.val_r2,
            "best_val_r2": state.best_val_r2,
        }
        sha256 = save_checkpoint(checkpoint, model, manifest, parts.train_subjects, weights, parts.first.earlier)
        write_done(settings, {"checkpoint": checkpoint, "weights_sha256": sha256, "step": state.step})
        logger.info("done: %s", checkpoint)
        lock.close()
    engine.barrier()
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
