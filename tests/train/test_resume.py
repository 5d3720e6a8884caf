"""Ranks and ZeRO stages train the same model, and a run goes on at any of them, to the same bits where they stay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brainlm.store import Store
from tests.train.conftest import Trained, command, environment, metrics, run, stopped_after, weights
from train.snapshots import read_newest

Config = Callable[[Path], Path]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_trains_the_same_model(stage: int, finished: Path, trained: Trained) -> None:
    out = trained(f"engine.zero_stage={stage}")
    ours, stage_1 = metrics(out), metrics(finished)
    for name in ("loss", "grad_norm"):  # float32: other summation orders
        assert [row[name] for row in ours.values()] == pytest.approx([row[name] for row in stage_1.values()], rel=1e-4)
    assert ours[12]["val_r2"] == pytest.approx(stage_1[12]["val_r2"], abs=1e-4)


def test_two_ranks_of_the_deepspeed_launcher_train_the_same_model(
    finished: Path, trained: Trained, write_config: Config
) -> None:
    out = trained("data.micro_batch_size=1", ranks=2)
    one, two = metrics(finished), metrics(out)
    for step in one:  # float32: other summation orders, amplified by a few updates
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)
    assert two[12]["val_r2"] == pytest.approx(one[12]["val_r2"], abs=1e-3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["deepspeed"]["gradient_accumulation_steps"] == 2
    refused = run(write_config(out), "data.micro_batch_size=1")
    assert "this run is done" in refused.stderr


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "fp32", False), (1, "fp32", False), (2, "fp32", False), (3, "fp32", False), (1, "bf16", False),
        (2, "bf16", False), (3, "bf16", False), (1, "fp32", True), (3, "bf16", True),
    ],
)  # fmt: skip
def test_a_run_goes_on_bit_by_bit(
    stage: int, precision: str, offload: bool, trained: Trained, tmp_path: Path, write_config: Config
) -> None:
    options = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    options = [option for option in options if option not in ("engine.zero_stage=1", "engine.precision=fp32")]
    options += ["engine.offload_optimizer=true"] * offload
    undisturbed = trained(*options)
    out = stopped_after(undisturbed, 8, tmp_path / "run")
    result = run(write_config(out), *options)
    assert result.returncode == 0, result.stderr
    assert "resumed after step 8" in result.stderr
    ours, theirs = weights(out), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(out)[12]["val_r2"] == metrics(undisturbed)[12]["val_r2"]
    assert [metrics(out)[step]["loss"] for step in range(1, 13)] == [
        metrics(undisturbed)[step]["loss"] for step in range(1, 13)
    ]


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (3, 2), (0, 1), (3, 1)])
def test_a_run_goes_on_at_another_number_of_ranks_and_another_stage(
    stage: int, ranks: int, finished: Path, tmp_path: Path, write_config: Config
) -> None:
    out = stopped_after(finished, 8, tmp_path / "run")
    result = run(write_config(out), f"engine.zero_stage={stage}", ranks=ranks if ranks > 1 else None)
    assert (out / "done.json").is_file(), result.stdout + result.stderr
    for step in range(9, 13):  # the same windows and masks; float32 in other orders of summation
        assert metrics(out)[step]["loss"] == pytest.approx(metrics(finished)[step]["loss"], rel=1e-4)
    ours, theirs = weights(out), weights(finished)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_activations_computed_again_give_the_same_weights(stage: int, trained: Trained) -> None:
    options = [f"engine.zero_stage={stage}"] if stage != 1 else []
    kept, again = trained(*options), trained(*options, "engine.activation_checkpointing=true")
    ours, theirs = weights(again), weights(kept)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_torchrun_trains_the_same_model(finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = tmp_path / "torchrun"
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    arguments = command(write_config(out))[1:]  # without the interpreter
    result = subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "manifest.json").read_text())["world_size"] == 2
    for step, row in metrics(finished).items():
        assert metrics(out)[step]["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_two_ranks_go_on_as_one(trained: Trained, finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = stopped_after(trained("data.micro_batch_size=1", ranks=2), 8, tmp_path / "run")
    result = run(write_config(out))
    assert result.returncode == 0, result.stderr
    for step in range(9, 13):
        assert metrics(out)[step]["loss"] == pytest.approx(metrics(finished)[step]["loss"], rel=1e-4)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "exp_avg_sq.safetensors", "state.json", "complete.json"])
def test_a_damaged_snapshot_is_passed_over(
    spoil: Callable[[Path], None], name: str, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped_after(finished, 12, tmp_path / "run") / "snapshots"
    spoil(folder / "step-12" / name)
    whole, counters = read_newest(Store(str(folder)))
    assert whole is not None
    assert counters is not None
    assert (counters["step"], whole.num_updates) == (8, 8)
    if not (name == "complete.json" and spoil is Path.unlink):  # that one was never complete
        assert "step-12" in caplog.text
        assert "going on from the snapshot before it" in caplog.text


def test_a_run_goes_on_past_a_damaged_snapshot(finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = stopped_after(finished, 12, tmp_path / "run")
    flip(out / "snapshots" / "step-12" / "exp_avg.safetensors")
    result = run(write_config(out))
    assert result.returncode == 0, result.stderr
    assert "exp_avg.safetensors is damaged" in result.stderr
    assert "resumed after step 8" in result.stderr
    assert all(torch.equal(value, weights(finished)[key]) for key, value in weights(out).items())


def test_a_run_of_which_every_snapshot_is_damaged_does_not_begin_anew(
    finished: Path, tmp_path: Path, write_config: Config
) -> None:
    out = stopped_after(finished, 12, tmp_path / "run")
    for step in (8, 12):
        flip(out / "snapshots" / f"step-{step}" / "weights.safetensors")
    before = (out / "metrics.jsonl").read_bytes()
    result = run(write_config(out))
    assert result.returncode == 1
    assert "all 2 snapshots are damaged" in result.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_snapshot_of_an_earlier_version_is_refused(finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = stopped_after(finished, 8, tmp_path / "run")
    (out / "snapshots" / "step-8" / "complete.json").write_text(json.dumps({"step": 8, "world_size": 1}))
    result = run(write_config(out))
    assert result.returncode == 1
    assert "was written by another version of brainlm" in result.stderr
