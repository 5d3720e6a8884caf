"""The learning rate of every step."""

from __future__ import annotations

import math

from train.settings import OptimizerSettings


def learning_rate_at(step: int, num_steps: int, optimizer: OptimizerSettings, batch_size: int = 256) -> float:
    """Return the learning rate of a step, counted from 0.

    A linear warm-up, then ``cosine``: a cosine to the final rate; ``constant``: the peak; ``wsd``: the peak, and in the
    last `decay_steps` a line to the final rate (Hu et al. 2024, MiniCPM, Sec. 4).
    """
    peak = optimizer.peak_lr(batch_size)
    warmup = optimizer.num_warmup_steps(num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return peak
    floor = peak * optimizer.final_lr_ratio
    if optimizer.schedule == "wsd":
        decay = optimizer.num_decay_steps(num_steps)
        progress = (step - (num_steps - decay)) / decay
        return peak - (peak - floor) * min(max(progress, 0.0), 1.0)
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
