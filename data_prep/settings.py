"""Settings of `prepare.py`: what goes in, what is done to it, where it goes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from brainlm.config import Section, config_hash, to_tree
from brainlm.shards import StoredDtype

Orientation = Literal["timepoints_by_parcels", "parcels_by_timepoints", "from_atlas"]
MeanOver = Literal["covered", "all"]
Strategy = Literal["none", "6P", "24P", "aCompCor", "ICA-AROMA"]

# Raise it when the same settings give other series: staged recordings of a stopped run are then made again.
RECORDING_VERSION = 2


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
    denoised: str | None = None
    """How the recording is denoised already (``FIX``, ``ICA-AROMA``); empty where it is not."""


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

    kind: Literal["table", "bids", "pattern", "nilearn"]
    path: str
    """``table``: the table (.tsv, .csv, .parquet). ``bids``: the derivatives folder that holds ``sub-*``. ``pattern``:
    the folder that `pattern` starts from. ``nilearn``: the folder that nilearn's fetchers download to. A path, or any
    fsspec URL (not for ``nilearn``)."""
    pattern: str | None = None
    """``pattern``: path below `path` with the fields ``{subject}``, ``{session}``, ``{task}``, ``{run}``, ``{site}``
    and wildcards, such as ``{subject}/MNINonLinear/Results/{task}_{run}/*_clean.dtseries.nii``."""
    confounds_pattern: str | None = None
    """``pattern``: the confounds table of a recording, with the same fields."""
    dataset: Literal["abide_pcp", "adhd", "development_fmri"] | None = None
    """``nilearn``: which open cohort."""
    participants: str | None = None
    """Table of phenotypes, a row a subject, joined by `columns.subject`. Default for ``bids``: ``participants.tsv``."""
    allow_unlisted: bool = False
    """Keep subjects that the table `participants` does not list, with missing phenotypes."""
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
    """Template space of the images, where their names do not say it (``space-...``)."""
    denoised: str | None = None
    """How all recordings are denoised already (``FIX``, ``ICA-AROMA``), where names and columns do not say it."""
    warp: str | None = None
    """``pattern``: FSL warp from an image's own space to the template, with the same fields; needs FSL's applywarp."""
    warp_reference: str | None = None
    """Image that gives the grid that warped images are put on."""
    bids: BidsSettings = field(default_factory=BidsSettings)

    def __post_init__(self) -> None:
        if self.tr_s is not None and not self.tr_s > 0:
            raise ValueError(f"tr_s must be above 0, found {self.tr_s}")
        if self.space is not None and not self.space.startswith("MNI"):
            raise ValueError(f"space must be a template space (MNI...), found {self.space!r}")
        for kind, name in (("pattern", "pattern"), ("nilearn", "dataset")):
            if (self.kind == kind) != (getattr(self, name) is not None):
                raise ValueError(f"{name} belongs to kind: {kind}, which needs it; the kind is {self.kind}")
        for name in ("confounds_pattern", "warp"):
            if getattr(self, name) is not None and self.kind != "pattern":
                raise ValueError(f"{name} belongs to kind: pattern; the kind is {self.kind}")
        if (self.warp is None) != (self.warp_reference is None):
            raise ValueError("warp and warp_reference must be given together")


@dataclass(frozen=True, kw_only=True)
class AtlasSettings(Section):
    """The label image, and a table that names its parcels."""

    name: str
    image: str | None = None
    """NIfTI label image, or CIFTI ``.dlabel.nii``. Default: the atlas registry's image of this name, downloaded once,
    its sha256 checked (`data_prep.atlas_registry`)."""
    space: str = ""
    """BIDS name of its template space, such as MNI152NLin6Asym."""
    labels: str | None = None
    """Table with one row a parcel: .tsv, .csv, .parquet, FreeSurfer's .txt, AAL's .xml."""
    coords_columns: tuple[str, str, str] = ("x_mm", "y_mm", "z_mm")
    """Columns of the table that replace the centre of mass, where it has them; in the template's millimetres."""
    label_column: str = "index"
    name_column: str = "name"
    network_column: str | None = None
    network_pattern: str | None = None
    """Regular expression of whole names with the network as its first group, for names that hold it:
    ``7Networks_[LR]H_([A-Za-z]+)_.+`` finds Vis in 7Networks_LH_Vis_1. Default: the registry's, for its own table."""
    hemisphere_column: str | None = None
    transforms: dict[str, str] = field(default_factory=dict)
    """Template space of images -> file of the transform that brings atlas images to it (ITK ``.h5`` or ``.txt``, as
    TemplateFlow's ``from-<atlas space>_to-<space>_mode-image_xfm.h5``, or a displacement field). The labels are moved,
    never the images."""

    def __post_init__(self) -> None:
        if self.network_pattern is None:
            return
        if self.network_column is not None:
            raise ValueError("give network_column or network_pattern, not both")
        try:
            num_groups = re.compile(self.network_pattern).groups
        except re.error as error:
            raise ValueError(f"network_pattern is no regular expression: {error}") from error
        if num_groups < 1:
            raise ValueError(f"network_pattern must have a group (...) for the network, found {self.network_pattern!r}")


@dataclass(frozen=True, kw_only=True)
class ScrubSettings(Section):
    """Which timepoints are censored: kept out of every fit, and marked in ``keep_mask``."""

    fd_mm: float = 0.5
    """Censor timepoints of larger framewise displacement (Power et al. 2012, NeuroImage 59)."""
    std_dvars: float | None = 3.0
    """Censor timepoints of larger standardised DVARS; null = do not look."""
    min_segment: int = 5
    """Segments of fewer kept timepoints between censored ones are censored too; 0 = none."""

    def __post_init__(self) -> None:
        if not self.fd_mm > 0 or (self.std_dvars is not None and not self.std_dvars > 0) or self.min_segment < 0:
            raise ValueError("fd_mm and std_dvars must be above 0, min_segment at least 0")


@dataclass(frozen=True, kw_only=True)
class CleanSettings(Section):
    """How series are made and what is removed from them, before resampling. Nothing is removed by default."""

    mean_over: MeanOver = "covered"
    """Voxels that a parcel's mean is over: those with signal, or ``all``, those without counting as 0 (as in nilearn's
    masker: the amplitude of a parcel then shrinks with its coverage)."""
    dummy_scans: int | Literal["auto"] = 0
    """Timepoints dropped at the start; ``auto`` drops those that the confounds mark as non-steady state."""
    strategy: Strategy = "none"
    """Confounds by name, chosen by nilearn's interface to fMRIPrep: 6P (motion), 24P (with derivatives and squares),
    aCompCor (24P and anatomical components), ICA-AROMA (its non-aggressive images with white matter and CSF)."""
    global_signal: bool = False
    """Regress out the global signal too."""
    confounds: tuple[str, ...] | None = None
    """Further columns of the confounds table to regress out."""
    scrub: ScrubSettings | None = None
    detrend: bool = False
    """Remove a linear trend."""
    high_pass_hz: float | None = None
    """Remove slower cosines; with `low_pass_hz`, all outside of the band (docs/processing.md)."""
    low_pass_hz: float | None = None
    """Remove faster cosines. With censoring this costs many degrees of freedom (docs/processing.md)."""

    @property
    def needs_confounds(self) -> bool:
        """Whether a recording without a table of confounds cannot be cleaned as asked for."""
        return self.denoises or self.scrub is not None or self.dummy_scans == "auto"

    @property
    def denoises(self) -> bool:
        """Whether confounds are regressed out, which must not be done twice."""
        return self.strategy != "none" or self.global_signal or self.confounds is not None

    def __post_init__(self) -> None:
        if isinstance(self.dummy_scans, int) and self.dummy_scans < 0:
            raise ValueError(f"dummy_scans must be at least 0, or auto, found {self.dummy_scans}")
        for name in ("high_pass_hz", "low_pass_hz"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 or null, found {value}")
        if self.high_pass_hz and self.low_pass_hz and self.high_pass_hz >= self.low_pass_hz:
            raise ValueError(f"high_pass_hz {self.high_pass_hz} must be below low_pass_hz {self.low_pass_hz}")
        if self.confounds is not None and not self.confounds:
            raise ValueError("confounds must name columns, or be null")
        if self.strategy == "ICA-AROMA" and self.confounds is not None:
            raise ValueError("strategy ICA-AROMA takes no further confounds: the images are denoised already")


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
    column: str | None = None
    """Column of the table or phenotypes that gives the split (train, val, test), instead of the hash."""
    test_sites: tuple[str, ...] = ()
    """Sites of which every recording is in test; the fractions then divide the other sites."""

    def __post_init__(self) -> None:
        if self.column is not None and self.test_sites:
            raise ValueError("give column or test_sites, not both")
        if self.val < 0 or self.test < 0 or self.val + self.test > 1:
            raise ValueError(f"val {self.val} and test {self.test} must be at least 0 and together at most 1")

    @property
    def fractions(self) -> dict[str, float]:
        return {"train": 1.0 - self.val - self.test, "val": self.val, "test": self.test}


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Section):
    """Form of the training shards."""

    dtype: StoredDtype = "float32"
    recordings_per_shard: int = 64
    max_mb: int = 64
    """A shard ends before it grows beyond this, whatever the length of the recordings; a worker holds two copies."""

    def __post_init__(self) -> None:
        for name in ("recordings_per_shard", "max_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckSettings(Section):
    """What makes a recording unfit."""

    min_parcel_coverage: float = 0.25
    """A parcel with signal in a smaller fraction of its voxels is missing from the recording."""
    min_parcels: float = 0.5
    """A recording is refused when a smaller fraction of the parcels has signal."""
    max_outside_brain: float = 0.3
    """An image is refused when a larger fraction of its bright voxels lies outside the template's brain box."""
    min_fit: float = 0.94
    """An image is refused when its brain fits the atlas less well than this times its best fit, moved by 10 mm. 0: not
    looked at."""
    min_kept: float = 0.5
    """A recording is refused when a smaller fraction of its timepoints is kept."""
    max_mean_fd_mm: float | None = None
    """A recording of larger mean framewise displacement, or of unknown, is refused. Null: not looked at."""
    min_tsnr: float | None = None
    """An image of smaller temporal signal-to-noise ratio is refused. Null: not looked at."""
    min_duration_s: float | None = None
    """A recording with less kept time is refused; one window is the least in any case."""

    def __post_init__(self) -> None:
        for name in ("min_parcel_coverage", "min_parcels", "max_outside_brain", "min_fit", "min_kept"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, found {getattr(self, name)}")
        for name in ("max_mean_fd_mm", "min_tsnr", "min_duration_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0 or null, found {value}")


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
    atlas: AtlasSettings | None = None
    """Needed, except with `contract`, whose atlas serves for parcel series."""
    clean: CleanSettings = field(default_factory=CleanSettings)
    target_tr_s: float | None = None
    """Seconds between timepoints of the data set. Null: the TR of the recordings; the longest, if they have several."""
    windows: WindowSettings = field(default_factory=WindowSettings)
    splits: SplitSettings = field(default_factory=SplitSettings)
    shards: ShardSettings = field(default_factory=ShardSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    contract: str | None = None
    """A checkpoint (or a data set) whose atlas, TR, filter, cleaning, windows and statistics are applied."""
    statistics: Literal["cohort", "contract"] | None = None
    """Whose median and IQR scale the series. Default: those of `contract` if one is given, else the cohort's."""
    add: bool = False
    """Add the recordings to the data set that `out` holds, which keeps its statistics, splits and bytes."""
    withdraw: str | None = None
    """Do nothing but remove the subjects that this file lists, one a line, from the data set."""
    checkpoints: tuple[str, ...] = ()
    """With `withdraw`: folders below which checkpoints are looked for that saw the subjects."""
    max_refused_fraction: float = 0.1
    """More refused recordings than this, and no data set is made."""
    truth: str | None = None
    """Folder with the truth of a simulated cohort, copied into the data set."""
    ray: RaySettings = field(default_factory=RaySettings)

    def __post_init__(self) -> None:
        if self.target_tr_s is not None and not self.target_tr_s > 0:
            raise ValueError(f"target_tr_s must be above 0, found {self.target_tr_s}")
        if not 0 <= self.max_refused_fraction <= 1:
            raise ValueError(f"max_refused_fraction must be from 0 to 1, found {self.max_refused_fraction}")
        if self.atlas is None and self.contract is None:
            raise ValueError("atlas must be given (or a contract, whose atlas serves for parcel series)")
        if self.statistics == "contract" and self.contract is None:
            raise ValueError("statistics: contract needs a contract")

    def data_tree(self) -> dict[str, Any]:
        """Return the settings that decide what the data set holds: not where it lies nor how the work is divided."""
        tree = to_tree(self)
        for name in ("out", "ray", "max_refused_fraction", "add", "withdraw", "checkpoints"):
            del tree[name]
        return tree

    def processing_tree(self) -> dict[str, Any]:
        """Return the settings that every recording of a data set shares, whichever cohort it came with."""
        tree = self.data_tree()
        return {name: tree[name] for name in ("clean", "windows", "splits", "shards", "checks")}

    def recording_hash(self) -> str:
        """Identify what decides one recording's staged series: other splits or shards reuse it.

        The atlas goes into the name of the staging folder by its own hash; the TR is compared row by row.
        """
        tree = self.data_tree()
        parts = {name: tree[name] for name in ("clean", "checks")} | {
            "window_len": self.windows.window_len,
            "orientation": self.source.orientation,
            "transforms": None if self.atlas is None else self.atlas.transforms,
        }
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
