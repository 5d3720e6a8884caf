"""The checkpoints of a training run: of its last step, and of the best validation score so far. Rank zero writes them.

::

    checkpoints/step-N         when every step is done
    checkpoints/best-step-N    the best score so far; the one before is removed once this one is complete

The best one has its step in its name because no storage replaces a whole folder at once: a run that is killed, or finds
the disk full, while it writes a better one keeps the one it had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from brainlm.checkpoint import CONFIG
from brainlm.store import Store

Save = Callable[[str, dict[str, Tensor], dict[str, Any]], str]

BEST = "best-step-"


class Checkpoints:
    """Writes checkpoints of one training run.

    Parameters
    ----------
    store : Store
        The folder of checkpoints.
    save : callable
        Takes the URL of a folder, float32 weights, and what is true of them alone; writes a checkpoint and returns what
        identifies its weights.
    """

    def __init__(self, store: Store, save: Save) -> None:
        self._store, self._save = store, save

    def write(self, name: str, weights: dict[str, Tensor], counters: dict[str, Any]) -> tuple[str, str]:
        """Write a checkpoint; return its URL, and the sha256 of its weights.

        Parameters
        ----------
        counters : mapping
            `train.state.TrainState` at the step of the weights.
        """
        facts = {key: counters[key] for key in ("step", "windows_seen", "val_r2", "best_val_r2")}
        url = self._store.url_of(name)
        return url, self._save(url, weights, facts)

    def write_best(self, weights: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Write the checkpoint of a new best score, and remove those before it."""
        name = f"{BEST}{counters['step']}"
        self.write(name, weights, counters)
        for other in self._store.names():
            if other.startswith(BEST) and other != name:
                self._store.remove(f"{other}/{CONFIG}")  # first, or a killed run would leave what looks complete
                self._store.remove(other)

    def best(self) -> str | None:
        """Return the URL of the complete checkpoint of the best score, None if there is none."""
        names = [name for name in self._store.names() if name.startswith(BEST)]
        complete = [name for name in names if self._store.exists(f"{name}/{CONFIG}")]
        newest = max(complete, key=lambda name: int(name.removeprefix(BEST)), default=None)
        return None if newest is None else self._store.url_of(newest)
