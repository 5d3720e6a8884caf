"""Match the names that a file gives its parcels with the atlas': series in another order are brought into the atlas'.

A name is a parcel's name in the atlas, or its label (``2001``). Plain numbering from 0 or 1 is no name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.settings import Orientation
from data_prep.source_entry import MAX_LISTED


class ParcelNames(NamedTuple):
    """Names and labels of the parcels of an atlas, in its order."""

    names: tuple[str, ...]
    labels: tuple[int, ...]


def cleaned(name: str) -> str:
    """Return a name without quotes and AFNI's ``#``."""
    return name.strip().strip("\"'").lstrip("#").strip()


def is_numbering(names: Sequence[str]) -> bool:
    """Say whether names count from 0 or 1, and so name nothing."""
    try:
        numbers = [int(cleaned(name)) for name in names]
    except ValueError:
        return False
    return len(numbers) > 2 and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def columns_by_name(names: Sequence[str] | None, atlas: ParcelNames) -> list[int | None] | None:
    """Return the atlas column of each name, None for an unknown one; None if the names say nothing."""
    if not names or is_numbering(names):
        return None
    by_name = {name: column for column, name in enumerate(atlas.names)}
    found = [by_name.get(cleaned(name), by_name.get(name)) for name in names]
    if any(column is not None for column in found):
        return found
    by_label = {str(label): column for column, label in enumerate(atlas.labels)}
    return [by_label.get(cleaned(name)) for name in names]


def num_known(names: Sequence[str] | None, atlas: ParcelNames) -> int:
    return sum(column is not None for column in columns_by_name(names, atlas) or ())


def parcel_order(names: Sequence[str] | None, atlas: ParcelNames, orientation: Orientation) -> NDArray[np.int64] | None:
    """Return where each parcel of the atlas stands among the names; None where the names say nothing.

    Parameters
    ----------
    names : sequence of str or None
        What the file calls its parcels.
    orientation : str
        Unless ``from_atlas``, the user has stated how the file is laid out, and names that are all foreign to the
        atlas are taken in order.

    Raises
    ------
    DataError
        If some names are unknown, absent or double, or all are foreign and nothing was stated. What is missing is
        spelled out.
    """
    found = columns_by_name(names, atlas)
    if names is None or found is None:
        return None
    known = [column for column in found if column is not None]
    if not known:
        if orientation != "from_atlas" and len(names) == len(atlas.names):
            return None
        raise DataError(
            f"none of the {len(names)} names of parcels ({_listed(names)}) is one of the atlas' {len(atlas.names)} "
            f"({_listed(atlas.names)}): name parcels alike (atlas.labels, atlas.name_column), or state by "
            "source.orientation that the file has the parcels in the atlas' order"
        )
    problems = []
    if unknown := [name for name, column in zip(names, found) if column is None]:
        problems.append(f"{len(unknown)} unknown ({_listed(unknown)})")
    if missing := [atlas.names[column] for column in sorted(set(range(len(atlas.names))) - set(known))]:
        problems.append(f"{len(missing)} missing ({_listed(missing)})")
    if double := [atlas.names[column] for column, count in Counter(known).items() if count > 1]:
        problems.append(f"{len(double)} given twice ({_listed(double)})")
    if problems:
        raise DataError(f"the names of parcels are not the atlas': {'; '.join(problems)}")
    return np.argsort(np.asarray(known))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:MAX_LISTED])) + (", ..." if len(names) > MAX_LISTED else "")
