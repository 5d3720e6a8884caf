"""Pretrain BrainLM on a prepared data set.

    deepspeed --num_accelerators 2 train/pretrain.py --config train/configs/demo.yaml [section.key=value ...]
    python train/pretrain.py --config train/configs/demo.yaml              # one process

A run that was stopped goes on from its newest snapshot when the same command is given again; a finished one says so.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from brainlm.atlas import Atlas
from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config, parse_entry_args, to_tree, to_yaml
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import BrainLMError, ConfigError, DataError, StoreError
from brainlm.input_contract import InputContract
from brainlm.loader import WindowLoader
from brainlm.model import BrainLM, ModelConfig
from brainlm.presets import flops_per_window
from brainlm.provenance import git_commit, versions
from brainlm.store import Store
from brainlm.world import World, read_world
from train.engine import Engine, deepspeed_dict
from train.first_weights import first_weights, load_source
from train.held_out import HeldOut
from train.interruption import Interruption
from train.loop import train
from train.memory import describe as describe_memory
from train.memory import estimate
from train.precision import resolve_precision
from train.reporting import Reporter
from train.settings import PretrainSettings, check_settings, micro_batches, num_steps
from train.snapshots import Snapshots, resume_newest
from train.state import TrainState

logger = logging.getLogger("pretrain")
DONE = "done.json"
DEFAULT_NUM_PARCELS = 424  # of A424, the atlas of the paper; for --dry-run without a data set
# Settings that a run may go on with changed: they touch the weights by rounding at most.
MAY_CHANGE = {
    "run.out", "run.max_hours", "run.max_skipped", "run.log_every", "run.snapshot_every", "run.keep_snapshots",
    "engine.threads", "engine.timeout_s", "engine.zero_stage", "data.micro_batch_size",
    "engine.activation_checkpointing",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    world = read_world()
    logging.basicConfig(level=logging.INFO if world.is_rank_zero else logging.ERROR, format="pretrain: %(message)s")
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        settings = resolve_precision(load_config(PretrainSettings, args.config, args.overrides))
        check_settings(settings, world.size)
        if args.dry_run:
            if world.is_rank_zero:
                print(plan(settings, world))
            return 0
        return run(settings, open_dataset(settings.data.dataset), world)
    except BrainLMError as error:
        logger.error("%s", error)
        return 1


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
    on_gpu = torch.cuda.is_available()
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
        *describe_memory(estimate(settings, model, world.size, on_gpu=on_gpu), on_gpu),
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


def run(settings: PretrainSettings, dataset: Dataset, world: World) -> int:
    """Train, or go on training, and export the checkpoint. All ranks take part."""
    folder = Path(settings.run.out)
    if (folder / DONE).is_file():
        check_same_run(settings, dataset, folder)
        done = json.loads((folder / DONE).read_text())
        logger.info("this run is done: %s", done["checkpoint"])
        return 0
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(settings.engine.threads or max(1, cores // world.size))

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
    if (folder / "manifest.json").is_file():  # every rank looks, so that every rank stops
        check_same_run(settings, dataset, folder)
    if world.is_rank_zero:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)  # held until this process ends
        write_run_files(settings, dataset, folder, manifest)
    engine = Engine(settings, model, world)
    engine.barrier()

    store = Store(f"{settings.run.storage or settings.run.out}/snapshots")
    state = resume_newest(engine, store)
    if state is not None:
        logger.info("resumed after step %d", state.step)
    state = state or TrainState()
    snapshots = Snapshots(engine, store, settings.run.keep_snapshots)
    interruption = Interruption().install()
    reporter = Reporter(folder, steps, state.step) if world.is_rank_zero else None
    try:
        finished = train(engine, loader, held_out, state, settings, snapshots, steps, world, reporter, interruption)
    finally:
        snapshots.close()
        if reporter is not None:
            reporter.__exit__(None, None, None)
    if not finished:
        logger.warning("stopped after step %d of %d; give the same command to go on", state.step, steps)
        engine.close()
        return 0

    weights = engine.whole_weights()
    if world.is_rank_zero:
        checkpoint = f"{settings.run.storage or settings.run.out}/checkpoints/step-{state.step}"
        subjects = sorted({entry.subject for entry in reader.entries})
        manifest |= {
            "step": state.step,
            "windows_seen": state.windows_seen,
            "val_r2": state.val_r2,
            "best_val_r2": state.best_val_r2,
        }
        sha256 = save_checkpoint(checkpoint, model, manifest, subjects, weights, first.earlier)
        done_text = json.dumps({"checkpoint": checkpoint, "weights_sha256": sha256, "step": state.step})
        (folder / f"{DONE}.tmp").write_text(done_text)
        os.replace(folder / f"{DONE}.tmp", folder / DONE)
        logger.info("done: %s", checkpoint)
        lock.close()
    engine.barrier()
    engine.close()
    return 0


def describe(settings: PretrainSettings, dataset: Dataset, model: BrainLM, world: World) -> dict[str, Any]:
    """Return the manifest: where this run's numbers come from. No subject ids."""
    return {
        "git_commit": git_commit(),
        "dataset": dataset.name,
        "data_hash": dataset.content_hash,
        "num_parameters": model.num_parameters,
        "world_size": world.size,
        "versions": versions("torch", "numpy", "deepspeed", "safetensors"),
        "deepspeed": deepspeed_dict(settings, world.size, model.num_parameters),
        "config": to_tree(settings),
    }


def lock_folder(folder: Path) -> IO[str]:
    """Keep other training runs out of a folder for as long as the returned file is open.

    Raises
    ------
    ConfigError
        If another process trains there.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"another process is training in {folder}: wait for it, end it, or choose another run.out"
        ) from error
    return file


def write_run_files(settings: PretrainSettings, dataset: Dataset, folder: Path, manifest: dict[str, Any]) -> None:
    """Write config.yaml and manifest.json before step 0; those of a run that goes on stay as they are."""
    if (folder / "manifest.json").is_file():
        return
    (folder / "config.yaml").write_text(to_yaml(settings))
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    os.replace(temporary, folder / "manifest.json")


def check_same_run(settings: PretrainSettings, dataset: Dataset, folder: Path) -> None:
    """Raise `ConfigError` that lists what differs, if the folder belongs to a run with other settings or data."""
    manifest = json.loads((folder / "manifest.json").read_text())
    theirs, ours = _flat(manifest["config"]), _flat(to_tree(settings))
    differs = [
        f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in MAY_CHANGE and theirs.get(key) != ours.get(key)
    ]
    if manifest["data_hash"] != dataset.content_hash:
        differs.append(f"  data set content: {manifest['data_hash'][:12]} there, {dataset.content_hash[:12]} here")
    if differs:
        raise ConfigError(
            f"{folder} belongs to a run with other settings; choose another run.out, or remove it:\n"
            + "\n".join(differs)
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


if __name__ == "__main__":
    sys.exit(main())
