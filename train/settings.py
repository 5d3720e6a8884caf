"""What a training run is told: one YAML file. Relations between sections are checked in `check_settings`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.loader import MaskSettings
from brainlm.masking import MaskKind
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

    dataset: str | tuple[str, ...]
    """URL of a prepared data set; its train split is trained on, its val split validates. Or several: all windows of a
    step are of one, and the checkpoint's contract is that of the first."""
    weights: tuple[float, ...] | None = None
    """Relative numbers of steps of several data sets; null = in proportion to their recordings."""
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
        if not self.datasets or not all(self.datasets):
            raise ConfigError("data.dataset: expected the URL of at least one data set")
        if self.weights is not None:
            if len(self.weights) != len(self.datasets):
                raise ConfigError(
                    f"data.weights: expected one for each of {len(self.datasets)} data sets, found {len(self.weights)}"
                )
            if not all(weight > 0 and math.isfinite(weight) for weight in self.weights):
                raise ConfigError(f"data.weights: expected numbers above 0, found {list(self.weights)}")

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """AdamW (torch's; Adam if `weight_decay` is 0), and the learning rate of every step (`train.schedule`)."""

    lr: float | None = None
    """At the peak; null = from `base_lr`, or 1e-3."""
    base_lr: float | None = None
    """For 256 windows a step: the peak is base_lr * data.batch_size / 256 (He et al. 2022, App. A.1)."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After a linear warm-up: a cosine to the last step; the peak throughout; or the peak and a linear decay at the end
    (warmup-stable-decay)."""
    decay_steps: int | None = None
    """Steps of the decay of ``wsd``; null = a tenth of all."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """On matrices only; not on biases, norms, embeddings and tokens."""
    clip_grad_norm: float = 1.0
    warmup_steps: int | None = None
    """null = from `warmup_ratio`, or 100."""
    warmup_ratio: float | None = None
    """Warm-up as a fraction of all steps."""
    final_lr_ratio: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.base_lr is not None:
            raise ConfigError("give optimizer.lr or optimizer.base_lr, not both")
        for name in ("lr", "base_lr", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optimizer.{name}: expected above 0, found {value}")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError("give optimizer.warmup_steps or optimizer.warmup_ratio, not both")
        if (self.warmup_steps or 0) < 0 or not 0 <= self.final_lr_ratio <= 1 or not 0 <= (self.warmup_ratio or 0) < 1:
            raise ConfigError(
                "optimizer: warmup_steps must be at least 0, warmup_ratio in [0, 1), final_lr_ratio in [0, 1]"
            )
        if self.decay_steps is not None and (self.schedule != "wsd" or self.decay_steps < 1):
            raise ConfigError("optimizer.decay_steps: at least 1, and for optimizer.schedule=wsd alone")

    def num_warmup_steps(self, num_steps: int) -> int:
        if self.warmup_ratio is not None:
            return round(self.warmup_ratio * num_steps)
        return 100 if self.warmup_steps is None else self.warmup_steps

    def num_decay_steps(self, num_steps: int) -> int:
        """Steps of the decay of ``wsd``."""
        return self.decay_steps or -(-num_steps // 10)

    def peak_lr(self, batch_size: int) -> float:
        if self.base_lr is not None:
            return self.base_lr * batch_size / 256
        return 1e-3 if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Section):
    """How DeepSpeed runs it."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 where the machine has instructions for it (see `train.precision`), else fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: bool = False
    """Compute activations again for the gradient instead of keeping them: less memory, about a third more time."""
    offload_optimizer: bool = False
    """Keep the optimizer state in the machine's memory instead of the GPU's, and update the weights there."""
    compile: bool = False
    """Compile the Transformer's blocks with torch.compile, at the first steps of every run: about a minute."""
    threads: int | None = None
    """CPU threads per rank; null = cores / ranks on the host."""
    timeout_s: float = 600.0
    """A rank that waits longer than this for another says for which, and ends with exit status 75. Reading from object
    storage is tried again for $BRAINLM_STORE_RETRY_S (300 s): leave more."""


