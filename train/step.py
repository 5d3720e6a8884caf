"""One training step: forward and backward over the micro-batches, agree that it is finite, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from brainlm.loader import WindowBatch
from train.engine import Engine


class Step(NamedTuple):
    """Of one step, the same on all ranks.

    ``loss``, ``target``: means of the squared error and the squared target over the hidden values that were measured
    and decoded, contract units; ``gradient_norm``: before clipping, not finite if nothing was updated.
    """

    loss: float
    target: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the weights were updated."""
        return math.isfinite(self.gradient_norm)


def train_step(engine: Engine, batches: Sequence[WindowBatch], learning_rate: float) -> Step:
    """Take one step on this rank's micro-batches. All ranks take part.

    Where loss or gradient are not finite, on any rank, no weight changes on any of them.
    """
    (num_values,) = engine.sum_over_ranks([float(sum(batch.num_scored_values for batch in batches))])
    num_values = max(num_values, 1.0)  # all that is hidden may be censored: the loss is 0 then
    engine.set_learning_rate(learning_rate)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for number, cpu_batch in enumerate(batches, start=1):
        loss = engine.forward(cpu_batch.to(engine.device))
        sums += torch.stack([loss.sum.detach(), loss.target_sum.detach()])  # not read here: a GPU need not wait
        # DeepSpeed averages over ranks and micro-batches; this makes it the mean over hidden values of the batch.
        scale = torch.tensor(engine.world.size * len(batches) / num_values, device=engine.device)
        if number == len(batches):
            engine.all_reduce(sums)  # one rank's nan reaches all
            # so that the gradient is not finite either, and nothing is updated
            scale = scale.masked_fill(~sums[0].isfinite(), math.nan)
        engine.backward(loss.sum * scale)
        engine.micro_step()
    squared, target = sums.tolist()
    return Step(squared / num_values, target / num_values, engine.gradient_norm())
