"""A batch of windows as a model is fed them: values in contract units, and what is known about each.

`cut_windows` makes one from a recording, `pad_windows` joins unequal ones. Dimension letters: `B` windows, `P` parcels,
`W` timepoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.recording import Recording
from brainlm.scaling import centre, recording_mean, scale

TR_TOLERANCE_S = 1e-3  # repetition times in headers are rounded


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of equal size; parcels and timepoints that a window lacks are marked, not cut.

    Parameters
    ----------
    values : Tensor, shape (B, P, W), float32
        Contract units. What stands where a parcel is not present, or in patches without a kept timepoint, is never
        looked at.
    present : Tensor, shape (B, P), bool
        False = the parcel carries no signal here, or is padding.
    kept : Tensor, shape (B, W), bool
        False = censored timepoint, or padding.
    coords_mm : Tensor, shape (P, 3) or (B, P, 3), float32, optional
        Where the parcels are, template mm; None = the parcels of the model's contract.
    tr_s : Tensor, shape (B,), float32, optional
        Seconds between timepoints; None = the TR of the model's contract.
    starts : tuple of int
        First timepoint of each window in its recording, where known.
    as_is : bool
        The values are already as they look under the mask that comes with them, as those of `brainlm.loader`: a model
        takes them so.
    """

    values: Tensor
    present: Tensor
    kept: Tensor
    coords_mm: Tensor | None = None
    tr_s: Tensor | None = None
    starts: tuple[int, ...] = ()
    as_is: bool = False

    def __post_init__(self) -> None:
        if self.values.ndim != 3:
            raise DataError(f"windows: values must be (windows, parcels, timepoints), found {tuple(self.values.shape)}")
        B, P, W = self.values.shape
        for name, shape in (("present", (B, P)), ("kept", (B, W))):
            found = getattr(self, name)
            if tuple(found.shape) != shape or found.dtype != torch.bool:
                raise DataError(
                    f"windows of shape {(B, P, W)}: {name} must be bool of shape {shape}, found {found.dtype} of shape "
                    f"{tuple(found.shape)}"
                )
        if self.coords_mm is not None and tuple(self.coords_mm.shape) not in ((P, 3), (B, P, 3)):
            raise DataError(f"windows of {P} parcels: coords_mm has shape {tuple(self.coords_mm.shape)}")
        if self.tr_s is not None and (tuple(self.tr_s.shape) != (B,) or not bool((self.tr_s > 0).all())):
            raise DataError(f"windows: tr_s must be one positive number for each of {B} windows, found {self.tr_s}")

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, values: Tensor, present: Tensor | None = None, kept: Tensor | None = None) -> Windows:
        """Wrap values (B, P, W) of the contract's parcels; None = every parcel is present, every timepoint kept."""
        if values.ndim != 3:
            raise DataError(f"windows: values must be (windows, parcels, timepoints), found {tuple(values.shape)}")
        B, P, W = values.shape
        return cls(
            values=values,
            present=values.new_ones(B, P, dtype=torch.bool) if present is None else present,
            kept=values.new_ones(B, W, dtype=torch.bool) if kept is None else kept,
        )

    def with_present(self, present: Tensor) -> Windows:
        """Return the same windows with other parcels marked as present."""
        return replace(self, present=present)

    def to(self, device: torch.device | str) -> Windows:
        """Return the same windows on another device."""
        return replace(
            self,
            values=self.values.to(device),
            present=self.present.to(device),
            kept=self.kept.to(device),
            coords_mm=None if self.coords_mm is None else self.coords_mm.to(device),
            tr_s=None if self.tr_s is None else self.tr_s.to(device),
        )

    def as_seen(self, hidden_BPW: Tensor, empty_P: Tensor | None = None) -> Windows:
        """Return the windows as they look where some values are hidden: no visible value tells of a hidden one.

        Visible values at censored timepoints are interpolated anew, between values that are visible and kept.

        Parameters
        ----------
        hidden_BPW : Tensor, shape (B, P, W), bool
            These values stay as they are.
        empty_P : Tensor, shape (P,), optional
            The recording's mean in contract units, for parcels of which nothing kept is visible; None = 0.
        """
        if bool(self.kept.all()):
            return self
        values, kept = self.values.detach().float().cpu().numpy().copy(), self.kept.cpu().numpy()
        empty = 0.0 if empty_P is None else empty_P.float().cpu().numpy()
        for window, visible, kept_W in zip(values, ~hidden_BPW.cpu().numpy(), kept):
            refill_censored(window, visible, kept_W, empty)
        return replace(self, values=torch.from_numpy(values).to(self.values))

    def __getitem__(self, rows: slice) -> Windows:
        """Return some of the windows."""
        shared = self.coords_mm is None or self.coords_mm.ndim == 2
        return replace(
            self,
            values=self.values[rows],
            present=self.present[rows],
            kept=self.kept[rows],
            coords_mm=self.coords_mm if shared else self.coords_mm[rows],  # type: ignore[index]
            tr_s=None if self.tr_s is None else self.tr_s[rows],
            starts=self.starts[rows],
        )


