"""Scans to parcel series: stream an image volume by volume into one sparse product a volume.

Memory holds a few volumes, whatever the length of the scan. Before anything is averaged, the image must show that it
lies in the template space of the atlas (`data_prep.space_check`).
"""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.atlas_image import AtlasImage, Grid
from data_prep.nifti_stream import NiftiHeader, NiftiStream
from data_prep.settings import CheckSettings, MeanOver
from data_prep.space_check import check_claimed_space, check_overlap

LONGEST_TR_S = 30.0  # a larger number is milliseconds in a header that says seconds
TR_TOLERANCE = 2e-3  # relative: headers are float32 and sidecars are rounded


@dataclass(frozen=True, kw_only=True)
class Parcellated:
    """Parcel means of one image, in its own units.

    Attributes
    ----------
    bold : ndarray, shape (T, P), float32
        Mean over the parcel's voxels with signal on the image's grid (or over all, like nilearn's masker, those without
        counting as 0), summed in float64. A voxel has signal unless it is 0 in every volume or never finite. A parcel
        is missing if and only if its column is NaN: its coverage is 0 or below ``checks.min_parcel_coverage``, or one
        of its voxels is NaN (or infinite) now and then, which would put steps into the mean.
    coverage : ndarray, shape (P,), float32
        Measured for every parcel, missing or not: the fraction of its voxels inside the field of view (on the atlas'
        own grid) times the fraction of its voxels on the image's grid whose signal is finite in every volume and not 0
        in all.
    tr_s : float
    tsnr : float or None
        Temporal signal-to-noise ratio: the median, over a sample of the labelled voxels, of mean / standard deviation
        over all volumes (divided by T). The sample is `Grid.sampled`, about every sixteenth labelled voxel, always the
        same ones; voxels without variance or not always finite are left out. None if none is left.
    """

    bold: NDArray[np.float32]
    coverage: NDArray[np.float32]
    tr_s: float
    tsnr: float | None


def parcellate(
    path: str | Path,
    atlas: AtlasImage,
    *,
    space: str,
    tr_s: float | None,
    tr_from: str,
    checks: CheckSettings,
    mean_over: MeanOver = "covered",
) -> Parcellated:
    """Average an image over the parcels of an atlas.

    The result does not depend on how the image is stored (order of axes, byte order, type, compression) but for the
    rounding of what is stored, and is the same bits in every run. One thread computes while another decompresses.

    Parameters
    ----------
    path : path
        4-D NIfTI-1 or NIfTI-2, ``.nii`` or ``.nii.gz``, integers or floats of any size, scaling and byte order.
    space : str
        Template space that the file's name or the settings claim; "" if none.
    tr_s : float or None
        Repetition time from `tr_from`, to be compared with the header's.
    mean_over : {"covered", "all"}
        Voxels that a mean is over: those with signal, or all, those without counting as 0.

    Raises
    ------
    DataError
        With what was expected and found: not a 4-D image, cut off, not what its header says, too large (limits in
        `data_prep.nifti_stream`), no or two repetition times, not in a template space.
    """
    with NiftiStream(path) as image, closing(image.volumes()) as volumes:
        header = image.header
        tr_s = _repetition_time(header.tr_s, tr_s, tr_from)
        check_claimed_space(header, space)
        grid = atlas.on_grid(header.shape, header.affine, space)
        first = next(volumes)
        check_overlap(first, header, atlas, grid, checks)
        means = _Means(header, grid)
        for volume in itertools.chain([first], volumes):
            means.add(volume)
    return means.result(tr_s, checks, mean_over)


def _repetition_time(in_header: float | None, tr_s: float | None, tr_from: str) -> float:
    if in_header is None:
        if tr_s is None:
            raise DataError("no repetition time: the header has none, and neither sidecar nor table gives it")
        return tr_s
    if tr_s is not None and abs(in_header - tr_s) > TR_TOLERANCE * tr_s:
        raise DataError(f"repetition time: {tr_s:g} s by {tr_from}, {in_header:g} s in the image's header")
    if tr_s is None and in_header > LONGEST_TR_S:
        raise DataError(f"repetition time: the header says {in_header:g} s; are these milliseconds? Give source.tr_s")
    return in_header if tr_s is None else tr_s


