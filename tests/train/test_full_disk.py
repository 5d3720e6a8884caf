"""A disk without a free byte, a real one: training goes on to its end, and loses nothing that was there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brainlm.store import Store
from tests.train.conftest import command, environment, metrics, stopped_after, weights
from tests.train.forked import start
from train.snapshots import complete_snapshots, read_newest

Config = Callable[[Path], Path]
IN_A_FULL_DISK = """
mount -t tmpfs -o size=20m tmpfs disk
cp -r run disk/run
cat /dev/zero > disk/filler 2> /dev/null || true
status=0
"$@" 2> said.txt > /dev/null || status=$?
echo $status > status.txt
cp -r disk/run left
"""


def in_namespace(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *arguments]
    return subprocess.run(program, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


def test_a_full_disk_costs_snapshots_and_nothing_else(finished: Path, tmp_path: Path, write_config: Config) -> None:
    (tmp_path / "disk").mkdir()
    try:
        possible = in_namespace("mount -t tmpfs -o size=100k tmpfs disk", tmp_path).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("a small file system cannot be mounted here (unshare --user --mount)")
    stopped_after(finished, 8, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    program = command(write_config(tmp_path / "disk" / "run"), "run.snapshot_every=2")
    done = in_namespace(IN_A_FULL_DISK, tmp_path, *program)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said.txt").read_text()
    assert (tmp_path / "status.txt").read_text().split() == ["1"], said
    assert "Traceback" not in said
    assert "step 12/12" in said
    for number, end in (10, "; training goes on"), (12, ". See to it and give the same command again"):
        lines = [line for line in said.splitlines() if f"the snapshot of step {number} could not be written" in line]
        assert len(lines) == 1, said
        assert "the disk is full" in lines[0]
        assert end in lines[0]
    assert said.count("metrics.jsonl cannot be written") == 1

    left = tmp_path / "left"
    assert [path.name for path in (left / "snapshots").iterdir()] == ["step-8"]
    whole, counters = read_newest(Store(left / "snapshots"))
    assert whole is not None
    assert counters is not None
    assert counters["step"] == 8
    assert not list(left.rglob("*.tmp"))
    lines_of_8_steps = b"".join(before.splitlines(keepends=True)[:8])
    assert (left / "metrics.jsonl").read_bytes().startswith(lines_of_8_steps)

    again = start(tmp_path / "again.txt", write_config(left))
    assert again.finish() == [0], again.said
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(left).items())
    assert list(metrics(left)) == list(range(1, 13))
    assert complete_snapshots(Store(left / "snapshots")) == [8, 12]