def own_positions(
    contract: InputContract, model_contract: InputContract | None
) -> tuple[Tensor | None, float | None, NDArray[np.bool_]]:
    """Return what windows of one contract must bring to a model of another.

    Returns
    -------
    coords_mm : Tensor, shape (P, 3), or None
        None = the parcels are the model's.
    tr_s : float or None
        None = the TR is the model's.
    usable : ndarray, shape (P,), bool
        Parcels that carry signal; where they are the model's, in both.
    """
    model_contract = contract if model_contract is None else model_contract
    tr_s = contract.tr_s if abs(contract.tr_s - model_contract.tr_s) > TR_TOLERANCE_S else None
    if contract.atlas.differences(model_contract.atlas):
        return torch.from_numpy(contract.atlas.coords_mm.copy()), tr_s, contract.usable
    return None, tr_s, contract.usable & model_contract.usable


def as_windows(
    windows: Windows | Tensor | NDArray[Any], present_BP: Tensor | None = None, kept_BW: Tensor | None = None
) -> Windows:
    """Return Windows from values (P, W) or (B, P, W) in contract units."""
    if isinstance(windows, Windows):
        if present_BP is not None or kept_BW is not None:
            raise ConfigError("present and kept are part of Windows: give them there")
        return windows
    values = torch.from_numpy(np.array(windows, dtype=np.float32)) if isinstance(windows, np.ndarray) else windows
    return Windows.of(values[None] if values.ndim == 2 else values, present_BP, kept_BW)


