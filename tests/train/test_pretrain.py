"""Training runs through the entry, as a user starts them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from brainlm.checkpoint import seen_subjects
from brainlm.model import BrainLM
from tests.train.conftest import command, environment, metrics, run, weights
from train.run_files import lock_folder

Config = Callable[[Path], Path]


def test_a_run_leaves_every_file_that_is_promised(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    manifest = json.loads((finished / "manifest.json").read_text())
    assert config["run"]["steps"] == 12
    assert manifest["deepspeed"]["train_batch_size"] == 4
    assert manifest["data_hash"]
    assert manifest["versions"]["deepspeed"]
    assert list(finished.glob("events.*"))
    assert sorted(p.name for p in (finished / "snapshots").glob("step-*")) == ["step-12", "step-8"]
    assert sorted(p.name for p in (finished / "checkpoints" / "step-12").iterdir()) == [
        "README.md", "config.json", "input_contract.json", "manifest.json", "model.safetensors", "train_subjects.json",
    ]  # fmt: skip


def test_metrics_hold_every_step_and_validation_where_asked(finished: Path) -> None:
    rows = metrics(finished)
    assert sorted(rows) == list(range(1, 13))
    assert {step for step, row in rows.items() if "val_r2" in row} == {6, 12}
    names = {"loss", "train_r2", "lr", "grad_norm", "windows_per_s", "tokens_per_s", "data_wait", "save_wait"}
    assert names <= set(rows[12])
    assert rows[1]["lr"] == pytest.approx(5e-3)
    assert all(row["train_r2"] < 1 and row["loss"] > 0 for row in rows.values())


def test_the_checkpoint_knows_its_subjects_by_keyed_hash_only(finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-12"
    assert seen_subjects(str(checkpoint), ["sub-train000", "sub-test000"]) == {"sub-train000"}
    for path in [*checkpoint.glob("*.json"), finished / "manifest.json"]:
        assert "sub-train" not in path.read_text()


def test_the_checkpoint_is_the_trained_model(finished: Path) -> None:
    model = BrainLM.from_pretrained(str(finished / "checkpoints" / "step-12"))
    fresh = BrainLM.untrained_like(model, seed=0)
    assert model.manifest["step"] == 12
    assert not torch.equal(model.decoder_pred.weight, fresh.decoder_pred.weight)
    assert model.decoder_pred.weight.dtype == torch.float32


def test_the_same_command_again_says_that_it_is_done_and_changes_nothing(finished: Path, write_config: Config) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = run(write_config(finished))
    assert result.returncode == 0
    assert "this run is done" in result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused_with_what_differs(finished: Path, write_config: Config) -> None:
    result = run(write_config(finished), "optimizer.lr=3e-3")
    assert result.returncode == 1
    assert "optimizer.lr: 0.01 there, 0.003 here" in result.stderr


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    finished: Path, tmp_path: Path, write_config: Config
) -> None:
    out = tmp_path / "killed"
    config = write_config(out)
    process = subprocess.Popen(command(config), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "snapshots" / "step-4" / "complete.json").is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(config)
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in result.stderr or "this run is done" in result.stderr
    ours, theirs = weights(out), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {s: row["loss"] for s, row in metrics(out).items()} == {s: r["loss"] for s, r in metrics(finished).items()}


def test_sigterm_saves_a_snapshot_and_the_run_can_go_on(finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = tmp_path / "stopped"
    config = write_config(out)
    process = subprocess.Popen(command(config), env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 1/" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    if not (out / "done.json").is_file():
        assert "give the same command to go on" in rest
        assert run(config).returncode == 0
    ours, theirs = weights(out), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_windows(tmp_path: Path, write_config: Config) -> None:
    result = run(write_config(tmp_path / "diverged"), "optimizer.lr=1e30", "optimizer.warmup_steps=0")
    assert result.returncode == 1
    assert "the loss of step 5 is not finite: the weights were not changed by it. Its windows" in result.stderr
    assert re.search(r"sub-train00\d_task-rest from timepoint \d+ \(", result.stderr)
    assert "More than run.max_skipped=3 steps were like this" in result.stderr
    assert not (tmp_path / "diverged" / "done.json").exists()


def test_a_time_limit_saves_and_ends_in_order(finished: Path, tmp_path: Path, write_config: Config) -> None:
    out = tmp_path / "limited"
    config = write_config(out)
    for step in (1, 2):  # the limit is over before the first step is
        result = run(config, "run.max_hours=1e-6")
        assert result.returncode == 0, result.stderr
        assert "run.max_hours=1e-06 is over: saving a snapshot after this step, then leaving" in result.stderr
        assert f"stopped after step {step} of 12" in result.stderr
    assert run(config).returncode == 0
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(out).items())


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, write_config: Config) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    with lock_folder(out):
        result = run(write_config(out))
    assert result.returncode == 1
    assert "another process is training in" in result.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, write_config: Config) -> None:
    result = run(write_config(tmp_path / "dry"), "--dry-run")
    assert result.returncode == 0
    assert "tokens per step       384" in result.stdout
    assert "parameters" in result.stdout
    assert not (tmp_path / "dry").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path, write_config: Config) -> None:
    result = run(write_config(tmp_path / "odd"), "data.micro_batch_size=3")
    assert result.returncode == 1
    assert "data.micro_batch_size=3 must divide" in result.stderr
