"""Atlases on CIFTI grayordinates (``.dlabel.nii``): which vertex or voxel belongs to which parcel.

A dense series lists its own grayordinates, in its own order and without those that its authors left out (the medial
wall); so parcels are looked up by structure and vertex, or structure and voxel, never by position in the file.
(Glasser et al. 2013, NeuroImage 80; the CIFTI-2 format.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.label_image import whole_labels
from data_prep.label_table import LabelTable, nearest_mm

NO_NAME = ("???", "")  # what Connectome Workbench calls key 0
MAX_VERTICES = 1_000_000  # of a surface; fsaverage and fs_LR have 164 thousand
VOXEL_TOLERANCE = 0.01  # of a voxel, between two grids that are meant to be one


@dataclass(frozen=True, eq=False)
class Grayordinates:
    """Parcel column of every grayordinate of an atlas.

    Attributes
    ----------
    surfaces : dict of str to ndarray, shape (vertices of the surface,)
        Structure -> column of each vertex, -1 = none.
    voxels : dict of str to (ndarray, ndarray)
        Structure -> flat positions of its labelled voxels in `volume_shape`, sorted, and their columns.
    affine : ndarray, shape (4, 4), or None
        Of the voxels.
    volume_shape : tuple of int
    num_grayordinates : ndarray, shape (P,)
        Vertices and voxels of each parcel: what coverage is measured against.
    """

    surfaces: dict[str, NDArray[np.int32]]
    voxels: dict[str, tuple[NDArray[np.int64], NDArray[np.int32]]]
    affine: NDArray[np.float64] | None
    volume_shape: tuple[int, ...]
    num_grayordinates: NDArray[np.int64]

    def columns_of(self, axis: Any) -> NDArray[np.int64]:
        """Return the parcel column of each grayordinate of a series, -1 for none.

        Parameters
        ----------
        axis : nibabel.cifti2.BrainModelAxis
            Of the dense series, in its own order; it may lack any of the atlas' grayordinates.

        Returns
        -------
        ndarray, shape (G,)

        Raises
        ------
        DataError
            If a surface has another number of vertices than the atlas' (another mesh), if its voxels lie on another
            grid, or if atlas and series have nothing in common.
        """
        columns = np.full(len(axis), -1, dtype=np.int64)
        structures = np.asarray(axis.name)
        on_surface = np.asarray(axis.surface_mask)
        for name in dict.fromkeys(structures.tolist()):
            here = structures == name
            vertices, voxels = np.flatnonzero(here & on_surface), np.flatnonzero(here & ~on_surface)
            if vertices.size and name in self.surfaces:
                columns[vertices] = self._of_vertices(name, np.asarray(axis.vertex)[vertices], axis.nvertices.get(name))
            if voxels.size and name in self.voxels:
                columns[voxels] = self._of_voxels(name, np.asarray(axis.voxel)[voxels], np.asarray(axis.affine))
        if (columns < 0).all():
            theirs, ours = ", ".join(dict.fromkeys(structures.tolist())), ", ".join([*self.surfaces, *self.voxels])
            raise DataError(
                f"series and CIFTI atlas have no grayordinate in common: the series has {theirs}, the atlas {ours}"
            )
        return columns

    def _of_vertices(self, name: str, vertex: NDArray[Any], num_vertices: int | None) -> NDArray[np.int32]:
        of_vertex = self.surfaces[name]
        if num_vertices != len(of_vertex) or vertex.min() < 0 or vertex.max() >= len(of_vertex):
            raise DataError(
                f"{name}: the series has a surface of {num_vertices} vertices, the CIFTI atlas one of "
                f"{len(of_vertex)}; resample the labels to the mesh of the series (wb_command -label-resample)"
            )
        return of_vertex[vertex]

    def _of_voxels(self, name: str, ijk: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[np.int64]:
        assert self.affine is not None
        to_ours = np.linalg.inv(self.affine) @ affine
        ours = ijk @ to_ours[:3, :3].T + to_ours[:3, 3]
        index = np.rint(ours)
        edges = np.abs(np.linalg.svd(to_ours[:3, :3], compute_uv=False) - 1.0).max()
        if edges > VOXEL_TOLERANCE or np.abs(ours - index).max() > VOXEL_TOLERANCE:
            raise DataError(
                f"{name}: the voxels of the series lie on another grid than the CIFTI atlas' (affines\n{affine}\nand\n"
                f"{self.affine}); resample the labels to the series (wb_command -cifti-resample)"
            )
        flat, of_voxel = self.voxels[name]
        inside = ((index >= 0) & (index < np.asarray(self.volume_shape))).all(axis=1)
        wanted = np.full(len(index), -1, dtype=np.int64)
        wanted[inside] = np.ravel_multi_index(index[inside].astype(np.int64).T, self.volume_shape)
        at = np.minimum(np.searchsorted(flat, wanted), len(flat) - 1)
        return np.where(flat[at] == wanted, of_voxel[at], -1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class CiftiLabels:
    """A ``.dlabel.nii`` as it was read: ``keys (G,)`` int32 (0 = none) along ``axis``, and the name of each key."""

    keys: NDArray[np.int32]
    axis: Any
    names: dict[int, str]


def read_cifti_labels(image: Any, path: Path) -> CiftiLabels:
    """Return the labels of an open CIFTI image.

    Raises
    ------
    DataError
        If it is not one dense label map, or a label has no name.
    """
    import nibabel

    try:
        axes = [image.header.get_axis(number) for number in range(len(image.shape))]
        data = np.asarray(image.dataobj)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read the CIFTI atlas {path}: {error}") from error
    kinds = [type(axis).__name__ for axis in axes]
    if kinds != ["LabelAxis", "BrainModelAxis"]:
        raise DataError(
            f"{path}: expected a dense label file (.dlabel.nii: LabelAxis, BrainModelAxis), found {', '.join(kinds)}"
        )
    if data.shape[0] != 1:
        maps = ", ".join(map(str, axes[0].name[:5]))
        raise DataError(
            f"{path}: it holds {data.shape[0]} label maps ({maps}); keep one (wb_command -cifti-merge -column)"
        )
    if data.shape[1] != len(axes[1]):
        raise DataError(f"{path}: {data.shape[1]} values for {len(axes[1])} grayordinates")
    assert isinstance(axes[1], nibabel.cifti2.BrainModelAxis)
    if max(axes[1].nvertices.values(), default=0) > MAX_VERTICES:
        raise DataError(f"{path}: a surface of {max(axes[1].nvertices.values())} vertices is not believable")
    names = {int(key): str(entry[0]).strip() for key, entry in axes[0].label[0].items()}
    keys = whole_labels(data.T, str(path))[:, 0]
    none = [key for key, name in names.items() if name in NO_NAME]
    keys[np.isin(keys, [*none, 0])] = 0
    unnamed = sorted(set(np.unique(keys).tolist()) - {0} - set(names))
    if unnamed:
        raise DataError(f"{path}: its label table has no entry for {len(unnamed)} labels, for example {unnamed[0]}")
    if not keys.any():
        raise DataError(f"{path}: no grayordinate has a label")
    return CiftiLabels(keys, axes[1], names)


def make_grayordinates(found: CiftiLabels, labels: NDArray[np.int64]) -> Grayordinates:
    """Index the grayordinates of an atlas by structure; ``labels (P,)`` sorted, in the order of the columns."""
    axis = found.axis
    columns = np.where(found.keys > 0, np.searchsorted(labels, found.keys), -1).astype(np.int32)
    structures, on_surface = np.asarray(axis.name), np.asarray(axis.surface_mask)
    surfaces: dict[str, NDArray[np.int32]] = {}
    voxels: dict[str, tuple[NDArray[np.int64], NDArray[np.int32]]] = {}
    for name in dict.fromkeys(structures.tolist()):
        here = structures == name
        vertices = np.flatnonzero(here & on_surface)
        if vertices.size:
            surfaces[name] = np.full(axis.nvertices[name], -1, dtype=np.int32)
            surfaces[name][np.asarray(axis.vertex)[vertices]] = columns[vertices]
        labelled = np.flatnonzero(here & ~on_surface & (columns >= 0))
        if labelled.size:
            flat = np.ravel_multi_index(np.asarray(axis.voxel)[labelled].T, axis.volume_shape)
            order = np.argsort(flat)
            voxels[name] = flat[order], columns[labelled][order]
    return Grayordinates(
        surfaces=surfaces,
        voxels=voxels,
        affine=None if axis.affine is None else np.asarray(axis.affine, dtype=np.float64),
        volume_shape=() if axis.volume_shape is None else tuple(int(n) for n in axis.volume_shape),
        num_grayordinates=np.bincount(columns[columns >= 0], minlength=len(labels)).astype(np.int64),
    )


def centres_and_sides(found: CiftiLabels, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the centre of mass (P, 3) of the parcels that have voxels alone, else NaN; and each parcel's side (P,).

    The side is -1 for parcels of left structures, 1 of right ones, 0 for others.
    """
    axis = found.axis
    structures, on_surface = np.asarray(axis.name), np.asarray(axis.surface_mask)
    of_structure = np.array([-1.0 * name.endswith("_LEFT") + 1.0 * name.endswith("_RIGHT") for name in structures])
    mm = np.full((len(labels), 3), np.nan)
    side = np.zeros(len(labels))
    order = np.argsort(found.keys, kind="stable")
    first = np.searchsorted(found.keys[order], labels)
    last = np.searchsorted(found.keys[order], labels, side="right")
    for column, (start, stop) in enumerate(zip(first, last)):
        mine = order[start:stop]
        if mine.size == 0:
            continue
        side[column] = np.sign(of_structure[mine].mean().round())
        if not on_surface[mine].any():
            affine = np.asarray(axis.affine, dtype=np.float64)
            mm[column] = np.asarray(axis.voxel)[mine].mean(axis=0) @ affine[:3, :3].T + affine[:3, 3]
    return mm, side


