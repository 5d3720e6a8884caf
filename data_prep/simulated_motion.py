"""Head motion: six parameters, their trace in the images, and the confounds table.

A small shift changes a voxel by the shift times the local gradient of the image, so the artefact is linear in the
motion parameters, largest at the edges of the brain, and regressing the six parameters removes it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.config import Section
from brainlm.errors import ConfigError
from data_prep.simulated_atlas import SimulatedAtlas

FloatArray = NDArray[np.float64]
MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
# Rotations become mm on a sphere of this radius (Power et al., NeuroImage 59, 2012).
HEAD_RADIUS_MM = 50.0
# Image gradients are held below this share of the baseline per mm: at the rim of the mask they would be unbounded.
STEEPEST_GRADIENT = 0.15


@dataclass(frozen=True, kw_only=True)
class MotionConfig(Section):
    """How much heads move."""

    typical_jitter_mm: float = 0.03
    """Median over subjects of the standard deviation of small movements."""
    subject_spread: float = 0.4
    """Standard deviation over subjects of the logarithm of all movement."""
    drift_mm: float = 0.3
    """Slow drift over a recording, in units of a typical subject."""
    spikes_per_minute: float = 0.5
    """Sudden movements."""
    spike_mm: float = 0.5
    """Typical size of a sudden movement."""
    residual: float = 0.8
    """Share of the artefact that realignment leaves in the images."""

    def __post_init__(self) -> None:
        if min(self.typical_jitter_mm, self.drift_mm, self.spikes_per_minute, self.spike_mm, self.residual) < 0:
            raise ConfigError("motion settings must not be negative")


def draw_motion(
    config: MotionConfig, num_timepoints: int, tr_s: float, level: float, rng: np.random.Generator
) -> FloatArray:
    """Draw motion parameters, shape (T, 6), in mm and radians, zero at the first timepoint.

    Parameters
    ----------
    level : float
        How much this subject moves; 1 is typical.
    """
    jitter = rng.standard_normal((num_timepoints, 6)) * config.typical_jitter_mm
    time = np.linspace(0, 1, num_timepoints)[:, None]
    slope, bend = rng.standard_normal((2, 6)) * config.drift_mm / 2
    motion = jitter + slope * time + bend * time**2
    starts = np.flatnonzero(rng.random(num_timepoints) < config.spikes_per_minute * tr_s / 60)
    for start in starts:
        size = rng.standard_normal(6) * config.spike_mm
        motion[start : start + int(rng.integers(1, 3))] += size
    motion[:, 3:] /= HEAD_RADIUS_MM
    motion *= level
    return np.asarray(motion - motion[0])


def framewise_displacement(motion: FloatArray) -> FloatArray:
    """Return the framewise displacement, mm, shape (T,), NaN at the first timepoint (Power et al., 2012)."""
    change = np.abs(np.diff(motion, axis=0))
    displacement = change[:, :3].sum(axis=1) + HEAD_RADIUS_MM * change[:, 3:].sum(axis=1)
    return np.concatenate([[np.nan], displacement])


def motion_weights(atlas: SimulatedAtlas, baseline: FloatArray, residual: float) -> FloatArray:
    """Return the change of each brain voxel per unit of each motion parameter, shape (V, 6).

    Parameters
    ----------
    baseline : ndarray, shape (V,)
        Mean image at the brain voxels.
    residual : float
        Share of the artefact that realignment leaves.
    """
    image = np.zeros(atlas.brain.shape)
    image[atlas.brain] = baseline
    spacing = np.abs(np.diag(atlas.affine)[:3])
    gradient = np.stack([step[atlas.brain] for step in np.gradient(image, *spacing)], axis=1)
    steepest = STEEPEST_GRADIENT * baseline[:, None]
    gradient = np.clip(gradient, -steepest, steepest)
    position = np.argwhere(atlas.brain) @ atlas.affine[:3, :3].T + atlas.affine[:3, 3]
    return -residual * np.concatenate([gradient, np.cross(position, gradient)], axis=1)


def confounds_table(motion: FloatArray, tissue_series: dict[str, FloatArray]) -> str:
    """Return the text of a ``_desc-confounds_timeseries.tsv`` with fMRIPrep's column names."""
    columns = {**tissue_series, "framewise_displacement": framewise_displacement(motion)}
    columns |= dict(zip(MOTION_COLUMNS, motion.T))
    lines = ["\t".join(columns)]
    for row in zip(*columns.values()):
        lines.append("\t".join("n/a" if np.isnan(value) else f"{value:.9g}" for value in row))
    return "\n".join(lines) + "\n"
