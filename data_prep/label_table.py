"""Names, networks, hemispheres and coordinates of an atlas' labels, from the tables that atlases come with.

A parcel is found by its label, never by its row. What a table says is checked against the image where it can be: rows
that are one label off, or mirrored, give every parcel a wrong name and no error anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from data_prep.local_input import local_input
from data_prep.read_table import number, read_table, text
from data_prep.settings import AtlasSettings

MAX_TABLE_BYTES = 20_000_000
MAX_LISTED = 5
BACKGROUND = {"background", "unknown", "???", "clear label", "none"}
SIDES = {"l": "L", "lh": "L", "left": "L", "r": "R", "rh": "R", "right": "R"}
HEMISPHERE_WORDS = SIDES | {
    "b": "B",
    "both": "B",
    "bilateral": "B",
    "": "",
    "n/a": "",
    "none": "",
    "m": "",
    "midline": "",
}
MAX_MEDIAN_MM = 5.0  # from given coordinates to the nearest voxel of the parcel


@dataclass(frozen=True, eq=False)
class LabelTable:
    """What a table says of each label, in the order of ``labels (P,)``; None where it does not say it.

    ``coords_mm (P, 3)`` float64, right, anterior, superior.
    """

    labels: NDArray[np.int64]
    names: list[str] | None
    networks: list[str] | None
    hemispheres: list[str] | None
    coords_mm: NDArray[np.float64] | None
    warnings: list[str]


def read_label_table(
    settings: AtlasSettings,
    labels: NDArray[np.int64],
    *,
    header: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> LabelTable:
    """Find each label of an image in the atlas' table.

    A row without a voxel in the image is a parcel all the same where the table says where it lies: it is never
    covered, and the columns of the series stay those of the atlas.

    Parameters
    ----------
    labels : ndarray, shape (P,)
        Labels of the image, above 0, sorted.
    header : sequence of str, optional
        Columns of a table that is known to have no header.
    names : sequence of str, optional
        Names by the image itself (CIFTI); the table then needs none.

    Raises
    ------
    DataError
        If the table lacks a column or a label, names one twice, calls a label of the image background, or places
        parcels elsewhere than the image does.
    """
    assert settings.labels is not None
    path = settings.labels
    table = _read(path, [c for c in _text_columns(settings) if c], header)
    has_names = settings.name_column in table.columns
    wanted = [settings.label_column, settings.network_column, settings.hemisphere_column]
    if header is None and names is None:
        wanted.append(settings.name_column)
    absent = [name for name in wanted if name and name not in table.columns]
    if absent:
        raise DataError(
            f"{path} has no column {', '.join(map(repr, absent))} (it has {', '.join(map(str, table.columns))}): set "
            "atlas.label_column, name_column, network_column or hemisphere_column. A table needs a header line, such "
            "as index, name, x_mm, y_mm, z_mm; without one, only lines of 'index name r g b a' in a .txt are read"
        )
    where = f"{path}: {settings.label_column}"
    rows = {_label(row[settings.label_column], where): row for row in table.to_dict("records")}
    if len(rows) != len(table):
        raise DataError(f"{path}: a label stands in several rows of {settings.label_column!r}")
    unnamed = [int(label) for label in labels if int(label) not in rows]
    if unnamed:
        raise DataError(f"{path} has no row for {len(unnamed)} labels of {settings.image}, for example {unnamed[0]}")
    if has_names:
        empty = [int(v) for v in labels if text(rows[int(v)][settings.name_column]).lower() in BACKGROUND]
        if empty:
            raise DataError(
                f"{path} calls label {empty[0]} {text(rows[empty[0]][settings.name_column])!r}, but {settings.image} "
                "has voxels of it: the rows are numbered from another start than the labels (give the right "
                "atlas.label_column, or mend the table)"
            )
    warnings = []
    has_coords = set(settings.coords_columns) <= set(table.columns)
    extra = sorted(label for label in set(rows) - {int(v) for v in labels} if label > 0)
    if has_names:
        extra = [label for label in extra if text(rows[label][settings.name_column]).lower() not in BACKGROUND]
    if extra:
        what = "are parcels that nothing covers" if has_coords else "are left out, for want of coordinates"
        warnings.append(f"{len(extra)} rows of the atlas table have no voxel in the image and {what}: {extra[:10]}")
    present = labels
    if has_coords:
        labels = np.union1d(labels, np.asarray(extra, dtype=np.int64))
    mine = [rows[int(label)] for label in labels]
    found_names = [text(row[settings.name_column]) for row in mine] if has_names else None
    if names is not None and not has_names:
        known = dict(zip(present.tolist(), names))
        found_names = [known.get(label, f"{settings.name}_{label}") for label in labels.tolist()]
    return LabelTable(
        labels=labels,
        names=found_names,
        networks=[text(row[settings.network_column]) for row in mine] if settings.network_column else None,
        hemispheres=_hemispheres(settings, mine) if settings.hemisphere_column else None,
        coords_mm=_coordinates(settings, labels, mine) if has_coords else None,
        warnings=warnings,
    )


def networks_in_names(names: Sequence[str], pattern: str, where: str) -> tuple[str, ...]:
    """Return the network that each parcel's name holds: the group of `pattern`, which the whole name must match."""
    found = [re.fullmatch(pattern, name) for name in names]
    other = [name for name, match in zip(names, found) if match is None]
    if other:
        raise DataError(
            f"{where}: expected names that hold a network ({pattern}), found {', '.join(other[:MAX_LISTED])}: another "
            "version of the table? Give it as atlas.labels, with atlas.network_column or atlas.network_pattern"
        )
    return tuple(match.group(1) for match in found if match is not None)


