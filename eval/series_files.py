"""Series files as they lie: one recording a file, time first, columns in the order of an atlas.

``.npy`` arrays, ``.csv`` and ``.tsv`` tables with or without one line of column names. What could be read in two ways
is refused. All else (images, CIFTI, censoring, coverage, cleaning, resampling) is what ``data_prep/prepare.py`` does.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.atlas import Atlas
from brainlm.errors import ConfigError, DataError
from brainlm.recording import Recording
from brainlm.store import Store

SUFFIXES = (".npy", ".csv", ".tsv")
ENTITY = re.compile(r"(?:^|_)(sub|ses|task|run)-([A-Za-z0-9]+)")
MISSING = ["", "n/a", "N/A", "na", "NA", "nan", "NaN"]
PREPARE = "python data_prep/prepare.py --config CONFIG contract=CHECKPOINT"


def find_files(given: Sequence[str]) -> list[str]:
    """Return the series files that names and patterns stand for, each once, in order of their recording ids.

    Raises
    ------
    ConfigError
        If a pattern finds nothing, a file is of another kind, or two files would be the same recording.
    """
    by_id: dict[str, str] = {}
    for url in expand(given):
        if PurePosixPath(url).suffix not in SUFFIXES:
            raise ConfigError(
                f"data: {url} is neither a prepared data set nor a series file ({', '.join(SUFFIXES)}). Images and "
                f"other files are prepared first, as the checkpoint wants them: {PREPARE}; then data=DATASET"
            )
        name = recording_id_of(url)
        if name in by_id:
            raise ConfigError(f"data: {url} and {by_id[name]} would both be recording {name!r}: give one of them")
        by_id[name] = url
    return [by_id[name] for name in sorted(by_id)]


def expand(given: Sequence[str]) -> list[str]:
    """Return the files that names and patterns stand for, each once.

    Raises
    ------
    ConfigError
        If a pattern finds nothing, or has wildcards in its folder.
    """
    found: list[str] = []
    for name in given:
        folder, _, last = name.rpartition("/")
        if any(c in folder for c in "*?["):
            raise ConfigError(f"data: {name}: wildcards can be in the file name alone, not in its folder")
        if not any(c in last for c in "*?["):
            found.append(name)
            continue
        store = Store(folder or ("/" if name.startswith("/") else "."))
        here = [f"{folder}/{file}" if "/" in name else file for file in store.names() if fnmatchcase(file, last)]
        if not here:
            raise ConfigError(f"data: {name} finds no file")
        found += here
    return list(dict.fromkeys(found))


def recording_id_of(url: str) -> str:
    """Return the file's name without its ending."""
    return PurePosixPath(url).stem


def read_series_file(url: str, atlas: Atlas, tr_s: float) -> Recording:
    """Read one recording; every timepoint counts as kept, a column that is not finite as a missing parcel.

    Parameters
    ----------
    url : str
        Its name gives the ids: ``sub-``, ``ses-``, ``task-`` and ``run-`` where they are in it.
    atlas : Atlas
        Whose parcels the columns are. Columns with the names of the parcels may come in any order.
    tr_s : float
        Seconds between timepoints.

    Raises
    ------
    DataError
        If it is no table of numbers (T, P) for the parcels of the atlas, or which axis is time cannot be told.
    StoreError
        If it cannot be read.
    """
    folder, _, name = url.rpartition("/")
    data = Store(folder or ("/" if url.startswith("/") else ".")).read_bytes(name)
    if name.endswith(".npy"):
        bold, names = _read_npy(data), None
    else:
        bold, names = _read_text(data, "\t" if name.endswith(".tsv") else ",", atlas)
    T, P = bold.shape
    if names is not None:
        bold = bold[:, _columns(names, atlas)]
    elif T == P == atlas.num_parcels:
        raise DataError(
            f"{T} rows and {P} columns, as many as {atlas.name} has parcels: which of them is time cannot be told. "
            "Write it as .csv or .tsv with the names of the parcels in the first line"
        )
    elif atlas.num_parcels != P:
        hint = ": time comes first, so transpose it" if atlas.num_parcels == T else ""
        raise DataError(f"{T} rows and {P} columns, {atlas.name} has {atlas.num_parcels} parcels{hint}")
    words = dict(ENTITY.findall(PurePosixPath(url).stem))
    return Recording(
        recording_id=recording_id_of(url),
        subject=words.get("sub", ""),
        session=words.get("ses", ""),
        task=words.get("task", ""),
        run=words.get("run", ""),
        bold=bold,
        tr_s=tr_s,
    )


def _read_npy(data: bytes) -> NDArray[np.float32]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"it is not an .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"expected numbers (timepoints, parcels), found {what}")
    return array.astype(np.float32)


def _read_text(data: bytes, delimiter: str, atlas: Atlas) -> tuple[NDArray[np.float32], list[str] | None]:
    """Return the numbers, and the names of the columns where the first line holds them."""
    try:
        first = next(csv.reader([data.split(b"\n", 1)[0].decode("utf-8-sig").strip("\r")], delimiter=delimiter), [])
        names = [word.strip() for word in first]
        if not _are_names(names, atlas):
            names = []
        table = pd.read_csv(
            io.BytesIO(data),
            sep=delimiter,
            header=None,
            skiprows=1 if names else 0,
            na_values=MISSING,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
        values = table.to_numpy(dtype=np.float32)
    except (ValueError, UnicodeDecodeError, csv.Error) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"it is not a table of numbers: {error}") from error
    if names and len(names) != values.shape[1]:
        raise DataError(f"{len(names)} names in the first line, {values.shape[1]} columns below")
    return values, names or None


def _are_names(words: list[str], atlas: Atlas) -> bool:
    """Tell whether a first line names the columns. Plain numberings and the atlas' labels do: no signal is so."""
    if any(not _is_number(word) for word in words if word not in MISSING):
        return True
    count = len(words)
    numberings = (range(count), range(1, count + 1), atlas.labels.tolist())
    return count > 1 and any(words == [str(number) for number in line] for line in numberings)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _columns(names: list[str], atlas: Atlas) -> list[int]:
    """Return the column of each parcel of the atlas."""
    numberings = [[str(number) for number in line] for line in (range(len(names)), range(1, len(names) + 1))]
    labels = [str(label) for label in atlas.labels.tolist()]
    if len(names) == atlas.num_parcels and (names == labels or names in numberings):
        return list(range(len(names)))
    if sorted(names) == sorted(atlas.parcel_names):
        return [names.index(parcel) for parcel in atlas.parcel_names]
    unknown = [name for name in names if name not in set(atlas.parcel_names)]
    lacking = [parcel for parcel in atlas.parcel_names if parcel not in set(names)]
    raise DataError(
        f"the first line does not name the parcels of {atlas.name} (not among them: {unknown[:3]}; lacking: "
        f"{lacking[:3]}). Leave it out only if the columns are in their order"
    )
