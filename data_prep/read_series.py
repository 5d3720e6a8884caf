"""Read parcel series that another program has made: .npy, or text (.csv, .tsv, .txt, .1D)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.settings import Orientation

SERIES_SUFFIXES = (".npy", ".csv", ".tsv", ".txt", ".1d")


def read_series(path: str | Path, num_parcels: int, orientation: Orientation) -> NDArray[np.float32]:
    """Read one recording.

    Parameters
    ----------
    path : path
    num_parcels : int
        Parcels of the atlas; one axis must have this length.
    orientation : str
        Which axis is time; ``from_atlas`` decides by `num_parcels` and refuses when both axes have that length.

    Returns
    -------
    ndarray, shape (T, P), float32
        Values that are not finite stay as they are.

    Raises
    ------
    DataError
        If the file is not a two-dimensional table of numbers with `num_parcels` columns.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path.name}")
    series = _read_npy(path) if path.suffix == ".npy" else _read_text(path)
    if series.ndim != 2 or series.dtype.kind not in "iuf":
        raise DataError(f"expected a table of numbers (time, parcels), found {series.dtype} of shape {series.shape}")
    if orientation == "from_atlas":
        fits = [axis for axis in (0, 1) if series.shape[axis] == num_parcels]
        if len(fits) == 2:
            raise DataError(
                f"ambiguous: both axes of {series.shape} have as many entries as the atlas has parcels; "
                "set source.orientation"
            )
        orientation = "parcels_by_timepoints" if fits == [0] else "timepoints_by_parcels"
    if orientation == "parcels_by_timepoints":
        series = series.T
    if series.shape[1] != num_parcels:
        raise DataError(
            f"expected {num_parcels} columns, one for each parcel of the atlas; found {series.shape[1]} columns of "
            f"{len(series)} timepoints"
        )
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(series, dtype=np.float32)


def missing_columns(bold: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return shape (P,): True where a series is constant or has a value that is not finite."""
    finite = np.isfinite(bold).all(axis=0)
    spread = np.ptp(np.where(finite, bold, 0.0), axis=0)
    return ~finite | ~(spread > 0)


def _read_npy(path: Path) -> NDArray[np.generic]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"not a readable .npy array: {error}") from error
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise DataError("expected one array, found an archive of several (.npz)")
    return loaded


def _read_text(path: Path) -> NDArray[np.generic]:
    if path.suffix.lower() not in SERIES_SUFFIXES:
        raise DataError(f"cannot read {path.suffix or 'files without a suffix'}: expected .nii, .nii.gz, .npy, or text")
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    rows = [line.replace(",", " ").replace(";", " ").split() for line in lines]
    if rows and not all(_is_number(cell) for cell in rows[0]):
        rows = rows[1:]  # a header
    elif rows and rows[0] in ([str(i) for i in range(len(rows[0]))], [str(i + 1) for i in range(len(rows[0]))]):
        rows = rows[1:]  # a header that numbers the columns
    if not rows:
        raise DataError("the file has no numbers")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise DataError(f"rows of different lengths: {min(widths)} to {max(widths)} columns")
    try:
        return np.array([[float(cell) if cell.lower() != "n/a" else np.nan for cell in row] for row in rows])
    except ValueError as error:
        raise DataError(f"a cell is not a number: {error}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.lower() == "n/a"
    return True
