"""Training batches: windows from shards, scaled by the contract, with their masks.

A batch is a pure function of (data set, settings, step): no state, no workers' order, so resume is exact and 1, 2 or
64 ranks see the same global batches. Each rank reads only its part.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from brainlm.config import Section
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import MaskKind, make_mask, mask_generator
from brainlm.model import sample_hidden
from brainlm.ordering import rank_part, window_order
from brainlm.scaling import scale
from brainlm.shards import SplitReader

_RATIO, _TOKENS, _DECODED = 1, 2, 3  # separate random streams


@dataclass(frozen=True, kw_only=True)
class MaskSettings(Section):
    """What is hidden in training."""

    kind: MaskKind = "random"
    ratios: tuple[float, ...] = (0.75,)
    """One is drawn per step."""
    num_decoded: int | None = None
    """Hidden tokens decoded per window, drawn at random; null = all."""

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < r < 1 for r in self.ratios):
            raise ConfigError(f"masks.ratios: expected fractions between 0 and 1, found {self.ratios}")
        if self.num_decoded is not None and self.num_decoded < 1:
            raise ConfigError(f"masks.num_decoded: expected at least 1, found {self.num_decoded}")


@dataclass(frozen=True)
class WindowBatch:
    """One micro-batch of one rank.

    ``windows (B, P, W)`` float32 in contract units; ``mask (B, L)`` True = hidden; ``present (B, P)``;
    ``ids_decoded (B, Q)`` or None = all hidden tokens.
    """

    windows: Tensor
    mask: Tensor
    present: Tensor
    ids_decoded: Tensor | None

    def to(self, device: torch.device) -> WindowBatch:
        if device.type == "cpu":
            return self
        move = [None if t is None else t.to(device) for t in (self.windows, self.mask, self.present, self.ids_decoded)]
        return WindowBatch(*move)  # type: ignore[arg-type]


class WindowLoader:
    """Batches of training windows.

    Parameters
    ----------
    reader : SplitReader
        Recordings to draw from. All must be at least one window long.
    contract : InputContract
        Scales the series; gives window and patch length.
    batch_size : int
        Windows per step over all ranks.
    micro_batches : int
        Parts into which a rank's share is divided (gradient accumulation).
    windows_per_recording : int
        Windows drawn from each recording per epoch.
    """

    def __init__(
        self,
        reader: SplitReader,
        contract: InputContract,
        masks: MaskSettings,
        *,
        batch_size: int,
        windows_per_recording: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
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
        ratios = self.masks.ratios
        drawn = torch.randint(len(ratios), (), generator=mask_generator(self.seed, _RATIO, step)).item()
        return [
            self._batch(step, first + i * share, mine[i * share : (i + 1) * share], ratios[int(drawn)])
            for i in range(self.micro_batches)
        ]

    def _batch(self, step: int, first: int, rows: np.ndarray, ratio: float) -> WindowBatch:
        contract, num_parcels = self.contract, self.contract.atlas.num_parcels
        num_patches = contract.window_len // contract.patch_len
        windows = np.empty((len(rows), num_parcels, contract.window_len), dtype=np.float32)
        masks, presents, decoded = [], [], []
        for i, (recording, start) in enumerate(rows):
            windows[i] = scale(self.reader.window(int(recording), int(start), contract.window_len), contract).T
            present = torch.from_numpy(self.reader.present(int(recording)) & contract.usable)
            position = first + i  # in the global batch: the same for any number of ranks
            generator = mask_generator(self.seed, _TOKENS, step, position)
            mask = make_mask(self.masks.kind, num_parcels, num_patches, ratio, generator, present)
            masks.append(mask)
            presents.append(present)
            if self.masks.num_decoded is not None:
                scored = mask & present.repeat_interleave(num_patches)
                generator = mask_generator(self.seed, _DECODED, step, position)
                decoded.append(sample_hidden(scored, min(self.masks.num_decoded, len(mask)), generator))
        return WindowBatch(
            windows=torch.from_numpy(windows),
            mask=torch.stack(masks),
            present=torch.stack(presents),
            ids_decoded=torch.stack(decoded) if decoded else None,
        )

    def iterate(self, first_step: int, last_step: int, prefetch: int = 2) -> Iterator[list[WindowBatch]]:
        """Yield this rank's batches of steps `first_step` to `last_step` - 1, read ahead by a thread.

        Time spent waiting for the thread is added to ``data_wait_s``.
        """
        ahead: queue.Queue[list[WindowBatch] | BaseException] = queue.Queue(maxsize=prefetch)
        stopped = threading.Event()

        def read() -> None:
            try:
                for step in range(first_step, last_step):
                    item = self.batches_at(step)
                    while not stopped.is_set():
                        try:
                            ahead.put(item, timeout=0.2)
                            break
                        except queue.Full:
                            continue
                    if stopped.is_set():
                        return
            except BaseException as error:  # handed to the consumer, which raises it
                ahead.put(error)

        thread = threading.Thread(target=read, name="brainlm-loader", daemon=True)
        thread.start()
        try:
            for _ in range(first_step, last_step):
                started = time.perf_counter()
                item = ahead.get()
                self.data_wait_s += time.perf_counter() - started
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join(timeout=5)