class _Means:
    """Parcel means, coverage and temporal signal-to-noise ratio of volumes that come one by one.

    Sums are taken over stored values, as if these were the voxels, and scaled afterwards: a mean is linear.
    """

    def __init__(self, header: NiftiHeader, grid: Grid) -> None:
        num_voxels, num_parcels = len(grid.voxels), len(grid.num_voxels)
        self._header, self._grid = header, grid
        # Voxels parcel by parcel: the sum of each is one run, half the time of a sparse product.
        order = np.argsort(grid.columns, kind="stable")
        self._voxels, self._columns = grid.voxels[order], grid.columns[order]
        self._sampled = np.argsort(order)[grid.sampled]
        self._filled = np.flatnonzero(grid.num_voxels)
        self._starts = np.searchsorted(self._columns, self._filled)
        self._bold = np.full((header.num_volumes, num_parcels), np.nan, dtype=np.float32)
        self._num_added = 0
        self._stored = np.empty(num_voxels, dtype=header.dtype)
        self._values = np.empty(num_voxels)
        self._never_signal = np.arange(num_voxels)  # positions of the voxels that were 0 in every volume so far
        self._num_bad: NDArray[np.int32] | None = None  # volumes in which each voxel was not finite; None = always 0
        # Sums of the sampled voxels less their first value, and of the squares: accurate however large the mean is.
        self._first = np.zeros(len(grid.sampled))
        self._shifted, self._squares = np.zeros((2, len(grid.sampled)))

    def add(self, volume: NDArray[Any]) -> None:
        """Take the next volume, as stored, flat."""
        np.take(volume, self._voxels, out=self._stored, mode="clip")  # all are in range; "raise" would copy
        with np.errstate(all="ignore"):  # what is not finite in the end is dealt with there
            np.copyto(self._values, self._stored)
            self._bold[self._num_added] = self._parcel_sums() / self._grid.num_voxels
            self._update_signal()
            self._update_variance()
        self._num_added += 1

    def _parcel_sums(self) -> NDArray[np.float64]:
        """Return the sum of the scaled voxels of each parcel; voxels that are not finite become 0, and are counted."""
        header, grid, values = self._header, self._grid, self._values
        sums = self._sums_of(values)
        num_good = grid.num_voxels
        # One voxel that is not finite makes its parcel's sum so; integers always are.
        if header.dtype.kind == "f" and not np.isfinite(sums).all():
            bad = ~np.isfinite(values)
            values[bad] = 0.0
            sums = self._sums_of(values)
            num_good = num_good - np.bincount(self._columns, weights=bad, minlength=len(num_good))
            if self._num_bad is None:
                self._num_bad = np.zeros(len(values), dtype=np.int32)
            self._num_bad += bad
        return np.asarray(header.slope * sums + header.inter * num_good if header.is_scaled else sums)

    def _sums_of(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.zeros(len(self._grid.num_voxels))
        sums[self._filled] = np.add.reduceat(values, self._starts) if len(self._starts) else 0.0
        return sums

    def _update_signal(self) -> None:
        if len(self._never_signal):
            silent = self._values[self._never_signal] * self._header.slope + self._header.inter == 0.0
            self._never_signal = self._never_signal[silent]

    def _update_variance(self) -> None:
        sample = self._values[self._sampled]
        if self._num_added == 0:
            self._first = sample
            return
        sample = sample - self._first
        self._shifted += sample
        self._squares += sample * sample

    def result(self, tr_s: float, checks: CheckSettings, mean_over: MeanOver) -> Parcellated:
        """Return what came of all volumes."""
        grid, num_volumes = self._grid, self._header.num_volumes
        assert self._num_added == num_volumes
        on_grid = grid.num_voxels > 0
        if not np.isfinite(self._bold[:, on_grid]).all():
            volume = int(np.flatnonzero(~np.isfinite(self._bold[:, on_grid]).all(axis=1))[0])
            raise DataError(f"volume {volume + 1} of {num_volumes} has values too large for a signal (float32)")
        good = np.ones(len(grid.voxels), dtype=bool)
        good[self._never_signal] = False
        broken = np.zeros(len(grid.voxels), dtype=bool)
        if self._num_bad is not None:
            good &= self._num_bad == 0
            broken = (self._num_bad > 0) & (self._num_bad < num_volumes)
        num_good = np.bincount(self._columns, weights=good, minlength=len(on_grid))
        if mean_over == "covered":  # voxels without signal have added nothing to the sums
            self._bold *= np.where(num_good > 0, grid.num_voxels / np.maximum(num_good, 1.0), 1.0)
        coverage = num_good / np.maximum(grid.num_voxels, 1) * grid.in_view
        missing = (coverage == 0.0) | (coverage < checks.min_parcel_coverage)
        missing |= np.bincount(self._columns, weights=broken, minlength=len(on_grid)) > 0
        self._bold[:, missing] = np.nan
        return Parcellated(bold=self._bold, coverage=coverage.astype(np.float32), tr_s=tr_s, tsnr=self._tsnr())

    def _tsnr(self) -> float | None:
        num = self._num_added
        with np.errstate(all="ignore"):
            variance = (self._squares - self._shifted**2 / num) / num
            mean = self._header.slope * (self._first + self._shifted / num) + self._header.inter
        usable = (variance > 0) & np.isfinite(variance) & np.isfinite(mean)
        if self._num_bad is not None:
            usable &= self._num_bad[self._sampled] == 0
        if not usable.any():
            return None
        return float(np.median(mean[usable] / (abs(self._header.slope) * np.sqrt(variance[usable]))))