def check_places(
    settings: AtlasSettings, table: LabelTable, image_side: NDArray[np.float64], away_mm: NDArray[np.float64] | None
) -> None:
    """Refuse a table whose parcels lie elsewhere than the image's.

    Parameters
    ----------
    image_side : ndarray, shape (P,)
        Below 0 for parcels of the left hemisphere in the image, above 0 of the right, 0 or NaN for neither.
    away_mm : ndarray, shape (P,), or None
        Distance of each parcel's coordinates in the table from the edge of its nearest voxel; NaN where it has none.
        (The centre of mass may lie far from the coordinates that are published for a bilateral parcel.)
    """
    if table.coords_mm is not None:
        seen = np.zeros(0) if away_mm is None else away_mm[np.isfinite(away_mm)]
        if seen.size and np.median(seen) > MAX_MEDIAN_MM:
            raise DataError(
                f"{settings.labels}: its coordinates lie {np.median(seen):.0f} mm (median) outside of the parcels of "
                f"{settings.image}: another order of rows, another sign of x, or voxels instead of millimetres"
            )
        _check_sides(settings, image_side, np.sign(table.coords_mm[:, 0]), "coordinates")
    if table.hemispheres is not None:
        claimed = np.array([{"L": -1.0, "R": 1.0}.get(name, 0.0) for name in table.hemispheres])
        _check_sides(settings, image_side, claimed, f"column {settings.hemisphere_column!r}")


def nearest_mm(
    mm: NDArray[np.float64], column: NDArray[np.integer], coords_mm: NDArray[np.float64], into: NDArray[np.float64]
) -> None:
    """Lower `into` (P,) to each parcel's distance from its coordinates (P, 3) to the nearest of its voxels (V, 3)."""
    np.fmin.at(into, column, np.linalg.norm(mm - coords_mm[column], axis=1))


def _check_sides(
    settings: AtlasSettings, image_side: NDArray[np.float64], claimed: NDArray[np.float64], what: str
) -> None:
    side = np.sign(np.nan_to_num(image_side))
    both = (side != 0) & (claimed != 0)
    wrong = int((side[both] != claimed[both]).sum())
    if wrong > 0.5 * both.sum():
        raise DataError(
            f"{settings.labels}: by its {what}, {wrong} of {both.sum()} parcels lie in the other hemisphere than in "
            f"{settings.image}: left and right are exchanged in one of them, or the labels are numbered otherwise"
        )


def _text_columns(settings: AtlasSettings) -> list[str]:
    return [settings.name_column, settings.network_column or "", settings.hemisphere_column or ""]


