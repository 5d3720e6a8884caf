"""Windows as the image that the published 111M and 650M models read, and what can be hidden in it.

A token is a square of ``patch_size`` parcels, neighbours in the order of their y coordinate, x as many timepoints. The
window lies in the middle of a larger square; the margins are tokens, too.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `K` patches in time of our masks, `C` channels, `N` tokens
of the image. Masks: True = hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainlm.errors import DataError
from brainlm.official_config import VitMaeConfig
from brainlm.official_vitmae import columns_at_end, hidden_columns, rows_by_y


class ImageLayout(nn.Module):
    """Where parcels and timepoints are in the image.

    Parameters
    ----------
    config : VitMaeConfig
    coords_mm : Tensor, shape (P, 3)
    window_len : int
    """

    parcel_of_row: Tensor
    row_of_parcel: Tensor

    def __init__(self, config: VitMaeConfig, coords_mm: Tensor, window_len: int) -> None:
        super().__init__()
        self.config, self.window_len = config, window_len
        rows = rows_by_y(coords_mm)
        self.register_buffer("parcel_of_row", rows, persistent=False)
        self.register_buffer("row_of_parcel", torch.argsort(rows), persistent=False)

    @property
    def num_tokens(self) -> int:
        """N, margins included."""
        return self.config.grid**2

    @property
    def why_not_single(self) -> str:
        p = self.config.patch_size
        return (
            f"a token of this model is {p} parcels (neighbours in y) x {p} timepoints, so that none of our patches can "
            "be hidden alone. Hide the end of the window for every parcel (mask kind future), or the model's own "
            "tokens (token_of_value)"
        )

    def image(self, values_BPW: Tensor) -> Tensor:
        """Return (B, C, P, W): rows in the order of y, the same in each channel."""
        return values_BPW[:, self.parcel_of_row][:, None].expand(-1, self.config.num_channels, -1, -1)

    def parcels(self, rows_BPW: Tensor) -> Tensor:
        """Put rows back into the order of the atlas."""
        return rows_BPW[:, self.row_of_parcel]

    def token_of_value(self) -> Tensor:
        """Return which token each value lies in: shape (P, W), int64."""
        config = self.config
        top, left = (config.side - len(self.row_of_parcel)) // 2, (config.side - self.window_len) // 2
        rows = (self.row_of_parcel + top) // config.patch_size
        columns = (torch.arange(self.window_len, device=rows.device) + left) // config.patch_size
        return rows[:, None] * config.grid + columns

    def tokens_without(self, kept_BW: Tensor) -> Tensor:
        """Return the tokens that hold values of the window, but none at a timepoint that is kept: (B, N), bool."""
        empty = torch.zeros(len(kept_BW), self.num_tokens, dtype=torch.bool, device=kept_BW.device)
        if bool(kept_BW.all()):
            return empty
        token = self.token_of_value().flatten()
        here = kept_BW.repeat(1, len(self.row_of_parcel)).float()  # (B, P * W)
        measured = torch.zeros(empty.shape, device=kept_BW.device).index_add_(1, token, here) > 0
        empty[:, token] = True
        return empty & ~measured

    def draw_mask(self, ratio: float, generator: torch.Generator) -> Tensor:
        """Draw a mask over all tokens, margins included, as in training: shape (N,), bool."""
        if self.config.train_mode != "auto_encode":
            columns = hidden_columns(self.config, self.window_len).patches
            return self._columns(columns, torch.device("cpu"))
        num_hidden = min(max(self.num_tokens - int(self.num_tokens * (1 - ratio)), 1), self.num_tokens - 1)
        mask = torch.zeros(self.num_tokens, dtype=torch.bool)
        mask[torch.randperm(self.num_tokens, generator=generator)[:num_hidden]] = True
        return mask

    def timepoints_at_end(self, mask_BPK: Tensor, present_BP: Tensor) -> Tensor:
        """Return how many timepoints a mask of ours hides at the end of each window: shape (B,).

        Raises
        ------
        DataError
            If it hides anything else of a present parcel.
        """
        K = mask_BPK.shape[2]
        counts = (mask_BPK & present_BP[:, :, None]).sum(dim=1)  # (B, K): present parcels that hide this patch
        num_hidden = (counts > 0).sum(dim=1)
        is_end = torch.arange(K, device=counts.device) >= K - num_hidden[:, None]
        if bool((counts != is_end * present_BP.sum(dim=1)[:, None]).any()):
            raise DataError(f"this mask cannot be honoured: {self.why_not_single}")
        if bool(((num_hidden == 0) | (num_hidden == K)).any()):
            raise DataError("a window hides nothing, or all: hide at least one patch at its end, and not all")
        return num_hidden * (self.window_len // K)

    def hide_end(self, num_timepoints: int, *, whole_patches: bool) -> tuple[Tensor, range]:
        """Return the tokens (N,) that hide the end of a window, and the columns of the square to be set to 0.

        Raises
        ------
        DataError
            If no column of the window would be left.
        """
        columns = columns_at_end(self.config, self.window_len, num_timepoints, whole_patches=whole_patches)
        first_of_window = (self.config.side - self.window_len) // 2 // self.config.patch_size
        if columns.patches.start <= first_of_window:
            raise DataError("no patch column of the window would be visible: hide less of its end")
        return self._columns(columns.patches, self.row_of_parcel.device), columns.zeroed

    def _columns(self, columns: range, device: torch.device) -> Tensor:
        mask = torch.zeros(self.config.grid, self.config.grid, dtype=torch.bool, device=device)
        mask[:, columns.start : columns.stop] = True
        return mask.flatten()
