"""Points of one template space in another, by a transform file that ITK or ANTs wrote.

ITK's file for images *from A to B* takes a point of B and returns the point of A whose value the new image holds there.
That is what labels need: the file that brings atlas images to the space of the recordings takes a voxel centre of a
recording to the place in the atlas where its label stands. No image is resampled.

ITK counts millimetres towards left and posterior (LPS), NIfTI towards right and anterior (RAS); everything here is RAS.
Fields are interpolated linearly and end at their edge, beyond which nothing moves, as in ITK
(``itk::DisplacementFieldTransform``); composite files apply their last transform first (``itk::CompositeTransform``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.store import sha256_of_file
from data_prep.local_input import local_input

PointTransform = Callable[[NDArray[np.float64]], NDArray[np.float64]]

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MATRIX_TYPES = ("AffineTransform", "MatrixOffsetTransformBase")  # 12 parameters: the matrix by rows, the translation
MAX_FIELD_VALUES = 60_000_000  # TemplateFlow's fields of 1 mm have 26 million; a worker has 500 MB for everything
MAX_SHIFT_MM = 30.0  # templates differ by millimetres; a sign or a unit gone wrong moves the brain by more
TOLERANCE_MM = 0.05  # of the inverse
MAX_ITERATIONS = 30


@dataclass(frozen=True, eq=False)
class Affine:
    """``matrix (4, 4)``: millimetres to millimetres."""

    matrix: NDArray[np.float64]

    def __call__(self, mm: NDArray[np.float64]) -> NDArray[np.float64]:
        return mm @ self.matrix[:3, :3].T + self.matrix[:3, 3]


@dataclass(frozen=True, eq=False)
class Displacement:
    """A field of shifts.

    Attributes
    ----------
    shift : ndarray, shape (Z, Y, X, 3), float32
        Millimetres towards left, posterior and superior (LPS, as stored).
    to_voxel : ndarray, shape (4, 4)
        RAS millimetres to (x, y, z) of the field.
    """

    shift: NDArray[np.float32]
    to_voxel: NDArray[np.float64]

    def __call__(self, mm: NDArray[np.float64]) -> NDArray[np.float64]:
        from scipy.ndimage import map_coordinates

        size = np.asarray(self.shift.shape[2::-1])
        voxel = mm @ self.to_voxel[:3, :3].T + self.to_voxel[:3, 3]
        inside = np.flatnonzero(((voxel >= -0.5) & (voxel <= size - 0.5)).all(axis=1))
        at = np.clip(voxel[inside], 0, size - 1).T[::-1]
        moved = np.array(mm, dtype=np.float64)
        for axis in range(3):
            step = map_coordinates(self.shift[..., axis], at, order=1, mode="nearest", output=np.float64)
            moved[inside, axis] += LPS[axis, axis] * step
        return moved


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they are applied."""

    steps: tuple[PointTransform, ...]

    def __call__(self, mm: NDArray[np.float64]) -> NDArray[np.float64]:
        for step in self.steps:
            mm = step(mm)
        return mm


@dataclass(frozen=True)
class TransformFile:
    """A transform to be read where it is used: the path travels to the workers, not hundreds of megabytes.

    Attributes
    ----------
    path : str
        A path that every worker sees, or any fsspec URL.
    sha256 : str
        Of the file's bytes when the work began.
    """

    path: str
    sha256: str

    def load(self) -> PointTransform:
        """Read the transform; a file that has changed since is refused."""
        with local_input(self.path) as path:
            if not path.is_file():
                raise DataError(f"there is no transform {self.path} on this machine: put it where every worker sees it")
            found = sha256_of_file(path)
            if found != self.sha256:
                raise DataError(f"{self.path} has changed while the work went on: sha256 {found}, was {self.sha256}")
            return load_transform(path)


def find_transform(path: str, images_space: str, atlas_space: str) -> TransformFile:
    """Read a transform once to see that it can be used, and return what travels.

    Parameters
    ----------
    path : str
        See `load_transform`; any fsspec URL.
    images_space, atlas_space : str
        BIDS names of the spaces. Where the file's name says from where to where it leads (``from-``, ``to-`` or
        TemplateFlow's ``tpl-``), it must say the same.
    """
    check_direction(path, images_space, atlas_space)
    with local_input(path) as local:
        if not local.is_file():
            raise DataError(f"there is no transform {path} (atlas.transforms.{images_space})")
        load_transform(local)
        return TransformFile(path, sha256_of_file(local))


def check_direction(path: str, images_space: str, atlas_space: str) -> None:
    """Refuse a file whose name says that it leads elsewhere: the wrong way round shifts every parcel twice."""
    name = path.rsplit("/", 1)[-1]
    found: dict[str, str] = dict(re.findall(r"(?:^|_)(from|to|tpl|mode)-([A-Za-z0-9]+)", name))
    source, target = found.get("from"), found.get("to", found.get("tpl"))
    wanted = f"the transform of atlas.transforms.{images_space} must bring images from {atlas_space or 'the atlas'} to "
    if found.get("mode", "image") != "image":
        raise DataError(f"{name}: {wanted}{images_space} (mode-image), this one is mode-{found['mode']}")
    if (source and atlas_space and source != atlas_space) or (source and target and target != images_space):
        raise DataError(f"{name}: {wanted}{images_space}; by its name it brings them from {source} to {target}")


