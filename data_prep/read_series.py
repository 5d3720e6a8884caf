"""Read parcel series that another program has made: ``.npy``, or text (``.csv``, ``.tsv``, ``.txt``, ``.1D`` ...).

Which axis is time is stated by the settings, or told by names of parcels along one axis, or by an axis that has as
many entries as the atlas has parcels; where that leaves two answers, the file is refused. See `data_prep.parcel_names`
for names, `data_prep.text_series` for text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.parcel_names import ParcelNames, num_known, parcel_order
from data_prep.settings import Orientation
from data_prep.text_series import MAX_VALUES, TextTable, read_text_table

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".1d", ".dat")
BLOCK_VALUES = 2**19  # values read at a time: 4 MiB
MAX_NPY_HEADER = 4096  # bytes; an array of numbers needs about 100


def read_series(
    path: str | Path,
    num_parcels: int,
    orientation: Orientation,
    parcel_names: Sequence[str] = (),
    labels: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Read one recording.

    Parameters
    ----------
    path : path
    num_parcels : int
        Parcels of the atlas; one axis must have this length.
    orientation : str
        Which axis is time; ``from_atlas`` decides by names of parcels, then by `num_parcels`, and refuses when both
        axes have that length.
    parcel_names, labels : sequences
        Of the atlas, where names in the file are to be matched: another order is brought into the atlas', unknown,
        missing and double names are refused. None are matched where these are not given.

    Returns
    -------
    ndarray, shape (T, P), float32
        Values that are not finite stay as they are.

    Raises
    ------
    DataError
        If the file is not a two-dimensional table of numbers with `num_parcels` columns, or not the bytes that its
        header promises.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path.name}")
    name = path.name.lower()
    if name.endswith(".npy"):
        table = TextTable(_read_npy(path), None, None)
    elif name.removesuffix(".gz").endswith(TEXT_SUFFIXES):
        table = read_text_table(path)
    else:
        raise DataError(
            f"cannot read {path.suffix or 'files without a suffix'}: expected .nii, .nii.gz, .dtseries.nii, "
            f".ptseries.nii, .npy, or text ({', '.join(TEXT_SUFFIXES)}, also with .gz)"
        )
    atlas = ParcelNames(tuple(parcel_names), tuple(int(label) for label in labels))
    if atlas.labels:
        table = _labels_as_names(table, atlas)
    axis = _parcel_axis(table, num_parcels, orientation, atlas)
    bold = table.values if axis == 1 else table.values.T
    names = table.column_names if axis == 1 else table.row_names
    order = None
    if atlas.names and (num_known(names, atlas) or bold.shape[1] == num_parcels):
        order = parcel_order(names, atlas, orientation)
    if bold.shape[1] != num_parcels:
        raise DataError(
            f"expected {num_parcels} columns, one for each parcel of the atlas; found {bold.shape[1]} columns of "
            f"{len(bold)} timepoints"
        )
    if order is not None:
        bold = bold[:, order]
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(bold, dtype=np.float32)


def missing_columns(bold: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return shape (P,): True where a series is constant or has a value that is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = bold.min(axis=0), bold.max(axis=0)  # NaN where a value is
        return ~(np.isfinite(low) & np.isfinite(high) & (high - low > 0))


def _parcel_axis(table: TextTable, num_parcels: int, orientation: Orientation, atlas: ParcelNames) -> int:
    """Return which axis of the table holds the parcels."""
    named = [axis for axis, names in enumerate((table.row_names, table.column_names)) if num_known(names, atlas)]
    if orientation != "from_atlas":
        axis = 0 if orientation == "parcels_by_timepoints" else 1
        if named == [1 - axis]:
            raise DataError(
                f"source.orientation says {orientation}, but the {('first column', 'header')[1 - axis]} holds names of "
                "the atlas' parcels"
            )
        return axis
    if len(named) == 1:
        return named[0]
    fits = [axis for axis in (0, 1) if table.values.shape[axis] == num_parcels]
    if len(fits) == 2:
        raise DataError(
            f"ambiguous: both axes of {table.values.shape} have as many entries as the atlas has parcels; "
            "set source.orientation"
        )
    return 0 if fits == [0] else 1


def _labels_as_names(table: TextTable, atlas: ParcelNames) -> TextTable:
    """Take a first row or column that holds the atlas' labels for what it is: names, not a timepoint."""
    values, rows, columns = table.values, table.row_names, table.column_names
    labels = np.asarray(atlas.labels, dtype=np.float32)
    if labels.size < 3:
        return table
    if columns is None and values.shape[1] == labels.size and np.array_equal(np.sort(values[0]), labels):
        columns, values = [f"{value:.0f}" for value in values[0]], values[1:]
        rows = rows and rows[1:]
    elif rows is None and values.shape[0] == labels.size and np.array_equal(np.sort(values[:, 0]), labels):
        rows, values = [f"{value:.0f}" for value in values[:, 0]], values[:, 1:]
        columns = columns and columns[1:]
    return TextTable(values, rows, columns)


def _read_npy(path: Path) -> NDArray[np.float32]:
    """Return an array of numbers, once the header agrees with the file's size; nothing is unpickled."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(b"PK"):
            raise DataError("expected one array, found an archive of several (.npz)")
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise DataError(f"not a readable .npy array: format {version[0]}.{version[1]} is not one of numbers")
            shape, fortran_order, dtype = read_header(file, max_header_size=MAX_NPY_HEADER)
        except DataError:
            raise
        except (ValueError, EOFError, OSError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"not a readable .npy array: {error}") from error
        offset = file.tell()
        num_bytes = os.fstat(file.fileno()).st_size - offset
    if dtype.hasobject:
        raise DataError("not a readable .npy array: it holds pickled objects, which are never loaded")
    if len(shape) != 2 or dtype.kind not in "iuf" or dtype.subdtype is not None:
        raise DataError(f"expected a table of numbers (time, parcels), found {dtype} of shape {shape}")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != num_bytes:
        raise DataError(
            f"cut off or damaged: the header promises {dtype} of shape {shape}, {math.prod(shape) * dtype.itemsize} "
            f"bytes; the file has {num_bytes}"
        )
    if not 0 < math.prod(shape) <= MAX_VALUES:
        raise DataError(f"shape {shape}: expected 1 to {MAX_VALUES} values")
    values = np.empty(math.prod(shape), dtype=np.float32)
    with path.open("rb") as file, np.errstate(over="ignore"):
        file.seek(offset)
        for first in range(0, len(values), BLOCK_VALUES):  # of another type the whole would be twice as large
            part = values[first : first + BLOCK_VALUES]
            block = np.fromfile(file, dtype, len(part))
            if len(block) < len(part):
                raise DataError("cut off while it was read")
            part[:] = block
    return values.reshape(shape, order="F" if fortran_order else "C")
