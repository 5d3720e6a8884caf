"""Time and memory of perturbing windows, beside plain forward and backward passes of the same model.

    python benchmarks/perturbation.py [--cases tiny 13m] [--steps 3] [--repeats 3] [--json PATH]

Cases are presets with random weights on 424 parcels x 200 timepoints, the CLS token as the target; `tiny` 4 windows at
a time, `13m` 1. Methods: `ours` (`brainlm.perturb`), `plain` (as many passes forward and back, to the weights and the
input, as in training without an optimizer). Seconds are of one window and step, after a first step that is not counted;
methods take turns in one process, medians over repeats. Peak memory is that of a fresh process, and what it grows by
from 1 to 4 batches whose results are not kept: nothing else may depend on the number of windows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.perturbation import PerturbationSettings, perturb, perturb_in_batches
from brainlm.presets import preset
from brainlm.testing import synthetic_atlas

NUM_PARCELS, WINDOW_LEN = 424, 200
BATCH = {"tiny": 4, "13m": 1, "111m-grouped": 1}


def make_model(case: str) -> BrainLM:
    config = replace(preset(case), window_len=WINDOW_LEN, patch_len=20)
    contract = InputContract(
        atlas=synthetic_atlas(NUM_PARCELS),
        covered=np.ones(NUM_PARCELS, dtype=bool),
        median=np.zeros(NUM_PARCELS, dtype=np.float32),
        iqr=np.ones(NUM_PARCELS, dtype=np.float32),
        tr_s=0.72,
        window_len=WINDOW_LEN,
        patch_len=20,
    )
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def draw(num_windows: int, seed: int) -> Tensor:
    return torch.randn(num_windows, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(seed))


def ours(model: BrainLM, x: Tensor, target: Tensor, steps: int) -> None:
    perturb(model, x, target, PerturbationSettings(steps=steps, batch_size=len(x)))


def plain(model: BrainLM, x: Tensor, target: Tensor, steps: int) -> None:
    for _ in range(steps):
        values = x.clone().requires_grad_(True)
        (model.embed_windows(values).cls - target).square().sum().backward()
        model.zero_grad(set_to_none=True)


def measure(case: str, steps: int, repeats: int) -> dict[str, object]:
    model, batch = make_model(case), BATCH[case]
    x = draw(batch, 1)
    with torch.no_grad():
        target = model.embed_windows(draw(batch, 2)).cls
    methods = {"ours": ours, "plain": plain}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run(model, x, target, 1)
    for _ in range(repeats):
        for name, run in methods.items():
            begin = time.perf_counter()
            run(model, x, target, steps)
            seconds[name].append((time.perf_counter() - begin) / (steps * batch))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {"case": case, "s_per_window_and_step": medians, "ratio": medians["ours"] / medians["plain"]}


def peak_mb(case: str, num_batches: int) -> float:
    """Return the peak memory of this process after so many batches whose results are not kept."""
    model, batch = make_model(case), BATCH[case]
    x, target = draw(num_batches * batch, 1), torch.zeros(model.config.width)
    for _ in perturb_in_batches(model, x, target, PerturbationSettings(steps=1, batch_size=batch)):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(BATCH), default=["tiny", "13m"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_mb(args.cases[0], args.peak))
        return 0
    records = []
    for case in args.cases:
        record = measure(case, args.steps, args.repeats)
        command = [sys.executable, __file__, "--cases", case, "--peak"]
        peaks = [float(subprocess.run([*command, n], capture_output=True, text=True, check=True).stdout) for n in "14"]
        record |= {"peak_mb": peaks[0], "growth_mb": peaks[1] - peaks[0]}
        records.append(record)
        times = record["s_per_window_and_step"]
        assert isinstance(times, dict)
        print(
            f"{case:14} ours {times['ours']:8.3f} s   plain {times['plain']:8.3f} s   "
            f"ours / plain {record['ratio']:5.2f}   peak {peaks[0]:7.0f} MB, 4 batches {peaks[1] - peaks[0]:+.0f} MB",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
