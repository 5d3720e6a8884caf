"""Who is in a simulated cohort, which effects are planted in them, and the series of their parcels.

Everything is a pure function of the settings: each draw has a random stream of its own, named after what it is for, so
recordings can be made in any order and by any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.config import Section
from brainlm.errors import ConfigError
from brainlm.state_space import SimulatedTruth
from data_prep.simulated_atlas import SPACE, AtlasConfig, SimulatedAtlas, make_atlas
from data_prep.simulated_dynamics import DynamicsConfig
from data_prep.simulated_motion import MotionConfig, draw_motion, framewise_displacement, motion_weights
from data_prep.simulated_truth import EffectsConfig, plant_truth

FloatArray = NDArray[np.float64]
DISPLACEMENT_LIMIT_MM = 0.5
LARGEST_SEVERITY = 80


@dataclass(frozen=True, kw_only=True)
class CohortConfig(Section):
    """Who takes part."""

    num_subjects: int = 40
    """Each has one resting recording."""
    num_task_subjects: int = 8
    """The first of them also have a task recording."""
    num_sites: int = 2
    """Scanners, each with a gain and an offset."""
    family_share: float = 0.2
    """Share of subjects that come in pairs of siblings."""
    youngest_years: float = 20.0
    """Ages are spread evenly from here."""
    oldest_years: float = 80.0
    """Ages are spread evenly up to here."""

    def __post_init__(self) -> None:
        if self.num_subjects < 2 or not 0 <= self.num_task_subjects <= self.num_subjects or self.num_sites < 1:
            raise ConfigError("cohort needs 2 subjects, at most as many with a task, and a site")
        if not 0 <= self.family_share <= 1 or not 0 < self.youngest_years < self.oldest_years:
            raise ConfigError("cohort.family_share must lie in 0 ... 1 and youngest_years below oldest_years")


@dataclass(frozen=True, kw_only=True)
class AcquisitionConfig(Section):
    """What the scanner does."""

    tr_s: float = 2.0
    """Repetition time."""
    fewest_timepoints: int = 220
    """Shortest recording."""
    most_timepoints: int = 260
    """Longest recording."""
    signal_percent: float = 1.0
    """Standard deviation of a typical parcel, in percent of its baseline."""
    voxel_noise_percent: float = 0.4
    """Standard deviation of each voxel's own white noise, in percent of a baseline of 1000."""
    site_gain_spread: float = 0.15
    """Sites' gains lie evenly within 1 +- this."""
    site_offset: float = 40.0
    """Sites' offsets lie evenly within +- this, in image units."""
    block_s: float = 20.0
    """Length of a task block and of the rest before it."""
    data_type: str = "int16"
    """int16 (with a scale factor) or float32."""
    int16_step: float = 2.0
    """Resolution of int16 images, in image units."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.tr_s <= 10 or not 20 <= self.fewest_timepoints <= self.most_timepoints:
            raise ConfigError("acquisition needs 0.1 <= tr_s <= 10 and 20 <= fewest_timepoints <= most_timepoints")
        if self.signal_percent <= 0 or self.voxel_noise_percent <= 0 or not 0.05 <= self.int16_step <= 10:
            raise ConfigError(
                "acquisition.signal_percent and voxel_noise_percent must be above 0, int16_step 0.05 ... 10"
            )
        if self.data_type not in ("int16", "float32"):
            raise ConfigError(f"acquisition.data_type must be int16 or float32, found {self.data_type!r}")
        if not 0 <= self.site_gain_spread < 0.9 or not 0 <= self.site_offset <= 400 or self.block_s < self.tr_s:
            raise ConfigError("acquisition: site_gain_spread 0 ... 0.9, site_offset 0 ... 400, block_s at least tr_s")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig(Section):
    """A simulated cohort: where it goes and what it is."""

    out: str = "data/simulated"
    """Folder to write."""
    seed: int = 0
    """Everything random follows from it."""
    num_workers: int = 0
    """Processes that write recordings; 0 = one per processor."""
    atlas: AtlasConfig = field(default_factory=AtlasConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    acquisition: AcquisitionConfig = field(default_factory=AcquisitionConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    effects: EffectsConfig = field(default_factory=EffectsConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)

    def __post_init__(self) -> None:
        if self.seed < 0 or self.num_workers < 0:
            raise ConfigError("seed and num_workers must not be negative")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One row of ``participants.tsv``, and what only the simulation knows: gain, offset, amount of movement."""

    participant_id: str
    age: float
    sex: str
    site: str
    severity: int
    family_id: str
    site_gain: float
    site_offset: float
    movement: float

    def row(self) -> dict[str, Any]:
        """Return the columns of ``participants.tsv``."""
        names = ("participant_id", "age", "sex", "site", "severity", "family_id")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class PlannedRecording:
    """One run that will be made; ``task`` is ``rest`` or ``checkerboard``."""

    recording_id: str
    subject: Subject
    task: str
    num_timepoints: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CohortPlan:
    """All that is decided before a series is drawn; ``baseline_V`` and ``motion_weights_V6`` are per brain voxel."""

    config: SimulateConfig
    atlas: SimulatedAtlas
    subjects: tuple[Subject, ...]
    recordings: tuple[PlannedRecording, ...]
    truth: SimulatedTruth
    baseline_V: FloatArray
    motion_weights_V6: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedSeries:
    """Parcel series of one run: ``bold`` (T, P) in image units; ``keep_mask`` (T,) is False at sudden movements."""

    recording_id: str
    subject: dict[str, Any]
    task: str
    tr_s: float
    bold: NDArray[np.float32]
    keep_mask: NDArray[np.bool_]
    motion: FloatArray


