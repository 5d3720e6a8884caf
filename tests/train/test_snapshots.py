"""What the writer of snapshots does when storage is slow, fails, or holds what a killed run left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import open_dataset
from brainlm.errors import StoreError
from brainlm.model import BrainLM
from brainlm.store import Store
from brainlm.testing import small_model
from brainlm.world import World
from tests.train.conftest import metrics, weights
from tests.train.forked import start
from train.checkpoints import Checkpoints
from train.snapshots import Snapshots, complete_snapshots, prune, read_newest, write_snapshot
from train.state import TrainState
from train.whole_state import WholeState


class OneRank:
    """What `Snapshots` needs of an engine; the weights are the step."""

    def __init__(self, model: BrainLM) -> None:
        self.model, self.world = model, World(0, 0, 1)
        self.step = 0

    def from_rank_zero(self, value: Any) -> Any:
        return value

    def whole_weights(self) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(value, self.step) for name, value in self.model.state_dict().items()}

    def whole_state(self) -> WholeState:
        return WholeState(self.whole_weights(), {}, 0)


class Gate(Store):
    """A store whose writes wait while it is shut, and fail while it is broken."""

    def __init__(self, url: Path) -> None:
        super().__init__(url)
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_broken = False

    def write_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        assert self.is_open.wait(timeout=60)
        if self.is_broken:
            raise StoreError("it is broken")
        super().write_bytes(name, data)


class Training:
    """Steps whose validation score is what the test says."""

    def __init__(self, tmp_path: Path, dataset_url: str, keep: int = 2) -> None:
        model = small_model(open_dataset(dataset_url).contract)
        self.engine, self.store = OneRank(model), Gate(tmp_path / "snapshots")

        def save(url: str, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> str:
            return save_checkpoint(url, model, facts, [], weights)

        self.checkpoints = Checkpoints(Store(tmp_path / "checkpoints"), save)
        self.snapshots = Snapshots(self.engine, self.store, keep, self.checkpoints)  # type: ignore[arg-type]

    def begin(self, step: int, val_r2: float, **options: Any) -> str:
        self.engine.step = step
        return self.snapshots.begin(TrainState(step=step, val_r2=val_r2, best_val_r2=val_r2), **options)

    def best(self) -> tuple[int, float]:
        """Return the step of the best checkpoint, and a value of its weights."""
        url = self.checkpoints.best()
        assert url is not None
        model = BrainLM.from_pretrained(url)
        return model.manifest["step"], float(model.cls_token.detach().flatten()[0])


@pytest.fixture
def training(tmp_path: Path, dataset_url: str) -> Training:
    return Training(tmp_path, dataset_url)


def test_storage_that_is_slow_costs_a_snapshot_and_no_time(training: Training) -> None:
    training.store.is_open.clear()
    assert training.begin(1, 0.0) == ""
    said = training.begin(2, 0.1, best=True, patience_s=0.1)
    assert said == "the snapshot of step 1 is still being written: there is none of step 2"
    assert training.begin(3, 0.2, snapshot=False, best=True) == ""  # takes the place of the other one
    assert training.checkpoints.best() is None
    training.store.is_open.set()
    assert training.snapshots.wait() == ""
    assert training.begin(4, 0.0) == ""
    assert training.snapshots.wait() == ""
    assert complete_snapshots(training.store) == [1, 4]
    assert training.best() == (3, 3.0)


def test_a_best_checkpoint_that_cannot_be_written_is_written_with_the_next_snapshot(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.begin(1, 0.1, snapshot=False, best=True)
    assert training.snapshots.wait() == ""
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", lambda *_: (_ for _ in ()).throw(StoreError("it is broken")))
        training.begin(2, 0.2, snapshot=False, best=True)
        assert training.snapshots.wait() == "the checkpoint of the best step 2 could not be written: it is broken"
    assert training.best() == (1, 1.0)  # the one before it stays
    training.begin(3, 0.0)
    assert training.snapshots.wait() == ""
    assert training.best() == (2, 2.0)
    assert len(list(Path(training.checkpoints.best() or "").parent.iterdir())) == 1


def test_a_snapshot_that_fails_leaves_nothing_behind(training: Training) -> None:
    training.begin(1, 0.0)
    training.snapshots.wait()
    training.store.is_broken = True
    training.begin(2, 0.0)
    assert training.snapshots.wait() == "the snapshot of step 2 could not be written: it is broken"
    assert training.store.names() == ["step-1"]


def snapshot(store: Store, step: int) -> None:
    write_snapshot(store, WholeState({"a": torch.zeros(2)}, {}, step), {"step": step})


def test_pruning_removes_what_killed_writers_left_and_what_was_passed_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2, 3, 4, 9):
        snapshot(store, step)
    store.write_bytes("step-9/weights.safetensors", b"damaged")  # so that the run went on from one before it
    store.remove("step-2/complete.json")
    store.write_bytes("step-7/weights.safetensors", b"half a snapshot")
    store.write_bytes("notes.txt", b"of a person")
    prune(store, newest=4, keep=1)
    assert store.names() == ["notes.txt", "step-4"]
    whole, _ = read_newest(store)
    assert whole is not None
    assert whole.num_updates == 4


def test_the_best_checkpoint_holds_the_weights_of_the_best_score(tmp_path: Path, write_config: Any) -> None:
    out = tmp_path / "run"
    options = ("validation.every=1", "run.snapshot_every=1", "run.keep_snapshots=12", "optimizer.lr=0.1")
    run = start(tmp_path / "said.txt", write_config(out), *options)
    assert run.finish() == [0], run.said
    scores = {step: row["val_r2"] for step, row in metrics(out).items()}
    best = max(scores, key=lambda step: scores[step])
    assert 1 < best < 12, scores  # else this test says little
    (folder,) = (out / "checkpoints").glob("best-*")
    assert folder.name == f"best-step-{best}"
    model = BrainLM.from_pretrained(str(folder))
    assert (model.manifest["step"], model.manifest["val_r2"]) == (best, scores[best])
    expected = load_file(out / "snapshots" / f"step-{best}" / "weights.safetensors")
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    last = BrainLM.from_pretrained(str(out / "checkpoints" / "step-12"))
    assert last.manifest["best_val_r2"] == scores[best]
    assert not np.array_equal(weights(out)["cls_token"], expected["cls_token"])


def test_a_run_that_keeps_no_best_checkpoint_writes_none(tmp_path: Path, write_config: Any) -> None:
    run = start(tmp_path / "said.txt", write_config(tmp_path / "run"), "run.keep_best=false")
    assert run.finish() == [0], run.said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-12"]
