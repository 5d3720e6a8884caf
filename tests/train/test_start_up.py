"""Ranks begin together or not at all, as on hosts that share no disk: each here has its own arguments and folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brainlm.errors import TrainingError
from brainlm.world import World, read_world
from tests.train.conftest import command, environment, metrics, run, stopped_after, weights
from train.run_files import check_same_on_all_ranks
from train.start_up import StartUp

Config = Callable[[Path], Path]
PROMPTLY_S = 300.0  # imports on a busy machine; ranks would wait for each other for ten minutes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(*commands: list[str], wait_s: float = 300.0) -> list[tuple[int, str]]:
    """Start a process per command, as ranks of one training run; return exit status and what was said of each."""
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands)),
        "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            arguments, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank, arguments in enumerate(commands)
    ]
    try:
        said = [process.communicate(timeout=wait_s)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return [(process.returncode, text) for process, text in zip(started, said)]


def test_an_error_of_one_rank_ends_all_and_is_said_by_all(tmp_path: Path, write_config: Config) -> None:
    here, there = write_config(tmp_path / "a"), write_config(tmp_path / "b")
    begin = time.monotonic()
    ends = run_ranks(command(here), command(there, f"data.dataset={tmp_path / 'elsewhere'}"), wait_s=PROMPTLY_S)
    assert time.monotonic() - begin < PROMPTLY_S
    assert [status for status, _ in ends] == [1, 1], ends
    assert f"rank 1 on {socket.gethostname()} (process " in ends[0][1]
    for _, said in ends:
        assert "elsewhere holds no finished data set" in said
        assert "Traceback" not in said
    assert not (tmp_path / "a").exists()


def test_an_error_of_rank_zero_is_known_to_the_others(tmp_path: Path, write_config: Config) -> None:
    """Rank zero holds the store in which ranks meet: it stays until they have read."""
    (tmp_path / "file").write_text("in the way")
    here, there = write_config(tmp_path / "file" / "run"), write_config(tmp_path / "b")
    ends = run_ranks(command(here), command(there), wait_s=PROMPTLY_S)
    assert ends[0][0] == 1
    assert ends[1][0] == 1
    assert "rank 0 on" in ends[1][1]
    assert "Not a directory" in ends[1][1] or "File exists" in ends[1][1]


def test_ranks_with_other_settings_are_refused_with_what_differs(tmp_path: Path, write_config: Config) -> None:
    here, there = write_config(tmp_path / "a"), write_config(tmp_path / "b")  # other folders are no difference
    ends = run_ranks(command(here), command(there, "optimizer.lr=3e-3"), wait_s=PROMPTLY_S)
    host = socket.gethostname()
    for status, said in ends:
        assert status == 1
        assert f"config.optimizer.lr: 0.01 on rank 0 ({host}), 0.003 on rank 1 ({host})" in said
        assert "run.out" not in said


@pytest.mark.parametrize(("key", "value"), [("git_commit", "5678"), ("data_hash", "0"), ("versions", {"torch": "1"})])
def test_other_code_or_data_on_one_host_is_a_difference(key: str, value: object) -> None:
    manifest = {"git_commit": "1234", "data_hash": "1", "versions": {"torch": "2", "python": "3.11"}}
    check_same_on_all_ranks([("a", manifest), ("b", manifest | {"git_commit": ""})])
    check_same_on_all_ranks([("a", manifest), ("b", manifest | {"versions": {"torch": "2", "python": "3.12"}})])
    with pytest.raises(ValueError, match=rf"{key}.* on rank 1 \(b\)"):
        check_same_on_all_ranks([("a", manifest), ("b", manifest | {key: value})])


def test_a_run_goes_on_where_its_folder_has_never_been(finished: Path, tmp_path: Path, write_config: Config) -> None:
    """Rank zero moves to another host, which knows of the run by its storage alone."""
    storage = stopped_after(finished, 8, tmp_path / "storage")
    for path in (storage / "metrics.jsonl", storage / "config.yaml"):
        path.unlink()
    manifest = json.loads((storage / "manifest.json").read_text())
    manifest["config"]["run"]["storage"] = str(storage)
    (storage / "manifest.json").write_text(json.dumps(manifest))
    (storage / "config.yaml").write_text("of the first host")

    here, there = tmp_path / "here", tmp_path / "there"
    refused = run(write_config(here), f"run.storage={storage}", "optimizer.lr=3e-3")
    assert refused.returncode == 1
    assert f"{storage} belongs to a run with other settings; choose another run.storage" in refused.stderr
    result = run(write_config(here), f"run.storage={storage}")
    assert result.returncode == 0, result.stderr
    assert "resumed after step 8" in result.stderr
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(here).items())
    assert sorted(metrics(here)) == [9, 10, 11, 12]
    for name in ("manifest.json", "config.yaml", "done.json"):
        assert (here / name).read_bytes() == (storage / name).read_bytes()

    again = run(write_config(there), f"run.storage={storage}")  # done is done, wherever it is asked
    assert again.returncode == 0
    assert "this run is done" in again.stderr
    assert not there.exists()


def test_ranks_agree_that_a_run_is_done_when_one_of_them_alone_has_its_files(
    finished: Path, write_config: Config, tmp_path: Path
) -> None:
    away = write_config(tmp_path / "away")
    ends = run_ranks(command(write_config(finished)), command(away), wait_s=PROMPTLY_S)
    assert [status for status, _ in ends] == [0, 0]
    assert "this run is done" in ends[0][1]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[StartUp]]:
    """Two ranks in one process, which wait for each other at most some seconds."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return lambda patience_s: [StartUp(World(rank, 0, 2), patience_s) for rank in (0, 1)]


def test_a_rank_that_does_not_get_ready_is_named(
    two_ranks: Callable[[float], list[StartUp]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = two_ranks(0.5)
    said = rf"rank 1 on {socket.gethostname()} \(process {os.getpid()}\) was not ready to begin within"
    monkeypatch.setattr("train.start_up.LINGER_S", 0.1)
    with pytest.raises(TrainingError, match=said):
        ranks[0].gather("early")
    with pytest.raises(TrainingError, match=said):  # it is told, too
        ranks[1].gather("late")


def test_values_come_in_the_order_of_ranks(two_ranks: Callable[[float], list[StartUp]]) -> None:
    ranks, found = two_ranks(30.0), {}

    def gather(rank: int) -> None:
        found[rank] = [ranks[rank].gather(f"{rank} {number}") for number in range(3)]

    threads = [threading.Thread(target=gather, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found[0] == found[1] == [[f"0 {number}", f"1 {number}"] for number in range(3)]


@pytest.mark.parametrize(
    ("launcher", "variables", "here"),
    [("deepspeed", {"LOCAL_SIZE": "2"}, 2), ("torchrun", {"LOCAL_WORLD_SIZE": "2"}, 2), ("other", {}, 4)],
)
def test_processes_on_a_host_are_counted(
    launcher: str, variables: dict[str, str], here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", **variables}.items():
        monkeypatch.setenv(name, value)
    world = read_world()
    assert (world.rank, world.size, world.local_size) == (3, 4, here), launcher


def test_without_an_address_ranks_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR=None"):
        StartUp(World(1, 0, 2))
