"""The table of embeddings is what `BrainLM.embed` gives, however the work was divided or stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.contract_distance import read_recordings
from brainlm.dataset import SPLITS, Dataset, open_dataset
from brainlm.model import BrainLM, ModelConfig
from brainlm.recording import Recording
from brainlm.store import Store
from brainlm.testing import write_synthetic_dataset
from eval import table_parts
from eval.extract import main
from eval.table_parts import read_facts
from tests.eval.conftest import MISSING, TRAINED_ON

P = 24
ROOT = Path(__file__).resolve().parents[2]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(training_run: Path) -> str:
    return str(training_run / "checkpoints" / "step-10")


@pytest.fixture(scope="module")
def model(checkpoint: str) -> BrainLM:
    return BrainLM.from_pretrained(checkpoint)


def arguments(checkpoint: str, data: str, out: Path | str, *more: str) -> list[str]:
    return ["--checkpoint", checkpoint, "--data", data, "--out", str(out), "ray.workers=0", *more]


@pytest.fixture(scope="module")
def finished(checkpoint: str, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table") / "embeddings.parquet"
    assert main(arguments(checkpoint, dataset.store.url, out)) == 0
    return out


def recordings(dataset: Dataset) -> list[Recording]:
    return [recording for split in SPLITS for recording in read_recordings(dataset, split, max_recordings=1000)]


def test_rows_are_exactly_what_the_model_gives(finished: Path, model: BrainLM, dataset: Dataset) -> None:
    table = pd.read_parquet(finished)
    expected = recordings(dataset)
    assert table["recording_id"].tolist() == [recording.recording_id for recording in expected]
    for row, recording in zip(table.to_dict("records"), expected):
        found = model.embed(recording)
        np.testing.assert_array_equal(row["cls"], found.mean_cls)
        np.testing.assert_array_equal(row["pooled"], found.mean_pooled)
        assert (row["num_windows"], row["num_kept"]) == (3, 90)
        assert row["num_parcels"] == P - len(MISSING.get(recording.recording_id, ()))
        assert row["seen_in_training"] == (recording.subject == TRAINED_ON)
        assert (row["subject"], row["task"], row["tr_s"]) == (recording.subject, "rest", 2.0)
    assert table["split"].value_counts().to_dict() == {"train": 16, "val": 4, "test": 5}
    assert np.stack(table["cls"].tolist()).dtype == np.float32


def test_the_table_says_where_it_is_from_and_nothing_else_is_left(
    finished: Path, model: BrainLM, dataset: Dataset
) -> None:
    facts = read_facts(Store(str(finished.parent)), finished.name)
    assert facts["weights_sha256"] == model.weights_sha256
    assert facts["data"] == {"dataset": "synthetic", "content_hash": dataset.content_hash}
    assert facts["statistics_from"] == "checkpoint: train split of the synthetic data set"
    assert facts["adapted"] == []
    assert facts["width"] == 32
    assert sorted(path.name for path in finished.parent.iterdir()) == [
        "embeddings.parquet",
        "embeddings.rejected.parquet",
    ]
    assert len(pd.read_parquet(finished.parent / "embeddings.rejected.parquet")) == 0


def test_windows_and_parcels_are_those_of_the_model(
    checkpoint: str, model: BrainLM, dataset: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "all.parquet"
    more = ("per_window=true", "per_parcel=true", "splits=[test]")
    assert main(arguments(checkpoint, dataset.store.url, out, *more)) == 0
    table = pd.read_parquet(out)
    for recording in read_recordings(dataset, "test"):
        rows = table[table["recording_id"] == recording.recording_id]
        found = model.embed(recording, per_parcel=True)
        assert rows["start_s"].tolist() == found.starts_s.tolist() == [0, 80, 160]
        assert rows["num_kept"].tolist() == [40, 40, 10]
        np.testing.assert_array_equal(np.stack(rows["pooled"].tolist()), found.pooled)
        np.testing.assert_array_equal(np.stack(rows["parcels"].tolist()).reshape(3, P, 32), found.parcels)


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_do_not_depend_on_workers_or_parts(
    workers: int, finished: Path, checkpoint: str, dataset: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "again.parquet"
    more = (f"ray.workers={workers}", "recordings_per_part=3")
    assert main(arguments(checkpoint, dataset.store.url, out, *more)) == 0
    assert out.read_bytes() == finished.read_bytes()


def test_the_table_can_lie_on_any_storage(finished: Path, checkpoint: str, dataset: Dataset) -> None:
    assert main(arguments(checkpoint, dataset.store.url, "memory://test_extract/table.parquet")) == 0
    store = Store("memory://test_extract")
    assert store.read_bytes("table.parquet") == finished.read_bytes()
    assert store.names() == ["table.parquet", "table.rejected.parquet"]


def test_row_groups_have_a_fixed_size(
    finished: Path, checkpoint: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_parts, "GROUP_ROWS", 10)
    for step in (4, 100):
        more = f"recordings_per_part={step}"
        assert main(arguments(checkpoint, dataset.store.url, tmp_path / f"{step}.parquet", more)) == 0
        metadata = pq.read_metadata(tmp_path / f"{step}.parquet")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10, 10, 5]
    assert (tmp_path / "4.parquet").read_bytes() == (tmp_path / "100.parquet").read_bytes()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "4.parquet"), pd.read_parquet(finished))


KILLED_AFTER_FIVE = """
import os, signal, sys
from brainlm.store import Store
write, left = Store.write_bytes, [5]
def write_bytes(self, name, data):
    write(self, name, data)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