@dataclass(frozen=True, kw_only=True)
class ValidationEvery(Section):
    """When held-out subjects are scored, and when training ends because of them."""

    every: int = 200
    patience: int | None = None
    """Training ends after so many validations without a better score; null = never early."""

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"validation.{name}: expected at least 1, found {value}")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(ValidationEvery):
    """Scores on held-out subjects during training: hidden values of their windows."""

    mask_ratio: float = 0.75
    max_recordings: int = 16
    windows_per_recording: int = 1
    kind: MaskKind = "random"


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """Where it is written, how long it goes on."""

    out: str
    """Folder of this training run, on local disk: settings, metrics, TensorBoard."""
    storage: str | None = None
    """URL of a folder for snapshots, checkpoints, and what the run is known by (s3://...); null = `out`."""
    steps: int | None = None
    """Updates; null = from `epochs`, or 1000."""
    epochs: float | None = None
    """Passes over all recordings, each with data.windows_per_recording windows."""
    max_hours: float | None = None
    """After this long the run saves a snapshot and leaves with exit status 0; the same command goes on."""
    max_skipped: int = 3
    """Steps left out, in the whole run, because their loss or gradient was not finite; one more stops it."""
    seed: int = 0
    log_every: int = 20
    snapshot_every: int = 500
    keep_snapshots: int = 2
    """Older ones are removed once a newer one is complete."""
    keep_best: bool = True
    """Also keep a checkpoint of the best validation score so far."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give run.steps or run.epochs, not both")
        for name in ("steps", "log_every", "snapshot_every", "keep_snapshots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"run.{name}: expected at least 1, found {value}")
        for name in ("epochs", "max_hours"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"run.{name}: expected above 0, found {value}")
        if self.max_skipped < 0:
            raise ConfigError(f"run.max_skipped: expected at least 0, found {self.max_skipped}")
        if "://" in self.out:
            raise ConfigError(
                f"run.out={self.out}: metrics are written to local disk; give the URL as run.storage, where snapshots "
                "and checkpoints go"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    """What pretraining and fine-tuning have in common."""

    run: RunSettings
    data: DataSettings
    init_from: str | None = None
    """Checkpoint (path, URL or hub id) whose weights and sizes training begins with; the optimizer is new."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    validation: ValidationEvery = field(default_factory=ValidationEvery)

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Learning rates of parts of the model as multiples of the others', by the beginning of their names."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """All settings of `train/pretrain.py`."""

    model: ModelChoice = field(default_factory=ModelChoice)
    masks: MaskSettings = field(default_factory=MaskSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)


def num_steps(settings: TrainSettings, steps_per_epoch: int) -> int:
    """Return how many updates the run has.

    Raises
    ------
    ConfigError
        If the learning rate would not have reached its peak, or begin its decay before.
    """
    run, optimizer = settings.run, settings.optimizer
    steps = run.steps or 1000
    if run.epochs is not None:
        steps = max(round(run.epochs * steps_per_epoch), 1)
    said = f"run.steps={steps}" + (f" (of run.epochs={run.epochs:g})" if run.epochs is not None else "")
    warmup, decay = optimizer.num_warmup_steps(steps), optimizer.num_decay_steps(steps)
    if warmup >= steps:
        raise ConfigError(f"optimizer.warmup_steps={warmup} must be below {said}")
    if optimizer.schedule == "wsd" and warmup + decay > steps:
        raise ConfigError(f"optimizer.warmup_steps={warmup} and decay_steps={decay} are more than {said}")
    return steps


def micro_batches(settings: TrainSettings, world_size: int) -> int:
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
    if not 0 < settings.validation.mask_ratio < 1:
        raise ConfigError(f"validation.mask_ratio: expected between 0 and 1, found {settings.validation.mask_ratio}")
