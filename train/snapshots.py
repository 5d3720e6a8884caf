"""Snapshots: everything needed to resume, in ``snapshots/step-N``. One with a marker file is complete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from brainlm.errors import CheckpointError
from brainlm.world import World
from train.engine import Engine
from train.state import TrainState

MARKER = "complete.json"


def complete_snapshots(folder: Path) -> list[int]:
    """Return the steps of complete snapshots, oldest first."""
    steps = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and (path / MARKER).is_file():
            steps.append(int(number))
    return sorted(steps)


def save_snapshot(engine: Engine, state: TrainState, folder: Path, keep: int, world: World) -> None:
    """Write a snapshot, mark it complete, then remove the oldest beyond `keep`. All ranks take part."""
    tag = f"step-{state.step}"
    path = folder / tag
    if world.is_rank_zero and path.exists():
        shutil.rmtree(path)  # left unfinished by a killed run
    engine.barrier()
    engine.save(str(folder), tag, state.to_dict())
    engine.barrier()
    if world.is_rank_zero:
        temporary = path / f"{MARKER}.tmp"
        temporary.write_text(json.dumps({"step": state.step, "world_size": world.size}))
        os.replace(temporary, path / MARKER)
        for step in complete_snapshots(folder)[:-keep]:
            (folder / f"step-{step}" / MARKER).unlink()
            shutil.rmtree(folder / f"step-{step}")


def resume_newest(engine: Engine, folder: Path, world: World) -> TrainState | None:
    """Restore the newest complete snapshot; None if there is none. All ranks take part."""
    steps = complete_snapshots(folder)
    if not steps:
        return None
    tag = f"step-{steps[-1]}"
    marker = json.loads((folder / tag / MARKER).read_text())
    if marker["world_size"] != world.size:
        raise CheckpointError(
            f"{folder / tag} was written by {marker['world_size']} ranks, this run has {world.size}: "
            "resuming at another number of ranks is not supported yet; start with the same number"
        )
    return TrainState.from_dict(engine.load(str(folder), tag), str(folder / tag))
