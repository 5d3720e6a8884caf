"""What ``eval/run.py`` is told: one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from brainlm.config import Section
from brainlm.dataset import Split
from brainlm.device import Device
from brainlm.errors import ConfigError
from eval.clinical.settings import ClinicalSettings
from eval.external import is_external
from eval.models import ScaledBy
from eval.tasks.forecasting import ForecastingSettings
from eval.tasks.networks import NetworksSettings
from eval.tasks.reconstruction import ReconstructionSettings

TASKS = ("reconstruction", "forecasting", "clinical", "networks")


@dataclass(frozen=True, kw_only=True)
class IntervalsSettings(Section):
    """Bootstrap over subjects, and exchanges of two methods' results for p values."""

    num_bootstrap: int = 2000
    num_exchanges: int = 10_000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.num_bootstrap < 1 or self.num_exchanges < 1 or not 0 < self.level < 1:
            raise ConfigError(
                "intervals: num_bootstrap and num_exchanges must be at least 1, level must lie between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class RaySettings(Section):
    """Where the work runs."""

    address: str = "local"
    """``local`` starts a private Ray here, ``auto`` joins the cluster of a submitted job."""
    workers: int = 2
    """Units of work at a time; 0 = in this process, without Ray."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"ray.workers must be 0 or more, found {self.workers}")


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Section):
    """Everything that decides what is scored, and how."""

    out: str
    """Results folder; a second run computes only what is missing there."""
    dataset: str = ""
    """URL of a prepared data set."""
    datasets: tuple[str, ...] = ()
    """Several instead of ``dataset``, which is then not read: each gets a folder below ``out``, all of them a table."""
    checkpoints: tuple[str, ...] = ()
    """Checkpoint folders, or training-run folders (their newest complete checkpoint is taken)."""
    split: Split = "test"
    tasks: tuple[str, ...] = TASKS
    """By name, or ``package.module:Class`` of your own."""
    scaled_by: tuple[ScaledBy, ...] = ("checkpoint",)
    """Whose median and IQR scale what a checkpoint is fed: its own, those of the data set, or each once."""
    include_untrained: bool = True
    untrained_seed: int = 0
    allow_seen_subjects: bool = False
    """Score subjects that a checkpoint was trained on; every score is then marked."""
    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    forecasting: ForecastingSettings = field(default_factory=ForecastingSettings)
    clinical: ClinicalSettings = field(default_factory=ClinicalSettings)
    networks: NetworksSettings = field(default_factory=NetworksSettings)
    intervals: IntervalsSettings = field(default_factory=IntervalsSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    batch_size: int = 8
    """Windows given to a model at once; no score depends on it."""
    threads: int = 1
    """Threads of torch and BLAS in each worker."""
    device: Device = "auto"
    """Of the networks: ``cpu``, ``cuda``, or ``auto``, a GPU where there is one. Workers share the GPUs."""
    report: bool = True
    """Write figures and report.html at the end."""

    def __post_init__(self) -> None:
        if not (self.dataset or self.datasets) or len(set(self.datasets)) != len(self.datasets):
            raise ConfigError("give dataset, the URL of a prepared data set, or datasets, several, each once")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError("tasks: name at least one task, each once")
        unknown = [name for name in self.tasks if name not in TASKS and not is_external(name)]
        if unknown:
            raise ConfigError(
                f"tasks: expected some of {', '.join(TASKS)}, or package.module:Class, found {', '.join(unknown)}"
            )
        if not self.scaled_by or len(set(self.scaled_by)) != len(self.scaled_by):
            raise ConfigError("scaled_by: name checkpoint, dataset or both, each once")
        if self.batch_size < 1 or self.threads < 1:
            raise ConfigError("batch_size and threads must be at least 1")
