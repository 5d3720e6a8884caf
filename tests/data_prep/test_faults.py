"""Whatever fails, running the same command again gives the same bytes, and no finished recording is done twice.

A small cohort is prepared by the program itself onto a real S3 server over HTTP, through a proxy that goes wrong on
purpose (`tests.fault_proxy`), or onto a small disk. What comes out is compared, file by file, with an undisturbed run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from tests.data_prep.conftest import Toy
from tests.fault_proxy import FaultProxy
from tests.s3_server import CREDENTIALS, Address, client_of, serving

ROOT = Path(__file__).parents[2]
BUCKET = "cohorts"
NUM_RECORDINGS = 16
STAGED = r"/staging/[^/]+/[^/]+\.json$"  # written last: this recording is finished
WITHOUT_RAY = ("ray.address='off'",)  # with quotes: a plain off is false in YAML
TWO_WORKERS = ("ray.address=local", "ray.num_cpus=2")
TreeBytes = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Address]:
    with serving(BUCKET) as address:
        yield address


def write_cohort(folder: Path, num_recordings: int) -> Path:
    """Write series, atlas and config; return the config, which writes to ``dataset`` beside it."""
    toy = Toy(folder)
    toy.write_atlas()
    table = toy.write_table(np.random.default_rng(0), num_subjects=num_recordings)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(toy.settings(table, shards={"recordings_per_shard": 4})))
    return config


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), NUM_RECORDINGS)


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tree_bytes: TreeBytes) -> dict[str, bytes]:
    """All files of the data set as one run leaves them that nothing happened to, by name, without ``log/``."""
    return prepare_undisturbed(cohort, tree_bytes)


def prepare_undisturbed(config: Path, tree_bytes: TreeBytes) -> dict[str, bytes]:
    done = subprocess.run(command_for(config, *WITHOUT_RAY), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = tree_bytes(config.parent / "dataset")
    assert {"dataset.json", "input_contract.json", "quality.html", "recordings.parquet"} <= set(found)
    assert any(name.endswith(".tar") for name in found)
    assert any(name.startswith("recordings.zarr/") for name in found)
    return found


def command_for(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "data_prep" / "prepare.py"), "--config", str(config), *overrides]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | CREDENTIALS | more


@dataclass
class Drill:
    """One data set on the S3 server, reached through a proxy of its own."""

    config: Path
    server: Address
    name: str
    folder: Path
    proxy: FaultProxy = field(init=False)

    def __post_init__(self) -> None:
        self.proxy = FaultProxy(self.server)

    def start(self, *overrides: str, retry_s: float = 60.0) -> subprocess.Popen:
        command = command_for(self.config, f"out=s3://{BUCKET}/{self.name}", *overrides)
        variables = environment(
            AWS_ENDPOINT_URL=self.proxy.url,
            BRAINLM_STORE_RETRY_S=str(retry_s),
            BRAINLM_CACHE=str(self.folder / "cache"),
        )
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen, timeout: float = 120.0) -> tuple[int, str]:
        """Wait for the end; return the exit status and what was said."""
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, f"{out}\n{err}"

    def run(self, *overrides: str, retry_s: float = 60.0, timeout: float = 120.0) -> tuple[int, str]:
        return self.finish(self.start(*overrides, retry_s=retry_s), timeout)

    def objects(self) -> dict[str, bytes]:
        """Return what the server holds of the data set, by name, without ``log/``."""
        return {name: data for name, data in self.everything().items() if not name.startswith("log/")}

    def everything(self) -> dict[str, bytes]:
        client = client_of(self.server)
        found = {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.name}/"):
            for item in page.get("Contents", []):
                body = client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"]
                found[item["Key"].removeprefix(f"{self.name}/")] = body.read()
        client.close()
        return found

    def times_finished(self) -> list[int]:
        """Return, for each recording, how often a worker learned that its result was stored."""
        return sorted(self.proxy.count("PUT", STAGED).values())


@pytest.fixture
def drill(cohort: Path, s3_server: Address, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Drill]:
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())  # faults fall by names: always the same ones
    made = Drill(cohort, s3_server, name, tmp_path)
    yield made
    made.proxy.close()


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def kill_a_worker(driver: subprocess.Popen) -> int:
    """Kill one that is at work, and return its process id."""
    for child in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if child.cmdline()[:1] == ["ray::prepare_recording"]:
                child.kill()
                return child.pid
    raise AssertionError("no worker is at work")


def test_a_killed_worker_loses_and_repeats_nothing(drill: Drill, undisturbed: dict[str, bytes]) -> None:
    killed = []
    driver = drill.start(*TWO_WORKERS)
    drill.proxy.before(f"PUT .*{STAGED}", 5, lambda: killed.append(kill_a_worker(driver)))
    status, said = drill.finish(driver)
    assert status == 0, said
    assert len(killed) == 1
    assert_same(drill.objects(), undisturbed)
    assert drill.times_finished() == [1] * NUM_RECORDINGS


def test_a_driver_that_is_killed_twice_goes_on_where_it_was(drill: Drill, undisturbed: dict[str, bytes]) -> None:
    for pattern, number in ((f"PUT .*{STAGED}", 9), (r"PUT .*/shards/[^/]+\.tar$", 2)):
        driver = drill.start(*WITHOUT_RAY)
        drill.proxy.before(pattern, number, driver.kill)
        status, said = drill.finish(driver)
        assert status == -signal.SIGKILL, said
        assert "dataset.json" not in drill.objects()
    status, said = drill.run(*WITHOUT_RAY)
    assert status == 0, said
    assert_same(drill.objects(), undisturbed)
    assert drill.times_finished() == [1] * NUM_RECORDINGS


def test_a_server_that_is_away_for_a_while_is_waited_for(drill: Drill, undisturbed: dict[str, bytes]) -> None:
    absences = []

    def go_away() -> None:
        def away() -> None:
            with drill.proxy.away():
                time.sleep(2.5)

        absences.append(threading.Thread(target=away))
        absences[-1].start()

    for pattern in (f"PUT .*{STAGED}", "PUT .*/recordings.zarr/"):
        drill.proxy.before(pattern, 2, go_away)
    status, said = drill.run(*WITHOUT_RAY)
    for absence in absences:
        absence.join()
    assert status == 0, said
    assert len(absences) == 2
    assert_same(drill.objects(), undisturbed)
    assert set(drill.times_finished()) == {1}


def test_a_server_that_stays_away_ends_the_run_with_a_reason(drill: Drill, undisturbed: dict[str, bytes]) -> None:
    driver = drill.start(*WITHOUT_RAY, retry_s=2)
    drill.proxy.before(f"PUT .*{STAGED}", 6, drill.proxy.close)
    status, said = drill.finish(driver)
    assert status == 1, said
    assert re.search(r"^error: cannot (read|write|look up|list) s3://cohorts/.*: tried \d+ times in \d s", said, re.M)
    assert "Traceback" not in said
    finished = set(drill.proxy.count("PUT", STAGED))
    drill.proxy = FaultProxy(drill.server)
    status, said = drill.run(*WITHOUT_RAY)
    assert status == 0, said
    assert_same(drill.objects(), undisturbed)
    assert not finished & set(drill.proxy.count("PUT", STAGED))


def test_requests_that_fail_now_and_then_change_nothing(drill: Drill, undisturbed: dict[str, bytes]) -> None:
    drill.proxy.faults |= {"reset": 0.03, "503": 0.03, "cut": 0.03, "short": 0.03}
    status, said = drill.run(*WITHOUT_RAY)
    assert status == 0, said
    assert {request.fault for request in drill.proxy.log} == {"", "reset", "503", "cut", "short"}
    assert_same(drill.objects(), undisturbed)
    assert set(drill.times_finished()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "500", "503", "cut", "short"])
def test_a_twentieth_of_all_requests_may_fail(drill: Drill, undisturbed: dict[str, bytes], fault: str) -> None:
    drill.proxy.faults[fault] = 0.05
    status, said = drill.run(*TWO_WORKERS)
    assert status == 0, said
    assert sum(request.fault != "" for request in drill.proxy.log) >= 5
    assert_same(drill.objects(), undisturbed)
    assert set(drill.times_finished()) == {1}


SMALL_DISK = """
mount -t tmpfs -o size=$1k tmpfs disk
shift
status=0
"$@" 2> first.txt > /dev/null || status=$?
echo $status > first.status
find disk -name '*.json' -path '*/staging/*' > staged.txt
find disk -name '*.tmp' > temporary.txt
mount -o remount,size=50m disk
"$@" 2> second.txt > /dev/null
cp -r disk/dataset out
"""


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    cohort: Path, undisturbed: dict[str, bytes], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script, "sh", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)

    (tmp_path / "disk").mkdir()
    try:
        possible = in_namespace("mount -t tmpfs -o size=100k tmpfs disk").returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("a small file system cannot be mounted here (unshare --user --mount)")
    program = command_for(cohort, "out=disk/dataset", *WITHOUT_RAY)
    done = in_namespace(SMALL_DISK, "100", *program)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in sorted(tmp_path.glob("*.txt")))
    said = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "first.status").read_text().split() == ["1"], said
    assert "Traceback" not in said
    assert re.search(r"^error: cannot write .*: the disk is full \(.*No space left on device", said, re.M)
    num_staged = len((tmp_path / "staged.txt").read_text().splitlines())
    assert 0 < num_staged < NUM_RECORDINGS
    assert (tmp_path / "temporary.txt").read_text() == ""
    assert_same(tree_bytes(tmp_path / "out"), undisturbed)
    last = json.loads(sorted((tmp_path / "out" / "log").iterdir())[-1].read_text())
    assert (last["reused"], last["done"]) == (num_staged, NUM_RECORDINGS - num_staged)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_large_cohort_survives_everything_at_once(s3_server: Address, tmp_path: Path, tree_bytes: TreeBytes) -> None:
    """5 % of all requests fail in every way while workers, and twice the driver, are killed."""
    num_recordings = 200
    config = write_cohort(tmp_path, num_recordings)
    expected = prepare_undisturbed(config, tree_bytes)
    drill = Drill(config, s3_server, "large", tmp_path)
    drill.proxy.faults |= {"reset": 0.0125, "503": 0.0125, "cut": 0.0125, "short": 0.0125}
    try:
        for pattern, number in ((f"PUT .*{STAGED}", 120), ("PUT .*/recordings.zarr/", 3)):
            driver = drill.start(*TWO_WORKERS)
            drill.proxy.before(f"PUT .*{STAGED}", 40, lambda driver=driver: kill_a_worker(driver))
            drill.proxy.before(pattern, number, driver.kill)
            status, said = drill.finish(driver, timeout=300)
            assert status == -signal.SIGKILL, said
        status, said = drill.run(*TWO_WORKERS, timeout=300)
        assert status == 0, said
        assert sum(request.fault != "" for request in drill.proxy.log) > 50
    finally:
        drill.proxy.close()
    assert_same(drill.objects(), expected)
    assert set(drill.times_finished()) == {1}
