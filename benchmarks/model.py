"""Time and memory of a training step, ours beside the published models: forward, backward and AdamW, 75 % hidden.

    python benchmarks/model.py [--cases 13m 111m] [--repeats 3] [--json PATH]

Cases: `13m`, `13m-batch4` (four times the windows a batch), `111m` (ours groups parcels: `111m-grouped`), `tiny` (ours
alone). Methods, each with the same windows a batch:

* `ours` with the ``full`` decoder, `ours-cross` with the ``cross`` decoder;
* `published`: the published network of that size, random weights, with its attention written out (product, softmax,
  product), as the published code computes it;
* `published-attend`: the same network with the attention of `brainlm.layers`.

Every measurement is a fresh process, and methods take turns, so that a busy machine is busy for all. `peak_mb` is above
the memory after imports, so weights, gradients and optimizer state are in it. `flops_share` is operations counted by
formula (matrix products and convolutions; a step is three forward passes) over the rate of a large matrix product,
measured beside each. `cpu_seconds` of a window, over all threads, hold on a machine that others use too. bf16 is used
unless the machine multiplies float32 faster, as a CPU without bf16 instructions does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import brainlm.layers
import brainlm.official_layers
from brainlm.atlas import Atlas
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig, VitMaeConfig
from brainlm.official_vitmae import VitMaeBrainLM
from brainlm.presets import flops_per_window, preset

NUM_PARCELS, WINDOW_LEN, MASK_RATIO = 424, 200, 0.75
METHODS = ("ours", "ours-cross", "published", "published-attend")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FLOPS_TOLERANCE = 0.01  # between the formulas and what torch counts


@dataclass(frozen=True, kw_only=True)
class Case:
    """`preset` of ours; `published` sizes, or None; windows a batch on a CPU and on a GPU."""

    preset: str
    published: NystromConfig | VitMaeConfig | None
    batch: dict[str, int]


# The published sizes: config.json of the 13M and 111M checkpoints, the mask ratio aside.
PUBLISHED_13M = NystromConfig(
    hidden_size=512, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
    decoder_hidden_size=512, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=1024,
    attention_probs_dropout_prob=0.1, num_brain_voxels=NUM_PARCELS, timepoint_patching_size=20,
    num_landmarks=64, segment_means_seq_len=64, conv_kernel_size=65, mask_ratio=MASK_RATIO,
)  # fmt: skip
PUBLISHED_111M = VitMaeConfig(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    decoder_hidden_size=512, decoder_num_hidden_layers=8, decoder_num_attention_heads=16,
    decoder_intermediate_size=2048, image_size=432, patch_size=16, mask_ratio=MASK_RATIO,
)  # fmt: skip
CASES = {
    "13m": Case(preset="13m", published=PUBLISHED_13M, batch={"cpu": 1, "cuda": 64}),
    "111m": Case(preset="111m-grouped", published=PUBLISHED_111M, batch={"cpu": 2, "cuda": 256}),
    "13m-batch4": Case(preset="13m", published=PUBLISHED_13M, batch={"cpu": 4, "cuda": 128}),
    "tiny": Case(preset="tiny", published=None, batch={"cpu": 4, "cuda": 256}),
}


# -------------------------------------------------------------------- the models


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None = None) -> Tensor:
    """Attention as the published code writes it: all probabilities in memory, and kept for the backward pass."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if valid_BM is not None:
        scores = scores.masked_fill(~valid_BM[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1) @ v


def new_ours(name: str, decoder: str) -> BrainLM:
    """Build our model with made-up statistics and coordinates: the cost depends on the sizes alone."""
    rng = np.random.default_rng(0)
    ones = np.ones(NUM_PARCELS, dtype=np.float32)
    coords_mm = rng.normal(0, 40, (NUM_PARCELS, 3)).astype(np.float32)
    names = tuple(f"p{i}" for i in range(NUM_PARCELS))
    atlas = Atlas(name="benchmark", sha256="", labels=np.arange(NUM_PARCELS), parcel_names=names, coords_mm=coords_mm)
    contract = InputContract(
        atlas=atlas, covered=ones > 0, median=0 * ones, iqr=ones, tr_s=0.735, window_len=WINDOW_LEN, patch_len=20
    )
    return BrainLM(dataclasses.replace(preset(name), decoder=decoder), contract)  # type: ignore[arg-type]


def random_mask(batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """Hide the same number of random tokens in each window: (B, L), True = hidden."""
    order = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return (order < round(MASK_RATIO * num_tokens)).to(device)


def make(case: Case, method: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a model, and a function that computes its loss on one batch."""
    batch = case.batch[device.type]
    windows = torch.randn(batch, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(0)).to(device)
    if method.startswith("ours"):
        ours = new_ours(case.preset, "cross" if method == "ours-cross" else "full").to(device, dtype)
        mask = random_mask(batch, num_tokens(ours), device)
        return ours, lambda: ours(windows, mask).mean
    if method == "published":
        brainlm.official_layers.attend = explicit_attention
    windows = windows.to(dtype)
    if isinstance(case.published, NystromConfig):
        signal = NystromBrainLM(case.published).to(device, dtype)
        xyz = torch.randn(batch, NUM_PARCELS, 3).to(device, dtype)
        return signal, lambda: signal(windows, xyz).loss
    assert case.published is not None
    image = VitMaeBrainLM(case.published).to(device, dtype)
    pixels = windows[:, None].expand(-1, 3, -1, -1)
    return image, lambda: image(pixels).loss


def num_tokens(model: BrainLM) -> int:
    rows = -(-NUM_PARCELS // getattr(model.config, "patch_parcels", 1))
    return rows * (WINDOW_LEN // model.config.patch_len)


# -------------------------------------------------------------------- operations


def published_flops(config: NystromConfig | VitMaeConfig) -> int:
    """Count the operations of a forward pass of one window through a published model (a multiply-add is two).

    A layer over n tokens of width D: 8 n D^2 (query, key, value, output) + 4 n^2 D (attention) + 4 n D F (feed-forward
    of width F), and in the 13M family 2 n D c for its convolution of length c. Patch and coordinate maps run over all
    tokens, the encoder over the visible ones and CLS, the decoder and its predictions over all and CLS.
    """
    c, D, E = config, config.hidden_size, config.decoder_hidden_size

    def layers(depth: int, n: int, width: int, mlp_width: int) -> int:
        convolution = 2 * n * width * (c.conv_kernel_size or 0) if isinstance(c, NystromConfig) else 0
        return depth * (8 * n * width**2 + 4 * n * n * width + 4 * n * width * mlp_width + convolution)

    if isinstance(c, NystromConfig):
        values = c.timepoint_patching_size
        L = NUM_PARCELS * WINDOW_LEN // values
        embed = 2 * L * values * D + 2 * NUM_PARCELS * 3 * (D + E)
        predict = 2 * (L + 1) * (E * (E // 2) + (E // 2) * values)
    else:
        L, values = c.grid**2, c.patch_size**2 * c.num_channels
        embed, predict = 2 * L * values * D, 2 * (L + 1) * E * values
    V = int(L * (1 - c.mask_ratio)) + 1
    encoder = layers(c.num_hidden_layers, V, D, c.intermediate_size)
    decoder = 2 * V * D * E + layers(c.decoder_num_hidden_layers, L + 1, E, c.decoder_intermediate_size)
    return embed + encoder + decoder + predict


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Count the operations of a forward pass with torch, attention written out so that it is counted as products."""
    attend = brainlm.layers.attend
    brainlm.layers.attend = brainlm.official_layers.attend = explicit_attention
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss()
    brainlm.layers.attend = attend
    return int(counter.get_total_flops())


# -------------------------------------------------------------------- measuring


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the seconds that `work` takes, on the clock and of the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the rate of a large matrix product, FLOP/s: the median of 5 after 2."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [timed(lambda: a @ b, device)[0] for _ in range(7)][2:]
    return float(2 * size**3 / statistics.median(seconds))


def choose_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16"
    rates = {name: matrix_rate(device, dtype, 256) for name, dtype in DTYPES.items()}
    return max(rates, key=lambda name: rates[name])


def memory_mb(field: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure(case_name: str, method: str, dtype_name: str, steps: int, count: bool) -> dict[str, Any]:
    """Measure one method in this process: seconds of each step, peak memory, and the matrix rate of the moment."""
    case, dtype = CASES[case_name], DTYPES[dtype_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.randn(64, 64).to(dtype) @ torch.randn(64, 64).to(dtype)  # threads and libraries before the start
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from VmRSS
        start_mb = memory_mb("VmRSS")
    torch.manual_seed(0)
    model, loss = make(case, method, device, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    warm_up = 1 if device.type == "cpu" else 3
    times = [timed(step, device) for _ in range(warm_up + steps)][warm_up:]
    if device.type == "cpu":
        peak_mb = memory_mb("VmHWM") - start_mb
    else:
        peak_mb = torch.cuda.max_memory_allocated() / 2**20
    rate = matrix_rate(device, dtype, 2048 if device.type == "cpu" else 8192)
    if method.startswith("ours"):
        assert isinstance(model, BrainLM)
        flops = flops_per_window(model.config, NUM_PARCELS, MASK_RATIO)
    else:
        assert case.published is not None
        flops = published_flops(case.published)
    batch = case.batch[device.type]
    seconds, cpu_seconds = (list(x) for x in zip(*times))
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_mb,
        "rate": rate,
        "flops": flops,
        "batch": batch,
    }
    if count:
        result["flops_counted"] = count_flops(loss) / batch
    return result


def in_fresh_process(case: str, method: str, dtype: str, steps: int, count: bool) -> dict[str, Any] | None:
    """Call `measure` in a new process; None if it ran out of memory."""
    command = [sys.executable, __file__, "--measure", case, method, dtype, str(steps), str(int(count))]
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if "OutOfMemoryError" in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f"{case}, {method} failed:\n{done.stderr[-2000:]}")


def summarise(case: str, method: str, dtype: str, device: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record: medians over all repeats."""
    batch, flops = runs[0]["batch"], runs[0]["flops"]
    counted = next((run["flops_counted"] for run in runs if "flops_counted" in run), None)
    if counted is not None and abs(counted / flops - 1) > FLOPS_TOLERANCE:
        print(
            f"  {case}, {method}: the formula gives {flops / 1e9:.2f} GFLOP a window, torch counts {counted / 1e9:.2f}"
        )
    per_second = batch / statistics.median(second for run in runs for second in run["seconds"])
    rate = statistics.median(run["rate"] for run in runs)
    return {
        "case": case,
        "method": method,
        "per_second": per_second,
        "cpu_seconds": statistics.median(second for run in runs for second in run["cpu_seconds"]) / batch,
        "peak_mb": statistics.median(run["peak_mb"] for run in runs),
        "flops_share": statistics.median(
            3 * flops * batch / (statistics.median(run["seconds"]) * run["rate"]) for run in runs
        ),
        "gflop_per_window": 3 * flops / 1e9,
        "gflop_counted": None if counted is None else 3 * counted / 1e9,
        "matrix_rate": rate,
        "batch": batch,
        "device": device,
        "dtype": dtype,
    }


def print_table(records: list[dict[str, Any]]) -> None:
    print(
        f"{'case':12}{'method':18}{'batch':>6}{'windows/s':>11}{'x':>6}{'CPU s':>9}{'x':>6}{'peak MB':>9}{'x':>6}"
        f"{'share':>7}   (x: of published; CPU s: of a window)"
    )
    for r in records:
        published = next((p for p in records if (p["case"], p["method"]) == (r["case"], "published")), None)

        def ratio(field: str) -> str:
            return "" if published is None else f"{r[field] / published[field]:.2f}"  # noqa: B023 (used at once)

        print(
            f"{r['case']:12}{r['method']:18}{r['batch']:6}{r['per_second']:11.3f}{ratio('per_second'):>6}"
            f"{r['cpu_seconds']:9.3f}{ratio('cpu_seconds'):>6}{r['peak_mb']:9.0f}{ratio('peak_mb'):>6}"
            f"{r['flops_share']:7.0%}"
        )


def instructions() -> str:
    """Name what this CPU has for bf16 products."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "instructions unknown"
    return ", ".join(sorted(flags & {"amx_bf16", "avx512_bf16", "avx512f", "avx2"})) or "neither AVX2 nor AVX-512"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per method")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each (ten times as many on a GPU)")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        case, method, dtype, steps, count = args.measure
        print(json.dumps(measure(case, method, dtype, int(steps), count == "1")))
        return 0

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or choose_dtype(device)
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({instructions()})"
    print(f"{what}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}")
    steps = args.steps * (10 if device.type == "cuda" else 1)
    records = []
    for case in args.cases:
        methods = [m for m in args.methods if CASES[case].published is not None or m.startswith("ours")]
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for repeat in range(args.repeats):
            for method in methods:
                result = in_fresh_process(case, method, dtype, steps, count=repeat == 0)
                if result is not None:
                    runs[method].append(result)
                    seconds, peak_mb = statistics.median(result["seconds"]), result["peak_mb"]
                    print(f"  {case}, {method}: {seconds:.3g} s a step, {peak_mb:.0f} MB", flush=True)
                elif repeat == 0:
                    print(f"  {case}, {method}: out of memory")
        records += [summarise(case, method, dtype, device.type, done) for method, done in runs.items() if done]
    rate = statistics.median(record["matrix_rate"] for record in records)
    print(f"matrix rate {rate / 1e12:.3g} TFLOP/s in {dtype}\n")
    print_table(records)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
