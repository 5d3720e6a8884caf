"""Scans to parcel series: stream an image volume by volume into one sparse product a volume.

Memory holds a few volumes, whatever the length of the scan. Before anything is averaged, the image must show that it
lies in the template space of the atlas; a raw scan in its own space would give numbers for every parcel, all wrong.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.atlas_image import AtlasImage, Grid
from data_prep.settings import CheckSettings

# The brain of the MNI templates, with a margin of about 15 mm: x right, y anterior, z superior.
BRAIN_BOX_MM = np.array([[-90.0, 90.0], [-125.0, 95.0], [-90.0, 100.0]])
BRIGHT = 0.2  # of the 98th percentile of the positive voxels: tissue rather than air
XFORM_NAMES = {0: "unknown", 1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152", 5: "template"}
SECONDS_PER_UNIT = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
LONGEST_TR_S = 30.0  # a larger number is milliseconds in a header that says seconds
TR_TOLERANCE = 2e-3  # relative: headers are float32 and sidecars are rounded


@dataclass(frozen=True, kw_only=True)
class Parcellated:
    """Parcel means of one image, in its own units.

    Attributes
    ----------
    bold : ndarray, shape (T, P), float32
        Mean over all voxels of the parcel on the image's grid, like nilearn's masker; NaN where coverage is 0.
    coverage : ndarray, shape (P,), float32
        Fraction of the parcel's voxels inside the field of view (on the atlas' own grid) times the fraction of its
        voxels on the image's grid whose signal is finite in every volume and not 0 in all.
    tr_s : float
    """

    bold: NDArray[np.float32]
    coverage: NDArray[np.float32]
    tr_s: float


def parcellate(
    path: str | Path, atlas: AtlasImage, *, space: str, tr_s: float | None, tr_from: str, checks: CheckSettings
) -> Parcellated:
    """Average an image over the parcels of an atlas.

    Parameters
    ----------
    path : path
        ``.nii`` or ``.nii.gz``, 4-D, any numeric type, scaling and byte order.
    space : str
        Template space that the file's name or the settings claim; "" if none.
    tr_s : float or None
        Repetition time from `tr_from`, to be compared with the header's.

    Raises
    ------
    DataError
        With what was expected and found: not a 4-D image, cut off, no or two repetition times, not in a template space.
    """
    image = _open(path)
    header = image.header
    shape: tuple[int, ...] = image.shape
    if len(shape) != 4 or shape[3] < 2:
        raise DataError(f"expected a 4-D image (x, y, z, time), found shape {shape}")
    tr_s = _repetition_time(header, tr_s, tr_from)
    affine = np.asarray(image.affine, dtype=np.float64)
    _check_claimed_space(header, affine, space)
    grid = atlas.on_grid(shape[:3], affine)
    volumes = _volumes(Path(path), image)
    first = next(volumes)
    _check_overlap(first, grid, affine, shape, checks)
    return _average(first, volumes, grid, shape[3], tr_s, checks)


def _open(path: str | Path) -> Any:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path.name}")
    try:
        image: Any = nibabel.load(path)
    except (ImageFileError, HeaderDataError) as error:
        raise DataError(f"not a readable NIfTI image: {error}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"the image cannot be read: {error}") from error
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one
        raise DataError(f"expected a NIfTI volume image, found {type(image).__name__}")
    if image.header.get_data_dtype().kind not in "iuf":
        raise DataError(f"voxels of type {image.header.get_data_dtype()} are not a signal")
    return image


def _repetition_time(header: Any, tr_s: float | None, tr_from: str) -> float:
    unit = header.get_xyzt_units()[1]
    if unit not in SECONDS_PER_UNIT:
        raise DataError(f"the header's fourth axis is in {unit}, not in seconds")
    in_header = float(header["pixdim"][4]) * SECONDS_PER_UNIT[unit]
    if not (np.isfinite(in_header) and in_header > 0):
        if tr_s is None:
            raise DataError("no repetition time: the header has none, and neither sidecar nor table gives it")
        return tr_s
    if tr_s is not None and abs(in_header - tr_s) > TR_TOLERANCE * tr_s:
        raise DataError(f"repetition time: {tr_s:g} s by {tr_from}, {in_header:g} s in the image's header")
    if tr_s is None and in_header > LONGEST_TR_S:
        raise DataError(f"repetition time: the header says {in_header:g} s; are these milliseconds? Give source.tr_s")
    return in_header if tr_s is None else tr_s


def _check_claimed_space(header: Any, affine: NDArray[np.float64], space: str) -> None:
    codes = int(header["qform_code"]), int(header["sform_code"])
    found = f"qform {XFORM_NAMES.get(codes[0], codes[0])}, sform {XFORM_NAMES.get(codes[1], codes[1])}"
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise DataError(f"the image's affine is not usable ({found})")
    if space and not space.startswith("MNI"):
        raise DataError(f"native space: expected an image in an MNI template space, its name says space-{space}")
    if max(codes) == 0:
        raise DataError(f"the image has no affine ({found}): its place in a template space is unknown")
    if not space and max(codes) < 2:
        raise DataError(
            f"native space: no template space is claimed for the image, its coordinates are the scanner's ({found}). "
            "Normalise it to the atlas' template first; if it is, set source.space"
        )


def _check_overlap(
    volume: NDArray[Any], grid: Grid, affine: NDArray[np.float64], shape: tuple[int, ...], checks: CheckSettings
) -> None:
    """Refuse an image whose signal does not lie where the atlas and the template's brain are."""
    magnitude = np.nan_to_num(np.abs(volume.astype(np.float32)), nan=0.0, posinf=0.0)
    positive = magnitude[magnitude > 0]
    if positive.size == 0:
        raise DataError("the first volume has no signal at all")
    bright = np.flatnonzero(magnitude > BRIGHT * np.percentile(positive, 98))
    ijk = np.stack(np.unravel_index(bright, shape[:3], order="F"))
    mm = affine[:3, :3] @ ijk + affine[:3, 3:]
    inside = ((mm >= BRAIN_BOX_MM[:, :1]) & (mm <= BRAIN_BOX_MM[:, 1:])).all(axis=0)
    outside = 1.0 - float(inside.mean())
    seen = np.bincount(grid.columns, weights=magnitude[grid.voxels] > 0, minlength=len(grid.in_view)) > 0
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


