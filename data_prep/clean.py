"""Remove confounds, trend and frequencies from parcel series, in one projection fitted on kept timepoints.

The design holds an intercept, a linear trend (`detrend`), the discrete cosines (DCT-II over the recording's own time
grid) outside of the pass band, and the confounds. What is left is orthogonal to all of it at the kept timepoints; the
means are put back.

* One projection: filtering after regression, or regression after filtering, brings back what the first step took out
  (Hallquist, Hwang and Luna 2013, NeuroImage 82; Lindquist, Geuter, Wager and Caffo 2019, Human Brain Mapping 40).
  Cosines outside of the pass band are a filter that can share a design with confounds (Caballero-Gaudes and Reynolds
  2017, NeuroImage 154, on AFNI's 3dTproject).
* Kept timepoints alone decide: values at censored ones take part in nothing, and are replaced by linear interpolation
  between kept neighbours of the cleaned series (Power et al. 2012, NeuroImage 59; 2014, NeuroImage 84).

The design would have as many columns as the recording has timepoints, so that it is never built. Let the rows of a
series be y, with zeros at censored timepoints; N the projection on the pass band, which is a DCT, zeroing, and the
inverse DCT; E the columns of the identity at the censored timepoints. Then r = N (y + E z) is the residual of least
squares on the kept timepoints for the z that makes r zero at the censored ones: r is orthogonal to the stop band and
lives on kept timepoints, so that it is orthogonal to the stop band there, and y - r is in its span. The system for z,
``E'N E z = -E'N y``, is only as large as the number of censored timepoints (the Woodbury identity for the normal
equations of the cosines). Confounds go through the same step, and are then regressed out (Frisch and Waugh 1933,
Econometrica 1: the same as one regression on both).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, fft, idct
from scipy.linalg import qr, solve_triangular
from scipy.linalg.lapack import dpstrf

from brainlm.errors import DataError
from data_prep.settings import CleanSettings

FloatArray = NDArray[np.float64]

# Fewer dimensions than these are no recording: chance correlations between parcels would be about 0.3.
MIN_DEGREES_OF_FREEDOM = 10
# The system of the censored timepoints is dense: 72 MB at this size.
MAX_CENSORED = 3000
# A censored timepoint adds a constraint if the pass band has more than this (squared, of 1) there that the others do
# not fix already. In a long gap most do not; following them would remove dimensions by rounding.
NEW_CONSTRAINT = 1e-10
# A confound of which the rest of the design leaves less than this fraction is a combination of the rest: tables are
# rounded to about seven digits.
NEW_CONFOUND = 1e-5
FLOAT32 = 2.0**-23  # the series hold no more digits
BLOCK_VALUES = 2**19  # values worked on at a time: 4 MiB


def clean(
    bold: NDArray[np.float32],
    settings: CleanSettings,
    tr_s: float,
    regressors: FloatArray | None,
    keep_mask: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Return cleaned series around their means.

    The same input gives the same bits where the linear algebra library runs with one thread, as it does in a worker.

    Parameters
    ----------
    bold : ndarray, shape (T, P), float32
        Finite at kept timepoints; dummy scans are dropped already. Not modified.
    regressors : ndarray, shape (T, K), or None
        Confounds, in any units; finite at kept timepoints. Not modified.
    keep_mask : ndarray, shape (T,), bool
        True = kept. What `bold` and `regressors` hold elsewhere has no influence.

    Returns
    -------
    ndarray, shape (T, P), float32
        In the units of the input. At kept timepoints the residual plus the parcel's mean over kept timepoints; a
        parcel of which nothing is left beyond rounding is constant. At the others, see `fill_censored`. With nothing
        to do, `bold` itself.

    Raises
    ------
    DataError
        If a cut-off is not below the Nyquist frequency, values at kept timepoints are not finite, too few degrees of
        freedom would be left (`MIN_DEGREES_OF_FREEDOM`), or a filter meets too many censored timepoints
        (`MAX_CENSORED`).
    """
    return clean_and_count(bold, settings, tr_s, regressors, keep_mask, overwrite=False)[0]


