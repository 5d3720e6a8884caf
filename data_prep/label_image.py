"""Read the whole numbers of a label image, whatever type they are stored in; refuse what is no label image.

The header is looked at before anything is allocated: what it claims decides how much is read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.nifti_stream import check_extensions

MAX_VOXELS = 64_000_000  # an atlas of 0.5 mm has 58 million
MAX_HEADER_BYTES = 64_000_000  # header with extensions; the tables of a CIFTI file have some 10 million
MAX_LABEL = 2**31 - 1
MAX_PARCELS = 10_000
WHOLE = 1e-3  # a slope stored as float32 leaves labels this close to whole numbers


def open_labels(path: Path) -> Any:
    """Open a NIfTI or CIFTI image of believable size.

    Raises
    ------
    DataError
        If it is not a single-file NIfTI image, or its header claims an absurd size.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.is_file():
        raise DataError(f"there is no atlas image {path}")
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a label image .nii or .nii.gz, or a CIFTI .dlabel.nii")
    try:
        _check_size(path)
        check_extensions(path)
        image: Any = nibabel.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the atlas image {path}: {error}") from error
    if not isinstance(image, (nibabel.Nifti1Image, nibabel.Cifti2Image)):  # Nifti2Image is a Nifti1Image
        raise DataError(f"{path}: expected a NIfTI label image, found {type(image).__name__}")
    return image


def read_label_volume(image: Any, path: Path) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return the labels (X, Y, Z) of an open image, and its affine (4, 4).

    Raises
    ------
    DataError
        If it holds several volumes, values that are no labels, or has no place in a template space.
    """
    shape = image.shape
    if len(shape) > 3 and math.prod(shape[3:]) == 1:
        shape = shape[:3]
    if len(shape) != 3:
        raise DataError(
            f"{path}: expected one 3-D label image, found shape {image.shape}"
            + (" (one probability map a parcel?): give its maximum-probability labels" if len(shape) == 4 else "")
        )
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        raise DataError(f"{path}: neither qform nor sform is set, so the atlas has no place in a template space")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
        raise DataError(f"{path}: the affine of the atlas is not usable")
    kind = image.header.get_data_dtype()
    if kind.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {kind} are not labels")
    try:
        values = np.asarray(image.dataobj).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read the atlas image {path}: {error}") from error
    return whole_labels(values, str(path)), affine


def whole_labels(values: NDArray[Any], where: str) -> NDArray[np.int32]:
    """Return values (..., Z) as whole numbers, or say why they are no labels."""
    labels = np.empty(values.shape, dtype=np.int32)
    found: set[int] = set()
    for k in range(values.shape[-1]):  # one slice at a time bounds memory
        labels[..., k] = _whole(values[..., k], where)
        found.update(np.unique(labels[..., k]).tolist())
        if len(found) > MAX_PARCELS + 1:
            raise DataError(f"{where}: more than {MAX_PARCELS} labels are too many for an atlas: is this a scan?")
    if found <= {0}:
        raise DataError(f"{where}: the image has no label above 0")
    return labels


def _whole(values: NDArray[Any], where: str) -> NDArray[Any]:
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise DataError(f"{where}: a voxel is {values[~np.isfinite(values)][0]}; outside of parcels the label is 0")
        rounded = np.rint(values)
        broken = np.abs(values - rounded) > WHOLE
        if broken.any():
            raise DataError(
                f"{where}: labels must be whole numbers from 0 up, found {values[broken][0]:g} "
                "(a probability map is not a label image, nor is one that was resampled with interpolation)"
            )
        values = rounded
    lowest, highest = values.min(initial=0), values.max(initial=0)
    if lowest < 0 or highest > MAX_LABEL:
        raise DataError(
            f"{where}: labels must be whole numbers from 0 up to {MAX_LABEL}, found {lowest if lowest < 0 else highest}"
        )
    return values


def _check_size(path: Path) -> None:
    """Refuse by the first bytes of the header what would not fit in memory."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        head = stream.read(540)
    for order in "<>":
        size = int(np.frombuffer(head[:4], f"{order}i4")[0]) if len(head) >= 4 else 0
        if size == 348 and len(head) >= 348:
            dim, offset = np.frombuffer(head, f"{order}i2", 8, 40), float(np.frombuffer(head, f"{order}f4", 1, 108)[0])
            break
        if size == 540 and len(head) >= 540:
            dim, offset = np.frombuffer(head, f"{order}i8", 8, 16), float(np.frombuffer(head, f"{order}i8", 1, 168)[0])
            break
    else:
        raise DataError(f"cannot read the atlas image {path}: not a NIfTI header")
    num_axes = int(dim[0])
    lengths = [int(length) for length in dim[1 : 1 + num_axes]] if 0 < num_axes <= 7 else []
    if not lengths or min(lengths) < 1 or math.prod(lengths) > MAX_VOXELS:
        raise DataError(f"{path}: its header claims {lengths or num_axes} voxels, at most {MAX_VOXELS} are an atlas")
    if not 0 <= offset <= MAX_HEADER_BYTES:
        raise DataError(f"{path}: its header claims that the voxels begin at byte {offset:g}")
