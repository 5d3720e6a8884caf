"""Training steps over several data sets: all windows of a step are of one, drawn in fixed shares.

Data sets may have other atlases and TRs: a batch is never padded. Which data set a step is of depends on the step and
the weights alone, so that resuming is exact and every number of ranks sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from brainlm.loader import WindowBatch, WindowLoader
from brainlm.read_ahead import read_ahead


class Mix:
    """Batches of one or several data sets.

    Parameters
    ----------
    loaders : dict of str to WindowLoader
        By the name of the data set.
    weights : sequence of float, optional
        Relative numbers of steps, in the order of `loaders`; None = in proportion to the windows of an epoch. After any
        number of steps each data set has had its share to within one step per data set.
    """

    def __init__(self, loaders: dict[str, WindowLoader], weights: Sequence[float] | None = None) -> None:
        self.names, self.loaders = tuple(loaders), tuple(loaders.values())
        self.steps_per_epoch = sum(loader.steps_per_epoch for loader in self.loaders)
        given = [loader.steps_per_epoch for loader in self.loaders] if weights is None else weights
        self.shares = np.array(given, dtype=np.float64) / sum(given)
        self.data_wait_s = 0.0
        self._had = np.zeros(len(loaders), dtype=np.int64)
        self._turns: list[tuple[int, int]] = []

    def turn(self, step: int) -> tuple[int, int]:
        """Return the number of the data set of a step, and how many steps that data set has had before it."""
        while len(self._turns) <= step:  # the one that is farthest behind its share; the first of equals
            chosen = int(np.argmax(self.shares * (len(self._turns) + 1) - self._had))
            self._turns.append((chosen, int(self._had[chosen])))
            self._had[chosen] += 1
        return self._turns[step]

    def batches_at(self, step: int) -> list[WindowBatch]:
        """Return this rank's micro-batches of one step."""
        number, own_step = self.turn(step)
        return self.loaders[number].batches_at(own_step)

    def rows_at(self, step: int) -> tuple[str, WindowLoader, np.ndarray]:
        """Return the data set of a step, its loader, and its (recording, start) rows, shape (batch_size, 2)."""
        number, own_step = self.turn(step)
        loader = self.loaders[number]
        return self.names[number], loader, loader.rows_at(own_step)

    def iterate(self, first_step: int, last_step: int) -> Iterator[list[WindowBatch]]:
        """Yield the batches of steps `first_step` to `last_step` - 1, read ahead; waiting adds to ``data_wait_s``."""
        return read_ahead(self.batches_at, first_step, last_step, self._waited)

    def _waited(self, seconds: float) -> None:
        self.data_wait_s += seconds