def random_stream(seed: int, *names: object) -> np.random.Generator:
    """Return the generator for one purpose; different names give independent streams."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def plan_cohort(config: SimulateConfig, subjects: Sequence[Subject] | None = None) -> CohortPlan:
    """Decide who is recorded, for how long, and from which systems.

    Parameters
    ----------
    subjects : sequence of Subject, optional
        In place of those that are drawn: the same ids with other ages, say, of whom all else stays as it was.
    """
    atlas = make_atlas(config.atlas, config.seed)
    subjects = draw_subjects(config) if subjects is None else tuple(subjects)
    recordings = []
    for index, subject in enumerate(subjects):
        for task in ("rest", "checkerboard")[: 2 if index < config.cohort.num_task_subjects else 1]:
            recording_id = f"{subject.participant_id}_task-{task}"
            bounds = config.acquisition.fewest_timepoints, config.acquisition.most_timepoints
            length = int(random_stream(config.seed, "length", recording_id).integers(*bounds, endpoint=True))
            recordings.append(
                PlannedRecording(recording_id=recording_id, subject=subject, task=task, num_timepoints=length)
            )
    baseline = 800 + 400 * atlas.intensity[atlas.brain]
    weights = motion_weights(atlas, baseline, config.motion.residual)
    parcels = atlas.parcel_of_voxel
    counts = np.bincount(parcels[parcels >= 0])
    truth = plant_truth(
        atlas=atlas,
        dynamics=config.dynamics,
        effects=config.effects,
        tr_s=config.acquisition.tr_s,
        signal_percent=config.acquisition.signal_percent,
        block_s=config.acquisition.block_s,
        baseline=np.bincount(parcels[parcels >= 0], baseline[parcels >= 0]) / counts,
        voxel_noise_var=(voxel_noise_sd(config) ** 2 + rounding_var(config)) / counts,
        subjects=[{**subject.row(), "gain": subject.site_gain, "offset": subject.site_offset} for subject in subjects],
        recordings=[
            (item.recording_id, subjects.index(item.subject), item.task, item.num_timepoints) for item in recordings
        ],
        stream=lambda *names: random_stream(config.seed, *names),
        age_range=(config.cohort.youngest_years, config.cohort.oldest_years),
        largest_severity=LARGEST_SEVERITY,
    )
    truth.facts["seed"], truth.facts["space"] = config.seed, SPACE
    return CohortPlan(
        config=config,
        atlas=atlas,
        subjects=subjects,
        recordings=tuple(recordings),
        truth=truth,
        baseline_V=baseline,
        motion_weights_V6=weights,
    )


def voxel_noise_sd(config: SimulateConfig) -> float:
    """Return the standard deviation of each voxel's own noise, image units, the same at every site."""
    return 10.0 * config.acquisition.voxel_noise_percent


