"""Snapshots: all that a training run goes on from, in ``step-N`` of any storage.

::

    weights.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors    float32, by parameter name
    state.json                                                         counters (`train.state.TrainState`)
    complete.json                                                      sha256 of these; written last

Tensors are whole, so that a snapshot fits any number of ranks and any ZeRO stage, and needs no storage that all hosts
share: rank zero writes and reads, and sends to the others. A damaged snapshot is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from contextlib import suppress
from typing import Any

from torch import Tensor

from brainlm.errors import CheckpointError, StoreError
from brainlm.store import Store
from train.checkpoints import Checkpoints
from train.engine import Engine
from train.state import TrainState
from train.whole_state import MOMENTS, WholeState

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # 1 was DeepSpeed's own format
WAIT_AT_ONCE_S = 1.0
PATIENCE_S = 30.0  # training waits no longer for storage that is slow or away; the next snapshot is left out then
CLOSE_WITHIN_S = 60.0
WEIGHTS, STATE, MARKER = "weights.safetensors", "state.json", "complete.json"


def complete_snapshots(store: Store) -> list[int]:
    """Return the steps of complete snapshots, oldest first."""
    return [step for step in _all_snapshots(store) if store.exists(f"step-{step}/{MARKER}")]


def _all_snapshots(store: Store) -> list[int]:
    """Return the steps of all snapshots, also of those that a killed run left unfinished."""
    numbers = [name.removeprefix("step-") for name in store.names() if name.startswith("step-")]
    return sorted(int(number) for number in numbers if number.isdigit())


class Snapshots:
    """Writes snapshots, and the best checkpoint, while training goes on: only gathering on rank zero holds it up.

    `begin` and `wait` are called by all ranks together. A snapshot that cannot be written leaves those before it alone.

    Parameters
    ----------
    keep : int
        Older ones are removed once a newer one is complete.
    checkpoints : Checkpoints
        Where the weights of the best validation score go.
    """

    def __init__(self, engine: Engine, store: Store, keep: int, checkpoints: Checkpoints) -> None:
        self._engine, self._store, self._keep, self._checkpoints = engine, store, keep, checkpoints
        self._thread: threading.Thread | None = None  # on rank zero alone, as is what follows
        self._step = 0  # that the thread is at work for
        self._best: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # not written yet
        self._problem = ""

    def begin(
        self, state: TrainState, *, snapshot: bool = True, best: bool = False, patience_s: float = PATIENCE_S
    ) -> str:
        """Gather, and begin to write.

        Parameters
        ----------
        state : TrainState
        snapshot : bool
            Write a snapshot; False = the best checkpoint alone.
        best : bool
            Write these weights as the best checkpoint. Where that fails it is tried again with the next snapshot.
        patience_s : float
            How long to wait for what is still being written; then the snapshot is left out.

        Returns
        -------
        str
            What could not be written before, or is left out, the same on every rank; "" if nothing.
        """
        is_busy, problem = self._settle(patience_s if snapshot else 0.0)
        if is_busy:
            problem = f"{problem}: there is none of step {state.step}" if snapshot else ""
            snapshot = False
        whole = self._engine.whole_state() if snapshot else None
        if best:
            weights = self._engine.whole_weights() if not snapshot else whole.weights if whole is not None else {}
            self._best = (weights, state.to_dict()) if self._engine.world.is_rank_zero else None
        if self._engine.world.is_rank_zero and not is_busy:
            self._step = state.step
            arguments = (whole, state.to_dict())
            self._thread = threading.Thread(target=self._write, args=arguments, name="brainlm-snapshot", daemon=True)
            self._thread.start()
        return problem

    def wait(self) -> str:
        """Wait until nothing is being written.

        Returns
        -------
        str
            What could not be written since this was last said, the same on every rank; "" if nothing.
        """
        return self._settle(math.inf)[1]

    def close(self) -> None:
        """Let rank zero end what it is writing, after an error. Not together: the other ranks may be gone."""
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_WITHIN_S)

    def _settle(self, patience_s: float) -> tuple[bool, str]:
        """Wait for the thread; return whether it is still at work, and what is to be said, the same on every rank."""
        deadline = time.monotonic() + patience_s
        is_waiting = True
        while is_waiting:  # the other ranks wait no longer than one round for any message
            is_busy = self._is_busy(min(deadline - time.monotonic(), WAIT_AT_ONCE_S))
            problem = f"the snapshot of step {self._step} is still being written" if is_busy else self._problem
            said = is_busy, problem, is_busy and time.monotonic() < deadline
            is_busy, problem, is_waiting = self._engine.from_rank_zero(said)
        if not is_busy:
            self._problem = ""
        return is_busy, problem

    def _is_busy(self, timeout_s: float) -> bool:
        if self._thread is not None:
            self._thread.join(timeout=max(timeout_s, 0.0))
            if self._thread.is_alive():
                return True
            self._thread = None
        return False

    def _write(self, whole: WholeState | None, counters: dict[str, Any]) -> None:
        problems = []
        if (best := self._best) is not None:
            try:
                self._checkpoints.write_best(*best)
                if self._best is best:  # there may be a better one by now
                    self._best = None
            except Exception as error:  # told to all ranks by `_settle`, as below
                problems.append(f"the checkpoint of the best step {best[1]['step']} could not be written: {error}")
        if whole is not None:
            try:
                write_snapshot(self._store, whole, counters)
                prune(self._store, counters["step"], self._keep)
            except Exception as error:
                problems.append(f"the snapshot of step {counters['step']} could not be written: {error}")
                if self._store.is_local:  # elsewhere storage may be away, and this would wait for it once more
                    with suppress(StoreError):
                        remove_unfinished(self._store)  # of a full disk half a snapshot must not take the rest
        self._problem = "; ".join(problems)


def prune(store: Store, newest: int, keep: int) -> None:
    """Remove all snapshots but the last `keep` complete ones up to the step `newest`.

    Those of later steps are of no use: training went on from one before them because they are damaged.
    """
    kept = [step for step in complete_snapshots(store) if step <= newest][-keep:]
    for step in _all_snapshots(store):
        if step not in kept:
            store.remove(f"step-{step}/{MARKER}")  # first, or a killed run would leave half a snapshot
            store.remove(f"step-{step}")


def remove_unfinished(store: Store) -> None:
    """Remove what killed or failed writers left."""
    complete = complete_snapshots(store)
    for step in _all_snapshots(store):
        if step not in complete:
            store.remove(f"step-{step}")


def resume_newest(engine: Engine, store: Store) -> TrainState | None:
    """Restore the newest snapshot that is whole; None if there is none. All ranks take part.

    Raises
    ------
    CheckpointError
        On all ranks: if there are snapshots and every one is damaged, or they are of another model or version.
    """
    whole, tree, problem = None, None, ""
    if engine.world.is_rank_zero:
        try:
            whole, tree = read_newest(store)
        except (CheckpointError, StoreError) as error:
            problem = str(error)
    tree, problem = engine.from_rank_zero((tree, problem))
    if problem:
        raise CheckpointError(problem)
    if tree is None:
        return None
    engine.restore(whole)
    return TrainState.from_dict(tree, store.url)


def write_snapshot(store: Store, whole: WholeState, counters: dict[str, Any]) -> None:
    """Write a snapshot of the step that `counters` names, and mark it complete."""
    from safetensors.torch import save

    folder = f"step-{counters['step']}"
    store.remove(f"{folder}/{MARKER}")  # left by a killed run, and about to be overwritten
    files: dict[str, dict[str, int | str]] = {}
    tensors: dict[str, dict[str, Tensor]] = {WEIGHTS: whole.weights}
    tensors |= {f"{key}.safetensors": moments for key, moments in whole.moments.items()}
    for name, found in tensors.items():
        data = save(found)
        store.write_bytes(f"{folder}/{name}", data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    text = json.dumps({**counters, "num_updates": whole.num_updates}).encode()
    store.write_bytes(f"{folder}/{STATE}", text)
    files[STATE] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    store.write_json(f"{folder}/{MARKER}", {"format_version": FORMAT_VERSION, "step": counters["step"], "files": files})


def read_newest(store: Store) -> tuple[WholeState | None, dict[str, Any] | None]:
    """Return what is in the newest snapshot that is whole: tensors, and counters. None, None if there is none.

    Raises
    ------
    CheckpointError
        If there are snapshots and every one is damaged, or one is of another version.
    """
    steps = complete_snapshots(store)
    for step in reversed(steps):
        try:
            return _read(store, f"step-{step}")
        except _DamagedError as error:
            logger.warning("%s: going on from the snapshot before it", error)
    if steps:
        raise CheckpointError(
            f"{store.url}: all {len(steps)} snapshots are damaged. Remove the folder of the training run to begin anew"
        )
    return None, None


class _DamagedError(CheckpointError):
    """A snapshot's bytes are not those that were written."""


def _read(store: Store, folder: str) -> tuple[WholeState, dict[str, Any]]:
    from safetensors.torch import load

    where = store.url_of(folder)
    try:
        marker = json.loads(store.read_bytes(f"{folder}/{MARKER}"))
    except ValueError as error:
        raise _DamagedError(f"{where}/{MARKER} is damaged") from error
    if not isinstance(marker, dict) or marker.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} was written by another version of brainlm, which must finish this training run; "
            "or choose another run.out"
        )
    data = {}
    for name, expected in marker["files"].items():
        try:
            data[name] = store.read_bytes(f"{folder}/{name}")
        except StoreError as error:
            if store.exists(f"{folder}/{name}"):
                raise
            raise _DamagedError(f"{where}/{name} is missing") from error
        if hashlib.sha256(data[name]).hexdigest() != expected["sha256"]:
            raise _DamagedError(f"{where}/{name} is damaged ({len(data[name])} of {expected['bytes']} bytes)")
    tree = json.loads(data[STATE])
    moments = {key: load(data[f"{key}.safetensors"]) for key in MOMENTS if f"{key}.safetensors" in data}
    return WholeState(load(data[WEIGHTS]), moments, int(tree.pop("num_updates"))), tree
