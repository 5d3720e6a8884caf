"""What the entries are told that read recordings with a checkpoint and write a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from brainlm.config import Section, to_tree
from brainlm.dataset import SPLITS, Split
from brainlm.device import Device
from brainlm.errors import ConfigError
from eval.settings import RaySettings

ScaledBy = Literal["checkpoint", "dataset", "recording"]


@dataclass(frozen=True, kw_only=True)
class TableSettings(Section):
    """Which recordings are read by which checkpoint, and the table that is made of it: a row a recording."""

    KIND: ClassVar[str] = "table"
    HOW: ClassVar[tuple[str, ...]] = ()
    """Further settings that decide no number by themselves."""

    checkpoint: str
    """Checkpoint folder, or training-run folder (its newest complete checkpoint is taken)."""
    data: str | tuple[str, ...]
    """URL of a prepared data set; or series files (.npy, .csv, .tsv) in the checkpoint's parcels, time first. Names of
    files may hold wildcards."""
    out: str
    """The table: any fsspec URL that ends with ``.parquet``."""
    splits: tuple[Split, ...] = SPLITS
    """Splits of a data set, in the order of the rows."""
    scaled_by: ScaledBy = "checkpoint"
    """Whose median and IQR scale the recordings: those that the checkpoint was trained with, those of the data set, or
    each recording's own. Parcels other than the checkpoint's need one of the latter."""
    native_tr: bool = False
    """Accept another TR than the checkpoint's, with tokens placed in true seconds."""
    tr_s: float | None = None
    """Of series files, which do not say it. Default: that of the checkpoint."""
    ray: RaySettings = field(default_factory=RaySettings)
    recordings_per_part: int = 32
    """Recordings that a worker reads at a time; what is repeated after a kill is at most this for each worker."""
    threads: int = 1
    """Threads of torch in each worker."""
    device: Device = "auto"
    """Of the model: ``cpu``, ``cuda``, or ``auto``, a GPU where there is one. Workers share the GPUs."""

    def __post_init__(self) -> None:
        if not self.out.rsplit("/", 1)[-1].removesuffix(".parquet") or not self.out.endswith(".parquet"):
            raise ConfigError(f"out must be a file whose name ends with .parquet, found {self.out!r}")
        if not self.splits or len(set(self.splits)) != len(self.splits):
            raise ConfigError("splits: name at least one, each once")
        if not self.data:
            raise ConfigError("data: give the URL of a data set, or series files")
        if self.recordings_per_part < 1 or self.threads < 1:
            raise ConfigError("recordings_per_part and threads must be at least 1")
        if self.tr_s is not None and not self.tr_s > 0:
            raise ConfigError(f"tr_s must be above 0, found {self.tr_s}")

    @property
    def folder(self) -> str:
        """URL of the folder that the table is in."""
        head, slash, _ = self.out.rpartition("/")
        if not slash:
            return "."
        return f"{head}/" if head.endswith(("/", ":")) or not head else head

    @property
    def file_name(self) -> str:
        return self.out.rpartition("/")[2]

    def hashed(self) -> dict[str, Any]:
        """Return the settings that decide the numbers and their order, not how the work is divided."""
        tree = to_tree(self)
        for name in ("checkpoint", "data", "out", "ray", "recordings_per_part", *self.HOW):
            del tree[name]
        return tree
