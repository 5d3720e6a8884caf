"""Time a training step of the model: forward, backward and AdamW, in bf16 at mask ratio 0.75.

    python benchmarks/model.py [--repeats 5] [--json PATH] [--cases tiny 13m]

Methods: `ours` with each decoder, and `floor`: the same number of operations at this machine's measured matrix rate.
Records: {case, method, per_second (windows), peak_mb, flops_share (of the matrix rate)}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import time
from typing import Any

import numpy as np
import torch

from brainlm.atlas import Atlas
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM
from brainlm.presets import flops_per_window, preset

NUM_PARCELS, MASK_RATIO = 424, 0.75
BATCH = {"tiny": {"cpu": 4, "cuda": 256}, "13m": {"cpu": 1, "cuda": 64}}


def matrix_rate(device: torch.device) -> float:
    """Return the measured rate of a large bf16 matrix product, FLOP/s (median of 7)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [_timed(lambda: a @ b, device) for _ in range(10)][3:]
    return 2 * size**3 / statistics.median(seconds)


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def new_model(case: str, decoder: str) -> BrainLM:
    rng = np.random.default_rng(0)
    ones = np.ones(NUM_PARCELS, dtype=np.float32)
    coords_mm = rng.normal(0, 40, (NUM_PARCELS, 3)).astype(np.float32)
    names = tuple(f"p{i}" for i in range(NUM_PARCELS))
    atlas = Atlas(name="benchmark", sha256="", labels=np.arange(NUM_PARCELS), parcel_names=names, coords_mm=coords_mm)
    contract = InputContract(
        atlas=atlas, covered=ones > 0, median=0 * ones, iqr=ones, tr_s=0.735, window_len=200, patch_len=20
    )
    return BrainLM(dataclasses.replace(preset(case), decoder=decoder), contract)  # type: ignore[arg-type]


def measure(case: str, decoder: str, device: torch.device, repeats: int, rate: float) -> list[dict[str, Any]]:
    batch = BATCH[case][device.type]
    model = new_model(case, decoder).to(device).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows = torch.randn(batch, NUM_PARCELS, 200, device=device)
    num_patches = model.config.num_patches
    masks = [make_mask("random", NUM_PARCELS, num_patches, MASK_RATIO, mask_generator(0, i)) for i in range(batch)]
    mask = torch.stack(masks).to(device)

    def step() -> None:
        loss = model(windows, mask)
        loss.mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = [_timed(step, device) for _ in range(repeats + 2)][2:]
    per_second = batch / statistics.median(seconds)
    flops = 3 * flops_per_window(model.config, NUM_PARCELS, MASK_RATIO)
    if device.type == "cuda":
        peak_mb = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
    else:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    shared = {"case": f"{case}-{decoder}", "batch": batch, "device": device.type}
    ours = {"method": "ours", "per_second": per_second, "peak_mb": peak_mb, "flops_share": per_second * flops / rate}
    floor = {"method": "floor", "per_second": rate / flops, "peak_mb": 0.0, "flops_share": 1.0}
    return [{**shared, **ours}, {**shared, **floor}]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--cases", nargs="+", default=["tiny", "13m"], choices=list(BATCH))
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device)
    print(f"{device.type}, {torch.get_num_threads()} threads, matrix rate {rate / 1e12:.3g} TFLOP/s in bf16")
    records = []
    for case in args.cases:
        for decoder in ("full", "cross"):
            records += measure(case, decoder, device, args.repeats, rate)
            ours = records[-2]
            print(
                f"{ours['case']:12} batch {ours['batch']:4}  {ours['per_second']:9.1f} windows/s  "
                f"{ours['flops_share']:6.1%} of the matrix rate  peak {ours['peak_mb']:.0f} MB"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
