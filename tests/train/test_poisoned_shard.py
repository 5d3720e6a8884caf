"""A recording whose stored values are no numbers: every rank leaves out its steps, and the log names it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import DataError
from brainlm.loader import MaskSettings, WindowLoader
from brainlm.shards import FOLDER
from tests.train.conftest import metrics
from tests.train.forked import Run, start
from train.held_out import HeldOut
from train.settings import ValidationSettings

Config = Callable[[Path], Path]
RECORDING = "sub-train003_task-rest"
HELD_OUT = "sub-val001_task-rest"
STEPS, BATCH, SEED = 12, 4, 3  # of the configuration


def poison(url: str, folder: Path, value: float, recording: str = RECORDING) -> Dataset:
    """Copy a data set; put a value into every timepoint of one recording, with hashes and sizes as they should be."""
    shutil.copytree(url, folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    (shard,) = manifest["shards"]["train" if recording == RECORDING else "val"]
    index_path = folder / FOLDER / f"{shard['name']}.index.json"
    index = json.loads(index_path.read_text())
    (entry,) = [entry for entry in index["recordings"] if entry["recording_id"] == recording]
    tar = folder / FOLDER / f"{shard['name']}.tar"
    data = bytearray(tar.read_bytes())
    values = np.frombuffer(data, "<f4", entry["num_timepoints"] * entry["num_parcels"], entry["offset"])
    values.reshape(entry["num_timepoints"], -1)[:, 7] = value
    tar.write_bytes(data)
    index["sha256"] = shard["sha256"] = hashlib.sha256(data).hexdigest()
    index_path.write_text(json.dumps(index))
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return open_dataset(str(folder))


def steps_with_it(dataset: Dataset) -> list[int]:
    """Return the steps, from 1, whose batch has a window of the recording."""
    reader = dataset.split("train")
    loader = WindowLoader(
        reader, dataset.contract, MaskSettings(), batch_size=BATCH, windows_per_recording=2, seed=SEED
    )
    ids = [entry.recording_id for entry in reader.entries]
    return [step + 1 for step in range(STEPS) if ids.index(RECORDING) in loader.rows_at(step)[:, 0]]


def train(dataset: Dataset, tmp_path: Path, write_config: Config, max_skipped: int) -> Run:
    return start(
        tmp_path / "said.txt", write_config(tmp_path / "run"), f"data.dataset={dataset.store.url}",
        f"run.max_skipped={max_skipped}", "run.log_every=12", "run.snapshot_every=1", "run.keep_snapshots=12", ranks=2,
    )  # fmt: skip


def snapshot(out: Path, step: int) -> tuple[str, ...]:
    """Return the hashes of weights and moments."""
    files = json.loads((out / "snapshots" / f"step-{step}" / "complete.json").read_text())["files"]
    return tuple(files[name]["sha256"] for name in sorted(files) if name.endswith(".safetensors"))


@pytest.mark.parametrize("value", [np.nan, 1e38])
def test_steps_with_a_poisoned_recording_are_left_out_and_it_is_named(
    value: float, dataset_url: str, tmp_path: Path, write_config: Config
) -> None:
    dataset = poison(dataset_url, tmp_path / "poisoned", value)
    left_out = steps_with_it(dataset)
    assert 2 <= len(left_out) < STEPS
    run = train(dataset, tmp_path, write_config, max_skipped=len(left_out))
    assert run.finish() == [0, 0], run.said
    lines = [line for line in run.said.splitlines() if "is not finite" in line]
    assert [int(re.findall(r"of step (\d+) is", line)[0]) for line in lines] == left_out
    for line in lines:  # before all others
        assert re.search(rf"by their largest value in contract units: {RECORDING} from timepoint \d+ \(", line), line
    rows = metrics(tmp_path / "run")
    assert rows[STEPS]["num_skipped"] == len(left_out)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    for step in range(2, STEPS + 1):
        before, after = snapshot(tmp_path / "run", step - 1), snapshot(tmp_path / "run", step)
        assert (before == after) == (step in left_out)


def test_more_poisoned_steps_than_allowed_end_the_run_on_every_rank(
    dataset_url: str, tmp_path: Path, write_config: Config
) -> None:
    dataset = poison(dataset_url, tmp_path / "poisoned", 1e38)
    first, second, *_ = steps_with_it(dataset)
    run = train(dataset, tmp_path, write_config, max_skipped=1)
    assert run.finish() == [1, 1], run.said
    assert f"of step {first} is not finite" in run.said
    assert f"of step {second} is not finite" in run.said
    assert "More than run.max_skipped=1 steps were like this" in run.said
    assert "Traceback" not in run.said
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38])
def test_a_poisoned_recording_of_the_validation_split_is_refused_by_name(
    value: float, dataset_url: str, tmp_path: Path
) -> None:
    dataset = poison(dataset_url, tmp_path / "poisoned", value, HELD_OUT)
    with pytest.raises(DataError, match=f"{HELD_OUT}, of the val split, holds values that are not finite or above"):
        HeldOut(dataset.split("val"), dataset.contract, ValidationSettings())
