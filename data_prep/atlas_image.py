"""Read a label image as a `brainlm.atlas.Atlas`, and put its labels on the grid of another image.

Labels may be stored as floats, have gaps, and exceed 255 (nilearn had a bug with each). A parcel's column is the rank
of its label; names, networks and hemispheres come from a table by label, never by position. Atlases on CIFTI
grayordinates have no grid (`data_prep.cifti_atlas`); an atlas without any image serves parcel series alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from brainlm.atlas import Atlas
from brainlm.errors import DataError
from data_prep.atlas_registry import AtlasRecord, fetch_atlas, find_record
from data_prep.cifti_atlas import (
    CiftiLabels,
    Grayordinates,
    centres_and_sides,
    distances,
    hash_of,
    make_grayordinates,
    read_cifti_labels,
)
from data_prep.label_image import open_labels, read_label_volume
from data_prep.label_table import LabelTable, check_places, nearest_mm, networks_in_names, read_label_table
from data_prep.local_input import local_input
from data_prep.settings import AtlasSettings
from data_prep.template_transform import PointTransform, TransformFile, find_transform, inverse_points

MAX_GRIDS = 4  # resampled label images kept: one cohort has few grids
MAX_LOST = 0.02  # of the atlas' voxels, where a transform cannot be inverted; they count as out of view
VOXELS_AT_ONCE = 2**17  # of an image, while labels are resampled: bounds memory whatever the shape
MIN_SAMPLED = 1024  # voxels
MIDLINE_MM = 1.0  # a parcel whose centre is this close to the midline is in neither hemisphere
GRID_DECIMALS = 4  # of a voxel: rounding of affines must not move a label, whatever the orientation


# Kept by the process, not by the atlas: every task of a worker unpacks its own copy of the atlas.
_GRIDS: dict[str, Grid] = {}


@dataclass(frozen=True)
class Grid:
    """An atlas on the voxels of an image, in the order in which the voxels are stored.

    Attributes
    ----------
    voxels : ndarray, shape (V,)
        Position in the flat volume (first axis fastest) of each labelled voxel.
    columns : ndarray, shape (V,)
        Parcel column of each labelled voxel.
    num_voxels : ndarray, shape (P,)
        Labelled voxels of each parcel on this grid.
    in_view : ndarray, shape (P,)
        Fraction of each parcel's voxels, on the atlas' own grid, that lie inside the image's field of view.
    sampled : ndarray
        Positions in `voxels` of about every sixteenth, for statistics that need no more (all, if they are few). They
        are chosen by a hash of the atlas voxel, so the choice does not depend on how the image is stored.
    """

    voxels: NDArray[np.int64]
    columns: NDArray[np.int32]
    num_voxels: NDArray[np.int64]
    in_view: NDArray[np.float64]
    sampled: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AtlasImage:
    """An atlas with its label image.

    Attributes
    ----------
    atlas : Atlas
    columns : ndarray, shape (X, Y, Z), int32
        Parcel column of each voxel, -1 outside of all parcels. Of size 0 where the atlas has no volume.
    affine : ndarray, shape (4, 4)
    warnings : list of str
        What a reader should know about image and table.
    grayordinates : Grayordinates or None
        Where the atlas is a CIFTI label file.
    transforms : dict of str to TransformFile
        Template space of images -> how their points are found in the atlas' space.
    """

    atlas: Atlas
    columns: NDArray[np.int32]
    affine: NDArray[np.float64]
    warnings: list[str] = field(default_factory=list)
    grayordinates: Grayordinates | None = None
    transforms: dict[str, TransformFile] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Labels travel to workers compressed: some 100 kB for an atlas of 2 mm."""
        packed = zlib.compress(self.columns.astype(np.int32).tobytes(), 1)
        return self.__dict__ | {"columns": (packed, self.columns.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed, shape = state["columns"]
        columns = np.frombuffer(zlib.decompress(packed), dtype=np.int32).reshape(shape)
        self.__dict__.update(state | {"columns": columns})

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which voxels of an image go into which column: image, parcels, transforms."""
        moved = sorted((space, file.sha256) for space, file in self.transforms.items())
        parts = [self.atlas.sha256, self.atlas.labels.tolist(), moved]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def has_volume(self) -> bool:
        """Whether volume images can be parcellated."""
        return self.columns.size > 0

    def columns_of(self, axis: Any) -> NDArray[np.int64]:
        """Return the parcel column of each grayordinate of a CIFTI series (`Grayordinates.columns_of`).

        Raises
        ------
        DataError
            If the atlas has no grayordinates, or those of another mesh or grid.
        """
        if self.grayordinates is None:
            raise DataError(
                f"the recording is a dense CIFTI series, the atlas {self.atlas.name} "
                + ("a volume image" if self.has_volume else "has no image")
                + ": give atlas.image a CIFTI label file (.dlabel.nii)"
            )
        return self.grayordinates.columns_of(axis)

    def _check_volume(self) -> None:
        if self.grayordinates is not None:
            raise DataError(
                f"the recording is a volume image, the atlas {self.atlas.name} a CIFTI label file: give atlas.image a "
                "NIfTI label image"
            )
        if not self.has_volume:
            raise DataError(
                f"the recording is a volume image, and of the atlas {self.atlas.name} there is no image here (it comes "
                "from a checkpoint or data set): give atlas.image"
            )

    def on_grid(self, shape: tuple[int, ...], affine: NDArray[np.float64], space: str = "") -> Grid:
        """Return the labels at each voxel centre of an image: the nearest atlas voxel by the two affines.

        Exact where the grids agree up to flips and permutations of the axes.

        Parameters
        ----------
        shape, affine
            Of the image.
        space : str
            Its template space. Where `transforms` has one for it, every voxel centre goes through it first: the labels
            are moved to where their parcels lie in the image, which itself stays as it is.

        Raises
        ------
        DataError
            If the atlas has no volume, or the transform has changed or cannot be inverted.
        """
        self._check_volume()
        transform = self.transforms.get(space)
        key = "|".join([self.fingerprint, space if transform else "", repr(tuple(shape)), affine.tobytes().hex()])
        if key not in _GRIDS:
            if len(_GRIDS) >= MAX_GRIDS:
                _GRIDS.pop(next(iter(_GRIDS)))
            _GRIDS[key] = self._resample(shape, affine, transform.load() if transform else None)
        return _GRIDS[key]

    def _resample(self, shape: tuple[int, ...], affine: NDArray[np.float64], transform: PointTransform | None) -> Grid:
        num_parcels = self.atlas.num_parcels
        to_atlas = np.linalg.inv(self.affine) @ (np.eye(4) if transform else affine)
        voxels, columns, hashes = [], [], []
        for first in range(0, math.prod(shape), VOXELS_AT_ONCE):
            flat = np.arange(first, min(first + VOXELS_AT_ONCE, math.prod(shape)))
            ijk = np.stack(np.unravel_index(flat, shape, order="F"), axis=1).astype(np.float64)
            if transform:
                ijk = transform(ijk @ affine[:3, :3].T + affine[:3, 3])  # millimetres in the atlas' space
            index, inside = _nearest(ijk @ to_atlas[:3, :3].T + to_atlas[:3, 3], self.columns.shape)
            index, flat = index[inside], flat[inside]
            column = self.columns[index[:, 0], index[:, 1], index[:, 2]]
            labelled = column >= 0
            voxels.append(flat[labelled])
            columns.append(column[labelled])
            hashes.append(_hash(index[labelled]))
        column = np.concatenate(columns)
        return Grid(
            voxels=np.concatenate(voxels),
            columns=column,
            num_voxels=np.bincount(column, minlength=num_parcels),
            in_view=self._in_view(shape, affine, transform),
            sampled=_sample(np.concatenate(hashes)),
        )

    def _in_view(
        self, shape: tuple[int, ...], affine: NDArray[np.float64], transform: PointTransform | None
    ) -> NDArray[np.float64]:
        """Return the fraction of each parcel's own voxels whose centre lies inside an image."""
        num_parcels = self.atlas.num_parcels
        to_image = np.linalg.inv(affine) @ (np.eye(4) if transform else self.affine)
        edge = 0.5 + 10.0**-GRID_DECIMALS
        num_own, num_visible, num_lost = np.zeros(num_parcels), np.zeros(num_parcels), 0
        for i, slab in enumerate(self.columns):
            jk = np.argwhere(slab >= 0)
            own = slab[jk[:, 0], jk[:, 1]]
            centres = np.column_stack([np.full(len(jk), i), jk]).astype(np.float64)
            if transform:
                centres = inverse_points(transform, centres @ self.affine[:3, :3].T + self.affine[:3, 3])
                num_lost += int(np.isnan(centres).any(axis=1).sum())
            at = centres @ to_image[:3, :3].T + to_image[:3, 3]
            visible = np.all((at >= -edge) & (at <= np.asarray(shape) - 1 + edge), axis=1)
            num_own += np.bincount(own, minlength=num_parcels)
            num_visible += np.bincount(own, weights=visible, minlength=num_parcels)
        if num_lost > MAX_LOST * num_own.sum():
            raise DataError(f"the transform folds: {num_lost} of {num_own.sum():.0f} labelled voxels have no inverse")
        return np.asarray(num_visible / np.maximum(num_own, 1))  # a parcel may have no voxel at all


def _hash(index: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return a number without pattern for each voxel (i, j, k)."""
    mixed = (index * np.array([73856093, 19349663, 83492791])).sum(axis=1).astype(np.uint32)
    mixed ^= mixed >> 16
    mixed *= np.uint32(0x7FEB352D)  # multiplier and shifts of Wellons' lowbias32
    mixed ^= mixed >> 15
    return mixed


def _sample(hashes: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the positions of about a sixteenth of the voxels, at least `MIN_SAMPLED` where there are so many."""
    number = max(len(hashes) // 16, min(len(hashes), MIN_SAMPLED))
    if number == 0:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(hashes <= np.partition(hashes, number - 1)[number - 1])


def _nearest(position: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the nearest voxel of each position, and whether it lies inside the volume. Ties go up."""
    index = np.floor(np.round(position, GRID_DECIMALS) + 0.5).astype(np.int64)
    inside: NDArray[np.bool_] = np.all((index >= 0) & (index < np.asarray(shape[:3])), axis=1)
    return index, inside


def load_atlas(settings: AtlasSettings) -> AtlasImage:
    """Read an atlas: its label image or CIFTI label file, its table, and the transforms to other template spaces.

    Parameters
    ----------
    settings : AtlasSettings
        Without an image, the atlas is taken from the registry by its name (`data_prep.atlas_registry`).

    Raises
    ------
    DataError
        If the image is no label image, has no place in a template space, or its table does not fit it.
    ConfigError, StoreError
        If the registry has no atlas of this name, or cannot have its files.
    """
    record: AtlasRecord | None = None
    header: tuple[str, ...] | None = None
    is_own_table = settings.labels is None  # of the registry
    if settings.image is None:
        record = find_record(settings.name)
        header = record.header if settings.labels is None else None
        settings = _from_registry(settings, record)
    assert settings.image is not None
    with local_input(settings.image) as path:
        image = open_labels(path)
        if isinstance(image, _cifti_image()):
            atlas = _load_grayordinates(settings, header, read_cifti_labels(image, path))
        else:
            atlas = _load_volume(settings, header, *read_label_volume(image, path))
    pattern = settings.network_pattern
    if pattern is None and record is not None and is_own_table and atlas.atlas.networks is None:
        pattern = record.network_pattern
    if pattern is not None:
        networks = networks_in_names(atlas.atlas.parcel_names, pattern, settings.labels or settings.image)
        atlas = replace(atlas, atlas=replace(atlas.atlas, networks=networks))
    if record is not None and atlas.atlas.num_parcels != record.num_parcels:
        raise DataError(
            f"atlas {record.name}: expected {record.num_parcels} parcels, found {atlas.atlas.num_parcels} in "
            f"{settings.image}: another version of the atlas? Give it under its own name with atlas.image"
        )
    return atlas


def series_atlas(atlas: Atlas) -> AtlasImage:
    """Return an atlas without an image, such as a checkpoint's: it serves series that are parcellated already."""
    return AtlasImage(atlas, np.zeros((0, 0, 0), dtype=np.int32), np.eye(4))


def _cifti_image() -> type:
    import nibabel

    return cast(type, nibabel.Cifti2Image)


def _from_registry(settings: AtlasSettings, record: AtlasRecord) -> AtlasSettings:
    """Fill in what the registry knows; what the user gives otherwise must not contradict it."""
    if settings.space not in ("", record.space):
        raise DataError(
            f"atlas {record.name} is in {record.space} by the registry, atlas.space says {settings.space}: remove "
            "atlas.space, or give atlas.image"
        )
    fetched = fetch_atlas(record)
    changes: dict[str, Any] = {"name": record.name, "image": str(fetched.image), "space": record.space}
    if settings.labels is None and fetched.table is not None:
        changes["labels"] = str(fetched.table)
        changes["hemisphere_column"] = settings.hemisphere_column or record.hemisphere_column
        if record.coords_columns is not None:
            changes["coords_columns"] = record.coords_columns
    return replace(settings, **changes)


def _load_volume(
    settings: AtlasSettings, header: tuple[str, ...] | None, labelled: NDArray[np.int32], affine: NDArray[np.float64]
) -> AtlasImage:
    # One slab at a time, here and below: an atlas of 0.5 mm has 58 million voxels.
    labels = np.unique(np.concatenate([np.unique(slab) for slab in labelled])).astype(np.int64)
    labels = labels[labels > 0]
    table = _table_of(settings, header, labels, None)
    columns = np.empty_like(labelled)
    for slab, out in zip(labelled, columns):
        out[:] = np.where(slab > 0, np.searchsorted(table.labels, slab), -1)
    image_mm = _centres_of_mass(columns, affine, len(table.labels))
    digest = hashlib.sha256(np.asarray(labelled.shape).astype("<i8").tobytes())
    for slab in labelled:
        digest.update(slab.astype("<i8").tobytes())
    digest.update(np.round(affine, 6).astype("<f8").tobytes())
    side = np.where(np.abs(image_mm[:, 0]) > MIDLINE_MM, image_mm[:, 0], 0.0)
    away_mm = None if table.coords_mm is None else _distances(columns, affine, table.coords_mm)
    check_places(settings, table, side, away_mm)
    atlas = _make_atlas(settings, table, image_mm, digest.hexdigest())
    return AtlasImage(atlas, columns, affine, table.warnings, transforms=_transforms(settings))


def _load_grayordinates(settings: AtlasSettings, header: tuple[str, ...] | None, found: CiftiLabels) -> AtlasImage:
    labels = np.unique(found.keys).astype(np.int64)
    labels = labels[labels > 0]
    table = _table_of(settings, header, labels, [found.names[int(label)] for label in labels])
    image_mm, side = centres_and_sides(found, table.labels)
    check_places(settings, table, side, None if table.coords_mm is None else distances(found, table))
    atlas = _make_atlas(settings, table, image_mm, hash_of(found))
    if settings.transforms:
        raise DataError(f"{settings.image}: atlas.transforms move the labels of volumes; grayordinates need none")
    return AtlasImage(
        atlas,
        np.zeros((0, 0, 0), dtype=np.int32),
        np.eye(4),
        table.warnings,
        grayordinates=make_grayordinates(found, table.labels),
    )


def _table_of(
    settings: AtlasSettings, header: tuple[str, ...] | None, labels: NDArray[np.int64], names: list[str] | None
) -> LabelTable:
    """Read the atlas' table; without one, the parcels are those of the image, called by name and label."""
    if settings.labels is not None:
        return read_label_table(settings, labels, header=header, names=names)
    asked = [name for name in ("network_column", "hemisphere_column") if getattr(settings, name)]
    if asked:
        raise DataError(f"atlas.{asked[0]} names a column of a table, but atlas.labels gives none")
    return LabelTable(labels, names, None, None, None, [])


def _make_atlas(settings: AtlasSettings, table: LabelTable, image_mm: NDArray[np.float64], sha256: str) -> Atlas:
    coords_mm = image_mm if table.coords_mm is None else table.coords_mm
    lost = np.flatnonzero(~np.isfinite(coords_mm).all(axis=1))
    if lost.size:
        raise DataError(
            f"{settings.image}: {len(lost)} parcels lie on surfaces, which have no coordinates in a label file: give "
            f"atlas.labels, a table with {settings.label_column} and {', '.join(settings.coords_columns)} (millimetres "
            "right, anterior, superior), such as the centres of wb_command -surface-coordinates-to-metric, then "
            "-cifti-create-dense-scalar and -cifti-parcellate, on the midthickness surface of the group"
        )
    names = table.names or [f"{settings.name}_{label}" for label in table.labels]
    return Atlas(
        name=settings.name,
        sha256=sha256,
        labels=table.labels,
        parcel_names=tuple(names),
        coords_mm=np.asarray(coords_mm, dtype=np.float32),
        networks=None if table.networks is None else tuple(table.networks),
        space=settings.space,
        hemispheres=None if table.hemispheres is None else tuple(table.hemispheres),
    )


def _transforms(settings: AtlasSettings) -> dict[str, TransformFile]:
    if settings.transforms and not settings.space:
        raise DataError("atlas.transforms lead from the atlas' space to that of images: atlas.space must name it")
    if settings.space in settings.transforms:
        raise DataError(f"atlas.transforms.{settings.space}: the atlas is in that space already")
    return {space: find_transform(path, space, settings.space) for space, path in settings.transforms.items()}


def _centres_of_mass(columns: NDArray[np.int32], affine: NDArray[np.float64], num_parcels: int) -> NDArray[np.float64]:
    """Return the mean position (mm) of each parcel's voxels, NaN where it has none."""
    totals, count = np.zeros((num_parcels, 3)), np.zeros(num_parcels)
    for k in range(columns.shape[2]):  # one slice at a time bounds memory
        where = np.argwhere(columns[:, :, k] >= 0)
        own = columns[where[:, 0], where[:, 1], k]
        here = np.bincount(own, minlength=num_parcels)
        count += here
        totals[:, 2] += k * here
        for axis in range(2):
            totals[:, axis] += np.bincount(own, weights=where[:, axis], minlength=num_parcels)
    mean = np.full((num_parcels, 3), np.nan)
    np.divide(totals, count[:, None], out=mean, where=count[:, None] > 0)
    return mean @ affine[:3, :3].T + affine[:3, 3]


def _distances(
    columns: NDArray[np.int32], affine: NDArray[np.float64], coords_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distance of each parcel's coordinates from its nearest voxel, NaN where it has none."""
    away_mm = np.full(len(coords_mm), np.nan)
    for k in range(columns.shape[2]):
        where = np.argwhere(columns[:, :, k] >= 0)
        mm = where @ affine[:3, :2].T + affine[:3, 2] * k + affine[:3, 3]
        nearest_mm(mm, columns[where[:, 0], where[:, 1], k], coords_mm, away_mm)
    return away_mm - 0.5 * float(np.linalg.norm(affine[:3, :3].sum(axis=1)))  # to the corner of the voxel
