"""How windows become tokens: one per parcel (or group of parcels) and patch in time, row-major.

Token ``r * K + k`` is patch ``k`` in time of row ``r``. A row is one parcel, or one group of `patch_parcels` parcels
that lie together in space (see `parcel_groups`); the last groups may hold fewer, and are padded.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `R` rows, `G` groups, `K` patches in time, `L` = R * K
tokens, `v` values per token (parcels of a row x timepoints of a patch). Masks: True = hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.errors import DataError
from brainlm.positions import space_features, time_features
from brainlm.windows import Windows


def parcel_groups(coords_mm: Tensor, patch_parcels: int) -> Tensor:
    """Divide parcels into groups that lie together, by recursive bisection.

    The parcels are cut in two along the axis (x, y, z) over which they are spread most, so that the first part is a
    multiple of `patch_parcels`, until a part is one group. Ties go by the other axes and then by the order given, so
    the groups depend on the coordinates and not on the order of the parcels.

    Parameters
    ----------
    coords_mm : Tensor, shape (P, 3)
    patch_parcels : int
        Parcels in a group.

    Returns
    -------
    Tensor, shape (ceil(P / patch_parcels), patch_parcels), int64
        Column numbers; -1 = padding, in the last group alone.
    """
    points = coords_mm.detach().cpu().double()

    def divide(members: Tensor) -> list[Tensor]:
        if len(members) <= patch_parcels:
            return [members]
        axis = int((points[members].amax(0) - points[members].amin(0)).argmax())
        for other in ((axis + 2) % 3, (axis + 1) % 3, axis):  # stable sorts, the most significant last
            members = members[points[members, other].sort(stable=True).indices]
        num_groups = -(-len(members) // patch_parcels)
        cut = (num_groups // 2) * patch_parcels
        return divide(members[:cut]) + divide(members[cut:])

    groups = torch.full((-(-len(points) // patch_parcels), patch_parcels), -1, device="cpu")
    for row, members in enumerate(divide(torch.arange(len(points), device="cpu"))):
        groups[row, : len(members)] = members.sort().values
    return groups.to(coords_mm.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenGrid:
    """The tokens of one batch of windows: where they are, and what they hold.

    Parameters
    ----------
    windows : Windows
    space : Tensor, shape (R, F) or (B, R, F)
        Features of the place of each row; see `brainlm.positions`.
    time : Tensor, shape (K, F) or (B, K, F)
    patch_len : int
    groups : Tensor, shape (G, g), int64, or None
        Parcels of each row, -1 = padding; None = one parcel a row.
    """

    windows: Windows
    space: Tensor
    time: Tensor
    patch_len: int
    groups: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return int(self.space.shape[-2])

    @property
    def num_patches(self) -> int:
        return int(self.windows.values.shape[2]) // self.patch_len

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_patches

    @cached_property
    def present(self) -> Tensor:
        """Shape (B, L): False for tokens of rows without any parcel that carries signal."""
        rows = self.windows.present if self.groups is None else self._members(self.windows.present).any(dim=2)
        return rows.repeat_interleave(self.num_patches, dim=1)

    @cached_property
    def attendable(self) -> Tensor:
        """Shape (B, L): tokens of present rows with at least one kept timepoint; nothing attends to any other."""
        kept = self.windows.kept
        if bool(kept.all()):
            return self.present
        kept_BK = kept.unflatten(1, (self.num_patches, self.patch_len)).any(dim=2)
        return self.present & kept_BK.repeat(1, self.num_rows)

    def patchify(self, values_BPW: Tensor, ids_BN: Tensor | None = None) -> Tensor:
        """Cut (B, P, W) into tokens (B, L, v), or pick those with the given numbers: (B, N, v)."""
        B, P = values_BPW.shape[:2]
        if self.groups is None:
            patches = values_BPW.reshape(B, P * self.num_patches, self.patch_len)
        else:
            parts = self._members(values_BPW).unflatten(3, (self.num_patches, self.patch_len))  # (B, G, g, K, p)
            patches = parts.transpose(2, 3).flatten(3).flatten(1, 2)
        return patches if ids_BN is None else gather_tokens(patches, ids_BN)

    def unpatchify(self, patches_BLv: Tensor) -> Tensor:
        """Undo `patchify`: (B, L, v) -> (B, P, W)."""
        B, P, W = self.windows.values.shape
        if self.groups is None:
            return patches_BLv.reshape(B, P, W)
        G, g = self.groups.shape
        parts = patches_BLv.view(B, G, self.num_patches, g, self.patch_len).transpose(2, 3).reshape(B, G * g, W)
        members = self.groups.flatten()
        out = patches_BLv.new_empty(B, P, W)
        out[:, members[members >= 0]] = parts[:, members >= 0]
        return out

    def hidden_values(self, mask_BL: Tensor) -> Tensor:
        """Return (B, P, W), bool: the values that lie in masked tokens."""
        return self.unpatchify(mask_BL[:, :, None].expand(-1, -1, self._values_per_token))

    def scored(self, mask_BL: Tensor, ids_BN: Tensor) -> Tensor:
        """Return which values of the given tokens the loss is over: masked, of present parcels, at kept timepoints.

        Shape (B, N, v), or (B, N, 1) where the values of a token are alike.
        """
        scored = (mask_BL & self.present).gather(1, ids_BN)[:, :, None]
        if self.groups is not None:
            present_BGg = self._members(self.windows.present)
            present_BLg = present_BGg.repeat_interleave(self.num_patches, dim=1)
            scored = scored & gather_tokens(present_BLg, ids_BN).repeat_interleave(self.patch_len, dim=2)
        if not bool(self.windows.kept.all()):
            kept_BKp = self.windows.kept.unflatten(1, (self.num_patches, self.patch_len))
            kept_BNp = gather_tokens(kept_BKp, ids_BN % self.num_patches)
            scored = scored & kept_BNp.repeat(1, 1, 1 if self.groups is None else self.groups.shape[1])
        return scored

    def presence(self, ids_BN: Tensor) -> Tensor:
        """Return (B, N, g), bool: which parcels of the given tokens are present (groups only)."""
        return gather_tokens(self._members(self.windows.present).repeat_interleave(self.num_patches, dim=1), ids_BN)

    @property
    def _values_per_token(self) -> int:
        return self.patch_len * (1 if self.groups is None else int(self.groups.shape[1]))

    def _members(self, x_BP: Tensor) -> Tensor:
        """Put (B, P, ...) into groups: (B, G, g, ...); 0 (False) for padding."""
        assert self.groups is not None
        grouped = x_BP[:, self.groups.clamp(min=0)]
        padding = (self.groups < 0)[None].unflatten(2, (-1, *([1] * (grouped.ndim - 3))))
        return grouped.masked_fill(padding, 0)


def present_rows(present_BP: Tensor, groups: Tensor | None) -> Tensor:
    """Return how many present parcels each row of tokens has: (B, P) bool -> (B, R) int64."""
    if groups is None:
        return present_BP.long()
    return (present_BP[:, groups.clamp(min=0)] & (groups >= 0)).sum(dim=2)


def parcel_mask(mask_L: Tensor, num_parcels: int, groups: Tensor | None) -> Tensor:
    """Return a mask over tokens as one over parcels and patches: (L,) -> (P, K)."""
    if groups is None:
        return mask_L.view(num_parcels, -1)
    rows = mask_L.view(len(groups), -1)
    out = rows.new_empty(num_parcels, rows.shape[1])
    members = groups >= 0
    out[groups[members]] = rows[:, None].expand(-1, groups.shape[1], -1)[members]
    return out


def as_mask(mask: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Return a mask as bool on a device: True, or 1, = hidden.

    Raises
    ------
    DataError
        If it holds anything but True and False, or 0 and 1.
    """
    found = torch.from_numpy(np.asarray(mask)) if isinstance(mask, np.ndarray) else mask
    if not isinstance(found, Tensor):
        raise DataError(f"mask: expected a tensor or an array, True = hidden, found {type(mask).__name__}")
    found = found.to(device)
    if found.dtype != torch.bool:
        if not bool(((found == 0) | (found == 1)).all()):
            raise DataError(f"mask: expected True (hidden) and False, or 1 and 0, found other values ({found.dtype})")
        found = found == 1
    return found


