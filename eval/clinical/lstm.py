"""LSTM over the series of a recording, all parcels at once; what is averaged over time is read by a linear layer.

Censored timepoints are fed as 0, the mean of every parcel, and have no weight in the average.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm.fitting import FitSettings
from brainlm.ordering import even_starts
from eval.clinical.network_fit import Inputs, NetworkPredictor, output_layer
from eval.clinical.people import People
from eval.clinical.problem import IntArray, Problem

LAYERS = 2
WIDTH = 64
DROPOUT = 0.1
MAX_WINDOWS = 4
"""Windows of a recording that are answered for, at most; the answer is the mean over them."""
MAX_CACHED_BYTES = 2 * 2**30


class ClinicalLSTM(NetworkPredictor):
    """Trained on windows at random places, answers for windows that lie evenly over the recording.

    Confounds cannot be removed from a series that is read in order.

    Parameters
    ----------
    people : People
    settings : FitSettings
    hidden_sizes : sequence of int
        To choose from.
    device : str
    """

    def __init__(
        self, people: People, settings: FitSettings, hidden_sizes: Sequence[int] = (64, 128), device: str = "cpu"
    ) -> None:
        super().__init__(settings, device)
        self.hidden_sizes = tuple(hidden_sizes)
        self.series = Series(people, device)

    def read(self, problem: Problem) -> Series:
        return self.series  # nothing in it is fitted to people

    def candidates(self, inputs: Series) -> Sequence[str]:
        return [f"{size} units" for size in self.hidden_sizes]

    def build(self, candidate: str, inputs: Series, num_outputs: int) -> nn.Module:
        return Recurrent(inputs.num_parcels, int(candidate.split()[0]), num_outputs)


class Series(Inputs):
    """Windows of recordings. Series are kept in memory up to `MAX_CACHED_BYTES`, and read again beyond.

    Parameters
    ----------
    people : People
    """

    def __init__(self, people: People, device: str) -> None:
        self.people, self.device = people, device
        self.window_len = people.cohort.window_len
        self._cached: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        self._num_bytes = 0

    @property
    def num_parcels(self) -> int:
        return self.series(0)[0].shape[1]

    def series(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return a recording (T, P), 0 where it is censored, and which timepoints are kept (T,)."""
        found = self._cached.get(row)
        if found is None:
            kept = self.people.kept(row)
            found = np.where(kept[:, None], self.people.standardised(row), np.float32(0)), kept
            if self._num_bytes + found[0].nbytes <= MAX_CACHED_BYTES:
                self._cached[row] = found
                self._num_bytes += found[0].nbytes
        return found

    def drawn(self, rows: IntArray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Return a window of each row, at a random place."""
        lengths = np.array([len(self.series(int(row))[1]) for row in rows])
        starts = rng.integers(0, lengths - self.window_len + 1)
        return self._windows([(int(row), int(start)) for row, start in zip(rows, starts)])

    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        """Return windows that lie evenly; those that are censored all through are left out, where there are others."""
        where, owner = [], []
        for i, row in enumerate(rows.tolist()):
            kept = self.series(row)[1]
            starts = even_starts(len(kept), self.window_len, MAX_WINDOWS)
            starts = [start for start in starts if kept[start : start + self.window_len].any()] or starts
            where += [(row, start) for start in starts]
            owner += [i] * len(starts)
        return self._windows(where), np.array(owner, dtype=np.int64)

    def _windows(self, where: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        series, kept = [], []
        for row, start in where:
            every, every_kept = self.series(row)
            series.append(every[start : start + self.window_len])
            kept.append(every_kept[start : start + self.window_len])
        return torch.from_numpy(np.stack(series)).to(self.device), torch.from_numpy(np.stack(kept)).to(self.device)


class Recurrent(nn.Module):
    """Linear map of the parcels, LSTM, mean over kept timepoints, linear output."""

    def __init__(self, num_parcels: int, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.project = nn.Linear(num_parcels, WIDTH)
        self.lstm = nn.LSTM(WIDTH, hidden_size, LAYERS, batch_first=True, dropout=DROPOUT)
        self.output = output_layer(hidden_size, num_outputs)

    def forward(self, series_BWP: Tensor, kept_BW: Tensor) -> Tensor:
        states = self.lstm(self.project(series_BWP))[0]
        weights = kept_BW.float() / kept_BW.sum(dim=1, keepdim=True).clamp(min=1)
        out: Tensor = self.output((states * weights[:, :, None]).sum(dim=1))
        return out