Store.write_bytes = write_bytes
from eval.extract import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_program_goes_on_and_ends_in_the_same_bytes(
    finished: Path, checkpoint: str, dataset: Dataset, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "table.parquet"
    words = arguments(checkpoint, dataset.store.url, out, "recordings_per_part=2")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_FIVE, *words], env=env, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    assert main(words) == 0
    assert "25 recordings, 10 done before" in capsys.readouterr().out
    assert out.read_bytes() == finished.read_bytes()
    assert main(words) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_table_of_something_else_is_not_written_over(
    finished: Path, checkpoint: str, dataset: Dataset, tmp_path: Path, capsys: Captured
) -> None:
    before = finished.read_bytes()
    assert main(arguments(checkpoint, dataset.store.url, finished, "per_window=true")) == 1
    assert "holds something else (other settings)" in capsys.readouterr().err
    (tmp_path / "text.parquet").write_text("not parquet")
    assert main(arguments(checkpoint, dataset.store.url, tmp_path / "text.parquet")) == 1
    assert "is no parquet file" in capsys.readouterr().err
    assert finished.read_bytes() == before


def test_a_dry_run_says_what_is_missing_and_writes_nothing(
    finished: Path, checkpoint: str, dataset: Dataset, tmp_path: Path, capsys: Captured
) -> None:
    assert main([*arguments(checkpoint, dataset.store.url, tmp_path / "a.parquet"), "--dry-run"]) == 0
    assert "25 recordings in 3 parts, 0 done before" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments(checkpoint, dataset.store.url, finished), "--dry-run"]) == 0
    assert "25 done before" in capsys.readouterr().out


def test_recordings_that_cannot_be_embedded_are_listed_with_their_reason(
    checkpoint: str, model: BrainLM, tmp_path: Path, capsys: Captured
) -> None:
    series = np.random.default_rng(0).normal(size=(90, P)).astype(np.float32)
    files = {
        "sub-1_task-rest": series,
        "sub-2_ses-b_run-2": series[:25],  # shorter than a window: padded, as `embed` does
        "sub-3": np.full_like(series, np.nan),
        "sub-4": series[:1],
        "sub-5": series.T,
        "sub-6": series[:P],
        "sub-7": series * np.float32(1e30),
        "sub-8": series[:, :-1],
    }
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "sub-9.npy").write_bytes(b"damaged")
    out = tmp_path / "table.parquet"
    assert main(arguments(checkpoint, str(tmp_path / "sub-*.npy"), out, "tr_s=2.0")) == 0
    table = pd.read_parquet(out)
    assert table["recording_id"].tolist() == ["sub-1_task-rest", "sub-2_ses-b_run-2"]
    ids = table[["subject", "session", "task", "run"]]
    assert ids.to_numpy().tolist() == [["1", "", "rest", ""], ["2", "b", "", "2"]]
    for row, name in zip(table.to_dict("records"), files):
        np.testing.assert_array_equal(row["pooled"], model.embed(files[name], tr_s=2.0).mean_pooled)
    rejected = pd.read_parquet(tmp_path / "table.rejected.parquet").set_index("recording_id")
    for name, reason in {
        "sub-3": "no parcel carries signal",
        "sub-4": "no parcel carries signal",
        "sub-5": "time comes first",
        "sub-6": "which of them is time cannot be told",
        "sub-7": "not finite",
        "sub-8": "23 columns",
        "sub-9": "not an .npy file",
    }.items():
        assert reason in rejected.loc[name, "reason"], name
        assert rejected.loc[name, "source"] == str(tmp_path / f"{name}.npy")
    assert "2 recordings embedded, 7 rejected" in capsys.readouterr().out


