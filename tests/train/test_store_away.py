"""An S3 server that goes away while a snapshot is being written: training goes on; what is missing is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.fault_proxy import FaultProxy
from tests.s3_server import CREDENTIALS, Address, client_of, serving
from tests.train.conftest import weights
from tests.train.forked import start

Config = Callable[[Path], Path]
BUCKET = "training"
RETRY_S = 2.0


@pytest.fixture
def server() -> Iterator[Address]:
    with serving(BUCKET) as address:
        yield address


def objects(server: Address) -> dict[str, bytes]:
    client = client_of(server)
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    found = {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
    client.close()
    return found


def test_a_store_that_is_away_costs_snapshots_and_no_training(
    server: Address, finished: Path, tmp_path: Path, write_config: Config
) -> None:
    proxy = FaultProxy(server)
    out = tmp_path / "run"
    config = write_config(out)
    absences: list[threading.Thread] = []

    def away_until_it_is_said() -> None:
        with proxy.away():
            deadline = time.monotonic() + 60
            while "could not be written" not in (tmp_path / "1.txt").read_text() and time.monotonic() < deadline:
                time.sleep(0.02)

    def go_away() -> None:
        absences.append(threading.Thread(target=away_until_it_is_said))
        absences[-1].start()

    def launch(number: int) -> tuple[list[int | None], str]:
        variables = CREDENTIALS | {"AWS_ENDPOINT_URL": proxy.url, "BRAINLM_STORE_RETRY_S": str(RETRY_S)}
        run = start(tmp_path / f"{number}.txt", config, f"run.storage=s3://{BUCKET}/run", **variables)
        return run.finish(), run.said

    proxy.before("PUT .*/snapshots/step-4/exp_avg.safetensors", 1, go_away)
    proxy.before("PUT .*/snapshots/step-12/exp_avg.safetensors", 1, proxy.close)
    try:
        statuses, said = launch(1)
        assert statuses == [1], said
        for absence in absences:
            absence.join()
        assert "step 12/12" in said
        lines = [line for line in said.splitlines() if "could not be written" in line]
        assert len(lines) == 2, said
        assert "the snapshot of step 4 could not be written: cannot write s3://training/run/snapshots/" in lines[0]
        assert lines[0].endswith("training goes on")
        assert "the snapshot of step 12 could not be written: cannot write s3://training/run/snapshots/" in lines[1]
        assert "give the same command again: it goes on from the newest snapshot" in lines[1]
        assert "Traceback" not in said
        markers = [key for key in objects(server) if key.endswith("complete.json")]
        assert markers == ["run/snapshots/step-8/complete.json"]
        assert proxy.count("PUT", "/checkpoints/best-step-6/config.json").total() == 1  # once the store was back

        proxy.close()
        proxy = FaultProxy(server)
        statuses, said = launch(2)
        assert statuses == [0], said
        assert "resumed after step 8" in said
    finally:
        proxy.close()
    found = objects(server)
    ours, theirs = load(found["run/checkpoints/step-12/model.safetensors"]), weights(finished)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [key for key in found if key.endswith("complete.json")] == [
        "run/snapshots/step-12/complete.json", "run/snapshots/step-8/complete.json",
    ]  # fmt: skip
    assert not any("/step-4/" in key for key in found)
