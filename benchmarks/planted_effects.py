"""Does fine-tuning find what was planted? Age and severity of simulated subjects, beside what is possible and controls.

    python benchmarks/planted_effects.py [--subjects 400] [--parcels 60] [--folder runs/planted] [--json PATH]

A cohort is simulated and prepared; a model is pretrained on 40 % of its subjects, and fine-tuned on others, to predict
age and severity of subjects that neither saw. Methods, all with the same subjects:

* `fine-tuned`: encoder and head;
* `frozen`: the head alone, on the pretrained encoder;
* `frozen untrained`: the head alone, on random weights;
* `permuted`: as `fine-tuned`, the targets of the training subjects permuted among them: chance;
* `possible`: the posterior mean given everything about a subject but his age (or severity), from the exact likelihood
  of the simulated system: no method that sees the series alone can do better.

Records: {case, method, r2, low, high}: R2 over the test subjects with its 95 % interval over families.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from brainlm.metrics import r2, with_interval
from brainlm.store import Store
from data_prep.prepare import main as prepare
from data_prep.simulated_atlas import AtlasConfig
from data_prep.simulated_cohort import (
    LARGEST_SEVERITY,
    AcquisitionConfig,
    CohortConfig,
    SimulateConfig,
    plan_cohort,
    simulate_series,
)
from data_prep.simulated_images import atlas_bytes
from data_prep.simulated_truth import EffectsConfig
from train.finetune_scores import SCORES

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("age", "severity")
GRID = 13
METHODS: dict[str, list[str]] = {
    "fine-tuned": [],
    "frozen": ["encoder.trained=none"],
    "frozen untrained": ["encoder.trained=none", "encoder.untrained=true"],
    "permuted": ["permute_targets=true"],
}


def cohort_config(num_subjects: int, num_parcels: int) -> SimulateConfig:
    """Return a cohort whose effects are strong enough to be seen in a few hundred subjects."""
    return SimulateConfig(
        seed=3,
        atlas=AtlasConfig(num_parcels=num_parcels, resolution_mm=8.0),
        cohort=CohortConfig(num_subjects=num_subjects, num_task_subjects=0),
        acquisition=AcquisitionConfig(fewest_timepoints=220, most_timepoints=240),
        effects=EffectsConfig(age_amplitude=0.3, age_coupling=0.15, severity_shift=0.9),
    )


def write_dataset(config: SimulateConfig, folder: Path) -> str:
    """Simulate the series and prepare a data set of them."""
    series, _ = simulate_series(config)
    plan = plan_cohort(config)
    atlas = folder / "atlas.nii.gz"
    atlas.write_bytes(atlas_bytes(plan.atlas))
    rows = []
    (folder / "ts").mkdir(parents=True, exist_ok=True)
    for item in series:
        np.save(folder / "ts" / f"{item.recording_id}.npy", item.bold)
        rows.append({"recording_id": item.recording_id, "file": f"ts/{item.recording_id}.npy", **item.subject})
    pd.DataFrame(rows).to_csv(folder / "recordings.tsv", sep="\t", index=False)
    tree = {
        "name": "planted",
        "out": str(folder / "dataset"),
        "source": {
            "kind": "table", "path": str(folder / "recordings.tsv"), "orientation": "timepoints_by_parcels",
            "tr_s": config.acquisition.tr_s, "phenotypes": ["age", "severity", "sex"],
            "columns": {
                "recording_id": "recording_id", "subject": "participant_id", "site": "site", "family": "family_id",
                "file": "file",
            },
        },
        "atlas": {"name": "planted", "image": str(atlas)},
        "splits": {"val": 0.1, "test": 0.5, "group_by": "family"},
        "ray": {"address": "off"},
    }  # fmt: skip
    path = folder / "prepare.yaml"
    path.write_text(yaml.safe_dump(tree))
    if prepare(["--config", str(path)]):
        raise SystemExit("the data set could not be prepared")
    return str(folder / "dataset")


def pretrained(folder: Path, dataset: str, steps: int) -> str:
    """Pretrain a small model on the train split; return its checkpoint."""
    tree = {
        "run": {"out": str(folder / "pretrain"), "steps": steps, "log_every": 100},
        "data": {"dataset": dataset, "batch_size": 16, "windows_per_recording": 4},
        "model": {"preset": "tiny"},
        "masks": {"ratios": [0.5, 0.75, 0.9]},
        "optimizer": {"lr": 2e-3, "warmup_steps": 50},
        "engine": {"precision": "fp32", "threads": 1},
        "validation": {"every": 200},
    }
    return str(_run(folder / "pretrain.yaml", tree, "pretrain")["checkpoint"])


def fine_tuned(folder: Path, dataset: str, checkpoint: str, overrides: Sequence[str], steps: int) -> Path:
    """Fine-tune with some settings changed; return the run's folder."""
    out = folder / "-".join(["finetune", *(o.replace("=", "-") for o in overrides)])
    tree = {
        "run": {"out": str(out), "steps": steps, "log_every": 50, "snapshot_every": steps},
        "data": {"dataset": dataset, "batch_size": 16, "windows_per_recording": 4},
        "init_from": checkpoint,
        "targets": [{"column": column} for column in TARGETS],
        "head": {"pooling": "mean", "dropout": 0.1},
        "encoder": {"dropout": 0.0, "lr_ratio": 0.2},
        "optimizer": {"lr": 2e-3, "warmup_ratio": 0.1},
        "engine": {"precision": "fp32", "threads": 1},
        "validation": {"every": 50, "patience": 8},
    }
    _run(folder / f"{out.name}.yaml", tree, "finetune", overrides)
    return out


