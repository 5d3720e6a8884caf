"""What the clinical task is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.fitting import FitSettings
from brainlm.targets import TargetSettings

Readout = Literal["linear", "SVR", "parcels", "attentive", "fine-tuned"]
BASELINES = ("FC, linear", "FC tangent, linear", "FC, SVR", "raw series, SVR", "FC, MLP", "LSTM", "GCN")
FoldKind = Literal["random", "sites"]


@dataclass(frozen=True, kw_only=True)
class ClinicalSettings(Section):
    """Which columns are predicted, from what, and how people are divided."""

    targets: tuple[TargetSettings, ...] = ()
    """Columns of subjects.parquet or recordings.parquet; none = the task is left out."""
    of: Literal["unseen", "split"] = "unseen"
    """``unseen``: all recordings of people that none of the checkpoints was pretrained on, whatever the data set's
    split. ``split``: of the scored split alone."""
    folds: int = 5
    repeats: int = 3
    """Random divisions into folds; scores are averaged over them."""
    fold_kinds: tuple[FoldKind, ...] = ("random", "sites")
    """``sites``: every site is tested once, by what was learned at the others; left out where there is one site."""
    readouts: tuple[Readout, ...] = ("linear", "SVR", "parcels", "attentive")
    """Of what the encoder makes of a recording. ``linear`` and ``SVR`` read one vector (`embedding`); ``parcels`` is
    linear in the embeddings of all parcels side by side, ``attentive`` in their mean weighted by a learned query;
    ``fine-tuned`` trains the encoder too, with `finetune`."""
    finetune: str | None = None
    """A configuration of train/finetune.py, for the readout ``fine-tuned``: targets, split and checkpoint are set
    here."""
    embedding: Literal["cls", "pooled"] = "pooled"
    """What ``linear`` and ``SVR`` read: the CLS token, which no loss of pretraining asks for anything, or the mean over
    the others."""
    baselines: tuple[str, ...] = BASELINES
    confounds: tuple[str, ...] = ("site", "mean_fd_mm", "num_timepoints", "age", "sex")
    """Columns that are a method of their own, and are removed from features within folds; those that the data set
    lacks, and the target itself, are left out."""
    remove_confounds: bool = True
    """Also score features from which the confounds were removed."""
    permuted_control: bool = True
    """Also learn from permuted targets: what comes out is chance."""
    by: tuple[str, ...] = ("site", "sex")
    """Columns by which people are told apart in tables of scores within groups."""
    fit: FitSettings = field(default_factory=FitSettings)
    """Budget of the networks among the baselines, and of the attentive readout."""
    seed: int = 0
    reference: str = "auto"
    """Baseline that every method is compared with; ``auto`` = the best one on validation, target by target."""

    def __post_init__(self) -> None:
        columns = [target.column for target in self.targets]
        if len(set(columns)) < len(columns):
            raise ConfigError(f"clinical.targets: each column once, found {columns}")
        if self.folds < 2 or self.repeats < 1:
            raise ConfigError("clinical: folds must be at least 2 and repeats at least 1")
        if not self.fold_kinds or len(set(self.fold_kinds)) < len(self.fold_kinds):
            raise ConfigError("clinical.fold_kinds: name random, sites or both, each once")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ConfigError(
                f"clinical.baselines: expected some of {'; '.join(BASELINES)}, found {'; '.join(unknown)}"
            )
        if ("fine-tuned" in self.readouts) != (self.finetune is not None):
            raise ConfigError(
                "clinical: the readout fine-tuned and clinical.finetune, a configuration of train/finetune.py, go "
                "together: give both or neither"
            )