def clean_and_count(
    bold: NDArray[np.float32],
    settings: CleanSettings,
    tr_s: float,
    regressors: FloatArray | None,
    keep_mask: NDArray[np.bool_],
    *,
    overwrite: bool,
) -> tuple[NDArray[np.float32], int]:
    """Return what `clean` and `degrees_of_freedom` do, with the work of one; `overwrite` cleans `bold` in place."""
    if not _is_asked(settings, regressors):
        return fill_censored(bold, keep_mask, overwrite=overwrite), int(keep_mask.sum())
    projection = Projection(settings, tr_s, regressors, keep_mask)
    projection.check()
    censored = ~keep_mask
    num_kept = int(keep_mask.sum())
    cleaned = bold if overwrite else np.empty(bold.shape, dtype=np.float32)
    for columns in _blocks(bold.shape[1], len(bold)):
        rows = np.array(bold[:, columns].T, dtype=np.float64, order="C")
        rows[:, censored] = 0.0
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{int((~finite).sum())} parcels have NaN or infinite values at kept timepoints; expected finite "
                "series (missing parcels as zeros)"
            )
        mean = rows.sum(axis=1, keepdims=True) / num_kept
        size = np.sqrt((rows**2).sum(axis=1))
        rows -= mean
        rows[:, censored] = 0.0
        rows = projection.residual(rows)
        rows[np.sqrt((rows**2).sum(axis=1)) <= FLOAT32 * size] = 0.0
        cleaned[:, columns] = (rows + mean).T
    return fill_censored(cleaned, keep_mask, overwrite=True), projection.degrees_of_freedom


def degrees_of_freedom(
    settings: CleanSettings, tr_s: float, regressors: FloatArray | None, keep_mask: NDArray[np.bool_]
) -> int:
    """Return how many independent values a parcel has after `clean`: kept timepoints less the rank of the design."""
    if not _is_asked(settings, regressors):
        return int(keep_mask.sum())
    return Projection(settings, tr_s, regressors, keep_mask).degrees_of_freedom


def fill_censored(
    bold: NDArray[np.float32], keep_mask: NDArray[np.bool_], *, overwrite: bool = False
) -> NDArray[np.float32]:
    """Replace censored timepoints by linear interpolation between the nearest kept ones; at the ends, by the nearest.

    Parameters
    ----------
    bold : ndarray, shape (T, P)
        Returned itself where nothing is censored.
    overwrite : bool
        Fill `bold` itself; otherwise it is not modified.

    Returns
    -------
    ndarray, shape (T, P), float32
    """
    kept, censored = np.flatnonzero(keep_mask), np.flatnonzero(~keep_mask)
    if not censored.size:
        return bold
    if not kept.size:
        raise DataError(f"all {len(keep_mask)} timepoints are censored")
    filled = bold if overwrite else np.array(bold, dtype=np.float32)
    after = np.searchsorted(kept, censored)
    left = kept[np.maximum(after - 1, 0)]
    right = kept[np.minimum(after, len(kept) - 1)]
    share = np.clip((censored - left) / np.maximum(right - left, 1), 0.0, 1.0)
    for rows in _blocks(len(censored), bold.shape[1]):
        low, high = filled[left[rows]].astype(np.float64), filled[right[rows]].astype(np.float64)
        filled[censored[rows]] = low + (high - low) * share[rows, None]
    return filled


