"""Read a label image as a `brainlm.atlas.Atlas`, and put its labels on the grid of another image.

Labels may be stored as floats, have gaps, and exceed 255 (nilearn had a bug with each). A parcel's column is the rank
of its label; names and networks come from a table by label, never by position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.atlas import Atlas
from brainlm.errors import DataError
from data_prep.read_table import number, read_table, text
from data_prep.settings import AtlasSettings

MAX_GRIDS = 4  # resampled label images kept: one cohort has few grids
GRID_DECIMALS = 4  # of a voxel: rounding of affines must not move a label, whatever the orientation


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
    """

    voxels: NDArray[np.int64]
    columns: NDArray[np.int64]
    num_voxels: NDArray[np.int64]
    in_view: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AtlasImage:
    """An atlas with its label image.

    Attributes
    ----------
    atlas : Atlas
    columns : ndarray, shape (X, Y, Z), int32
        Parcel column of each voxel, -1 outside of all parcels.
    affine : ndarray, shape (4, 4)
    warnings : list of str
        What a reader should know about image and table.
    """

    atlas: Atlas
    columns: NDArray[np.int32]
    affine: NDArray[np.float64]
    warnings: list[str] = field(default_factory=list)
    _grids: dict[bytes, Grid] = field(default_factory=dict, repr=False)

    def on_grid(self, shape: tuple[int, ...], affine: NDArray[np.float64]) -> Grid:
        """Return the labels at each voxel centre of an image: the nearest atlas voxel by the two affines.

        Exact where the grids agree up to flips and permutations of the axes.
        """
        key = repr(shape).encode() + np.ascontiguousarray(affine).tobytes()
        if key not in self._grids:
            if len(self._grids) >= MAX_GRIDS:
                self._grids.pop(next(iter(self._grids)))
            self._grids[key] = self._resample(shape, affine)
        return self._grids[key]

    def _resample(self, shape: tuple[int, ...], affine: NDArray[np.float64]) -> Grid:
        num_parcels = self.atlas.num_parcels
        to_atlas = np.linalg.inv(self.affine) @ affine
        found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        ij = np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij"), axis=-1).reshape(-1, 2)
        for k in range(shape[2]):  # one slice at a time bounds memory
            ijk = np.column_stack([ij, np.full(len(ij), k), np.ones(len(ij))])
            index, inside = _nearest(ijk @ to_atlas.T[:, :3], self.columns.shape)
            column = np.full(len(ij), -1, dtype=np.int64)
            column[inside] = self.columns[tuple(index[inside].T)]
            here = np.flatnonzero(column >= 0)
            flat = ij[here, 0] + shape[0] * (ij[here, 1] + shape[1] * k)
            order = np.argsort(flat)
            found.append((flat[order], column[here][order]))
        voxels = np.concatenate([pair[0] for pair in found])
        columns = np.concatenate([pair[1] for pair in found])
        labelled = np.argwhere(self.columns >= 0)
        to_image = np.linalg.inv(affine) @ self.affine
        centres = np.column_stack([labelled, np.ones(len(labelled))]).astype(np.float64) @ to_image.T[:, :3]
        own = self.columns[tuple(labelled.T)]
        edge = 0.5 + 10.0**-GRID_DECIMALS
        visible = np.all((centres >= -edge) & (centres <= np.asarray(shape) - 1 + edge), axis=1)
        num_own = np.maximum(np.bincount(own, minlength=num_parcels), 1)  # a parcel may have no voxel at all
        in_view = np.bincount(own, weights=visible, minlength=num_parcels) / num_own
        return Grid(voxels, columns, np.bincount(columns, minlength=num_parcels), in_view)