def test_a_cohort_of_which_nothing_can_be_embedded_fails_and_lists_it(
    checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    np.save(tmp_path / "a.npy", np.zeros((50, P)))
    out = tmp_path / "table.parquet"
    assert main(arguments(checkpoint, str(tmp_path / "a.npy"), out)) == 1
    assert "none of 1 recordings could be embedded" in capsys.readouterr().err
    assert not out.exists()
    assert len(pd.read_parquet(tmp_path / "table.rejected.parquet")) == 1


def test_text_tables_may_name_their_columns(checkpoint: str, model: BrainLM, tmp_path: Path) -> None:
    series = np.random.default_rng(0).normal(size=(60, P)).astype(np.float32).round(3)
    names = model.contract.atlas.parcel_names
    order = np.random.default_rng(1).permutation(P)
    frame = pd.DataFrame(series, columns=names)
    frame.iloc[:, order].to_csv(tmp_path / "named.csv", index=False)
    frame.to_csv(tmp_path / "bare.tsv", sep="\t", index=False, header=False)
    pd.DataFrame(series).to_csv(tmp_path / "numbered.csv", index=False)
    frame.rename(columns={names[0]: "other"}).to_csv(tmp_path / "wrong.csv", index=False)
    frame.to_csv(tmp_path / "with_index.csv")
    out = tmp_path / "table.parquet"
    patterns = json.dumps([str(tmp_path / "*.csv"), str(tmp_path / "*.tsv")])
    assert main([f"data={patterns}", f"checkpoint={checkpoint}", f"out={out}", "ray.workers=0", "tr_s=2"]) == 0
    table = pd.read_parquet(out)
    assert table["recording_id"].tolist() == ["bare", "named", "numbered"]
    expected = model.embed(series, tr_s=2.0).mean_cls
    for vector in table["cls"]:
        np.testing.assert_array_equal(vector, expected)
    assert table["seen_in_training"].isna().all()  # whose recordings these are is not in their names
    rejected = pd.read_parquet(tmp_path / "table.rejected.parquet").set_index("recording_id")["reason"]
    assert "not among them: ['other']" in rejected["wrong"]
    assert "does not name the parcels" in rejected["with_index"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("scan.nii.gz", "prepare.py"), ("*.csv", "finds no file"), ("absent", "no finished data set")],
)
def test_what_is_no_recording_is_refused(
    name: str, message: str, checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    assert main(arguments(checkpoint, str(tmp_path / name), tmp_path / "out.parquet")) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set of another atlas and TR."""
    url = str(tmp_path_factory.mktemp("other") / "dataset")
    return write_synthetic_dataset(url, num_subjects={"train": 3, "test": 2}, num_parcels=10, tr_s=1.0, seed=3)


def test_another_atlas_and_tr_are_adapted_only_when_that_is_asked_for(
    dataset: Dataset, other: Dataset, checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    config = ModelConfig(
        width=16, mlp_width=32, decoder_width=16, decoder_mlp_width=32, window_len=40, patch_len=10,
        parcel_embedding=False,
    )  # fmt: skip
    reads_any = BrainLM(config, dataset.contract).eval()
    save_checkpoint(str(tmp_path / "model"), reads_any, {}, [])
    out = tmp_path / "table.parquet"

    def refusal(*more: str, folder: str = str(tmp_path / "model")) -> str:
        assert main(arguments(folder, other.store.url, out, *more)) == 1
        return capsys.readouterr().err

    assert "Set scaled_by=dataset" in refusal()
    assert "set native_tr=true" in refusal("scaled_by=dataset")
    assert "learned code for each parcel" in refusal("scaled_by=dataset", "native_tr=true", folder=checkpoint)
    for scaled_by, options in (
        ("dataset", {"contract": other.contract}),
        ("recording", {"atlas": other.contract.atlas, "statistics": "recording"}),
    ):
        out = tmp_path / f"{scaled_by}.parquet"
        more = (f"scaled_by={scaled_by}", "native_tr=true")
        assert main(arguments(str(tmp_path / "model"), other.store.url, out, *more)) == 0
        loaded = BrainLM.from_pretrained(str(tmp_path / "model"))
        for vector, recording in zip(pd.read_parquet(out)["cls"], recordings(open_dataset(other.store.url))):
            found: Any = loaded.embed(recording, native_tr=True, **options)
            np.testing.assert_array_equal(vector, found.mean_cls)
        adapted = " ".join(read_facts(Store(str(tmp_path)), out.name)["adapted"])
        assert "placed by their coordinates" in adapted
        assert "TR 1 s against 2 s" in adapted


def test_a_difference_of_scale_is_said(checkpoint: str, model: BrainLM, tmp_path: Path, capsys: Captured) -> None:
    from eval.extract_settings import ExtractSettings
    from eval.table_plan import check_dataset

    louder = replace(model.contract, iqr=model.contract.iqr * 3)
    settings = ExtractSettings(checkpoint=checkpoint, data="x", out="x.parquet")
    (note,) = check_dataset(louder, model.contract, settings)
    assert "amplitude" in note
