"""Time and memory of attention, forward and backward: ours, torch's own, and written out.

    python benchmarks/attention.py [--tokens 4241 1061] [--repeats 5] [--json PATH]

Cases are self-attention over 4241 tokens (the decoder of `13m`: 424 parcels x 10 patches and CLS) and 1061 (its encoder
at 75 % hidden), 4 heads of 128, one window on a CPU and 16 on a GPU. Methods: `ours` (`brainlm.layers.attend`), `sdpa`
(`scaled_dot_product_attention`), `explicit` (product, softmax, product, all probabilities in memory). Every measurement
is a fresh process, and methods take turns. `peak_mb` is above the inputs. `error` is the largest difference from
float64 at 1061 tokens, over the largest value, of the output and of the gradients of q, k and v.

In bf16 unless the machine multiplies float32 faster, as a CPU without bf16 instructions does (`--dtype` decides).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from brainlm.layers import attend

NUM_HEADS, HEAD_WIDTH = 4, 128
BATCH = {"cpu": 1, "cuda": 16}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS_OF_ERROR = 1061  # float64 in one piece


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": attend,
    "sdpa": F.scaled_dot_product_attention,
    "explicit": explicit,
}


def inputs(num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, (B, H, N, E), laid out as heads are cut from the rows of a linear map."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH[device.type], num_tokens, NUM_HEADS, HEAD_WIDTH)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def run(method: str, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
    y = METHODS[method](q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]


def errors(method: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from float64 over the largest value."""
    given = inputs(TOKENS_OF_ERROR, device, dtype)
    found = run(method, *given)
    exact = [x.detach().double() for x in given]
    q, k, v = (x.requires_grad_() for x in exact[:3])
    expected = run("explicit", q, k, v, exact[3])
    return {
        name: float((x.double() - wanted).abs().max() / wanted.abs().max())
        for name, x, wanted in zip(("y", "dq", "dk", "dv"), found, expected)
    }


def memory_mb(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def kernels(work: Callable[[], Any]) -> list[str]:
    """Return the names of the GPU kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [event.key for event in events[:2]]


def measure(num_tokens: int, method: str, dtype_name: str) -> dict[str, Any]:
    """Measure one method in this process."""
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[dtype_name]
    given = inputs(num_tokens, device, dtype)
    run(method, *(x[:, :, :64] for x in given))  # threads and libraries before the start
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from VmRSS
        start_mb = memory_mb("VmRSS")
    else:
        start_mb = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    seconds, cpu_seconds = [], []
    for _ in range(3 if device.type == "cpu" else 20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started, cpu_started = time.perf_counter(), time.process_time()
        run(method, *given)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    peak_mb = memory_mb("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    result = {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_mb": peak_mb - start_mb}
    if device.type == "cuda":
        result["kernels"] = kernels(lambda: run(method, *given))
    return result


def in_fresh_process(num_tokens: int, method: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(num_tokens), method, dtype]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{method} at {num_tokens} tokens failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def faster_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16"

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(256, 256).to(dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
        return min(times)

    return min(DTYPES, key=lambda name: seconds(DTYPES[name]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4241, 1061])
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes per method")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        num_tokens, method, dtype = args.measure
        print(json.dumps(measure(int(num_tokens), method, dtype)))
        return 0

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or faster_dtype(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {dtype}, {NUM_HEADS} heads of {HEAD_WIDTH}")
    records = []
    for num_tokens in args.tokens:
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for _ in range(args.repeats):
            for method in METHODS:
                runs[method].append(in_fresh_process(num_tokens, method, dtype))
        for method, done in runs.items():
            records.append(
                {
                    "case": f"{num_tokens} tokens",
                    "method": method,
                    "seconds": statistics.median(s for r in done for s in r["seconds"]),
                    "cpu_seconds": statistics.median(s for r in done for s in r["cpu_seconds"]),
                    "peak_mb": statistics.median(r["peak_mb"] for r in done),
                    "error": errors(method, device, DTYPES[dtype]),
                    "kernels": done[0].get("kernels"),
                    "batch": BATCH[device.type],
                    "device": device.type,
                    "dtype": dtype,
                }
            )
    print(f"{'case':13}{'method':10}{'ms':>9}{'x ours':>8}{'CPU ms':>9}{'peak MB':>9}  error of y, dq, dk, dv")
    for r in records:
        ours = next(x for x in records if (x["case"], x["method"]) == (r["case"], "ours"))
        error = " ".join(f"{x:.1e}" for x in r["error"].values())
        print(
            f"{r['case']:13}{r['method']:10}{1e3 * r['seconds']:9.1f}{r['seconds'] / ours['seconds']:8.2f}"
            f"{1e3 * r['cpu_seconds']:9.0f}{r['peak_mb']:9.1f}  {error}"
        )
        for name in r["kernels"] or []:
            print(f"             {name}")
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
