"""What a run trains: the module, its batches, and how it is scored on held-out subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from brainlm.loader import MaskSettings
from brainlm.model import BrainLM
from brainlm.presets import flops_per_window
from train.engine import Engine
from train.held_out import HeldOut, score_all
from train.mix import Mix
from train.pictures import Example


@dataclass(frozen=True, eq=False)
class Objective:
    """Pretraining, or fine-tuning of any kind, as `train.loop` sees it.

    Parameters
    ----------
    module : nn.Module
        Called with ``batch.inputs()``, it returns a `brainlm.model.Loss`.
    mix : Mix
    score : callable
        Takes the engine; returns ``val_loss``, ``val_r2`` and whatever else is to be logged. All ranks take part.
    examples : callable
        Returns what TensorBoard is to show, by name. Rank zero alone.
    flops_per_window : float or None
        Forward and backward; None = not known.
    tokens_per_window : int
    """

    module: nn.Module
    mix: Mix
    score: Callable[[Engine], dict[str, float]]
    flops_per_window: float | None
    tokens_per_window: int
    examples: Callable[[], Mapping[str, Example | None]] = dict


def rebuild_hidden(model: BrainLM, mix: Mix, masks: MaskSettings, held_out: dict[str, HeldOut]) -> Objective:
    """Return the objective of a masked autoencoder: pretraining, and fine-tuning to forecast."""
    flops = [3 * flops_per_window(model.config, model.num_parcels, ratio, masks.num_decoded) for ratio in masks.ratios]
    return Objective(
        module=model,
        mix=mix,
        score=lambda engine: score_all(held_out, engine),
        examples=lambda: {name: part.example for name, part in held_out.items()},
        flops_per_window=sum(flops) / len(flops),
        tokens_per_window=model.num_rows * model.config.num_patches,
    )