class Projection:
    """What is left of series after least squares on a design, at kept timepoints. Rows are series, shape (N, T).

    Attributes
    ----------
    degrees_of_freedom : int
        Kept timepoints less the rank of the design.
    """

    def __init__(
        self,
        settings: CleanSettings,
        tr_s: float,
        regressors: FloatArray | None,
        keep_mask: NDArray[np.bool_],
    ) -> None:
        num_timepoints = len(keep_mask)
        assert keep_mask.dtype == np.bool_
        if not keep_mask.any():
            raise DataError(f"all {num_timepoints} timepoints are censored")
        assert regressors is None or len(regressors) == num_timepoints
        self._keep = keep_mask
        self._censored = np.flatnonzero(~keep_mask)
        self._passed = _pass_band(settings, num_timepoints, tr_s)
        self._factor: FloatArray | None = None
        left = int(keep_mask.sum()) - 1
        if self._passed is not None:
            left = int(self._passed.sum())
            if self._censored.size:
                left -= self._fix_censored(self._passed)
        self._num_stopped = int(keep_mask.sum()) - left
        self._confounds = self._orthonormal(settings.detrend, regressors)  # (K', T)
        self.degrees_of_freedom = left - len(self._confounds)

    def check(self) -> None:
        """Refuse a design that leaves next to nothing."""
        if self.degrees_of_freedom < MIN_DEGREES_OF_FREEDOM:
            what = "the mean" if self._passed is None else "the mean and the frequencies outside of the pass band"
            raise DataError(
                f"cleaning leaves {max(self.degrees_of_freedom, 0)} degrees of freedom, expected at least "
                f"{MIN_DEGREES_OF_FREEDOM}: of {len(self._keep)} timepoints {self._censored.size} are censored, {what} "
                f"take {self._num_stopped}, confounds and trend {len(self._confounds)}. Use fewer confounds, a wider "
                "pass band (a low-pass takes most), a laxer clean.scrub, or longer recordings"
            )

    def residual(self, rows: FloatArray) -> FloatArray:
        """Return what is left of centred rows, zero at censored timepoints; `rows`, zero there too, are overwritten."""
        rows = self._filter(rows)
        if len(self._confounds):
            rows -= (rows @ self._confounds.T) @ self._confounds
        return rows

    def _filter(self, rows: FloatArray) -> FloatArray:
        """Take out the intercept, or the cosines outside of the pass band, as fitted on kept timepoints."""
        if self._passed is None:
            rows -= rows.sum(axis=1, keepdims=True) / self._keep.sum()
            rows[:, self._censored] = 0.0
            return rows
        passing = _project(rows, self._passed)
        if self._factor is None:
            return passing
        known = -passing[:, self._censored].T
        known = known[self._order]
        known[self._num_fixed :] = 0.0
        half = solve_triangular(self._factor, known, trans=1, check_finite=False)
        fill = np.empty_like(half)
        fill[self._order] = solve_triangular(self._factor, half, check_finite=False)
        rows[:, self._censored] = fill.T
        passing = _project(rows, self._passed)
        passing[:, self._censored] = 0.0
        return passing

    def _fix_censored(self, passed: NDArray[np.bool_]) -> int:
        """Factorise the pass band's projection at the censored timepoints; return its rank.

        Its element for times i and j is a sum of cosines over the pass band, h(i - j) + h(i + j + 1): a product of two
        cosines is the sum of two. The Cholesky factorisation chooses its pivots, and ends where nothing new is left
        (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 10.3).
        """
        at, num_timepoints = self._censored, len(passed)
        if at.size > MAX_CENSORED:
            raise DataError(
                f"{at.size} of {num_timepoints} timepoints are censored; with a filter at most {MAX_CENSORED} can be: "
                "give the runs one by one, use a laxer clean.scrub, or no filter"
            )
        h = fft(np.concatenate([passed, np.zeros(num_timepoints)])).real / num_timepoints
        system = np.empty((at.size, at.size), order="F")
        for column, time in enumerate(at):
            system[:, column] = h[np.abs(at - time)] + h[(at + time + 1) % (2 * num_timepoints)]
        factor, order, rank, status = dpstrf(system, tol=NEW_CONSTRAINT, overwrite_a=1)
        assert status >= 0
        unused = np.arange(rank, at.size)  # their fill is zero: it would add nothing
        factor[:, unused] = 0.0
        factor[unused, unused] = 1.0
        self._factor, self._order, self._num_fixed = factor, order - 1, rank
        return int(rank)

    def _orthonormal(self, detrend: bool, regressors: FloatArray | None) -> FloatArray:
        """Return orthonormal rows, shape (K', T), that span trend and confounds beyond intercept and filter."""
        num_timepoints, num_kept = len(self._keep), int(self._keep.sum())
        trend = [np.arange(num_timepoints, dtype=np.float64)[:, None]] if detrend else []
        given = [] if regressors is None else [regressors]
        rows = np.concatenate([np.empty((num_timepoints, 0)), *trend, *given], axis=1, dtype=np.float64).T.copy()
        rows[:, self._censored] = 0.0
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).any(axis=1).sum())
            raise DataError(f"{bad} confounds have NaN or infinite values at kept timepoints")
        rows -= rows.sum(axis=1, keepdims=True) / num_kept
        rows[:, self._censored] = 0.0
        spread = np.sqrt((rows**2).sum(axis=1))
        rows = rows[spread > 0] / spread[spread > 0, None]
        for block in _blocks(len(rows), num_timepoints):
            rows[block] = self._filter(rows[block])
        if not len(rows):
            return rows
        basis, weights, _ = qr(rows.T, mode="economic", pivoting=True, overwrite_a=True, check_finite=False)
        rank = int((np.abs(np.diag(weights)) > NEW_CONFOUND).sum())
        return np.ascontiguousarray(basis[:, :rank].T)