def _read(url: str, text_columns: list[str], header: Sequence[str] | None) -> pd.DataFrame:
    with local_input(url) as path:
        if not path.is_file():
            raise DataError(f"there is no table {url}")
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{url}: {path.stat().st_size} bytes are too many for a table of parcels")
        if path.suffix == ".xml":
            return _read_xml(path)
        if header is not None or path.suffix in (".txt", ".lut"):
            return _read_lines(path, header)
        return read_table(path, text_columns)


def _read_lines(path: Path, header: Sequence[str] | None) -> pd.DataFrame:
    """Read words between blanks: columns by `header`, else FreeSurfer's ``index name r g b a``, or a header line."""
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [words for words in lines if words and not words[0].startswith("#")]
    if not lines:
        raise DataError(f"{path}: the table is empty")
    if header is None:
        if all(len(words) == 6 and all(re.fullmatch(r"-?\d+", w) for w in (words[0], *words[2:])) for words in lines):
            header = ("index", "name", "r", "g", "b", "a")
        elif any(re.fullmatch(r"-?[\d.]+", word) for word in lines[0]):
            raise DataError(
                f"{path}: expected lines of 'index name r g b a' (FreeSurfer's colour table) or a line that names the "
                f"columns, found {' '.join(lines[0])[:80]!r} first. Name the columns in a .tsv: index, name, x_mm, ..."
            )
        else:
            header, lines = lines[0], lines[1:]
    uneven = [words for words in lines if len(words) != len(header)]
    if uneven:
        raise DataError(
            f"{path}: expected {len(header)} columns ({' '.join(header)}), found {' '.join(uneven[0])[:80]!r}"
        )
    return pd.DataFrame(lines, columns=list(header), dtype=str)


def _read_xml(path: Path) -> pd.DataFrame:
    """Read ``<label><index>..</index><name>..</name></label>``, as AAL and FSL's atlases for SPM have it."""
    if b"<!ENTITY" in path.read_bytes():
        raise DataError(f"{path}: an atlas table has no use for XML entities")
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not readable XML ({error})") from error
    pairs = [(label.findtext("index"), label.findtext("name")) for label in root.iter("label")]
    if not pairs or any(index is None or name is None for index, name in pairs):
        raise DataError(f"{path}: expected elements <label><index>1</index><name>Precentral_L</name></label>")
    return pd.DataFrame(pairs, columns=["index", "name"], dtype=str)


def _hemispheres(settings: AtlasSettings, rows: list[dict[Any, Any]]) -> list[str]:
    """Read a column of hemispheres, or of names that hold one (``LH_Vis_1``, ``Precentral_L``) if names are given."""
    column = settings.hemisphere_column
    assert column is not None
    values = [text(row[column]) for row in rows]
    if column == settings.name_column:
        found = [{SIDES[word] for word in re.split(r"[^a-z0-9]+", v.lower()) if word in SIDES} for v in values]
        return [sides.pop() if len(sides) == 1 else "" for sides in found]
    unknown = sorted({value for value in values if value.lower() not in HEMISPHERE_WORDS})
    if unknown:
        raise DataError(
            f"{settings.labels}: {column}: expected L, R, B (both) or nothing, found {', '.join(unknown[:MAX_LISTED])}"
        )
    return [HEMISPHERE_WORDS[value.lower()] for value in values]


def _coordinates(settings: AtlasSettings, labels: NDArray[np.int64], rows: list[dict[Any, Any]]) -> NDArray[np.float64]:
    axes = settings.coords_columns
    given = [[number(row[axis], f"{settings.labels}: {axis}") for axis in axes] for row in rows]
    coords_mm = np.asarray(given, dtype=np.float64)
    lost = labels[~np.isfinite(coords_mm).all(axis=1)]
    if lost.size:
        raise DataError(
            f"{settings.labels}: {len(lost)} parcels have no coordinates in {', '.join(axes)}, for example {lost[0]}"
        )
    return coords_mm


def _label(value: Any, where: str) -> int:
    label = number(value, where)
    if label is None or not np.isfinite(label) or label % 1 != 0:
        raise DataError(f"{where}: expected whole numbers, found {value!r}")
    return int(label)
