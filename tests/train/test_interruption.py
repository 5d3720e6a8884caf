"""What ends a run in order: a signal, its echo by the launcher, a second Ctrl-C, the end of the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.train.conftest import command, environment
from train import interruption
from train.interruption import Interruption

WITHIN_S = 240.0  # on a busy machine; seconds on an idle one


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_repeating_a_signal_does_not_end_the_snapshot(first: signal.Signals) -> None:
    asked = Interruption()
    asked._handle(first, None)
    assert asked.requested
    asked._handle(signal.SIGTERM, None)  # the launcher answers a signal to the whole group by SIGTERM to every rank
    asked._handle(signal.SIGTERM, None)
    assert asked.requested


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    asked = Interruption()
    asked._handle(signal.SIGINT, None)
    asked._handle(signal.SIGINT, None)  # the same key press, heard twice
    now[0] += 5
    with pytest.raises(SystemExit) as ended:
        asked._handle(signal.SIGINT, None)
    assert ended.value.code == 128 + signal.SIGINT


def test_a_launcher_that_is_there_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    asked = Interruption()
    asked.look_for_launcher()
    assert not asked.requested


def test_a_process_without_a_launcher_outlives_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    asked = Interruption()
    monkeypatch.setattr("os.getppid", lambda: 1)
    asked.look_for_launcher()
    assert not asked.requested


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_ranks_save_and_leave_when_their_launcher_is_gone(
    which: str, tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    """SIGTERM to `deepspeed` by its process id ends it alone, SIGKILL to the launcher below it leaves orphans, too."""
    out = tmp_path / "run"
    options = ("run.steps=100000", "run.snapshot_every=50000")
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        outer = psutil.Popen(
            command(write_config(out), *options, ranks=2), env=environment(), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    known = [outer]
    try:
        deadline = time.monotonic() + WITHIN_S
        while "step 5/" not in log.read_text():
            assert outer.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (inner,) = outer.children()
        ranks = inner.children()
        assert len(ranks) == 2
        known += [inner, *ranks]
        if which == "outer":
            outer.terminate()
        else:
            inner.kill()
        _, left = psutil.wait_procs(known, timeout=WITHIN_S)
        assert left == []
    finally:
        with suppress(ProcessLookupError):  # what is left of them, orphans too
            os.killpg(outer.pid, signal.SIGKILL)
        outer.wait()
    said = log.read_text()
    assert "the launcher is gone: saving a snapshot after this step, then leaving" in said
    assert "give the same command to go on" in said
    (snapshot,) = (out / "snapshots").iterdir()
    assert (snapshot / "complete.json").is_file()
