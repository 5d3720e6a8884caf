"""Read a table of numbers from text, with or without names along either axis.

::

    0.1 0.2 0.3              # comment (AFNI .1D)         label_name,timepoint_0,timepoint_1
    0.4 0.5 0.6              L_V1,L_V2,L_V3               L_V1,0.1,0.4                 (UK Biobank's parcels)
                             0.1,0.2,0.3                  L_V2,0.2,0.5

pandas' parser reads plain numbers. What it cannot read is read once more here, line by line, which either succeeds
(quotes, an empty last column) or says which line is wrong: the slow reader defines what a file means, and the fast one
must agree.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.parcel_names import cleaned, is_numbering

MAX_TEXT_BYTES = 512 * 1024**2  # after decompression: 4800 timepoints of 1000 parcels in 25 characters take 120 MB
MAX_LINE_BYTES = 2 * 1024**2
MAX_LINES = 1024**2
BLOCK_VALUES = 2**19  # values parsed at a time
MAX_VALUES = 10 * 1024**2  # 40 MiB as float32; an hour at 0.7 s takes 5 million for 1000 parcels
MISSING = ("", "n/a", "na", "nan")  # in any case
MISSING_AS_WRITTEN = ("", "n/a", "N/A", "na", "NA", "nan", "NaN", "NAN")
INDEX_NAMES = ("", "index", "unnamed: 0")  # what pandas leaves above a column that numbers the rows
NOT_PLAIN = re.compile(r'"|rue|RUE|alse|ALSE')
WHITESPACE = re.compile(r'"[^"]*"|\S+')


@dataclass(frozen=True)
class TextTable:
    """Numbers ``(rows, columns)`` float32, and the names along each axis (None where there are none)."""

    values: NDArray[np.float32]
    row_names: list[str] | None
    column_names: list[str] | None


@dataclass(frozen=True)
class _Layout:
    """How a file is written.

    ``delimiter`` "" means any whitespace. ``header`` holds the names of the columns, which the first line carries
    (``has_header_line``) or a comment above it. ``has_labels``: the first column names the rows.
    """

    delimiter: str
    header: list[str] | None
    has_labels: bool
    inline_comments: bool
    has_header_line: bool = False

    def split(self, line: str) -> list[str]:
        return _split(line, self.delimiter)


def read_text_table(path: Path) -> TextTable:
    """Read a text table, decompressed in passing where its name ends in ``.gz``, in bounded memory.

    Raises
    ------
    DataError
        If a line is wrong, naming it, or the text is larger than a recording can be.
    """
    layout = _find_layout(path)
    try:
        values, labels = _read_fast(path, layout)
    except DataError:
        raise
    except ValueError:
        values, labels = _read_slow(path, layout)
    header = layout.header
    if header is not None and len(header) == values.shape[1] + 1 and not header[-1]:
        header = header[:-1]
    if header is not None and len(header) != values.shape[1]:
        raise DataError(f"the header has {len(header)} names for {values.shape[1]} columns of numbers")
    if labels is None and min(values.shape) > 1 and is_numbering([f"{value:.9g}" for value in values[:, 0]]):
        labels, values = [f"{value:.0f}" for value in values[:, 0]], values[:, 1:]  # the rows' numbers, not a series
        header = header and header[1:]
    return TextTable(values, labels, header)


def _find_layout(path: Path) -> _Layout:
    """Tell from the first two lines, and the comment above them, what a file has besides numbers."""
    is_1d = path.name.lower().removesuffix(".gz").endswith(".1d")
    comments: list[str] = []
    first = [line for _, line in islice(_lines(path, is_1d, comments), 2)]
    if not first:
        raise DataError("the file has no numbers")
    found = next((mark for mark in (";", "\t", ",") if mark in first[0].strip()), "")
    delimiter = "" if is_1d and found == "\t" else found  # AFNI ends lines with a tab
    rows = [_split(line, delimiter) for line in first]
    above, below = rows[0], rows[-1]
    if len(rows) == 1:
        has_labels = len(above) > 1 and not _is_cell(above[0])
        return _Layout(delimiter, None, has_labels, is_1d)
    texts = [not _is_cell(cell) for cell in above]
    # Text above a number, beside whole numbers, heads a row of labels: a column of labels would go on with text.
    has_names = any(texts[1:]) and not any(map(_is_number, above[1:]))  # a line with a slip in it is no header
    is_header = (
        has_names
        or is_numbering(above)
        or is_numbering(above[1:])
        or (texts[0] and _is_cell(below[0]) and all(cell.strip().isdigit() for cell in above[1:]))
    )
    if not is_header:
        has_labels = len(above) > 1 and texts[0]
        header = _names_in_comment(comments, delimiter, len(above) - has_labels)
        return _Layout(delimiter, header, has_labels, is_1d)
    names = [cleaned(cell) for cell in above]
    if len(below) == len(above) + 1:  # a header that leaves the corner out
        return _Layout(delimiter, names, True, is_1d, has_header_line=True)
    has_labels = len(above) > 1 and (not _is_cell(below[0]) or names[0].lower() in INDEX_NAMES)
    return _Layout(delimiter, names[1:] if has_labels else names, has_labels, is_1d, has_header_line=True)


def _names_in_comment(comments: list[str], delimiter: str, num_columns: int) -> list[str] | None:
    """Return the names in the last comment above the numbers, if there is one a column (C-PAC: ``#2001 #2002``)."""
    if not comments:
        return None
    names = [cleaned(cell) for cell in _split(comments[0].lstrip().removeprefix("#"), delimiter)]
    names = [name for name in names if name]
    return names if len(names) == num_columns else None


class _Fast:
    """The numbers of a file as a stream for pandas' parser, one line at a time.

    Raises `ValueError` where only the slow reader can tell what a line means: quotes, rows of different lengths.
    """

    def __init__(self, path: Path, layout: _Layout) -> None:
        self.labels: list[str] | None = [] if layout.has_labels else None
        self.delimiter = layout.delimiter
        self.lines = _limited(_data_lines(path, layout), layout)
        self.width = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.read, "")

    def read(self, size: int = -1) -> str:
        """Return one line, whatever size is asked for; "" at the end."""
        for _, line in self.lines:
            if NOT_PLAIN.search(line) or (self.delimiter and line.rstrip(" ").endswith(self.delimiter)):
                raise ValueError("quotes, words that pandas takes for 0 and 1, or an empty last cell")
            if self.labels is not None:
                label, line = _first_cell(line, self.delimiter)
                self.labels.append(cleaned(label))
            width = line.count(self.delimiter) + 1 if self.delimiter else len(line.split())
            self.width = self.width or width
            if width != self.width:
                raise ValueError("rows of different lengths")
            return f"{line}\n"
        return ""