def load_transform(path: str | Path) -> PointTransform:
    """Read a transform file.

    Parameters
    ----------
    path : path
        ITK affine ``.txt``, ``.tfm`` or ``.mat``; ITK composite ``.h5``; displacement field ``.nii``, ``.nii.gz`` as
        ITK and ANTs write it (X, Y, Z, 1, 3).

    Returns
    -------
    callable
        Takes points (N, 3), RAS millimetres, of the space that the file brings images *to*, and returns the matching
        points of the space that it brings them *from*. For an atlas: image space in, atlas space out.

    Raises
    ------
    DataError
        If the file is none of these, holds a transform of another type, mirrors, or moves the brain by more than
        templates can differ.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], list[PointTransform]]] = {
        ".txt": _read_text,
        ".tfm": _read_text,
        ".mat": _read_matlab,
        ".h5": _read_composite,
        ".nii": _read_field,
        ".gz": _read_field,
    }
    if path.suffix not in readers:
        raise DataError(f"{path.name}: expected a transform .txt, .tfm, .mat, .h5, .nii or .nii.gz")
    try:
        steps = readers[path.suffix](path)
    except DataError:
        raise
    except (OSError, EOFError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path.name}: not a readable ITK transform ({error})") from error
    transform = Chain(tuple(steps))
    _check_plausible(transform, path.name)
    return transform


def inverse_points(transform: PointTransform, mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points that a transform takes to `mm`, by fixed-point iteration (Chen et al. 2008, Med. Phys. 35).

    It converges for shifts that change by less than a millimetre per millimetre, as they do between templates. A point
    that it does not reach to `TOLERANCE_MM` along each axis comes back as NaN.
    """
    guess = np.array(mm, dtype=np.float64)
    error = mm - transform(guess)
    for _ in range(MAX_ITERATIONS):
        if np.abs(error).max(initial=0.0) < TOLERANCE_MM:
            break
        guess += error
        error = mm - transform(guess)
    guess[np.linalg.norm(error, axis=1) > 2 * TOLERANCE_MM] = np.nan
    return guess


def _check_plausible(transform: PointTransform, name: str) -> None:
    axis = np.arange(-60.0, 61.0, 20.0)
    brain = np.stack(np.meshgrid(axis, axis - 15.0, axis + 10.0, indexing="ij"), axis=-1).reshape(-1, 3)
    moved = transform(brain)
    if np.corrcoef(brain[:, 0], moved[:, 0])[0, 1] < 0:
        raise DataError(f"{name}: it mirrors left and right")
    shift = float(np.median(np.linalg.norm(moved - brain, axis=1)))
    if shift > MAX_SHIFT_MM:
        raise DataError(
            f"{name}: it moves the brain by {shift:.0f} mm (median); templates differ by millimetres. "
            "Is it a field of positions (SPM, FSL), or a transform to a subject's own space?"
        )


def _affine(kind: str, parameters: NDArray[Any], fixed: NDArray[Any], name: str) -> PointTransform:
    """Build a linear step: y = M (x - centre) + translation + centre, in LPS."""
    base = kind.split("_")[0]
    values = np.asarray(parameters, dtype=np.float64).ravel()
    matrix = np.eye(4)
    if base in MATRIX_TYPES and values.size == 12 and fixed.size == 3:
        centre = np.asarray(fixed, dtype=np.float64).ravel()
        matrix[:3, :3] = values[:9].reshape(3, 3)
        matrix[:3, 3] = values[9:] + centre - matrix[:3, :3] @ centre
    elif base == "TranslationTransform" and values.size == 3:
        matrix[:3, 3] = values
    elif base != "IdentityTransform":
        raise DataError(
            f"{name}: transforms of type {kind} with {values.size} parameters are not read here; write it as an affine "
            "and a displacement field, for example with antsApplyTransforms"
        )
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-6:
        raise DataError(f"{name}: the matrix of the transform is not usable")
    return Affine(LPS @ matrix @ LPS)


