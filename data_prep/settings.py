"""Settings of `prepare.py`: what goes in, what is done to it, where it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from brainlm.config import Section, config_hash, to_tree
from brainlm.shards import StoredDtype

Orientation = Literal["timepoints_by_parcels", "parcels_by_timepoints", "from_atlas"]


# Raise it when the same settings give other series: staged recordings of a stopped run are then made again.
RECORDING_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ColumnNames(Section):
    """Columns of the table (`source.kind: table`) or of ``participants.tsv`` (``bids``: site, family, mean_fd_mm).

    ``recording_id``, ``file`` and ``confounds`` may be patterns over columns, such as ``ts/{file_id}.npy``.
    """

    recording_id: str | None = None
    """Default: made from subject, session, task and run."""
    subject: str = "participant_id"
    session: str | None = None
    task: str | None = None
    run: str | None = None
    site: str | None = None
    family: str | None = None
    file: str = "file"
    """Path of the series or image, relative to `source.root`."""
    tr_s: str | None = None
    """Repetition time in seconds."""
    confounds: str | None = None
    """Path of a confounds table, relative to `source.root`."""
    mean_fd_mm: str | None = None
    """Mean framewise displacement, where no confounds give it."""


@dataclass(frozen=True, kw_only=True)
class BidsSettings(Section):
    """Which images of a BIDS derivatives folder are taken; an empty list takes all."""

    space: tuple[str, ...] = ()
    """Default: every template space (names beginning with MNI)."""
    task: tuple[str, ...] = ()
    desc: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Section):
    """Where recordings come from."""

    kind: Literal["table", "bids"]
    path: str
    """The table (.tsv, .csv, .parquet), or the BIDS derivatives folder that holds ``sub-*``."""
    root: str | None = None
    """Folder that relative paths in the table start from. Default: the table's own."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    phenotypes: tuple[str, ...] | None = None
    """Columns kept, as given, in ``subjects.parquet``. Default: none of a table, all of ``participants.tsv``."""
    tr_s: float | None = None
    """Repetition time of all recordings, where neither a column nor the images give it."""
    orientation: Orientation = "from_atlas"
    """Axes of series files; ``from_atlas`` finds the parcels by their number."""
    space: str | None = None
    """Template space of the images of a table, where their names do not say it (``space-...``)."""
    bids: BidsSettings = field(default_factory=BidsSettings)

    def __post_init__(self) -> None:
        if self.tr_s is not None and not self.tr_s > 0:
            raise ValueError(f"tr_s must be above 0, found {self.tr_s}")
        if self.space is not None and not self.space.startswith("MNI"):
            raise ValueError(f"space must be a template space (MNI...), found {self.space!r}")


@dataclass(frozen=True, kw_only=True)
class AtlasSettings(Section):
    """The label image, and a table that names its parcels."""

    image: str
    name: str
    space: str = ""
    """BIDS name of its template space, such as MNI152NLin6Asym."""
    labels: str | None = None
    """Table (.tsv, .csv) with one row a parcel."""
    coords_columns: tuple[str, str, str] = ("x_mm", "y_mm", "z_mm")
    """Columns of the table that replace the centre of mass, where it has them; in the template's millimetres."""
    label_column: str = "index"
    name_column: str = "name"
    network_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class CleanSettings(Section):
    """What is removed from each series, before resampling. Nothing by default."""

    confounds: tuple[str, ...] | None = None
    """Columns of the confounds table to regress out."""
    detrend: bool = False
    high_pass_hz: float | None = None
    low_pass_hz: float | None = None

    def __post_init__(self) -> None:
        for name in ("high_pass_hz", "low_pass_hz"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 or null, found {value}")
        if self.high_pass_hz and self.low_pass_hz and self.high_pass_hz >= self.low_pass_hz:
            raise ValueError(f"high_pass_hz {self.high_pass_hz} must be below low_pass_hz {self.low_pass_hz}")
        if self.confounds is not None and not self.confounds:
            raise ValueError("confounds must name columns, or be null")


@dataclass(frozen=True, kw_only=True)
class WindowSettings(Section):
    """Windows that models will be given; recordings shorter than one are refused."""

    window_len: int = 200
    patch_len: int = 20

    def __post_init__(self) -> None:
        if self.window_len <= 0 or self.patch_len <= 0 or self.window_len % self.patch_len:
            raise ValueError(f"window_len {self.window_len} must be a positive multiple of patch_len {self.patch_len}")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Section):
    """Share of groups in validation and test; the rest trains."""

    val: float = 0.15
    test: float = 0.15
    seed: int = 0
    group_by: str = "subject"
    """``subject``, ``family``, ``site``, or a phenotype column. All recordings of a group are in one split."""

    def __post_init__(self) -> None:
        if self.val < 0 or self.test < 0 or self.val + self.test >= 1:
            raise ValueError(f"val {self.val} and test {self.test} must be at least 0 and leave something to train on")

    @property
    def fractions(self) -> dict[str, float]:
        return {"train": 1.0 - self.val - self.test, "val": self.val, "test": self.test}


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Section):
    """Form of the training shards."""

    dtype: StoredDtype = "float32"
    recordings_per_shard: int = 64

    def __post_init__(self) -> None:
        if self.recordings_per_shard <= 0:
            raise ValueError(f"recordings_per_shard must be above 0, found {self.recordings_per_shard}")


