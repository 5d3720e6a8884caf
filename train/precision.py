"""Which number format a machine trains in."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from train.settings import TrainSettings

SettingsT = TypeVar("SettingsT", bound=TrainSettings)


def resolve_precision(settings: SettingsT) -> SettingsT:
    """Return settings in which ``engine.precision: auto`` has become what this machine does fast.

    bf16 where the hardware multiplies in it and ZeRO is on, else fp32: without such instructions a processor emulates
    bf16, tens of times slower.
    """
    if settings.engine.precision != "auto":
        return settings
    fast = settings.engine.zero_stage > 0 and multiplies_bf16()
    return replace(settings, engine=replace(settings.engine, precision="bf16" if fast else "fp32"))


def multiplies_bf16() -> bool:
    """Say whether the GPU, or the processor where there is none, has instructions for products in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not part of torch's public interface: a version without one of these trains in fp32.
    return any(
        bool(getattr(torch.cpu, name, bool)()) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