def rounding_var(config: SimulateConfig) -> float:
    """Return the variance that rounding to int16 adds to a voxel."""
    return config.acquisition.int16_step**2 / 12 if config.acquisition.data_type == "int16" else 0.0


def draw_subjects(config: SimulateConfig) -> tuple[Subject, ...]:
    """Draw the subjects: ages and severities spread evenly over their ranges and independent of each other."""
    cohort, acquisition = config.cohort, config.acquisition
    rng = random_stream(config.seed, "subjects")
    num = cohort.num_subjects
    age_rank, severity_rank = (rng.permutation(num) + rng.random(num) for _ in range(2))
    while num > 5 and abs(np.corrcoef(age_rank, severity_rank)[0, 1]) > 0.05:
        rng.shuffle(severity_rank)
    ages = cohort.youngest_years + (cohort.oldest_years - cohort.youngest_years) * age_rank / num
    # Many subjects with few complaints and few with many, as in questionnaires.
    severities = LARGEST_SEVERITY * (severity_rank / num) ** 1.5
    num_paired = 2 * int(cohort.family_share * num / 2)
    families = np.arange(num)
    families[:num_paired] -= families[:num_paired] % 2
    families = families[rng.permutation(num)]
    # A family goes to one site.
    sites = rng.permutation(num) % cohort.num_sites
    spread = np.linspace(-1, 1, cohort.num_sites) if cohort.num_sites > 1 else np.zeros(1)
    movement = np.exp(config.motion.subject_spread * rng.standard_normal(num))
    sexes = rng.permutation(np.arange(num) % 2)
    width = max(3, len(str(num)))
    return tuple(
        Subject(
            participant_id=f"sub-{index + 1:0{width}d}",
            age=round(float(ages[index]), 1),
            sex="FM"[sexes[index]],
            site=f"site{sites[families[index]] + 1}",
            severity=round(float(severities[index])),
            family_id=f"fam-{families[index] + 1:0{width}d}",
            site_gain=1 + acquisition.site_gain_spread * float(spread[sites[families[index]]]),
            site_offset=acquisition.site_offset * float(spread[sites[families[index]]]),
            movement=float(movement[index]),
        )
        for index in range(num)
    )


def recording_motion(plan: CohortPlan, recording: PlannedRecording) -> FloatArray:
    """Draw the motion parameters of one run, shape (T, 6), mm and radians."""
    rng = random_stream(plan.config.seed, "motion", recording.recording_id)
    tr_s = plan.config.acquisition.tr_s
    return draw_motion(plan.config.motion, recording.num_timepoints, tr_s, recording.subject.movement, rng)


def simulate_series(
    config: SimulateConfig, *, with_motion: bool = False
) -> tuple[list[SimulatedSeries], SimulatedTruth]:
    """Simulate the cohort's parcel series in memory, without images.

    Parameters
    ----------
    config : SimulateConfig
    with_motion : bool
        Add the artefacts that the images would have; without them ``bold - baseline`` is an exact draw from the system.

    Returns
    -------
    series : list of SimulatedSeries
        The states are those of the images of the same settings; voxel noise is drawn as its parcel mean.
    truth : SimulatedTruth
    """
    plan = plan_cohort(config)
    parcels = plan.atlas.parcel_of_voxel
    inside = parcels >= 0
    sums = np.stack([np.bincount(parcels[inside], column[inside]) for column in plan.motion_weights_V6.T], axis=1)
    weights = sums / np.bincount(parcels[inside])[:, None]
    found = []
    for recording in plan.recordings:
        system, inputs = plan.truth.system(recording.recording_id)
        rng = random_stream(config.seed, "series", recording.recording_id)
        bold = system.simulate(recording.num_timepoints, rng, inputs) + plan.truth.baseline(recording.recording_id)
        motion = recording_motion(plan, recording)
        if with_motion:
            bold += recording.subject.site_gain * (motion - motion.mean(axis=0)) @ weights.T
        found.append(
            SimulatedSeries(
                recording_id=recording.recording_id,
                subject=recording.subject.row(),
                task=recording.task,
                tr_s=config.acquisition.tr_s,
                bold=bold.astype(np.float32),
                keep_mask=~(framewise_displacement(motion) > DISPLACEMENT_LIMIT_MM),
                motion=motion,
            )
        )
    return found, plan.truth