def check_sizes(windows: Windows, patch_len: int) -> None:
    """Raise `DataError` unless the windows are whole patches."""
    W = windows.values.shape[2]
    if W == 0 or W % patch_len:
        raise DataError(f"windows of {W} timepoints: expected a multiple of the patch length {patch_len}")


def row_features(coords_mm: Tensor, groups: Tensor | None) -> Tensor:
    """Return the space features of rows, (R, F) or (B, R, F): of a group, the mean over its parcels."""
    features = space_features(coords_mm)
    if groups is None:
        return features
    real = (groups >= 0)[..., None]
    return (features[..., groups.clamp(min=0), :] * real).sum(-2) / real.sum(-2)


def patch_features(num_patches: int, patch_len: int, tr_s: Tensor) -> Tensor:
    """Return the time features of patches, by the seconds from the window's beginning to their middle.

    `tr_s` () gives (K, F), `tr_s` (B,) gives (B, K, F).
    """
    middle = (torch.arange(num_patches, device=tr_s.device) + 0.5) * patch_len
    return time_features(middle * tr_s[..., None])


def gather_tokens(x_BLD: Tensor, ids_BN: Tensor) -> Tensor:
    """Pick tokens by number: (B, L, D) and (B, N) -> (B, N, D)."""
    return x_BLD.gather(1, ids_BN[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def hidden_ids(wanted_BL: Tensor) -> Tensor:
    """Return the numbers of the marked tokens, (B, Q), in order; windows with fewer are filled up with others."""
    return torch.argsort((~wanted_BL).to(torch.uint8), dim=1, stable=True)[:, : int(wanted_BL.sum(dim=1).max())]


def sample_hidden(scored_L: Tensor, num_decoded: int, generator: torch.Generator) -> Tensor:
    """Draw which hidden tokens of one window are decoded, without replacement.

    Returns shape (num_decoded,), int64. Where fewer tokens are scored, the rest are tokens that are not scored: the
    loss leaves them out.
    """
    scored = torch.nonzero(scored_L)[:, 0]
    picked = scored[torch.randperm(len(scored), generator=generator)[:num_decoded]]
    if len(picked) < num_decoded:
        others = torch.nonzero(~scored_L)[:, 0]
        picked = torch.cat([picked, others[: num_decoded - len(picked)]])
    return picked
