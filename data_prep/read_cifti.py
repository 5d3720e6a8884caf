"""Read CIFTI series: dense ones (``.dtseries.nii``) by an atlas on grayordinates, parcellated ones by their names.

A dense file keeps the series of each grayordinate together, so it is read in blocks of grayordinates, every block
once: memory holds one block and the parcel means, whatever the length of the recording.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.atlas_image import AtlasImage
from data_prep.nifti_stream import check_extensions
from data_prep.parcel_names import ParcelNames, parcel_order
from data_prep.parcellate import TR_TOLERANCE, Parcellated
from data_prep.read_series import missing_columns
from data_prep.settings import CheckSettings, Orientation
from data_prep.text_series import MAX_VALUES

BLOCK_BYTES = 16 * 1024**2  # of float64 values in one block


def read_dense_series(
    path: str | Path, atlas: AtlasImage, *, tr_s: float | None, tr_from: str, checks: CheckSettings
) -> Parcellated:
    """Average a ``.dtseries.nii`` over the parcels of a CIFTI atlas.

    Parameters
    ----------
    path : path
    atlas : AtlasImage
        Read from a ``.dlabel.nii``.
    tr_s : float or None
        Repetition time from `tr_from`, to be compared with the file's.

    Returns
    -------
    Parcellated
        ``coverage`` is the fraction of the parcel's grayordinates in the atlas that the series has, with values that
        are all finite and not all 0 (the medial wall). The mean is over these; below ``checks.min_parcel_coverage``
        the parcel is missing.

    Raises
    ------
    DataError
        If the file is not a dense series in seconds, is cut off, or shares no grayordinate with the atlas.
    """
    from nibabel.cifti2 import BrainModelAxis
    from scipy.sparse import csr_array

    grayordinates = atlas.grayordinates
    if grayordinates is None:
        raise DataError(
            "a dense CIFTI series needs an atlas on grayordinates: set atlas.image to a .dlabel.nii; the atlas "
            f"{atlas.atlas.name} is a volume"
        )
    image, series, models = _open(path, BrainModelAxis, "a dense series")
    tr_s = _repetition_time(series, tr_s, tr_from)
    columns = grayordinates.columns_of(models)
    num_timepoints, num_parcels = image.shape[0], atlas.atlas.num_parcels
    if num_timepoints * num_parcels > MAX_VALUES:
        raise DataError(f"{num_timepoints} timepoints of {num_parcels} parcels are more than {MAX_VALUES} values")
    totals = np.zeros((num_parcels, num_timepoints))
    num_good = np.zeros(num_parcels, dtype=np.int64)
    step = max(1, BLOCK_BYTES // (8 * num_timepoints))
    for first in range(0, len(columns), step):
        here = columns[first : first + step]
        if (here < 0).all():
            continue
        block = _values(image, first, first + len(here))
        good = (here >= 0) & np.isfinite(block).all(axis=0) & (block != 0.0).any(axis=0)
        where = np.flatnonzero(good)
        parcels, rows = np.unique(here[where], return_inverse=True)  # few: sums of all would be as large as the totals
        sums = csr_array((np.ones(where.size), (rows, np.arange(where.size))), shape=(parcels.size, where.size))
        totals[parcels] += sums @ block[:, where].T
        num_good += np.bincount(here[where], minlength=num_parcels)
    coverage = num_good / np.maximum(grayordinates.num_grayordinates, 1)
    bold = np.empty((num_timepoints, num_parcels), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        totals /= np.maximum(num_good, 1)[:, None]
        bold[:] = totals.T
    bold[:, (num_good == 0) | (coverage < checks.min_parcel_coverage)] = np.nan
    return Parcellated(bold=bold, coverage=coverage.astype(np.float32), tr_s=tr_s, tsnr=None)


def read_parcel_series(
    path: str | Path, atlas: AtlasImage, orientation: Orientation, *, tr_s: float | None, tr_from: str
) -> Parcellated:
    """Read a ``.ptseries.nii``; its parcels are matched with the atlas' by name.

    Raises
    ------
    DataError
        If the file is not a parcellated series in seconds, is cut off, or its parcels are not the atlas'.
    """
    from nibabel.cifti2 import ParcelsAxis

    image, series, parcels = _open(path, ParcelsAxis, "a parcellated series")
    tr_s = _repetition_time(series, tr_s, tr_from)
    names = ParcelNames(atlas.atlas.parcel_names, tuple(int(label) for label in atlas.atlas.labels))
    if math.prod(image.shape) > MAX_VALUES:
        raise DataError(f"shape {image.shape}: more than {MAX_VALUES} values")
    order = parcel_order([str(name) for name in parcels.name], names, orientation)
    if image.shape[1] != atlas.atlas.num_parcels:
        raise DataError(f"expected {atlas.atlas.num_parcels} parcels, found {image.shape[1]}")
    bold = np.empty(image.shape, dtype=np.float32)
    step = max(1, BLOCK_BYTES // (8 * image.shape[0]))
    with np.errstate(over="ignore"):
        for first in range(0, image.shape[1], step):
            bold[:, first : first + step] = _values(image, first, first + step)
    if order is not None:
        bold = bold[:, order]
    coverage = np.where(missing_columns(bold), np.float32(0.0), np.float32(1.0))
    return Parcellated(bold=np.ascontiguousarray(bold), coverage=coverage, tr_s=tr_s, tsnr=None)


def _open(path: str | Path, kind: type, what: str) -> tuple[Any, Any, Any]:
    """Return the image and its two axes, once shape, axes and the file's size agree."""
    import nibabel
    from nibabel.cifti2 import SeriesAxis
    from nibabel.filebasedimages import ImageFileError

    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path.name}")
    check_extensions(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel warns of shapes that differ, which is an error below
            image: Any = nibabel.load(path)
            if not isinstance(image, nibabel.Cifti2Image):
                raise DataError(f"expected {what} (CIFTI-2), found {type(image).__name__}")
            axes: list[Any] = [image.header.get_axis(number) for number in range(len(image.shape))]
    except DataError:
        raise
    except (ImageFileError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"not a readable CIFTI file: {type(error).__name__}: {error}") from error
    except Exception as error:  # of the XML parser and nibabel's own kinds
        raise DataError(f"not a readable CIFTI file: {type(error).__name__}: {error}") from error
    kinds = [type(axis) for axis in axes]
    if kinds != [SeriesAxis, kind]:
        found = " by ".join(axis.__name__ for axis in kinds)
        raise DataError(f"expected {what}, axes SeriesAxis by {kind.__name__}; found {found}")
    if image.shape != (len(axes[0]), len(axes[1])) or image.shape[0] < 2:
        raise DataError(
            f"the data have shape {image.shape}, the axes {len(axes[0])} timepoints by {len(axes[1])} entries"
        )
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"values of type {dtype} are not a signal")
    needed = image.dataobj.offset + math.prod(image.shape) * dtype.itemsize
    if path.stat().st_size < needed:
        raise DataError(f"cut off: the header promises {needed} bytes, the file has {path.stat().st_size}")
    return image, axes[0], axes[1]


def _values(image: Any, first: int, stop: int) -> NDArray[np.float64]:
    """Return (T, stop - first): the scaled series of some grayordinates or parcels."""
    try:
        return np.asarray(image.dataobj[:, first:stop], dtype=np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the series cannot be read: {error}") from error


def _repetition_time(series: Any, tr_s: float | None, tr_from: str) -> float:
    if series.unit.upper() != "SECOND":
        raise DataError(f"the series axis is in {series.unit}, expected SECOND")
    in_file = float(series.step)
    if not (math.isfinite(in_file) and in_file > 0):
        if tr_s is None:
            raise DataError("no repetition time: the series axis has none, and neither sidecar nor table gives it")
        return tr_s
    if tr_s is not None and abs(in_file - tr_s) > TR_TOLERANCE * tr_s:
        raise DataError(f"repetition time: {tr_s:g} s by {tr_from}, {in_file:g} s in the file's series axis")
    return in_file if tr_s is None else tr_s
