"""What `train/finetune.py` is told: one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.heads import HeadConfig
from brainlm.loader import MaskSettings
from brainlm.published import is_published
from brainlm.targets import TargetSettings
from train.settings import OptimizerSettings, TrainSettings, ValidationEvery, micro_batches

SPLIT_SUFFIXES = (".tsv", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(Section):
    """What of the encoder is trained."""

    trained: Literal["all", "none"] | int = "all"
    """``none``: frozen; a number: its last blocks and what follows them."""
    dropout: float = 0.4
    """In the trained blocks: share of what attention and feed-forward add to the tokens that is left out (the paper's
    0.4). Parts that are frozen have none."""
    lr_ratio: float = 0.1
    """Learning rate of the encoder as a multiple of the head's: at its own rate it would lose what pretraining found
    before the head can read it (Kumar et al. 2022, ICLR)."""
    untrained: bool = False
    """A control: random weights in place of those of ``init_from``."""

    def __post_init__(self) -> None:
        if isinstance(self.trained, int) and self.trained < 1:
            raise ConfigError(f"encoder.trained: expected all, none, or at least 1 block, found {self.trained}")
        if not self.lr_ratio > 0:
            raise ConfigError(f"encoder.lr_ratio: expected above 0, found {self.lr_ratio}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"encoder.dropout: expected at least 0 and below 1, found {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Section):
    """Which subjects are trained on, validated on and tested on. Subjects of one family, and equal series, stay
    together."""

    of: Literal["unseen", "dataset"] = "unseen"
    """``unseen``: a new split, made among the subjects that the checkpoint was not pretrained on; the others are left
    out. ``dataset``: the one that the data set has."""
    column: str | None = None
    """Column of subjects.parquet or recordings.parquet with train, val or test; empty = left out. Replaces `of`."""
    file: str | None = None
    """URL of a .tsv, .csv or .parquet with the columns recording_id (or subject) and split: train, val or test; empty,
    or not listed = left out. Replaces `of`."""
    file_sha256: str | None = None
    """Of the file; null = as it is found. A run goes on with no other."""
    fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.6, "val": 0.2, "test": 0.2})
    """Of a new split, in subjects."""
    folds: int | None = None
    """Instead of fractions: subjects are divided into so many parts; part `fold` is test, the next one val."""
    fold: int = 0
    seed: int = 0
    allow_pretraining_subjects: bool = False
    """Accept subjects that the checkpoint was pretrained on, or a checkpoint that does not say whom it was trained on.
    Every result then shows it."""

    def __post_init__(self) -> None:
        if self.column is not None and self.file is not None:
            raise ConfigError("give split.column or split.file, not both")
        if self.file is not None and not self.file.endswith(SPLIT_SUFFIXES):
            raise ConfigError(f"split.file: expected a {', '.join(SPLIT_SUFFIXES)}, found {self.file}")
        if self.file is None and self.file_sha256 is not None:
            raise ConfigError("split.file_sha256 is given without split.file")
        if set(self.fractions) != {"train", "val", "test"} or not all(0 < f < 1 for f in self.fractions.values()):
            raise ConfigError(f"split.fractions: expected train, val and test above 0, found {self.fractions}")
        if abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ConfigError(f"split.fractions: expected a sum of 1, found {sum(self.fractions.values()):g}")
        if self.folds is not None and not (self.folds >= 3 and 0 <= self.fold < self.folds):
            raise ConfigError(f"split.folds={self.folds}: at least 3, and split.fold={self.fold} among them")


@dataclass(frozen=True, kw_only=True)
class FinetuneValidation(ValidationEvery):
    """Scores on validation subjects during training; the best weights are kept."""

    every: int = 50
    patience: int | None = 10
    max_recordings: int | None = 512
    """Recordings of validation subjects that are scored, all windows of each; null = all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_recordings is not None and self.max_recordings < 1:
            raise ConfigError(f"validation.max_recordings: expected at least 1, found {self.max_recordings}")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainSettings):
    """All settings of `train/finetune.py`. ``init_from`` must be given."""

    targets: tuple[TargetSettings, ...] = ()
    """Columns to predict. Or, instead, ``forecast_patches``."""
    forecast_patches: int | None = None
    """Fine-tune to forecast so many patches at the end of a window; no head, no targets."""
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    head: HeadConfig = field(default_factory=HeadConfig)
    split: SplitSettings = field(default_factory=SplitSettings)
    permute_targets: bool = False
    """A control: the targets of the training subjects are permuted among them. Scores on the others must be chance."""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), warmup_ratio=0.1)
    )
    validation: FinetuneValidation = field(default_factory=FinetuneValidation)

    def __post_init__(self) -> None:
        if bool(self.targets) == (self.forecast_patches is not None):
            raise ConfigError("give targets, or forecast_patches to fine-tune a forecaster: one of them")
        columns = [target.column for target in self.targets]
        if len(set(columns)) < len(columns):
            raise ConfigError(f"targets: each column once, found {columns}")
        if self.permute_targets and not self.targets:
            raise ConfigError("permute_targets is a control of targets: forecast_patches has none")

    @property
    def lr_ratios(self) -> dict[str, float]:
        """Learning rates of parts of the model as multiples of the others', by the beginning of their names."""
        return {"encoder.": self.encoder.lr_ratio} if self.targets else {}

    @property
    def checkpoint(self) -> str:
        """What fine-tuning begins from."""
        assert self.init_from is not None
        return self.init_from

    def masks(self, num_patches: int) -> MaskSettings:
        """Return what is hidden when a forecaster is fine-tuned."""
        assert self.forecast_patches is not None
        if not 1 <= self.forecast_patches < num_patches:
            raise ConfigError(
                f"forecast_patches={self.forecast_patches}: expected 1 to {num_patches - 1} of the {num_patches} "
                "patches of a window"
            )
        return MaskSettings(kind="future", ratios=(self.forecast_patches / num_patches,))


def check_finetune_settings(settings: FinetuneSettings, world_size: int) -> None:
    """Check relations between sections; change nothing."""
    micro_batches(settings, world_size)
    if settings.init_from is None:
        raise ConfigError("init_from: give the checkpoint to fine-tune, a folder, URL or owner/name on the hub")
    if len(settings.data.datasets) > 1:
        raise ConfigError(f"data.dataset: fine-tuning takes one data set, found {len(settings.data.datasets)}")
    if not settings.run.keep_best:
        raise ConfigError("run.keep_best=false: the best weights are what fine-tuning exports")
    if settings.engine.precision == "bf16" and is_published(settings.init_from):
        raise ConfigError("engine.precision=bf16: published checkpoints are fine-tuned in fp32")
    if settings.targets and settings.engine.zero_stage == 3:
        raise ConfigError("engine.zero_stage=3 is tested for forecast_patches alone: for targets take 0, 1 or 2")
