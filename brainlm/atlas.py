"""An atlas as the model and the data sets know it: named parcels in a fixed order, with coordinates.

Label images are read in `data_prep.parcellate`; this type needs numpy alone and travels inside the input contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError

COORD_DECIMALS = 3  # micrometres
MAX_LISTED = 5  # how many differing parcels an error message spells out
HEMISPHERES = ("L", "R", "B", "")  # left, right, both, none


@dataclass(frozen=True, kw_only=True, eq=False)
class Atlas:
    """Parcels of one atlas, in the order of the columns of every series.

    Parameters
    ----------
    name : str
        Identifier such as ``A424`` or ``cc200``.
    sha256 : str
        Hash of the label image's voxels and affine, or of the parcel table where there is no image.
    labels : ndarray, shape (P,), int64
        Value of each parcel in the label image; need not be contiguous.
    parcel_names : tuple of str
        Unique name of each parcel.
    coords_mm : ndarray, shape (P, 3), float32
        Centre of mass of each parcel in the template's millimetres (x right, y anterior, z superior); kept to 0.001 mm.
    networks : tuple of str or None
        Functional network of each parcel ("" = none), where the atlas carries them.
    space : str
        BIDS name of the template space, "" if unknown.
    hemispheres : tuple of str or None
        "L", "R", "B" (both) or "" (none, such as the brain stem) for each parcel, where the atlas carries them.
    """

    name: str
    sha256: str
    labels: NDArray[np.int64]
    parcel_names: tuple[str, ...]
    coords_mm: NDArray[np.float32]
    networks: tuple[str, ...] | None = None
    space: str = ""
    hemispheres: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels, dtype=np.int64)
        # Rounded here as they are in JSON: a model must place its tokens alike before and after it is saved.
        coords_mm = np.round(np.asarray(self.coords_mm, dtype=np.float64), COORD_DECIMALS).astype(np.float32)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "coords_mm", coords_mm)
        count = len(self.parcel_names)
        if count == 0:
            raise DataError(f"atlas {self.name}: it has no parcels")
        if labels.shape != (count,) or coords_mm.shape != (count, 3):
            raise DataError(
                f"atlas {self.name}: {count} parcel names, but labels of shape {labels.shape} and "
                f"coordinates of shape {coords_mm.shape}; expected ({count},) and ({count}, 3)"
            )
        if not np.isfinite(coords_mm).all():
            raise DataError(f"atlas {self.name}: coordinates must be finite")
        for what, values in (("parcel name", self.parcel_names), ("label", tuple(labels.tolist()))):
            if len(set(values)) != count:
                twice = sorted({str(v) for v in values if values.count(v) > 1})[:MAX_LISTED]
                raise DataError(f"atlas {self.name}: {what}s must be unique, found twice: {', '.join(twice)}")
        if self.networks is not None and len(self.networks) != count:
            raise DataError(f"atlas {self.name}: {count} parcels but {len(self.networks)} network names")
        if self.hemispheres is not None:
            if len(self.hemispheres) != count:
                raise DataError(f"atlas {self.name}: {count} parcels but {len(self.hemispheres)} hemispheres")
            if unknown := sorted({str(v) for v in self.hemispheres} - set(HEMISPHERES)):
                raise DataError(
                    f'atlas {self.name}: a hemisphere is L, R, B or "", found {", ".join(unknown[:MAX_LISTED])}'
                )

    @property
    def num_parcels(self) -> int:
        return len(self.parcel_names)

    def differences(self, other: Atlas) -> list[str]:
        """List, in words, what keeps series in `other`'s parcels from being read as series in these.

        Names in the same order with the same coordinates (to 1 mm) are the same parcels; the hash of the label image
        may differ (another resolution of the same atlas). An empty list means that the two fit.
        """
        found: list[str] = []
        if self.num_parcels != other.num_parcels:
            found.append(f"{self.num_parcels} parcels ({self.name}) against {other.num_parcels} ({other.name})")
        moved = [
            f"column {i}: {a} against {b}"
            for i, (a, b) in enumerate(zip(self.parcel_names, other.parcel_names))
            if a != b
        ]
        if moved:
            same_set = set(self.parcel_names) == set(other.parcel_names)
            kind = "the same parcels in another order" if same_set else "other parcel names"
            more = f", and {len(moved) - MAX_LISTED} more" if len(moved) > MAX_LISTED else ""
            found.append(f"{kind}: " + "; ".join(moved[:MAX_LISTED]) + more)
        if not found:
            shift_mm = np.linalg.norm(self.coords_mm - other.coords_mm, axis=1)
            far = np.flatnonzero(shift_mm > 1.0)
            if far.size:
                worst = int(far[np.argmax(shift_mm[far])])
                found.append(
                    f"{far.size} parcels lie elsewhere, {self.parcel_names[worst]} by {shift_mm[worst]:.1f} mm "
                    "(the same names in another space?)"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "space": self.space,
            "labels": self.labels.tolist(),
            "parcel_names": list(self.parcel_names),
            "coords_mm": [[round(float(v), COORD_DECIMALS) for v in row] for row in self.coords_mm],
            "networks": None if self.networks is None else list(self.networks),
            "hemispheres": None if self.hemispheres is None else list(self.hemispheres),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Atlas:
        networks, hemispheres = tree.get("networks"), tree.get("hemispheres")
        return cls(
            name=tree["name"],
            sha256=tree["sha256"],
            space=tree.get("space", ""),
            labels=np.asarray(tree["labels"], dtype=np.int64),
            parcel_names=tuple(tree["parcel_names"]),
            coords_mm=np.asarray(tree["coords_mm"], dtype=np.float32),
            networks=None if networks is None else tuple(networks),
            hemispheres=None if hemispheres is None else tuple(hemispheres),
        )