@dataclass(frozen=True, kw_only=True)
class CheckSettings(Section):
    """What makes a recording unfit."""

    min_parcel_coverage: float = 0.25
    """A parcel with signal in a smaller fraction of its voxels is missing from the recording."""
    min_parcels: float = 0.5
    """A recording is refused when a smaller fraction of the parcels has signal."""
    max_outside_brain: float = 0.3
    """An image is refused when a larger fraction of its bright voxels lies outside the template's brain box."""

    def __post_init__(self) -> None:
        for name in ("min_parcel_coverage", "min_parcels", "max_outside_brain"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RaySettings(Section):
    """Where the work is done; never changes a result."""

    address: str = "local"
    """``local``, ``auto`` inside a Ray job, a cluster's address, or ``off`` for this process alone."""
    num_cpus: int | None = None
    object_store_mb: int = 200


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Section):
    """Everything that one data set is made from."""

    name: str
    out: str
    """Any fsspec URL: a path, ``s3://``, ``gs://``, ``memory://``."""
    source: SourceSettings
    atlas: AtlasSettings
    clean: CleanSettings = field(default_factory=CleanSettings)
    target_tr_s: float | None = None
    """Seconds between timepoints of the data set. Null: all recordings must have one TR already."""
    windows: WindowSettings = field(default_factory=WindowSettings)
    splits: SplitSettings = field(default_factory=SplitSettings)
    shards: ShardSettings = field(default_factory=ShardSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    max_refused_fraction: float = 0.1
    """More refused recordings than this, and no data set is made."""
    statistics_memory_mb: int = 512
    """Bound on the memory of one task while median and IQR are computed."""
    truth: str | None = None
    """Folder with the truth of a simulated cohort, copied into the data set."""
    ray: RaySettings = field(default_factory=RaySettings)

    def __post_init__(self) -> None:
        if self.target_tr_s is not None and not self.target_tr_s > 0:
            raise ValueError(f"target_tr_s must be above 0, found {self.target_tr_s}")
        if not 0 <= self.max_refused_fraction <= 1:
            raise ValueError(f"max_refused_fraction must be from 0 to 1, found {self.max_refused_fraction}")
        if self.statistics_memory_mb <= 0:
            raise ValueError("statistics_memory_mb must be above 0")

    def data_tree(self) -> dict[str, Any]:
        """Return the settings that decide what the data set holds: not where it lies nor how the work is divided."""
        tree = to_tree(self)
        for name in ("out", "ray", "statistics_memory_mb", "max_refused_fraction"):
            del tree[name]
        return tree

    def recording_hash(self) -> str:
        """Identify what decides one recording's staged series: other splits or shards reuse it."""
        tree = self.data_tree()
        parts = {name: tree[name] for name in ("source", "atlas", "clean", "target_tr_s", "windows", "checks")}
        return config_hash(parts | {"version": RECORDING_VERSION})


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """List the dotted keys in which two settings trees differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted(set(ours) | set(theirs))
            for line in differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if ours == theirs else [f"{path}: {ours!r} here, {theirs!r} there"]