def _nearest(position: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the nearest voxel of each position, and whether it lies inside the volume. Ties go up."""
    index = np.floor(np.round(position, GRID_DECIMALS) + 0.5).astype(np.int64)
    inside: NDArray[np.bool_] = np.all((index >= 0) & (index < np.asarray(shape[:3])), axis=1)
    return index, inside


def load_atlas(settings: AtlasSettings) -> AtlasImage:
    """Read the label image and the table of an atlas.

    Raises
    ------
    DataError
        If the image is not a 3-D label image with an affine, or the table lacks a label or names one twice.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    path = Path(settings.image)
    if not path.is_file():
        raise DataError(f"there is no atlas image {path}")
    try:
        image: Any = nibabel.load(path)
        values = np.asarray(image.dataobj)
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read the atlas image {path}: {error}") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise DataError(f"{path}: expected one 3-D label image, found shape {values.shape}")
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        raise DataError(f"{path}: neither qform nor sform is set, so the atlas has no place in a template space")
    if not np.isfinite(values).all() or (values != np.round(values)).any() or values.min() < 0:
        raise DataError(f"{path}: labels must be whole numbers from 0 up (a probability map is not a label image)")
    labelled = values.astype(np.int64)
    affine = np.asarray(image.affine, dtype=np.float64)
    labels = np.unique(labelled)
    labels = labels[labels > 0]
    if labels.size == 0:
        raise DataError(f"{path}: the image has no label above 0")
    names: list[str] = [f"{settings.name}_{label}" for label in labels]
    networks: list[str] | None = None
    warnings: list[str] = []
    given_mm: NDArray[np.float64] | None = None
    if settings.labels is not None:
        labels, names, networks, given_mm, warnings = _read_labels(settings, labels)
    columns = np.where(labelled > 0, np.searchsorted(labels, labelled), -1).astype(np.int32)
    coords_mm = _centres_of_mass(columns, affine, len(labels)) if given_mm is None else given_mm
    digest = hashlib.sha256()
    for part in (np.asarray(labelled.shape), labelled, np.round(affine, 6)):
        digest.update(np.ascontiguousarray(part).astype("<f8" if part.dtype.kind == "f" else "<i8").tobytes())
    atlas = Atlas(
        name=settings.name,
        sha256=digest.hexdigest(),
        labels=labels,
        parcel_names=tuple(names),
        coords_mm=np.asarray(coords_mm, dtype=np.float32),
        networks=None if networks is None else tuple(networks),
        space=settings.space,
    )
    return AtlasImage(atlas, columns, affine, warnings)


def _centres_of_mass(columns: NDArray[np.int32], affine: NDArray[np.float64], num_parcels: int) -> NDArray[np.float64]:
    """Return the mean position (mm) of each parcel's voxels."""
    where = np.argwhere(columns >= 0)
    own = columns[tuple(where.T)]
    count = np.bincount(own, minlength=num_parcels)
    mean = np.stack([np.bincount(own, weights=where[:, axis], minlength=num_parcels) / count for axis in range(3)], 1)
    return mean @ affine[:3, :3].T + affine[:3, 3]


def _read_labels(
    settings: AtlasSettings, labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[str], list[str] | None, NDArray[np.float64] | None, list[str]]:
    """Return labels, names, networks, coordinates (None where the table has none) and warnings.

    A row without a voxel in the image is a parcel all the same where the table says where it lies: it is never
    covered, and the columns of the series stay those of the atlas.
    """
    assert settings.labels is not None
    text_columns = [settings.name_column, *([settings.network_column] if settings.network_column else [])]
    table = read_table(settings.labels, text_columns)
    absent = [name for name in (settings.label_column, *text_columns) if name not in table.columns]
    if absent:
        raise DataError(
            f"{settings.labels} has no column {', '.join(map(repr, absent))} (it has "
            f"{', '.join(map(str, table.columns))}): set atlas.label_column, name_column or network_column"
        )
    where = f"{settings.labels}: {settings.label_column}"
    rows = {_label(row[settings.label_column], where): row for row in table.to_dict("records")}
    if len(rows) != len(table):
        raise DataError(f"{settings.labels}: a label stands in several rows of {settings.label_column!r}")
    unnamed = [int(label) for label in labels if int(label) not in rows]
    if unnamed:
        raise DataError(
            f"{settings.labels} has no row for {len(unnamed)} labels of {settings.image}, for example {unnamed[0]}"
        )
    warnings = []
    extra = sorted(set(rows) - {int(label) for label in labels} - {0})
    has_coords = set(settings.coords_columns) <= set(table.columns)
    if extra:
        what = "are parcels that nothing covers" if has_coords else "are left out, for want of coordinates"
        warnings.append(f"{len(extra)} rows of the atlas table have no voxel in the image and {what}: {extra[:10]}")
    if has_coords:
        labels = np.union1d(labels, np.asarray(extra, dtype=np.int64))
    mine = [rows[int(label)] for label in labels]
    coords_mm = None
    if has_coords:
        axes = settings.coords_columns
        given = [[number(row[axis], f"{settings.labels}: {axis}") for axis in axes] for row in mine]
        coords_mm = np.asarray(given, dtype=np.float64)
    networks = [text(row[settings.network_column]) for row in mine] if settings.network_column else None
    return labels, [text(row[settings.name_column]) for row in mine], networks, coords_mm, warnings


def _label(value: Any, where: str) -> int:
    label = number(value, where)
    if label is None or label % 1 != 0:
        raise DataError(f"{where}: expected whole numbers, found {value!r}")
    return int(label)
