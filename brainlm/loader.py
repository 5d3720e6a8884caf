"""Training batches: windows from shards, scaled by the contract, with their masks.

A batch is a pure function of (data set, settings, step): no state, no workers' order, so resume is exact and 1, 2 or
64 ranks see the same global batches. Each rank reads only its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.config import Section
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import MaskKind, make_mask, mask_generator
from brainlm.ordering import rank_part, window_order
from brainlm.read_ahead import read_ahead
from brainlm.scaling import recording_mean
from brainlm.shards import Recordings
from brainlm.tokens import parcel_groups, parcel_mask, present_rows, sample_hidden
from brainlm.windows import Windows, own_positions

T = TypeVar("T")
_RATIO, _TOKENS, _DECODED = 1, 2, 3  # separate random streams


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Section):
    """What is hidden in training."""

    kind: MaskKind | tuple[MaskKind, ...] = "random"
    """One, or several, of which one is drawn per step: only what was hidden in training is answered well."""
    ratios: tuple[float, ...] = (0.75,)
    """One is drawn per step."""
    num_decoded: int | None = None
    """Hidden tokens decoded per window, drawn at random; null = all."""

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < r < 1 for r in self.ratios):
            raise ConfigError(f"masks.ratios: expected fractions between 0 and 1, found {self.ratios}")
        if not self.kinds:
            raise ConfigError("masks.kind: expected at least one")
        if self.num_decoded is not None and self.num_decoded < 1:
            raise ConfigError(f"masks.num_decoded: expected at least 1, found {self.num_decoded}")

    @property
    def kinds(self) -> tuple[MaskKind, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind


@dataclass(frozen=True)
class WindowBatch:
    """One micro-batch of one rank.

    ``windows (B, P, W)`` float32 in contract units; ``mask (B, L)`` True = hidden; ``present (B, P)``;
    ``ids_decoded (B, Q)`` or None = all hidden tokens; ``kept (B, W)`` False = censored timepoint. Visible values at
    censored timepoints are interpolated between visible kept ones; hidden ones are as stored, and are not to be scored.
    ``groups (G, g)``: parcels that share tokens, -1 = padding; None = one parcel a token. ``coords_mm (P, 3)`` and
    ``tr_s (B,)``, in seconds: of the windows; None = those of the model's contract.
    """

    windows: Tensor
    mask: Tensor
    present: Tensor
    ids_decoded: Tensor | None
    kept: Tensor
    groups: Tensor | None = None
    coords_mm: Tensor | None = None
    tr_s: Tensor | None = None

    def as_windows(self) -> Windows:
        """Return what a model is fed, to be taken as it is."""
        return Windows(
            values=self.windows, present=self.present, kept=self.kept, coords_mm=self.coords_mm, tr_s=self.tr_s,
            as_is=True,
        )  # fmt: skip

    def inputs(self) -> dict[str, Any]:
        """Return what `brainlm.model.BrainLM` is called with."""
        return {"windows": self.as_windows(), "mask_BL": self.mask, "ids_decoded": self.ids_decoded}

    @property
    def num_scored_values(self) -> int:
        """Hidden values of present parcels at kept timepoints that the loss is over."""
        row_parcels = present_rows(self.present, self.groups)  # (B, R): parcels whose values are in a row's tokens
        num_patches = self.mask.shape[1] // row_parcels.shape[1]
        num_kept = self.kept.unflatten(1, (num_patches, -1)).sum(dim=2)
        counts = self.mask * (row_parcels[:, :, None] * num_kept[:, None, :]).flatten(1)  # (B, L), row-major
        if self.ids_decoded is not None:
            counts = counts.gather(1, self.ids_decoded)
        return int(counts.sum())

    def to(self, device: torch.device) -> Self:
        if device.type == "cpu":
            return self
        tensors = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


class WindowLoader:
    """Batches of training windows.

    Parameters
    ----------
    reader : Recordings
        Recordings to draw from. All must be at least one window long.
    contract : InputContract
        Scales the series; gives window and patch length.
    batch_size : int
        Windows per step over all ranks.
    micro_batches : int
        Parts into which a rank's share is divided (gradient accumulation).
    windows_per_recording : int
        Windows drawn from each recording per epoch.
    patch_parcels : int
        Parcels in a token of the model.
    model_contract : InputContract, optional
        Of the model, where it is another one: windows then carry coordinates and TR if they differ from its own.
        None = `contract`.
    """

    def __init__(
        self,
        reader: Recordings,
        contract: InputContract,
        masks: MaskSettings,
        *,
        batch_size: int,
        windows_per_recording: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        patch_parcels: int = 1,
        model_contract: InputContract | None = None,
    ) -> None:
        if batch_size % (world_size * micro_batches):
            raise ConfigError(
                f"data.batch_size={batch_size} must be a multiple of {world_size} ranks x {micro_batches} micro-batches"
            )
        lengths = np.array([entry.num_timepoints for entry in reader.entries], dtype=np.int64)
        if len(lengths) * windows_per_recording < batch_size:
            raise DataError(
                f"{len(lengths)} recordings x {windows_per_recording} windows make no batch of {batch_size}: raise "
                "data.windows_per_recording or lower data.batch_size"
            )
        self.reader, self.contract, self.masks = reader, contract, masks
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.windows_per_recording, self.seed = windows_per_recording, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = len(lengths) * windows_per_recording // batch_size
        self.data_wait_s = 0.0
        if len(reader) and reader.entries[0].num_parcels != contract.atlas.num_parcels:
            raise DataError(
                f"recordings of {reader.entries[0].num_parcels} parcels, the contract has {contract.atlas.num_parcels}"
            )
        coords_mm = torch.from_numpy(contract.atlas.coords_mm.copy())
        self._coords_mm, self._tr_s, self._usable = own_positions(contract, model_contract)
        self._groups = parcel_groups(coords_mm, patch_parcels) if patch_parcels > 1 else None
        iqr = np.where(self._usable, contract.iqr, 1.0).astype(np.float32)
        self._median, self._iqr = torch.from_numpy(contract.median.copy()), torch.from_numpy(iqr)
        self._mean_z = recording_mean(contract)
        self._order = lru_cache(maxsize=2)(
            lambda epoch: window_order(lengths, contract.window_len, windows_per_recording, seed, epoch)
        )

    def rows_at(self, step: int) -> np.ndarray:
        """Return the (recording, start) rows of a step's global batch, shape (batch_size, 2)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rows: np.ndarray = self._order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        return rows

    def batches_at(self, step: int) -> list[WindowBatch]:
        """Return this rank's micro-batches of one step."""
        rows = self.rows_at(step)
        mine = rank_part(rows, self.rank, self.world_size)
        first = self.rank * len(mine)
        share = len(mine) // self.micro_batches
        generator = mask_generator(self.seed, _RATIO, step)
        ratio = _draw(self.masks.ratios, generator)
        kind = _draw(self.masks.kinds, generator)
        return [
            self._batch(step, first + i * share, mine[i * share : (i + 1) * share], kind, ratio)
            for i in range(self.micro_batches)
        ]

    def _batch(self, step: int, first: int, rows: np.ndarray, kind: MaskKind, ratio: float) -> WindowBatch:
        contract, num_parcels, reader = self.contract, self.contract.atlas.num_parcels, self.reader
        num_patches = contract.window_len // contract.patch_len
        windows = self.windows(rows)
        masks, presents, decoded, kepts = [], [], [], []
        for i, (recording, start) in enumerate(rows.tolist()):
            present = torch.from_numpy(reader.present(recording) & self._usable)
            position = first + i  # in the global batch: the same for any number of ranks
            generator = mask_generator(self.seed, _TOKENS, step, position)
            rows_present = present_rows(present[None], self._groups)[0] > 0
            mask = make_mask(kind, len(rows_present), num_patches, ratio, generator, rows_present)
            kept = reader.kept(recording, start, contract.window_len)
            if not kept.all():
                visible = ~parcel_mask(mask, num_parcels, self._groups).numpy()
                refill_censored(windows[i].numpy(), visible, kept, self._mean_z)
            masks.append(mask)
            presents.append(present)
            kepts.append(torch.from_numpy(kept))
            if self.masks.num_decoded is not None:
                scored = mask & rows_present.repeat_interleave(num_patches)
                generator = mask_generator(self.seed, _DECODED, step, position)
                decoded.append(sample_hidden(scored, min(self.masks.num_decoded, len(mask)), generator))
        return WindowBatch(
            windows=windows,
            mask=torch.stack(masks),
            present=torch.stack(presents),
            ids_decoded=torch.stack(decoded) if decoded else None,
            kept=torch.stack(kepts),
            groups=self._groups,
            coords_mm=self._coords_mm,
            tr_s=None if self._tr_s is None else torch.full((len(windows),), self._tr_s),
        )

    def windows(self, rows: np.ndarray) -> Tensor:
        """Return windows (B, P, W) in contract units; `rows (B, 2)` are recording and first timepoint.

        The arithmetic of `brainlm.scaling.scale`, operation by operation (a test holds them equal bit by bit), by torch
        because its conversion from float16 is many times faster than numpy's, and turned before it is widened.
        """
        raw, scales = self.reader.gather(rows, self.contract.window_len)
        x = torch.from_numpy(raw).transpose(1, 2).contiguous().float()
        x.mul_(torch.from_numpy(scales)[:, None, None])
        x.sub_(self._median[:, None]).div_(self._iqr[:, None])
        if not self._usable.all():
            x[:, ~self._usable] = 0.0
        return x

    def iterate(self, first_step: int, last_step: int, prefetch: int = 2) -> Iterator[list[WindowBatch]]:
        """Yield this rank's batches of steps `first_step` to `last_step` - 1, read ahead by a thread.

        Time spent waiting for the thread is added to ``data_wait_s``.
        """
        return read_ahead(self.batches_at, first_step, last_step, self._waited, prefetch)

    def _waited(self, seconds: float) -> None:
        self.data_wait_s += seconds


def _draw(choices: Sequence[T], generator: torch.Generator) -> T:
    return choices[int(torch.randint(len(choices), (), generator=generator))]
