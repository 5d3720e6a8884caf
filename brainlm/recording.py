"""One run of one subject after parcellation."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Parcel series of one run, with where it comes from.

    Parameters
    ----------
    recording_id : str
        Unique in its data set; BIDS entities such as ``sub-01_ses-1_task-rest_run-1``. No dots and no slashes
        (a WebDataset key ends at the first dot).
    subject, session, task, run, site, family : str
        BIDS words; "" where unknown.
    bold : ndarray, shape (T, P), float32
        Parcel-mean BOLD, arbitrary units. Values of parcels with zero coverage mean nothing.
    tr_s : float
        Seconds between timepoints.
    keep_mask : ndarray, shape (T,), bool
        True = timepoint kept.
    coverage : ndarray, shape (P,), float32
        Fraction of each parcel's voxels that the image covers, 0 to 1; 0 = the parcel is missing.
    """

    recording_id: str
    subject: str
    bold: NDArray[np.float32]
    tr_s: float
    session: str = ""
    task: str = ""
    run: str = ""
    site: str = ""
    family: str = ""
    keep_mask: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    coverage: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def __post_init__(self) -> None:
        check_recording_id(self.recording_id)
        bold = np.asarray(self.bold)
        if bold.ndim != 2:
            raise DataError(f"{self.recording_id}: bold must have shape (timepoints, parcels), found {bold.shape}")
        num_timepoints, num_parcels = bold.shape
        keep_mask = (
            np.asarray(self.keep_mask, dtype=bool) if len(self.keep_mask) else np.ones(num_timepoints, dtype=bool)
        )
        coverage = (
            np.asarray(self.coverage, dtype=np.float32)
            if len(self.coverage)
            else np.ones(num_parcels, dtype=np.float32)
        )
        if keep_mask.shape != (num_timepoints,) or coverage.shape != (num_parcels,):
            raise DataError(
                f"{self.recording_id}: bold is {bold.shape}, but keep_mask is {keep_mask.shape} and coverage is "
                f"{coverage.shape}"
            )
        if not (np.isfinite(self.tr_s) and self.tr_s > 0):
            raise DataError(f"{self.recording_id}: the repetition time must be above 0 s, found {self.tr_s}")
        object.__setattr__(self, "bold", np.ascontiguousarray(bold, dtype=np.float32))
        object.__setattr__(self, "keep_mask", keep_mask)
        object.__setattr__(self, "coverage", coverage)

    @property
    def num_timepoints(self) -> int:
        return int(self.bold.shape[0])

    @property
    def num_parcels(self) -> int:
        return int(self.bold.shape[1])

    def missing_parcels(self) -> NDArray[np.bool_]:
        """Return shape (P,): True where the parcel carries no signal, being uncovered, constant or not finite."""
        bold = self.bold[self.keep_mask]
        with np.errstate(invalid="ignore"):
            constant = ~(np.ptp(bold, axis=0) > 0) if len(bold) else np.ones(self.num_parcels, dtype=bool)
        return (self.coverage <= 0) | constant | ~np.isfinite(bold).all(axis=0)


def check_recording_id(recording_id: str) -> None:
    """Raise `DataError` unless the id can be a file name and a WebDataset key."""
    if not recording_id or any(c in recording_id for c in "./\\ \t\n\0") or not recording_id.isprintable():
        raise DataError(
            f"recording id {recording_id!r}: expected letters, digits, '-' and '_' without dots, slashes or blanks"
        )
