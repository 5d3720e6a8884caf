"""The learning rate of every step."""

from __future__ import annotations

import math

from train.settings import OptimizerSettings


def learning_rate_at(step: int, num_steps: int, optimizer: OptimizerSettings) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to the final rate."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(num_steps - optimizer.warmup_steps, 1)
    floor = optimizer.lr * optimizer.final_lr_ratio
    return floor + (optimizer.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
