"""What `train/pretrain.py --dry-run` says of a run: sizes, operations, memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from brainlm.atlas import Atlas
from brainlm.config import to_yaml
from brainlm.dataset import Dataset
from brainlm.errors import DataError, StoreError
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM, ModelConfig
from brainlm.presets import flops_per_window
from brainlm.world import World
from train.data import check_parcels, open_datasets
from train.first_weights import load_source
from train.memory import describe as describe_memory
from train.memory import estimate
from train.settings import PretrainSettings, num_steps

DEFAULT_NUM_PARCELS = 424  # of A424, the atlas of the paper; where there is no data set


def plan(settings: PretrainSettings, world: World) -> str:
    """Return the resolved settings and what they amount to, as text; for 424 parcels where there is no data set yet."""
    config = settings.model.resolved if settings.init_from is None else load_source(settings).config
    datasets: list[Dataset] = []
    try:
        datasets = open_datasets(settings)
    except (DataError, StoreError) as error:
        contract = blank_contract(DEFAULT_NUM_PARCELS, config)
        data = f"not there yet, {DEFAULT_NUM_PARCELS} parcels assumed ({error})"
    else:
        check_parcels(datasets, config)
        contract = max((d.contract for d in datasets), key=lambda c: c.atlas.num_parcels)  # needs most
        data = "; ".join(f"{dataset.name}, content {dataset.content_hash[:12]}" for dataset in datasets)
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
        f"windows in the run    {_windows_in_run(settings, datasets)}",
        *describe_memory(estimate(settings, model, world.size, on_gpu=on_gpu), on_gpu),
        f"data set              {data}",
    ]
    return "\n".join(lines)


def _windows_in_run(settings: PretrainSettings, datasets: Sequence[Dataset]) -> str:
    data = settings.data
    if not datasets and settings.run.epochs is not None:
        return f"{settings.run.epochs:g} epochs"
    per_epoch = sum(len(d.split("train")) * data.windows_per_recording // data.batch_size for d in datasets)
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