def _open_stream(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        try:
            from isal import igzip  # type: ignore[import-not-found]  # 2-3 times faster than zlib, where it is installed
        except ImportError:
            return cast(IO[bytes], gzip.open(path, "rb"))
        return cast(IO[bytes], igzip.open(path, "rb"))
    return path.open("rb")


def _volumes(path: Path, image: Any) -> Iterator[NDArray[Any]]:
    """Yield each volume as stored values, flat, first axis fastest; the whole stream is read, so that a cut shows."""
    dtype = image.header.get_data_dtype()
    num_voxels, num_volumes = int(np.prod(image.shape[:3])), image.shape[3]
    slope, inter = image.dataobj.slope, image.dataobj.inter
    nbytes = num_voxels * dtype.itemsize
    with _open_stream(path) as stream:
        for number in range(num_volumes):
            try:
                if number == 0:
                    stream.read(image.dataobj.offset)
                data = stream.read(nbytes)
                if number == num_volumes - 1:
                    stream.read(1)  # the end of a gzip stream carries its checksum
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"damaged or cut off in volume {number + 1} of {num_volumes}: {error}") from error
            if len(data) < nbytes:
                raise DataError(f"cut off: the file ends in volume {number + 1} of {num_volumes}")
            values = np.frombuffer(data, dtype=dtype)
            yield values if slope == 1.0 and inter == 0.0 else values * np.float64(slope) + np.float64(inter)


def _average(
    first: NDArray[Any], rest: Iterator[NDArray[Any]], grid: Grid, num_volumes: int, tr_s: float, checks: CheckSettings
) -> Parcellated:
    from scipy.sparse import csr_array

    num_parcels = len(grid.num_voxels)
    ones = np.ones(len(grid.voxels))
    sums = csr_array((ones, (grid.columns, np.arange(len(grid.voxels)))), shape=(num_parcels, len(grid.voxels)))
    totals = np.zeros((num_volumes, num_parcels))
    num_finite = np.zeros(len(grid.voxels), dtype=np.int32)
    has_signal = np.zeros(len(grid.voxels), dtype=bool)
    volume: NDArray[Any] | None = first
    for number in range(num_volumes):
        assert volume is not None
        values = volume[grid.voxels].astype(np.float64)
        finite = np.isfinite(values)
        if not finite.all():
            values[~finite] = 0.0
        num_finite += finite
        has_signal |= values != 0.0
        totals[number] = sums @ values
        volume = next(rest, None)
    # A voxel that is NaN now and then would put steps into the mean: such a parcel is missing.
    broken = np.bincount(grid.columns, weights=(num_finite > 0) & (num_finite < num_volumes), minlength=num_parcels)
    good = np.bincount(grid.columns, weights=has_signal, minlength=num_parcels)
    with np.errstate(invalid="ignore", divide="ignore"):
        bold = (totals / grid.num_voxels).astype(np.float32)
        coverage = np.where(grid.num_voxels > 0, good / grid.num_voxels, 0.0) * grid.in_view
    coverage[(broken > 0) | (coverage < checks.min_parcel_coverage)] = 0.0
    bold[:, coverage == 0.0] = np.nan
    return Parcellated(bold=bold, coverage=coverage.astype(np.float32), tr_s=tr_s)
