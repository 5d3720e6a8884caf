"""What a model must be fed: the input contract that a data set writes and every checkpoint carries.

Atlas and parcel order must match a model's; TR, filter and scale can be adapted. The statistics freeze at a data set's
first preparation. A recording is centred per parcel (its own mean over kept timepoints), then scaled by the group's
``(x - median) / IQR``, both of the centred series of the train subjects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainlm.atlas import Atlas
from brainlm.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from brainlm.contract_distance import ContractDistance, Reconstructs
    from brainlm.recording import Recording

FORMAT_VERSION = 1
FILE_NAME = "input_contract.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class InputContract:
    """How recordings become model input.

    Parameters
    ----------
    atlas : Atlas
    covered : ndarray, shape (P,), bool
        Parcels that at least one train recording covers.
    median, iqr : ndarray, shape (P,), float32
        Of the centred series over all train recordings, in the units of the series. The IQR is 0 where a parcel
        never varies (or is not covered); such parcels are masked out, see `usable`.
    tr_s : float
        Seconds between timepoints of what the model sees.
    high_pass_hz, low_pass_hz : float or None
        Temporal filter applied by the preparation; None = none.
    units : str
        Units of the series before scaling.
    centring : str
        How each recording was centred.
    cleaning : mapping
        Confounds and other choices of the preparation, as configured.
    window_len, patch_len : int
        Timepoints per window and per patch.
    statistics_from : str
        Which recordings median and IQR come from.
    num_statistics_recordings : int
    flags : tuple of str
        Known facts a reader of scores must see, e.g. whole-run filters that let the future leak.
    """

    atlas: Atlas
    covered: NDArray[np.bool_]
    median: NDArray[np.float32]
    iqr: NDArray[np.float32]
    tr_s: float
    window_len: int
    patch_len: int
    high_pass_hz: float | None = None
    low_pass_hz: float | None = None
    units: str = "arbitrary (parcel-mean BOLD)"
    centring: str = "per recording and parcel: mean over kept timepoints subtracted"
    cleaning: dict[str, Any] = field(default_factory=dict)
    statistics_from: str = ""
    num_statistics_recordings: int = 0
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = self.atlas.num_parcels
        for name, dtype in (("covered", np.bool_), ("median", np.float32), ("iqr", np.float32)):
            value = np.asarray(getattr(self, name), dtype=dtype)
            object.__setattr__(self, name, value)
            if value.shape != (count,):
                raise DataError(f"input contract: {name} has shape {value.shape}, the atlas has {count} parcels")
        if not (np.isfinite(self.median).all() and np.isfinite(self.iqr).all() and (self.iqr >= 0).all()):
            raise DataError("input contract: median and IQR must be finite and the IQR must not be negative")
        if not self.tr_s > 0:
            raise DataError(f"input contract: tr_s must be above 0, found {self.tr_s}")
        if self.patch_len <= 0 or self.window_len % self.patch_len:
            raise DataError(
                f"input contract: window_len {self.window_len} must be a multiple of patch_len {self.patch_len}"
            )

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Shape (P,): parcels that are covered and vary; all others are masked out of attention and loss."""
        return self.covered & (self.iqr > 0)

    @property
    def zero_iqr_parcels(self) -> tuple[str, ...]:
        """Names of covered parcels whose IQR is 0."""
        return tuple(self.atlas.parcel_names[i] for i in np.flatnonzero(self.covered & (self.iqr <= 0)))

    def with_windows(self, window_len: int, patch_len: int) -> InputContract:
        """Return the same contract for another window and patch length."""
        return replace(self, window_len=window_len, patch_len=patch_len)

    def check_fits(self, other: InputContract, *, ours: str, theirs: str) -> None:
        """Raise `CheckpointError` listing the differences unless `other` has the same atlas and parcel order.

        `ours` and `theirs` say what the two contracts belong to, for the message.
        """
        found = self.atlas.differences(other.atlas)
        if found:
            listed = "\n".join(f"  - {line}" for line in found)
            raise CheckpointError(
                f"{theirs} does not have the parcels that {ours} was made for:\n{listed}\n"
                "Prepare the recordings again with the atlas of the checkpoint, or use a checkpoint of this atlas."
            )

    def adaptable_differences(self, other: InputContract) -> list[str]:
        """List differences that can be adapted or tolerated but that every result should show."""
        found = []
        if abs(self.tr_s - other.tr_s) > 1e-3:
            found.append(f"TR {self.tr_s:g} s against {other.tr_s:g} s")
        for name in ("high_pass_hz", "low_pass_hz", "units", "centring"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"{name}: {getattr(self, name)} against {getattr(other, name)}")
        both = self.usable & other.usable
        if both.any():
            ratio = float(np.median(other.iqr[both] / self.iqr[both]))
            if not 0.8 < ratio < 1.25:
                found.append(f"amplitude (median ratio of the IQRs): {ratio:.3g}")
        missing = int((self.usable & ~other.usable).sum())
        if missing:
            found.append(f"{missing} parcels of the first are missing in the second")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "atlas": self.atlas.to_json(),
            "covered": self.covered.tolist(),
            "median": [float(v) for v in self.median],
            "iqr": [float(v) for v in self.iqr],
            "zero_iqr_parcels": list(self.zero_iqr_parcels),
            "tr_s": self.tr_s,
            "window_len": self.window_len,
            "patch_len": self.patch_len,
            "high_pass_hz": self.high_pass_hz,
            "low_pass_hz": self.low_pass_hz,
            "units": self.units,
            "centring": self.centring,
            "cleaning": self.cleaning,
            "statistics_from": self.statistics_from,
            "num_statistics_recordings": self.num_statistics_recordings,
            "flags": list(self.flags),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any], where: str = FILE_NAME) -> InputContract:
        version = tree.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{where}: expected an input contract of format {FORMAT_VERSION}, found {version!r}")
        fields = {k: v for k, v in tree.items() if k not in ("format_version", "atlas", "zero_iqr_parcels", "flags")}
        try:
            return cls(atlas=Atlas.from_json(tree["atlas"]), flags=tuple(tree.get("flags", ())), **fields)
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} is not a complete input contract: {error}") from error

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=1) + "\n"


def distance(model: Reconstructs, recordings: Iterable[Recording], **options: Any) -> ContractDistance:
    """Say how far recordings are from what a model was fed: TR, filter, parcels, amplitude, and the gain it asks for.

    `options` are those of `brainlm.contract_distance.measure_distance`, which needs torch. ``.summary()`` of what is
    returned says it in sentences.
    """
    from brainlm.contract_distance import measure_distance

    return measure_distance(model, recordings, **options)
