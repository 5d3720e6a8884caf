"""A peer that hangs ends the training run within a bounded time, and is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from brainlm.world import World
from tests.train.conftest import command, environment, is_running, metrics, process_of_rank, run
from train.watchdog import Watchdog

TIMEOUT_S = 5.0
ENDS_WITHIN_S = 180.0  # the launcher waits half a minute before it kills a rank that is stopped


@pytest.mark.parametrize(
    ("hanging", "said"),
    [
        (1, r"rank 0 has not come on for \d+ s: rank 1 on .* \(process {pid}\) is silent"),
        (0, r"rank 1 has not come on for \d+ s: rank 0 does not answer"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_ends(
    hanging: int, said: str, tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    out = tmp_path / "run"
    config = write_config(out)
    options = ("run.steps=100000", "run.snapshot_every=5", f"engine.timeout_s={TIMEOUT_S}")
    process = subprocess.Popen(
        command(config, *options, ranks=2), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "step 7/" in line:
                break
        ranks = [process_of_rank(rank, config) for rank in (0, 1)]
        os.kill(ranks[hanging], signal.SIGSTOP)
        begin = time.monotonic()
        rest, _ = process.communicate(timeout=ENDS_WITHIN_S)  # until the launcher and all ranks have ended
        assert time.monotonic() - begin < ENDS_WITHIN_S
        assert process.returncode != 0
        assert not any(is_running(pid) for pid in ranks)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert re.search(said.format(pid=ranks[hanging]), rest), rest
    again = run(config, *options[:1], "run.steps=12", ranks=None)
    assert again.returncode == 1  # other steps are another run
    assert (out / "snapshots" / "step-5" / "complete.json").is_file()
    assert len(metrics(out)) >= 7


def test_nothing_is_being_told_once_it_is_closed() -> None:
    """What comes back from the store while the interpreter is ending would abort a process that is done."""

    class Slow:
        num_told = 0

        def set(self, key: str, value: str) -> None:
            time.sleep(0.5)
            self.num_told += 1

    before = set(threading.enumerate())
    watchdog = Watchdog(World(0, 0, 1), timeout_s=1.0, from_rank_zero=lambda value: value)
    slow = Slow()
    watchdog._store = slow
    time.sleep(0.3)  # a pause is 0.2 s: it is telling
    watchdog.close()
    assert slow.num_told == 1
    assert set(threading.enumerate()) == before