def cut_windows(
    recording: Recording,
    contract: InputContract,
    *,
    own_contract: InputContract | None = None,
    starts: Sequence[int] | None = None,
    native_tr: bool = False,
) -> Windows:
    """Centre and scale a recording, and cut it into windows as a model is fed them.

    Parameters
    ----------
    recording : Recording
        Its columns are the parcels of `contract`, or of `own_contract` where that is given.
    contract : InputContract
        Of the model: gives the statistics, the TR, and the length of windows and patches.
    own_contract : InputContract, optional
        Of the data set that the recording is from: gives the statistics instead. If its parcels are not those of
        `contract`, the windows carry their coordinates.
    starts : sequence of int, optional
        First timepoints. None: windows side by side over the whole recording, the last one padded where the recording
        ends (as is the only window of a short recording).
    native_tr : bool
        Accept another TR than the contract's, with token positions in true seconds. A patch then spans another time
        than the one that the model was trained on.

    Raises
    ------
    DataError
        If the columns or the TR do not fit the contract, nothing was kept, or a window would begin outside.
    """
    name = recording.recording_id
    own = contract if own_contract is None else own_contract
    if recording.num_parcels != own.atlas.num_parcels:
        raise DataError(
            f"{name} has {recording.num_parcels} parcels, the contract ({own.atlas.name}) has "
            f"{own.atlas.num_parcels}: parcellate it with that atlas, or say which atlas it has"
        )
    same_tr = abs(recording.tr_s - contract.tr_s) <= TR_TOLERANCE_S
    if not (same_tr or native_tr):
        raise DataError(
            f"{name} has a TR of {recording.tr_s:g} s, the contract has {contract.tr_s:g} s: resample it "
            "(data_prep/prepare.py contract=CHECKPOINT does), or set native_tr=True, at a cost in accuracy"
        )
    T, W = recording.num_timepoints, contract.window_len
    if starts is None:
        starts = range(0, T, W)
    if outside := [start for start in starts if not 0 <= start < T]:
        raise DataError(f"{name} has {T} timepoints: no window can begin at {outside[0]}")
    keep = recording.keep_mask
    missing = recording.missing_parcels() | ~own.usable
    bold = np.where(missing, np.float32(0), recording.bold)
    series = scale(centre(bold, keep), own)
    empty = recording_mean(own)
    values = np.zeros((len(starts), recording.num_parcels, W), dtype=np.float32)
    kept = np.zeros((len(starts), W), dtype=bool)
    visible = np.ones((recording.num_parcels, W // contract.patch_len), dtype=bool)
    for i, start in enumerate(starts):
        part = series[start : start + W]
        values[i, :, : len(part)] = part.T
        kept[i, : len(part)] = keep[start : start + W]
        refill_censored(values[i], visible, kept[i], empty)
    present = torch.from_numpy(~missing).expand(len(starts), -1)
    return Windows(
        values=torch.from_numpy(values),
        present=present.clone(),
        kept=torch.from_numpy(kept),
        coords_mm=torch.from_numpy(own.atlas.coords_mm.copy()) if contract.atlas.differences(own.atlas) else None,
        tr_s=None if same_tr else torch.full((len(starts),), recording.tr_s),
        starts=tuple(starts),
    )


def pad_windows(parts: Sequence[Windows], contract: InputContract) -> Windows:
    """Join windows of unequal sizes: the smaller ones are padded with parcels and timepoints that nothing looks at.

    Parameters
    ----------
    parts : sequence of Windows
    contract : InputContract
        Of the model: where a part has no coordinates or TR of its own, these are meant.
    """
    if not parts:
        raise DataError("no windows to join")
    P, W = (max(part.values.shape[axis] for part in parts) for axis in (1, 2))
    own_coords = any(part.coords_mm is not None for part in parts)
    own_tr = any(part.tr_s is not None for part in parts)
    contract_coords = torch.from_numpy(contract.atlas.coords_mm.copy()).to(parts[0].values.device)
    values, present, kept, coords, tr = [], [], [], [], []
    for part in parts:
        b, p, w = part.values.shape
        if part.coords_mm is None and p != len(contract_coords):
            raise DataError(f"windows of {p} parcels without coordinates; the contract has {len(contract_coords)}")
        values.append(torch.nn.functional.pad(part.values, (0, W - w, 0, P - p)))
        present.append(torch.nn.functional.pad(part.present, (0, P - p)))
        kept.append(torch.nn.functional.pad(part.kept, (0, W - w)))
        where = contract_coords if part.coords_mm is None else part.coords_mm
        coords.append(torch.nn.functional.pad(where.expand(b, p, 3), (0, 0, 0, P - p)))
        tr.append(part.values.new_full((b,), contract.tr_s) if part.tr_s is None else part.tr_s)
    starts_known = all(len(part.starts) == len(part) for part in parts)
    return Windows(
        values=torch.cat(values),
        present=torch.cat(present),
        kept=torch.cat(kept),
        coords_mm=torch.cat(coords) if own_coords else None,
        tr_s=torch.cat(tr) if own_tr else None,
        starts=tuple(start for part in parts for start in part.starts) if starts_known else (),
    )