def _read_text(path: Path) -> list[PointTransform]:
    if path.stat().st_size > 1_000_000:
        raise DataError(f"{path.name}: too large for an ITK affine in text form")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("#Insight Transform File"):
        raise DataError(f"{path.name}: expected an ITK transform, which begins with '#Insight Transform File V1.0'")
    kinds, parameters, fixed = (
        re.findall(rf"^{key}:[ \t]*(.*)$", text, re.M) for key in ("Transform", "Parameters", "FixedParameters")
    )
    composite = bool(kinds) and kinds[0].startswith("CompositeTransform")
    if composite:
        kinds = kinds[1:]
        parameters, fixed = parameters[-len(kinds) :], fixed[-len(kinds) :]
    if not kinds or len(parameters) != len(kinds) or len(fixed) != len(kinds) or (len(kinds) > 1 and not composite):
        raise DataError(f"{path.name}: expected one transform, or one CompositeTransform, found {len(kinds)}")
    numbers = [[np.array(line.split(), dtype=np.float64) for line in lines] for lines in (parameters, fixed)]
    steps = [_affine(kind.strip(), p, f, path.name) for kind, p, f in zip(kinds, *numbers)]
    return steps[::-1]


def _read_matlab(path: Path) -> list[PointTransform]:
    from scipy.io import loadmat

    if path.stat().st_size > 1_000_000:
        raise DataError(f"{path.name}: too large for an ITK affine")
    found = loadmat(path)
    kinds = [key for key in found if not key.startswith("__") and key != "fixed"]
    if len(kinds) != 1 or "fixed" not in found:
        raise DataError(
            f"{path.name}: expected one ITK transform and its 'fixed', found {', '.join(kinds) or 'nothing'}"
        )
    return [_affine(kinds[0], found[kinds[0]], found["fixed"], path.name)]


def _read_composite(path: Path) -> list[PointTransform]:
    import h5py

    steps: list[PointTransform] = []
    with h5py.File(path, "r") as file:
        group = file["TransformGroup"]
        for key in sorted(group, key=int):
            part = group[key]
            kind = part["TransformType"][0].decode()
            if kind.startswith("CompositeTransform"):
                if key != "0":
                    raise DataError(f"{path.name}: a composite inside a composite is not read here")
                continue
            # ITK before 5.3 misspelt the names.
            prefix = "Transform" if "TransformParameters" in part else "Tranform"
            parameters, fixed = part[f"{prefix}Parameters"], np.asarray(part[f"{prefix}FixedParameters"]).ravel()
            if kind.startswith("DisplacementFieldTransform"):
                steps.append(_composite_field(parameters, fixed, path.name))
            elif parameters.size > 1000:
                raise DataError(f"{path.name}: transforms of type {kind} are not read here")
            else:
                steps.append(_affine(kind, np.asarray(parameters), fixed, path.name))
    if not steps:
        raise DataError(f"{path.name}: the file holds no transform")
    return steps[::-1]


def _composite_field(parameters: Any, fixed: NDArray[Any], name: str) -> Displacement:
    """Build a field from ITK's: size, origin, spacing and direction are fixed, shifts are stored vector by vector."""
    if fixed.size != 18:
        raise DataError(f"{name}: expected 18 fixed parameters of a 3-D displacement field, found {fixed.size}")
    size, origin, spacing, direction = fixed[:3], fixed[3:6], fixed[6:9], fixed[9:].reshape(3, 3)
    _check_field_size(size, name)
    shape = tuple(int(n) for n in size[::-1])
    if parameters.size != 3 * np.prod(shape):
        raise DataError(f"{name}: a field of {size} has {parameters.size} values")
    shift = np.empty(parameters.size, dtype=np.float32)
    parameters.read_direct(shift)  # converts piece by piece: no second copy of a field of doubles
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, origin
    return _displacement(shift.reshape(*shape, 3), LPS @ affine, name)


def _read_field(path: Path) -> list[PointTransform]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nibabel.load(path)
    except (ImageFileError, HeaderDataError) as error:
        raise DataError(f"{path.name}: not a readable NIfTI image: {error}") from error
    shape = image.shape
    if len(shape) != 5 or shape[3:] != (1, 3):
        raise DataError(
            f"{path.name}: expected a displacement field as ITK and ANTs write it, shape (X, Y, Z, 1, 3), found {shape}"
        )
    if "mapping" in str(image.header["intent_name"].item()).lower():
        raise DataError(f"{path.name}: a field of positions (SPM); expected displacements as ITK and ANTs write them")
    _check_field_size(np.asarray(shape[:3]), path.name)
    shift = np.asarray(image.dataobj, dtype=np.float32)[..., 0, :].transpose(2, 1, 0, 3)
    return [_displacement(shift, np.asarray(image.affine, dtype=np.float64), path.name)]


def _check_field_size(size: NDArray[Any], name: str) -> None:
    if not (np.isfinite(size).all() and (size >= 1).all() and 3.0 * np.prod(size.astype(float)) <= MAX_FIELD_VALUES):
        raise DataError(f"{name}: a displacement field of {size.tolist()} voxels is not believable")


def _displacement(shift: NDArray[np.float32], affine: NDArray[np.float64], name: str) -> Displacement:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DataError(f"{name}: the field has no usable place in space")
    if not np.isfinite(shift).all():
        raise DataError(f"{name}: the field holds values that are not finite")
    return Displacement(shift, np.asarray(np.linalg.inv(affine), dtype=np.float64))
