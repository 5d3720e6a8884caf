"""Whether an image lies in the template space of the atlas: what it claims, and whether its signal agrees.

A raw scan in its own space would give numbers for every parcel, all wrong. So an image must claim a template space, and
its first volume must have its tissue inside the template's brain, in the atlas' parcels, and fit the atlas as it lies.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.atlas_image import AtlasImage, Grid
from data_prep.nifti_stream import NiftiHeader
from data_prep.settings import CheckSettings

# The brain of the MNI templates, with a margin of about 15 mm: x right, y anterior, z superior.
BRAIN_BOX_MM = np.array([[-90.0, 90.0], [-125.0, 95.0], [-90.0, 100.0]])
BRIGHT = 0.2  # of the 98th percentile of the positive voxels: tissue rather than air
LOOKED_AT = 2**21  # voxels of the first volume in which signal is looked for; of a finer grid, evenly spaced ones
XFORM_NAMES = {0: "unknown", 1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152", 5: "template"}
VOXEL_MM = (0.1, 100.0)
FARTHEST_MM = 10_000.0

WHOLE_BRAIN_MM = np.array([110.0, 140.0, 90.0])  # least extent of the labels of an atlas of the whole brain or cortex
LATTICE_MM, LATTICE_POINTS = 10.0, 64  # spacing of the voxels that are compared; the most along an axis
SHIFT_MM = 10.0
# Fit in place / best fit moved, in trials with six atlases: 0.99 to 1.43 for normalised images (stripped or not, cut to
# 40 % of the slices, with fields of bias of 4 : 1, with dropout), 0.77 to 0.87 for a raw scan, 0.85 to 0.92 for a head
# moved by 14 to 20 mm. Offsets below 10 mm and rotations alone do not show. Hence the default of `checks.min_fit`.
LEAST_FIT = 0.4  # below, the image has too little contrast to judge by; the raw scan fits with 0.59 to 0.68


def check_claimed_space(header: NiftiHeader, space: str) -> None:
    """Refuse an image that claims no template space, another one than MNI, or has no usable affine.

    Parameters
    ----------
    header : NiftiHeader
    space : str
        Template space that the file's name or the settings claim; "" if none.

    Raises
    ------
    DataError
    """
    codes = header.qform_code, header.sform_code
    found = f"qform {XFORM_NAMES.get(codes[0], codes[0])}, sform {XFORM_NAMES.get(codes[1], codes[1])}"
    if not _is_usable(header.affine):
        raise DataError(
            f"the image's affine is not usable ({found}): expected voxels of {VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} mm "
            f"with three different axes, within {FARTHEST_MM:g} mm of the origin, found {header.affine[:3].tolist()}"
        )
    if space and not space.startswith("MNI"):
        raise DataError(f"native space: expected an image in an MNI template space, its name says space-{space}")
    if max(codes) == 0:
        raise DataError(f"the image has no affine ({found}): its place in a template space is unknown")
    if not space and max(codes) < 2:
        raise DataError(
            f"native space: no template space is claimed for the image, its coordinates are the scanner's ({found}). "
            "Normalise it to the atlas' template first; if it is, set source.space"
        )


def _is_usable(affine: NDArray[np.float64]) -> bool:
    if not np.isfinite(affine).all() or np.abs(affine[:3, 3]).max() > FARTHEST_MM:
        return False
    size_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)) if np.abs(affine).max() <= FARTHEST_MM else np.zeros(3)
    if size_mm.min() < VOXEL_MM[0] or size_mm.max() > VOXEL_MM[1]:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / size_mm)) > 0.1)  # 1 for axes at right angles


def check_overlap(
    volume: NDArray[Any], header: NiftiHeader, atlas: AtlasImage, grid: Grid, checks: CheckSettings
) -> None:
    """Refuse an image whose signal does not lie where the atlas and the template's brain are.

    Parameters
    ----------
    volume : ndarray, shape (X * Y * Z,)
        The first volume as stored, first axis fastest.
    grid : Grid
        The atlas on the image's voxels.

    Raises
    ------
    DataError
    """
    step = math.ceil(len(volume) / LOOKED_AT)
    magnitude = _magnitude(volume[::step], header)
    positive = magnitude[magnitude > 0]
    if positive.size == 0:
        raise DataError("the first volume has no signal at all")
    bright = step * np.flatnonzero(magnitude > BRIGHT * np.percentile(positive, 98))
    ijk = np.stack(np.unravel_index(bright, header.shape, order="F"))
    mm = header.affine[:3, :3] @ ijk + header.affine[:3, 3:]
    inside = ((mm >= BRAIN_BOX_MM[:, :1]) & (mm <= BRAIN_BOX_MM[:, 1:])).all(axis=0)
    outside = 1.0 - float(inside.mean())
    has_signal = _magnitude(volume[grid.voxels], header) > 0
    seen = np.bincount(grid.columns, weights=has_signal, minlength=len(grid.in_view)) > 0
    if outside > checks.max_outside_brain:
        raise DataError(
            f"not in a template space: {outside:.0%} of the bright voxels lie outside the template's brain "
            f"(at most {checks.max_outside_brain:.0%}), and {seen.sum()} of {len(seen)} parcels have signal"
        )
    if seen.mean() < checks.min_parcels:
        raise DataError(
            f"not in the template space of the atlas, or a partial field of view: {seen.sum()} of {len(seen)} parcels "
            f"have signal, expected at least {checks.min_parcels:.0%}"
        )
    _check_fit(volume, header, atlas, checks.min_fit)


def _check_fit(volume: NDArray[Any], header: NiftiHeader, atlas: AtlasImage, min_fit: float) -> None:
    """Refuse an image whose brain would fit the atlas much better if it were moved.

    A head in scanner coordinates lies more or less where the template's brain does, only not quite. Tissue and labels
    are therefore compared (correlation over a coarse lattice of voxels) in place and moved by `SHIFT_MM` along each
    axis. It says nothing about an atlas of a part of the brain, nor about an image without contrast. The MNI templates
    differ by a few mm, which does not show, so the labels are taken in the atlas' own space.
    """
    if atlas.atlas.space and not atlas.atlas.space.startswith("MNI"):
        return  # brought to the image by a transform
    labelled = np.pad(atlas.columns >= 0, 1)  # a position outside is moved to the unlabelled border
    corners = np.argwhere(labelled)
    extent_mm = (corners.max(axis=0) - corners.min(axis=0)) @ np.abs(atlas.affine[:3, :3]).T
    if (extent_mm < WHOLE_BRAIN_MM).any():
        return
    size_mm = np.sqrt((header.affine[:3, :3] ** 2).sum(axis=0))
    axes = []
    for length, step in zip(header.shape, np.maximum(np.round(LATTICE_MM / size_mm), 1).astype(int)):
        axes.append(np.arange(length % step // 2, length, max(step, math.ceil(length / LATTICE_POINTS))))
    ijk = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    magnitude = _magnitude(volume[np.ravel_multi_index(tuple(ijk.T), header.shape, order="F")], header)
    if not magnitude.any():
        return
    bright = magnitude > BRIGHT * np.percentile(magnitude[magnitude > 0], 98)
    to_atlas = np.linalg.inv(atlas.affine)
    position = (ijk @ header.affine[:3, :3].T + header.affine[:3, 3]) @ to_atlas[:3, :3].T + to_atlas[:3, 3] + 1.5
    fit = {}
    for moved in itertools.product((-SHIFT_MM, 0.0, SHIFT_MM), repeat=3):
        index = (position + to_atlas[:3, :3] @ np.array(moved)).astype(np.int64)
        index = np.clip(index, 0, np.array(labelled.shape) - 1)
        fit[moved] = _correlation(bright, labelled[index[:, 0], index[:, 1], index[:, 2]])
    here, best = fit[0.0, 0.0, 0.0], max(fit, key=lambda moved: fit[moved])
    if fit[best] > LEAST_FIT and here < min_fit * fit[best]:
        raise DataError(
            f"not in a template space, whatever its header or name claims: the brain fits the atlas {fit[best]:.2f} "
            f"(correlation) when moved by {best} mm, and {here:.2f} where it is. Normalise it to the atlas' template; "
            "if it is, lower checks.min_fit"
        )


def _correlation(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    p, q, both = one.mean(), other.mean(), (one & other).mean()
    spread = p * (1 - p) * q * (1 - q)
    return float((both - p * q) / np.sqrt(spread)) if spread > 0 else 0.0


def _magnitude(stored: NDArray[Any], header: NiftiHeader) -> NDArray[np.float32]:
    """Return the absolute values that stored ones stand for; 0 where they are not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.abs(stored.astype(np.float64) * header.slope + header.inter).astype(np.float32)
    values[~np.isfinite(values)] = 0.0
    return values
