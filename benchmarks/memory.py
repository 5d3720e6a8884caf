"""Peak memory of training runs, estimated by ``train/pretrain.py --dry-run`` and measured.

    python benchmarks/memory.py [--cases tiny-4 13m-1 ...] [--json PATH]

Every case is a training run of two steps of its own, through ``train/pretrain.py``, on simulated recordings of 424
parcels, with validation and a snapshot. Measured is the peak of the largest rank's process (what the system counted at
its end), on a machine with a GPU the peak of torch's allocator (metric ``memory_gb``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from brainlm.config import load_config
from brainlm.model import BrainLM
from brainlm.testing import write_synthetic_dataset
from train.memory import estimate
from train.plan import blank_contract
from train.precision import resolve_precision
from train.settings import PretrainSettings

ROOT = Path(__file__).resolve().parents[1]
NUM_PARCELS, WINDOW_LEN = 424, 200


@dataclass(frozen=True, kw_only=True)
class Case:
    """`micro` windows a pass, `passes` of them a step and rank."""

    preset: str
    micro: int
    passes: int = 1
    stage: int = 1
    ranks: int = 1
    precision: str = "fp32"
    checkpointing: bool = False
    ratios: tuple[float, ...] = (0.75,)
    num_decoded: int | None = None

    def overrides(self, dataset: str, out: str) -> list[str]:
        return [
            f"run.out={out}", f"data.dataset={dataset}", f"model.preset={self.preset}",
            f"data.batch_size={self.micro * self.passes * self.ranks}", f"data.micro_batch_size={self.micro}",
            f"masks.ratios={list(self.ratios)}", f"masks.num_decoded={json.dumps(self.num_decoded)}",
            f"engine.zero_stage={self.stage}", f"engine.precision={self.precision}",
            f"engine.activation_checkpointing={json.dumps(self.checkpointing)}",
        ]  # fmt: skip


CASES = {
    "tiny-4": Case(preset="tiny", micro=4),
    "tiny-64": Case(preset="tiny", micro=64),
    "tiny-64-decoded": Case(preset="tiny", micro=64, num_decoded=500),
    "1m-4": Case(preset="1m", micro=4),
    "4m-1-zero0": Case(preset="4m", micro=1, stage=0),
    "4m-1-zero1": Case(preset="4m", micro=1, stage=1),
    "4m-1-zero2": Case(preset="4m", micro=1, stage=2),
    "4m-1-zero3": Case(preset="4m", micro=1, stage=3),
    "4m-1-zero0-2ranks": Case(preset="4m", micro=1, stage=0, ranks=2),
    "4m-1-zero1-2ranks": Case(preset="4m", micro=1, stage=1, ranks=2),
    "4m-1-zero2-2ranks": Case(preset="4m", micro=1, stage=2, ranks=2),
    "4m-1-zero3-2ranks": Case(preset="4m", micro=1, stage=3, ranks=2),
    "4m-2": Case(preset="4m", micro=2),
    "4m-2-checkpointing": Case(preset="4m", micro=2, checkpointing=True),
    "4m-1-accumulated": Case(preset="4m", micro=1, passes=2),
    "13m-1-zero0": Case(preset="13m", micro=1, stage=0),
    "13m-1-zero1": Case(preset="13m", micro=1),
    "13m-1-zero3": Case(preset="13m", micro=1, stage=3),
    "13m-1-checkpointing": Case(preset="13m", micro=1, checkpointing=True),
}
CONFIG = """
run: {out: nowhere, steps: 2, log_every: 1, snapshot_every: 1}
data: {dataset: nowhere, windows_per_recording: 32}
optimizer: {warmup_steps: 1}
engine: {threads: 1}
validation: {every: 1, max_recordings: 1}
"""


def settings_of(case: Case, folder: Path) -> tuple[PretrainSettings, list[str]]:
    """Return the settings of a case, and the arguments of ``train/pretrain.py`` that give them."""
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    overrides = case.overrides(str(folder / "dataset"), str(folder / f"out-{time.monotonic_ns()}"))
    arguments = ["--config", str(config), *overrides]
    return resolve_precision(load_config(PretrainSettings, str(config), overrides)), arguments


def estimated(case: Case, settings: PretrainSettings) -> tuple[float, str]:
    """Return the estimate in GB, and at which moment that is."""
    config = settings.model.resolved
    with torch.device("meta"):
        model = BrainLM(config, blank_contract(NUM_PARCELS, config))
    fullest = estimate(settings, model, case.ranks, on_gpu=torch.cuda.is_available())[0]
    return fullest.total / 1e9, fullest.name


def measured(case: Case, settings: PretrainSettings, arguments: list[str], port: int) -> float:
    """Train, and return the peak memory in GB of the rank that had most.

    Raises
    ------
    RuntimeError
        If the training run fails.
    """
    launcher = [sys.executable]
    if case.ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={case.ranks}", f"--master-port={port}"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*launcher, str(ROOT / "train" / "pretrain.py"), *arguments], env=environment,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)  # the largest of the process and those it has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"training failed: {' '.join(arguments)}\n{output.read()[-2000:]}")
    if torch.cuda.is_available():
        lines = (Path(settings.run.out) / "metrics.jsonl").read_text().splitlines()
        return max(float(json.loads(line)["memory_gb"]) for line in lines)
    return usage.ru_maxrss * 1024 / 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    print(f"{'case':22}{'estimated':>10}{'measured':>10}{'ratio':>7}   GB; at which moment the estimate is largest")
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic_dataset(
            str(folder / "dataset"), num_subjects={"train": 8, "val": 3, "test": 1}, num_timepoints=WINDOW_LEN + 20,
            num_parcels=NUM_PARCELS, window_len=WINDOW_LEN, patch_len=20,
        )  # fmt: skip
        for number, case_name in enumerate(args.cases):
            case = CASES[case_name]
            settings, arguments = settings_of(case, folder)
            expected, moment = estimated(case, settings)
            peak = measured(case, settings, arguments, 29500 + (os.getpid() + number) % 1000)
            print(f"{case_name:22}{expected:10.3f}{peak:10.3f}{expected / peak:7.2f}   {moment}", flush=True)
            records.append({
                "case": case_name, "estimated_gb": expected, "measured_gb": peak, "ratio": expected / peak,
                "moment": moment,
            })  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