def leak_flags(settings: CleanSettings) -> list[str]:
    """List how the cleaning lets a timepoint depend on later ones."""
    flags = []
    if settings.high_pass_hz is not None or settings.low_pass_hz is not None:
        flags.append("the temporal filter is zero-phase: each timepoint depends on later ones")
    if settings.denoises:
        named: list[str] = [settings.strategy] if settings.strategy != "none" else []
        named += ["global signal"] if settings.global_signal else []
        named += [f"{len(settings.confounds)} columns"] if settings.confounds is not None else []
        flags.append(
            f"confounds ({', '.join(named)}) were regressed over the whole run: each timepoint depends on later ones"
        )
    if settings.detrend:
        flags.append("trends were fitted over the whole run: each timepoint depends on later ones")
    if settings.scrub is not None:
        flags.append(
            "censored timepoints were interpolated: each of them depends on the next kept one, and up to "
            f"{settings.scrub.min_segment} later timepoints decided whether one is kept"
        )
    return flags


def _is_asked(settings: CleanSettings, regressors: FloatArray | None) -> bool:
    filtered = settings.high_pass_hz is not None or settings.low_pass_hz is not None
    return regressors is not None or settings.detrend or filtered


def _pass_band(settings: CleanSettings, num_timepoints: int, tr_s: float) -> NDArray[np.bool_] | None:
    """Return which cosines pass, shape (T,), the intercept never; None without a filter."""
    if settings.high_pass_hz is None and settings.low_pass_hz is None:
        return None
    nyquist_hz = 0.5 / tr_s
    for name in ("high_pass_hz", "low_pass_hz"):
        if (value := getattr(settings, name)) is not None and value >= nyquist_hz:
            raise DataError(f"{name} {value:g} is not below the Nyquist frequency {nyquist_hz:g} Hz of TR {tr_s:g} s")
    frequency_hz = np.arange(num_timepoints) / (2.0 * num_timepoints * tr_s)
    passed = frequency_hz > 0
    if settings.high_pass_hz is not None:
        passed &= frequency_hz >= settings.high_pass_hz
    if settings.low_pass_hz is not None:
        passed &= frequency_hz <= settings.low_pass_hz
    return passed


def _project(rows: FloatArray, passed: NDArray[np.bool_]) -> FloatArray:
    """Return the pass band of rows, shape (N, T)."""
    weights = dct(rows, norm="ortho")
    weights[:, ~passed] = 0.0
    return np.asarray(idct(weights, norm="ortho", overwrite_x=True))


def _blocks(count: int, length: int) -> list[slice]:
    """Divide `count` vectors of `length` values into blocks of bounded size."""
    size = max(1, BLOCK_VALUES // max(length, 1))
    return [slice(start, start + size) for start in range(0, count, size)]
