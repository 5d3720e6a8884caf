"""Train a few steps with every combination of engine settings that is asked for, and print the losses as JSON.

    python tests/train/combination_losses.py DATASET '[["fp32", 1, false, false, false], ...]'

All in one process, one after the other: starting a process takes longer than the steps.
"""

from __future__ import annotations

import json
import sys

import torch

from brainlm.dataset import open_dataset
from brainlm.loader import MaskSettings
from brainlm.model import BrainLM
from brainlm.world import World
from train.combinations import Combination
from train.data import build_mix
from train.engine import Engine
from train.schedule import learning_rate_at
from train.settings import (
    DataSettings,
    EngineSettings,
    ModelChoice,
    OptimizerSettings,
    PretrainSettings,
    RunSettings,
)
from train.step import train_step

NUM_STEPS = 6


def losses(dataset_url: str, chosen: Combination) -> list[float]:
    """Return the mean loss of every step."""
    settings = PretrainSettings(
        run=RunSettings(out="unused", steps=NUM_STEPS),
        data=DataSettings(dataset=dataset_url, batch_size=4, micro_batch_size=2, windows_per_recording=2),
        model=ModelChoice(width=16, decoder_width=16, window_len=40, patch_len=10, depth=2),
        masks=MaskSettings(ratios=(0.5, 0.75), num_decoded=20),
        optimizer=OptimizerSettings(lr=1e-2, warmup_steps=2),
        engine=EngineSettings(threads=1, **chosen._asdict()),
    )
    dataset, world = open_dataset(dataset_url), World(0, 0, 1)
    torch.manual_seed(0)
    model = BrainLM(settings.model.resolved, dataset.contract)
    mix = build_mix([dataset], model, settings, world)
    engine = Engine(settings, model, world)
    engine.model.train()
    found = []
    for step in range(NUM_STEPS):
        lr = learning_rate_at(step, NUM_STEPS, settings.optimizer)
        found.append(train_step(engine, mix.batches_at(0), lr).loss)  # one batch: its loss falls
    return found  # the process group serves the next one too


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = [Combination(*values) for values in json.loads(sys.argv[2])]
    print("losses " + json.dumps([losses(sys.argv[1], chosen) for chosen in asked]))
