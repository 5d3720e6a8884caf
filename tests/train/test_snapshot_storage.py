"""Snapshots on a real S3 server of this machine: training goes on while they are written, or cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from brainlm.model import BrainLM
from brainlm.store import Store
from tests.train.conftest import run, weights
from train.snapshots import complete_snapshots, read_newest

Config = Callable[[Path], Path]
BUCKET = "training"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server over HTTP on the loopback interface, with one empty bucket; ended afterwards."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir(BUCKET)
        yield f"s3://{BUCKET}"
        S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_run_keeps_its_snapshots_on_object_storage_and_goes_on_from_them(
    s3: str, finished: Path, tmp_path: Path, write_config: Config
) -> None:
    out, url = tmp_path / "run", f"{s3}/one"
    config = write_config(out)
    first = run(config, f"run.storage={url}")
    assert first.returncode == 0, first.stderr
    snapshots = Store(f"{url}/snapshots")
    assert complete_snapshots(snapshots) == [8, 12]
    assert not (out / "snapshots").exists()
    assert BrainLM.from_pretrained(f"{url}/checkpoints/step-12").manifest["step"] == 12
    Store(url).remove("done.json")
    snapshots.remove("step-12")
    again = run(config, f"run.storage={url}")
    assert again.returncode == 0, again.stderr
    assert "resumed after step 8" in again.stderr
    whole, _ = read_newest(snapshots)
    assert whole is not None
    expected = weights(finished)
    assert all(torch.equal(whole.weights[name], expected[name]) for name in expected)


def test_a_store_out_of_reach_costs_snapshots_and_no_training(
    finished: Path, tmp_path: Path, write_config: Config
) -> None:
    """The folder of snapshots is a file: nothing can be written until the user has mended it."""
    out = tmp_path / "run"
    config = write_config(out)
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "snapshots").write_text("in the way")
    result = run(config, f"run.storage={tmp_path / 'storage'}")
    assert result.returncode == 1
    assert "the snapshot of step 4 could not be written" in result.stderr
    assert "training goes on" in result.stderr
    assert "the snapshot of step 12 could not be written" in result.stderr
    assert not (out / "done.json").exists()
    (tmp_path / "storage" / "snapshots").unlink()
    shutil.rmtree(tmp_path / "storage")
    result = run(config, f"run.storage={tmp_path / 'storage'}")
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(out).items())
