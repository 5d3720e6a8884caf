"""What `train/pretrain.py` is told: one YAML file. Relations between sections are checked in `check_settings`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.loader import MaskSettings
from brainlm.model import ModelConfig
from brainlm.presets import preset


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Section):
    """A preset, and sizes that replace some of its own (null = the preset's)."""

    preset: str = "tiny"
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_width: int | None = None
    decoder: Literal["full", "cross"] | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    decoder_mlp_width: int | None = None
    parcel_embedding: bool | None = None
    window_len: int | None = None
    patch_len: int | None = None
    patch_parcels: int | None = None

    @property
    def resolved(self) -> ModelConfig:
        changes: dict[str, Any] = {
            f.name: value
            for f in dataclasses.fields(self)
            if f.name != "preset" and (value := getattr(self, f.name)) is not None
        }
        return dataclasses.replace(preset(self.preset), **changes)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """What is trained on."""

    dataset: str
    """URL of a prepared data set; its train split is trained on, its val split validates."""
    batch_size: int = 64
    """Windows per step over all ranks."""
    micro_batch_size: int | None = None
    """Windows per rank and pass; null = a rank's whole share. Smaller values accumulate gradients."""
    windows_per_recording: int = 1
    """Windows drawn from each recording per epoch."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "windows_per_recording"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: expected at least 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """AdamW (torch's), with a linear warm-up and a cosine to `final_lr_ratio` of the peak."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """On matrices only; not on biases, norms, embeddings and tokens."""
    clip_grad_norm: float = 1.0
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.warmup_steps < 0 or not 0 <= self.final_lr_ratio <= 1 or self.clip_grad_norm <= 0:
            raise ConfigError(
                "optimizer: lr and clip_grad_norm must be above 0, warmup_steps at least 0, final_lr_ratio in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """How DeepSpeed runs it."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 where the machine has instructions for it (see `train.precision`), else fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    threads: int | None = None
    """CPU threads per rank; null = cores / ranks."""
    timeout_s: float = 300.0
    """A collective that waits longer than this ends the rank."""


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Section):
    """Scores on held-out subjects during training."""

    every: int = 200
    mask_ratio: float = 0.75
    max_recordings: int = 16
    windows_per_recording: int = 1


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """Where it is written, how long it goes on."""

    out: str
    """Folder of this training run, on local disk: settings, metrics, TensorBoard."""
    storage: str | None = None
    """URL of a folder for snapshots and checkpoints (s3://...); null = `out`."""
    steps: int = 1000
    seed: int = 0
    log_every: int = 20
    snapshot_every: int = 500
    keep_snapshots: int = 2
    """Older ones are removed once a newer one is complete."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "snapshot_every", "keep_snapshots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"run.{name}: expected at least 1, found {getattr(self, name)}")
        if "://" in self.out:
            raise ConfigError(
                f"run.out={self.out}: metrics are written to local disk; give the URL as run.storage, where snapshots "
                "and checkpoints go"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Section):
    """All settings of a training run."""

    run: RunSettings
    data: DataSettings
    model: ModelChoice = field(default_factory=ModelChoice)
    masks: MaskSettings = field(default_factory=MaskSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)


def micro_batches(settings: PretrainSettings, world_size: int) -> int:
    """Return into how many passes a rank's share of a step is divided.

    Raises
    ------
    ConfigError
        If batch size, ranks and micro-batch size do not divide.
    """
    share, left = divmod(settings.data.batch_size, world_size)
    if left:
        raise ConfigError(f"data.batch_size={settings.data.batch_size} must be a multiple of the {world_size} ranks")
    micro = settings.data.micro_batch_size or share
    if share % micro:
        raise ConfigError(
            f"data.micro_batch_size={micro} must divide each rank's share of {share} windows "
            f"(data.batch_size={settings.data.batch_size} over {world_size} ranks)"
        )
    return share // micro


def check_settings(settings: PretrainSettings, world_size: int) -> None:
    """Check relations between sections; change nothing."""
    settings.model.resolved  # noqa: B018 - raises if the sizes contradict each other
    micro_batches(settings, world_size)
    if settings.engine.precision == "bf16" and settings.engine.zero_stage == 0:
        raise ConfigError(
            "engine.precision=bf16 needs engine.zero_stage of 1 or more: at stage 0 DeepSpeed's first update is not "
            "the one that was asked for. Stage 1 costs nothing more on one rank"
        )
    if settings.optimizer.warmup_steps >= settings.run.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={settings.optimizer.warmup_steps} must be below run.steps={settings.run.steps}"
        )
    if not 0 < settings.validation.mask_ratio < 1 or settings.validation.every < 1:
        raise ConfigError("validation: mask_ratio must be between 0 and 1 and every at least 1")
