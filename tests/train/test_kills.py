"""kill -9 of one rank or of all, at any moment and within a save: the same command ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from safetensors import safe_open

from tests.train.conftest import command, environment, is_running, metrics, process_of_rank
from tests.train.forked import start

Config = Callable[[Path], Path]
# Snapshots of 3 MB, so that a save takes a while, and one after almost every step.
OPTIONS = (
    "run.snapshot_every=3", "validation.every=4", "model.width=64", "model.mlp_width=256",
    "model.decoder_width=64", "model.decoder_mlp_width=256",
)  # fmt: skip
MARKERS = {"snapshots": "complete.json", "checkpoints": "config.json"}
SNAPSHOT, BEST, ANYWHERE = "snapshots", "checkpoints", ""
GIVES_UP_S = 300.0  # of a machine with much else to do


class Running(Protocol):
    """A training run under way."""

    @property
    def is_alive(self) -> bool: ...

    def pids(self) -> list[int]: ...

    def kill(self, *numbers: int) -> None: ...

    def finish(self) -> list[int | None]: ...


@dataclass
class Launched:
    """A training run under the DeepSpeed launcher, which ends the other ranks when one has gone."""

    config: Path
    process: subprocess.Popen[bytes]
    num_ranks: int

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> list[int]:
        return [process_of_rank(rank, self.config) for rank in range(self.num_ranks)]

    def kill(self, *numbers: int) -> None:
        if numbers:
            for number in numbers:
                os.kill(process_of_rank(number, self.config), signal.SIGKILL)
        else:
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self) -> list[int | None]:
        try:
            return [self.process.wait(timeout=GIVES_UP_S)]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Kill:
    """When, and whom: `within` a save of a snapshot or of the best checkpoint, or after some steps and seconds."""

    ranks: tuple[int, ...]
    within: str
    num_steps: int
    seconds: float


def plan(num_kills: int, num_ranks: int, seed: int) -> Iterator[Kill]:
    chance = random.Random(seed)
    choices = [(rank,) for rank in range(num_ranks)] + ([()] if num_ranks > 1 else [])
    moments = [SNAPSHOT, ANYWHERE, BEST, *chance.choices((ANYWHERE, SNAPSHOT, BEST), (5, 3, 1), k=num_kills)]
    for within in moments[:num_kills]:
        num_steps = chance.randrange(6)
        # Before the first step, within start-up; after it, within a step, a validation or a save.
        yield Kill(chance.choice(choices), within, num_steps, chance.uniform(0, 0.05 if num_steps else 1.5))


def being_written(out: Path, kind: str, since_ns: int) -> list[str]:
    """Return folders that lack their marker and were written to after a time."""
    found = []
    for folder in (out / kind).glob("*step-*"):
        with suppress(OSError):  # it is being removed
            newest = max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0)
            if newest > since_ns and not (folder / MARKERS[kind]).exists():
                found.append(folder.name)
    return found


def num_lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(run: Running, kill: Kill, out: Path, started_ns: int) -> None:
    """Wait for the moment, and kill."""
    deadline = time.monotonic() + GIVES_UP_S
    if kill.within == ANYWHERE:
        seen = None
        while kill.num_steps:
            assert run.is_alive, "it ended before it could be killed"
            assert time.monotonic() < deadline
            now = num_lines(out)
            seen = now if seen is None or now < seen else seen  # resuming takes lines back
            if now >= seen + kill.num_steps:
                break
            time.sleep(0.002)
        time.sleep(kill.seconds)
        run.kill(*kill.ranks)
        return
    while True:
        assert run.is_alive, f"nothing of {kill.within} was written"
        assert time.monotonic() < deadline
        if being_written(out, kill.within, started_ns):
            rank_zero = run.pids()[0]
            os.kill(rank_zero, signal.SIGSTOP)  # so that it cannot come to the end of it meanwhile
            if being_written(out, kill.within, started_ns):
                run.kill(*kill.ranks)
                with suppress(ProcessLookupError):
                    os.kill(rank_zero, signal.SIGCONT)
                return
            os.kill(rank_zero, signal.SIGCONT)
        time.sleep(0.0005)


def survive(launch: Callable[[], Running], kills: Iterator[Kill], out: Path) -> None:
    """Kill run after run, then let one come to its end."""
    for kill in kills:
        started_ns = time.time_ns()
        run = launch()
        try:
            strike(run, kill, out, started_ns)
        finally:
            if kill.ranks and run.is_alive:
                statuses = run.finish()  # the other ranks notice
            else:
                run.kill()
                statuses = run.finish()
        assert all(statuses), statuses
        assert not (out / "done.json").exists()
    run = launch()
    statuses = run.finish()
    assert not any(statuses), statuses


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a mapping


def assert_same_run(out: Path, undisturbed: Path, num_steps: int) -> None:
    for name in ("snapshots", "checkpoints"):
        names = sorted(path.name for path in (undisturbed / name).iterdir())
        assert sorted(path.name for path in (out / name).iterdir()) == names
        for path in (undisturbed / name).rglob("*.safetensors"):
            assert tensors(out / path.relative_to(undisturbed)) == tensors(path), path
    assert {path.name for path in (out / "checkpoints").iterdir()} >= {f"step-{num_steps}"}
    assert any(path.name.startswith("best-step-") for path in (out / "checkpoints").iterdir())
    assert not list(out.rglob("*.tmp"))
    ours, theirs = metrics(out), metrics(undisturbed)
    assert list(ours) == list(theirs) == list(range(1, num_steps + 1))
    for name in ("loss", "grad_norm", "val_r2", "num_skipped"):
        assert [row.get(name) for row in ours.values()] == [row.get(name) for row in theirs.values()]


def drill(num_kills: int, num_ranks: int, num_steps: int, tmp_path: Path, write_config: Config) -> None:
    undisturbed, options = tmp_path / "undisturbed", (*OPTIONS, f"run.steps={num_steps}")
    finished = start(tmp_path / "undisturbed.txt", write_config(undisturbed), *options, ranks=num_ranks)
    assert not any(finished.finish()), finished.said
    out = tmp_path / "killed"
    config = write_config(out)
    launches = iter(range(1000))

    def launch() -> Running:
        return start(tmp_path / f"{next(launches)}.txt", config, *options, ranks=num_ranks)

    survive(launch, plan(num_kills, num_ranks, seed=num_ranks), out)
    assert_same_run(out, undisturbed, num_steps)


def test_three_kills_change_no_bit(tmp_path: Path, write_config: Config) -> None:
    drill(3, 1, 40, tmp_path, write_config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_of_one_rank_or_both_change_no_bit(tmp_path: Path, write_config: Config) -> None:
    drill(20, 2, 120, tmp_path, write_config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_deepspeed_launcher_ends_what_a_kill_has_left(tmp_path: Path, write_config: Config) -> None:
    num_steps = 40
    undisturbed, out, options = tmp_path / "undisturbed", tmp_path / "killed", (*OPTIONS, f"run.steps={num_steps}")
    finished = start(tmp_path / "undisturbed.txt", write_config(undisturbed), *options, ranks=2)
    assert not any(finished.finish()), finished.said
    config = write_config(out)
    processes: list[int] = []

    def launch() -> Running:
        assert not any(is_running(pid) for pid in processes)
        program = command(config, *options, ranks=2)
        with (tmp_path / "said.txt").open("ab") as said:
            process = subprocess.Popen(program, env=environment(), stdout=said, stderr=said, start_new_session=True)
        processes.append(process.pid)
        return Launched(config, process, 2)

    kills = [Kill((0,), SNAPSHOT, 0, 0.0), Kill((1,), ANYWHERE, 5, 0.02), Kill((), SNAPSHOT, 0, 0.0)]
    survive(launch, iter(kills), out)
    assert_same_run(out, undisturbed, num_steps)