def _read_fast(path: Path, layout: _Layout) -> tuple[NDArray[np.float32], list[str] | None]:
    stream = _Fast(path, layout)
    parser = pd.read_csv(
        cast(IO[str], stream),
        sep=layout.delimiter or r"\s+",
        header=None,
        dtype=np.float64,
        keep_default_na=False,
        na_values=list(MISSING_AS_WRITTEN),
        skipinitialspace=True,
        skip_blank_lines=False,
        iterator=True,
    )
    blocks = []  # the whole in double precision would take three times the memory
    with parser, np.errstate(over="ignore"), suppress(StopIteration):
        while True:
            blocks.append(parser.get_chunk(max(1, BLOCK_VALUES // stream.width)).to_numpy().astype(np.float32))
    return np.concatenate(blocks), stream.labels


def _first_cell(line: str, delimiter: str) -> tuple[str, str]:
    if delimiter:
        label, _, rest = line.partition(delimiter)
        return label, rest
    label, *rest_of = line.split(None, 1)
    return label, rest_of[0] if rest_of else ""


def _read_slow(path: Path, layout: _Layout) -> tuple[NDArray[np.float32], list[str] | None]:
    labels: list[str] | None = [] if layout.has_labels else None
    rows: list[NDArray[np.float32]] = []
    width_at: dict[int, int] = {}  # the first line of each number of columns
    last_is_empty = True
    for number, line in _limited(_data_lines(path, layout), layout):
        cells = layout.split(line)
        if labels is not None:
            labels.append(cleaned(cells[0]))
            cells = cells[1:]
        width_at.setdefault(len(cells), number)
        last_is_empty = last_is_empty and bool(cells) and not cells[-1].strip()
        rows.append(_numbers(cells, number, 1 + layout.has_labels))
    if len(width_at) > 1:
        few, many = min(width_at), max(width_at)
        raise DataError(
            f"rows of different lengths: {few} to {many} columns (line {width_at[many]} has {many}, line "
            f"{width_at[few]} has {few})"
        )
    values = np.stack(rows)
    is_named = layout.header is not None and len(layout.header) == values.shape[1] and layout.header[-1] != ""
    if last_is_empty and not is_named and values.shape[1] > 1:  # a delimiter at the end of every line
        values = values[:, :-1]
    return values, labels


def _numbers(cells: list[str], line: int, first: int) -> NDArray[np.float32]:
    out = np.empty(len(cells), dtype=np.float64)
    for column, cell in enumerate(cells):
        word = cell.strip().strip('"')
        try:
            if "_" in word:  # Python reads 1_000 as a number
                raise ValueError
            out[column] = np.nan if word.lower() in MISSING else float(word)
        except ValueError:
            raise DataError(f"line {line}, column {column + first}: expected a number, found {word[:40]!r}") from None
    with np.errstate(over="ignore"):
        return out.astype(np.float32)


def _data_lines(path: Path, layout: _Layout) -> Iterator[tuple[int, str]]:
    return islice(_lines(path, layout.inline_comments, []), int(layout.has_header_line), None)


def _limited(lines: Iterator[tuple[int, str]], layout: _Layout) -> Iterator[tuple[int, str]]:
    """Pass lines on until they hold more numbers than a recording can have."""
    left = MAX_VALUES
    width = 0
    for number, line in lines:
        width = width or max(1, len(layout.split(line)))
        left -= width
        if left < 0:
            raise DataError(f"more than {MAX_VALUES} numbers by line {number}: this is no recording")
        yield number, line


def _lines(path: Path, inline_comments: bool, comments: list[str]) -> Iterator[tuple[int, str]]:
    """Yield line number and text of the lines that hold something; `comments` holds the last comment so far."""
    total = 0
    try:
        with _open(path) as stream:
            number = 0
            while data := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(data)
                if len(data) > MAX_LINE_BYTES:
                    raise DataError(f"line {number} is longer than {MAX_LINE_BYTES} bytes: this is no recording")
                if total > MAX_TEXT_BYTES or number > MAX_LINES:
                    raise DataError(
                        f"line {number}, after {total} bytes: this is no recording (at most {MAX_LINES} lines and "
                        f"{MAX_TEXT_BYTES} bytes)"
                    )
                line = data.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").rstrip("\r\n")
                bare = line.lstrip()
                if bare.startswith("#"):
                    comments[:] = [line]
                    continue
                if inline_comments and "#" in line:
                    line = line.partition("#")[0]
                    bare = line.strip()
                if bare.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _split(line: str, delimiter: str) -> list[str]:
    if not delimiter:
        return WHITESPACE.findall(line)
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"the line {line[:40]!r} cannot be taken apart: {error}") from error


def _is_cell(cell: str) -> bool:
    """Say whether a cell can be a value: a number, or missing."""
    return cell.strip().strip('"').lower() in MISSING or _is_number(cell)


def _is_number(cell: str) -> bool:
    word = cell.strip().strip('"')
    try:
        float(word)
    except ValueError:
        return False
    return "_" not in word and word.lower() not in MISSING