def _run(path: Path, tree: dict[str, Any], entry: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run an entry in a process of its own: DeepSpeed begins once in each."""
    path.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "train" / f"{entry}.py"), "--config", str(path), *overrides]
    done_process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done_process.returncode:
        raise SystemExit(f"{entry} failed:\n{done_process.stdout[-1000:]}{done_process.stderr[-3000:]}")
    done: dict[str, Any] = json.loads((Path(tree["run"]["out"]) / "done.json").read_text())
    return done


def possible(config: SimulateConfig, recordings: Sequence[str], target: str) -> NDArray[np.float64]:
    """Return the posterior mean of a target for each recording, all else about its subject known; a flat prior."""
    plan = plan_cohort(config)
    if target == "age":
        values = np.linspace(config.cohort.youngest_years, config.cohort.oldest_years, GRID)
        prior = np.ones(GRID)
    else:  # severity is LARGEST x u^1.5 with u flat
        u = (np.arange(GRID) + 0.5) / GRID
        values, prior = LARGEST_SEVERITY * u**1.5, np.ones(GRID)
    series = {item.recording_id: item.bold for item in simulate_series(config)[0]}
    log_p = np.empty((len(recordings), GRID))
    for column, value in enumerate(values.tolist()):
        subjects = tuple(replace(subject, **{target: value}) for subject in plan.subjects)
        truth = plan_cohort(config, subjects).truth
        for row, name in enumerate(recordings):
            system, inputs = truth.system(name)
            log_p[row, column] = system.log_likelihood(series[name] - truth.baseline(name), inputs=inputs)
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True)) * prior
    mean: NDArray[np.float64] = (p @ values) / p.sum(axis=1)
    return mean


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=400)
    parser.add_argument("--parcels", type=int, default=60)
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=800, help="of each fine-tuning, at most")
    parser.add_argument("--folder", type=Path, default=Path("runs/planted"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    config = cohort_config(args.subjects, args.parcels)
    dataset = write_dataset(config, args.folder)
    begin = time.perf_counter()
    checkpoint = pretrained(args.folder, dataset, args.pretrain_steps)
    print(f"pretraining took {time.perf_counter() - begin:.0f} s", flush=True)
    records, table = [], pd.DataFrame()
    for method in args.methods:
        begin = time.perf_counter()
        out = fine_tuned(args.folder, dataset, checkpoint, METHODS[method], args.steps)
        tree = Store(str(out)).read_json(SCORES)
        table = pd.read_parquet(out / "predictions.parquet")
        found = [s for s in tree["scores"] if s["split"] == "test" and s["metric"] == "r2"]
        records += [
            {"case": s["target"], "method": method, "r2": s["value"], "low": s["low"], "high": s["high"]} for s in found
        ]
        print(f"{method} took {time.perf_counter() - begin:.0f} s", flush=True)
    test = table[table["split"] == "test"]
    for target in TARGETS:
        answer = possible(config, list(test["recording_id"]), target)
        score = with_interval(r2, test[f"true_{target}"].to_numpy(dtype=np.float64), answer, list(test["group"]))
        records.append({"case": target, "method": "possible", "r2": score.value, "low": score.low, "high": score.high})
    print(f"\n{len(test)} test subjects\n{'case':10}{'method':18}{'R2':>8}   95 % interval   share of possible")
    best = {r["case"]: r["r2"] for r in records if r["method"] == "possible"}
    for r in sorted(records, key=lambda r: r["case"]):
        share = r["r2"] / best[r["case"]]
        print(f"{r['case']:10}{r['method']:18}{r['r2']:8.3f}   {r['low']:.3f} to {r['high']:.3f}   {share:8.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