def distances(found: CiftiLabels, table: LabelTable) -> NDArray[np.float64]:
    """Return the distance (P,) of each parcel's coordinates from its nearest voxel, NaN where it has none."""
    assert table.coords_mm is not None
    away_mm = np.full(len(table.labels), np.nan)
    voxels = np.flatnonzero(~np.asarray(found.axis.surface_mask) & (found.keys > 0))
    if voxels.size:
        affine = np.asarray(found.axis.affine, dtype=np.float64)
        mm = np.asarray(found.axis.voxel)[voxels] @ affine[:3, :3].T + affine[:3, 3]
        nearest_mm(mm, np.searchsorted(table.labels, found.keys[voxels]), table.coords_mm, away_mm)
        away_mm -= 0.5 * float(np.linalg.norm(affine[:3, :3].sum(axis=1)))  # to the corner of the voxel
    return away_mm


def hash_of(found: CiftiLabels) -> str:
    """Identify an atlas by its labelled grayordinates, whatever order the file has them in."""
    axis = found.axis
    names, surface = np.asarray(axis.name), np.asarray(axis.surface_mask)
    digest = hashlib.sha256()
    for name in sorted(set(names.tolist())):
        here = np.flatnonzero((names == name) & (found.keys > 0))
        place = np.where(
            surface[here, None], np.asarray(axis.vertex)[here, None] * [1, 0, 0], np.asarray(axis.voxel)[here]
        )
        order = np.lexsort(place.T)
        digest.update(name.encode())
        digest.update(np.column_stack([place, found.keys[here]])[order].astype("<i8").tobytes())
    if axis.affine is not None:
        digest.update((np.round(np.asarray(axis.affine), 6) + 0.0).astype("<f8").tobytes())
    return digest.hexdigest()
