"""The whole line on a small simulated cohort, with every part real: NIfTI, Ray, two DeepSpeed ranks, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

from brainlm.dataset import open_dataset
from brainlm.errors import CheckpointError
from brainlm.model import BrainLM
from brainlm.testing import synthetic_atlas, write_synthetic_dataset

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: simulate, prepare, pretrain on two ranks, evaluate, verdict."""
    out = tmp_path_factory.mktemp("study")
    verdict = {
        "results": str(out / "results"),
        "claims": [
            {
                "name": "the optimum is above the mean", "task": "reconstruction", "metric": "r2",
                "conditions": [{"mask_ratio": 0.75, "centring": "recording"}], "at_least": -10.0,
            }
        ],
    }  # fmt: skip
    (out / "verdict.yaml").write_text(yaml.safe_dump(verdict))
    port = 29700 + os.getpid() % 200
    cohort, dataset = out / "cohort", out / "dataset"
    stages = {
        "simulate": (
            f"python data_prep/simulate.py --config data_prep/configs/tiny_cohort.yaml out={cohort}",
            cohort / "simulation.json",
        ),
        "prepare": (
            f"python data_prep/prepare.py --config data_prep/configs/demo.yaml out={dataset} source.path={cohort} "
            f"atlas.image={cohort}/atlas/sim56_dseg.nii.gz atlas.labels={cohort}/atlas/sim56_dseg.tsv "
            f"truth={cohort}/truth splits.val=0.25 splits.test=0.3 splits.seed=0",
            dataset / "dataset.json",
        ),
        "pretrain": (
            f"deepspeed --num_accelerators 2 --master_port {port} train/pretrain.py --config train/configs/demo.yaml "
            f"data.dataset={dataset} run.out={out}/pretrain run.steps=30 run.snapshot_every=15 "
            "optimizer.warmup_steps=5 masks.num_decoded=100 validation.every=15",
            out / "pretrain" / "done.json",
        ),
        "evaluate": (
            f"python eval/run.py --config eval/configs/demo.yaml dataset={dataset} checkpoints=[{out}/pretrain] "
            f"out={out}/results intervals.num_bootstrap=100",
            out / "results" / "report.html",
        ),
        "verdict": (f"python eval/verdict.py --config {out}/verdict.yaml", out / "results" / "verdict.json"),
    }
    tree = {
        "name": "study",
        "out": str(out),
        "stages": [{"name": k, "command": c, "done": str(d)} for k, (c, d) in stages.items()],
    }
    (out / "study.yaml").write_text(yaml.safe_dump(tree))
    result = run("cluster/pipeline.py", "--config", str(out / "study.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_every_recording_of_the_cohort_is_in_the_data_set_or_listed_as_refused(study: Path) -> None:
    kept = pandas.read_parquet(study / "dataset" / "recordings.parquet")
    refused = pandas.read_parquet(study / "dataset" / "rejected.parquet")
    assert len(kept) + len(refused) == 8
    splits_of_subject = kept.groupby("subject")["split"].nunique()
    assert (splits_of_subject == 1).all()
    dataset = open_dataset(str(study / "dataset"))
    assert dataset.contract.atlas.num_parcels == 56
    assert sum(len(dataset.split(s)) for s in ("train", "val", "test")) == len(kept)


def test_the_checkpoint_of_two_ranks_loads_with_the_contract_of_the_data(study: Path) -> None:
    model = BrainLM.from_pretrained(str(study / "pretrain" / "checkpoints" / "step-30"))
    dataset = open_dataset(str(study / "dataset"))
    assert model.contract.to_json() == dataset.contract.to_json()
    assert model.manifest["world_size"] == 2
    assert model.manifest["data_hash"] == dataset.content_hash


def test_the_checkpoint_refuses_a_data_set_of_another_atlas_and_says_why(study: Path, tmp_path: Path) -> None:
    model = BrainLM.from_pretrained(str(study / "pretrain" / "checkpoints" / "step-30"))
    other = write_synthetic_dataset(str(tmp_path / "other"), atlas=synthetic_atlas(num_parcels=56, name="other"))
    with pytest.raises(CheckpointError, match="other parcel names: column 0: L_"):
        model.contract.check_fits(other.contract, ours="the checkpoint", theirs="the data set")
    refused = run(
        "eval/run.py", "--config", "eval/configs/demo.yaml", f"dataset={tmp_path}/other",
        f"checkpoints=[{study}/pretrain]", f"out={tmp_path}/results",
    )  # fmt: skip
    assert refused.returncode == 1
    assert "other parcel names" in refused.stderr


def test_every_score_has_what_a_reader_needs(study: Path) -> None:
    records = json.loads((study / "results" / "results.json").read_text())
    needed = {
        "task", "version", "dataset", "split", "model", "metric", "value", "ci_low", "ci_high", "num_subjects",
        "condition",
    }  # fmt: skip
    assert all(needed <= set(record) for record in records)
    assert {record["task"] for record in records} == {"reconstruction", "forecasting", "networks"}
    best = {r["model"]: r["value"] for r in records if r["metric"] == "r2" and r["condition"].get("mask_ratio") == 0.75
            and r["condition"].get("centring") == "recording"}  # fmt: skip
    assert best["optimum"] > best["gaussian"] > best["mean"] == pytest.approx(0.0, abs=1e-6)


def test_the_report_opens_offline_and_names_no_subject(study: Path) -> None:
    page = (study / "results" / "report.html").read_text()
    assert 'src="http' not in page
    assert "<link" not in page
    assert "sub-0" not in page


def test_running_the_study_again_repeats_nothing(study: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in study.rglob("*") if p.is_file()}
    result = run("cluster/pipeline.py", "--config", str(study / "study.yaml"))
    assert result.returncode == 0
    assert "nothing was repeated" in result.stderr
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*") if p.is_file()} == before
