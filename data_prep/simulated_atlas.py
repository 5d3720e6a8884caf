"""An atlas for simulated cohorts: parcels of equal size in the MNI template, with planted networks that interleave.

Parcels are cut from the grey matter of the template that nilearn ships (ICBM152 2009a nonlinear symmetric, TemplateFlow
name ``MNI152NLin2009aSym``; Fonov et al., NeuroImage 54, 2011). The right hemisphere mirrors the left. Networks are
spread so that neighbours, and left-right partners, say little about each other: what a classifier finds beyond chance
must come from the series and not from positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.config import Section
from brainlm.errors import ConfigError

SPACE = "MNI152NLin2009aSym"
NETWORKS = (
    "Visual",
    "Somatomotor",
    "DorsalAttention",
    "VentralAttention",
    "Limbic",
    "Frontoparietal",
    "Default",
)
# Labels have gaps and exceed 255, as in real atlases: a reader that assumes 1 ... P or one byte fails here.
LEFT_LABEL, RIGHT_LABEL = 1000, 2000
# Parcels that are close together share out the networks evenly in groups of this many.
GROUP_SIZE = 2 * len(NETWORKS)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AtlasConfig(Section):
    """How the simulated brain is divided."""

    num_parcels: int = 424
    """Even: left and right partners."""
    resolution_mm: float = 4.0
    """Voxel edge of the atlas and of the images."""
    grey_matter_threshold: float = 0.3
    """Voxels with at least this grey matter probability belong to parcels."""
    mirror_share: float = 0.2
    """Share of parcels that keep their left partner's network for certain; the others agree by chance only."""

    def __post_init__(self) -> None:
        if self.num_parcels < GROUP_SIZE * 2 or self.num_parcels % 2 or self.num_parcels // 2 >= LEFT_LABEL:
            raise ConfigError(
                f"num_parcels must be even, at least {2 * GROUP_SIZE} and below {2 * LEFT_LABEL}, "
                f"found {self.num_parcels}"
            )
        if not 2 <= self.resolution_mm <= 12:
            raise ConfigError(f"resolution_mm must lie in 2 ... 12, found {self.resolution_mm}")
        if not 0 <= self.mirror_share <= 1 or not 0 < self.grey_matter_threshold < 1:
            raise ConfigError("mirror_share must lie in 0 ... 1 and grey_matter_threshold between 0 and 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedAtlas:
    """Parcels and tissue on the voxel grid of the images; parcels are in order of their label, left ones first.

    Parameters
    ----------
    labels : ndarray, shape (X, Y, Z), int16
        0 = no parcel.
    affine : ndarray, shape (4, 4)
        Voxel indices to mm, RAS+, symmetric about x = 0.
    brain : ndarray, shape (X, Y, Z), bool
    tissue : ndarray, shape (X, Y, Z), int8
        0 = outside, 1 = parcels, 2 = white matter, 3 = cerebrospinal fluid, 4 = other brain.
    intensity : ndarray, shape (X, Y, Z)
        T1 template, 0 ... 1: the source of anatomical contrast in the images.
    label_values : ndarray, shape (P,)
    names, hemispheres : tuple of str
    coords_mm : ndarray, shape (P, 3)
        Centre of mass.
    network_ids : ndarray, shape (P,)
        Position in ``NETWORKS``.
    """

    labels: NDArray[np.int16]
    affine: FloatArray
    brain: NDArray[np.bool_]
    tissue: NDArray[np.int8]
    intensity: FloatArray
    label_values: NDArray[np.int64]
    names: tuple[str, ...]
    hemispheres: tuple[str, ...]
    coords_mm: FloatArray
    network_ids: NDArray[np.int64]

    @property
    def num_parcels(self) -> int:
        """Number of parcels, ``P``."""
        return len(self.names)

    @property
    def networks(self) -> tuple[str, ...]:
        """Name of the planted network of each parcel."""
        return tuple(NETWORKS[index] for index in self.network_ids)

    @property
    def parcel_of_voxel(self) -> NDArray[np.int64]:
        """Position of the parcel of each brain voxel, -1 for none, shape (V,), in the order of ``labels[brain]``."""
        labels = self.labels[self.brain].astype(np.int64)
        return np.where(labels > 0, np.searchsorted(self.label_values, labels), -1)

    def table(self) -> str:
        """Return the atlas table as the text of a BIDS ``_dseg.tsv``."""
        lines = ["index\tname\themisphere\tx_mm\ty_mm\tz_mm\tnetwork"]
        rows = zip(self.label_values, self.names, self.hemispheres, self.coords_mm, self.networks)
        for value, name, hemisphere, (x, y, z), network in rows:
            lines.append(f"{value}\t{name}\t{hemisphere}\t{x:.3f}\t{y:.3f}\t{z:.3f}\t{network}")
        return "\n".join(lines) + "\n"


@lru_cache(maxsize=4)
def make_atlas(config: AtlasConfig, seed: int) -> SimulatedAtlas:
    """Cut the template into parcels and plant networks in them.

    Parameters
    ----------
    config : AtlasConfig
    seed : int
        Only the networks depend on it.

    Raises
    ------
    ConfigError
        If the grid is too coarse for so many parcels.
    """
    grey, white, intensity, brain, affine = _template_on_grid(config.resolution_mm)
    is_parcel = brain & (grey >= config.grey_matter_threshold)
    num_left, half = config.num_parcels // 2, is_parcel.shape[0] // 2
    left_voxels = np.argwhere(is_parcel[:half])
    if len(left_voxels) < 2 * num_left:
        raise ConfigError(
            f"{2 * len(left_voxels)} grey matter voxels at {config.resolution_mm:g} mm are too few for "
            f"{config.num_parcels} parcels: lower atlas.num_parcels or atlas.resolution_mm"
        )
    parcels = _equal_cells(left_voxels.astype(np.float64), num_left)
    labels = np.zeros(is_parcel.shape, dtype=np.int16)
    labels[tuple(left_voxels.T)] = LEFT_LABEL + 1 + parcels
    mirrored = labels[:half][::-1]
    labels[-half:] = np.where(mirrored > 0, mirrored + (RIGHT_LABEL - LEFT_LABEL), 0)

    tissue = np.where(brain, 4, 0).astype(np.int8)
    tissue[brain & (white >= 0.7)] = 2
    tissue[brain & (white < 0.3) & (grey < 0.3)] = 3
    tissue[labels > 0] = 1
    values = np.concatenate([np.arange(1, num_left + 1) + base for base in (LEFT_LABEL, RIGHT_LABEL)])
    voxels = np.argwhere(labels > 0)
    owner = np.searchsorted(values, labels[tuple(voxels.T)])
    sums = np.stack([np.bincount(owner, voxels[:, axis]) for axis in range(3)], axis=1)
    centres = sums / np.bincount(owner)[:, None]
    return SimulatedAtlas(
        labels=labels,
        affine=affine,
        brain=brain,
        tissue=tissue,
        intensity=intensity,
        label_values=values,
        names=tuple(f"{side}_{index + 1:03d}" for side in "LR" for index in range(num_left)),
        hemispheres=("L",) * num_left + ("R",) * num_left,
        coords_mm=centres @ affine[:3, :3].T + affine[:3, 3],
        network_ids=_interleaved_networks(num_left, config.mirror_share, np.random.default_rng([seed, 424])),
    )


def _template_on_grid(
    resolution_mm: float,
) -> tuple[FloatArray, FloatArray, FloatArray, NDArray[np.bool_], FloatArray]:
    """Average tissue maps into a grid that is symmetric about x = 0, and make them symmetric; crop to the brain.

    Returns grey matter, white matter and T1 intensity (0 ... 1), the brain mask, and the affine of their grid.
    """
    from nilearn import datasets
    from scipy.ndimage import affine_transform, uniform_filter

    loaders: list[Callable[..., Any]] = [
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
        datasets.load_mni152_template,
        datasets.load_mni152_brain_mask,
    ]
    first = loaders[0](resolution=1)
    low, high = first.affine[:3, 3], first.affine[:3, 3] + np.array(first.shape) - 1
    half = int(np.ceil(max(-low[0], high[0]) / resolution_mm))
    shape = (2 * half, *(np.ceil((high - low)[1:] / resolution_mm).astype(int) + 1))
    affine = np.diag([resolution_mm] * 3 + [1.0])
    affine[:3, 3] = (0.5 - half) * resolution_mm, low[1], low[2]
    maps = []
    for load in loaders:
        source = load(resolution=1)
        values = uniform_filter(np.asarray(source.dataobj, dtype=np.float32), round(resolution_mm))
        values = affine_transform(values, np.linalg.inv(source.affine) @ affine, output_shape=shape, order=1)
        # Rounded: the last bits of an interpolation must not decide on which side of a threshold a voxel falls.
        maps.append(np.round((values + values[::-1]).astype(np.float64) / 2, 4))
    grey, white, intensity, mask = maps
    brain = mask >= 0.5
    crop = []
    for axis in range(3):
        occupied = np.flatnonzero(brain.any(axis=tuple(other for other in range(3) if other != axis)))
        crop.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    affine[:3, 3] += resolution_mm * np.array([span.start for span in crop])
    box = tuple(crop)
    return grey[box], white[box], np.clip(intensity[box], 0, 1), brain[box], affine


def _equal_cells(points: FloatArray, num_cells: int) -> NDArray[np.int64]:
    """Divide points into compact cells whose sizes differ by at most a few, by repeated cuts across the longest axis.

    Cells that are close in space have close numbers. No randomness, so an atlas depends on its settings alone.
    """
    cells = np.zeros(len(points), dtype=np.int64)
    pending = [(np.arange(len(points)), 0, num_cells)]
    while pending:
        members, first, count = pending.pop()
        if count == 1:
            cells[members] = first
            continue
        centred = points[members] - points[members].mean(axis=0)
        axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        axis *= np.sign(axis[np.abs(axis).argmax()])
        order = np.argsort(np.round(centred @ axis, 6), kind="stable")
        lower = count // 2
        cut = round(len(members) * lower / count)
        pending.append((members[order[:cut]], first, lower))
        pending.append((members[order[cut:]], first + lower, count - lower))
    return cells


def _interleaved_networks(num_left: int, mirror_share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Assign networks: in each group of neighbouring parcels every network has about the same number of parcels."""
    left, right = np.empty(num_left, dtype=np.int64), np.empty(num_left, dtype=np.int64)
    for start in range(0, num_left, GROUP_SIZE):
        group = np.arange(start, min(start + GROUP_SIZE, num_left))
        deck = np.concatenate([rng.permutation(len(NETWORKS)) for _ in range(GROUP_SIZE // len(NETWORKS))])
        left[group] = rng.permutation(deck[: len(group)])
        free = group[rng.random(len(group)) >= mirror_share]
        right[group] = left[group]
        right[free] = left[rng.permutation(free)]
    return np.concatenate([left, right])
