"""What resumes: everything besides weights and optimizer that the next step depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from brainlm.errors import CheckpointError


@dataclass
class TrainState:
    """Counters of a training run.

    The position in the data, the masks and the learning rate are pure functions of `step` and the settings, and no
    random state is kept between steps; so the step is all that has to be remembered.
    """

    step: int = 0
    """Optimizer updates done."""
    windows_seen: int = 0
    val_r2: float | None = None
    """Of the newest validation; the last step always validates."""
    best_val_r2: float | None = None
    seconds_trained: float = 0.0
    since_best: int = 0
    """Validations since the best one."""
    num_skipped: int = 0
    """Steps left out because their loss or gradient was not finite."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any], where: str) -> TrainState:
        names = set(cls.__dataclass_fields__)
        tree = {"since_best": 0} | tree  # older snapshots do not have it
        if not names <= set(tree):
            raise CheckpointError(f"{where}: the snapshot lacks {', '.join(sorted(names - set(tree)))}")
        return cls(**{name: tree[name] for name in names})
