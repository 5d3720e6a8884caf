"""Is evaluation limited by the model alone, and does it grow linearly with the recordings?

    python benchmarks/eval_scale.py [--parts embedding evaluation] [--json PATH]
    python benchmarks/eval_scale.py --parts embedding --cases tiny 13m --repeats 5 --threads 2
    python benchmarks/eval_scale.py --parts evaluation --sizes 100 1000 10000 --parcels 16

`embedding`: windows a second of `brainlm.embedding.embed_recording` over simulated recordings in memory, with random
weights. Methods take turns in one process, and each round gives a ratio; what is printed is the median of rounds:

* `ours`: `embed_recording`, recording by recording: centring, scaling and cutting are part of it;
* `plain`: a loop over the same windows, scaled and stacked beforehand, in whole batches across recordings, under
  `torch.inference_mode`;
* `plain-by-recording`: the same, in the batches that `ours` makes. What lies between the two is batching, what lies
  between this one and `ours` is preparation.

`evaluation`: `eval/run.py` on the task reconstruction with the baselines `mean` and `interpolation`, no report, in a
fresh process for each number of test recordings; another one simulates them. Stages: `begin` (imports and plan),
`units` (all methods), `scores` (intervals, p values, files). Time a recording should not grow, nor memory by more than
the tables that units write, whose size is beside it. Resident memory counts what was read of mapped shards, too.

Records of `embedding`: {case, method, seconds, windows_per_s, ratio}, medians, the ratio over `plain`. Of `evaluation`:
{case, method, seconds, cpu_seconds, peak_mb, tables_mb}, CPU time, which other work on the machine does not change
much, and the largest resident memory up to the end of the stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainlm.embedding import embed_recording, side_by_side
from brainlm.model import BrainLM
from brainlm.presets import preset
from brainlm.recording import Recording
from brainlm.testing import write_synthetic_dataset
from brainlm.windows import Windows

PARTS = ("embedding", "evaluation")
NUM_PARCELS, WINDOW_LEN, PATCH_LEN = 424, 200, 20
METHODS = ("ours", "plain-by-recording", "plain")
STAGES = ("begin", "units", "scores")
SHORT_WINDOW, SHORT_PATCH = 20, 5
NUM_FITTED = 32  # train recordings, and as many for validation, whatever the number of test recordings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", default=["tiny", "13m"], help="presets that embed")
    parser.add_argument("--recordings", type=int, default=8, help="that are embedded")
    parser.add_argument("--timepoints", type=int, default=600, help="of each; windows have 200")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000], help="recordings evaluated")
    parser.add_argument("--parcels", type=int, default=16, help="of those that are evaluated")
    parser.add_argument("--short-timepoints", type=int, default=40, help="of those that are evaluated; windows have 20")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--simulate", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.simulate:
        simulate(args.simulate, args.sizes[0], args.short_timepoints, args.parcels)
        return 0
    if args.measure:
        print(json.dumps(measure(args.measure, args.sizes[0])))
        return 0
    records: list[dict[str, Any]] = []
    if "embedding" in args.parts:
        for case in args.cases:
            records += embedding(case, args.recordings, args.timepoints, args.batch_size, args.repeats)
    if "evaluation" in args.parts:
        found = evaluation(args.sizes, args.short_timepoints, args.parcels)
        show_evaluation(found, args.sizes)
        records += found
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


# --- embedding ---


def embedding(case: str, num: int, num_timepoints: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Time the methods in turns; print and return the medians."""
    model, recordings = model_and_recordings(case, num, num_timepoints)
    by_recording = [side_by_side(model.contract, recording)[2] for recording in recordings]
    stacked = stack(by_recording)
    methods: dict[str, Callable[[], NDArray[np.float32]]] = {
        "ours": lambda: np.concatenate(
            [embed_recording(model, recording, batch_size=batch_size).cls for recording in recordings]
        ),
        "plain-by-recording": lambda: np.concatenate([plain(model, windows, batch_size) for windows in by_recording]),
        "plain": lambda: plain(model, stacked, batch_size),
    }
    assert tuple(methods) == METHODS
    first = {name: method() for name, method in methods.items()}  # also warms up
    for name, found in first.items():
        np.testing.assert_allclose(found, first["plain"], rtol=1e-3, atol=1e-4, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(repeats):
        turn = METHODS[number % len(METHODS) :] + METHODS[: number % len(METHODS)]
        for name in turn:
            begin = time.perf_counter()
            methods[name]()
            seconds[name].append(time.perf_counter() - begin)
    what = f"{num} recordings, {len(stacked)} windows of {NUM_PARCELS} parcels, batches of {batch_size}"
    print(f"{case}: {what}, {torch.get_num_threads()} threads\n{'':20}{'seconds':>9}{'windows/s':>11}{'/ plain':>9}")
    records = []
    for name in METHODS:
        ratio = statistics.median(b / a for a, b in zip(seconds[name], seconds["plain"], strict=True))
        middle = statistics.median(seconds[name])
        rate = len(stacked) / middle
        print(f"{name:20}{middle:9.3f}{rate:11.2f}{ratio:9.3f}", flush=True)
        records.append(
            {"case": f"embedding {case}", "method": name, "seconds": middle, "windows_per_s": rate, "ratio": ratio}
        )
    return records


def model_and_recordings(case: str, num: int, num_timepoints: int) -> tuple[BrainLM, list[Recording]]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_synthetic_dataset(
            folder, num_subjects={"train": 2, "test": num, "val": 1}, num_timepoints=num_timepoints,
            window_len=WINDOW_LEN, patch_len=PATCH_LEN, num_parcels=NUM_PARCELS, num_networks=7,
        )  # fmt: skip
        reader = dataset.split("test")
        recordings = [reader.as_recording(index) for index in range(num)]
        recordings = [replace(recording, bold=np.array(recording.bold)) for recording in recordings]  # not on disk
    model = BrainLM(replace(preset(case), window_len=WINDOW_LEN, patch_len=PATCH_LEN), dataset.contract)
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, recordings


def stack(parts: list[Windows]) -> Windows:
    values, present, kept = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "present", "kept")
    )
    return Windows.of(values, present, kept)


def plain(model: BrainLM, windows: Windows, batch_size: int) -> NDArray[np.float32]:
    """Feed windows that are ready in batches."""
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            part = model.embed_windows(windows[first : first + batch_size].to(device))
            found.append((part.cls.cpu(), part.pooled.cpu())[0])
    return torch.cat(found).numpy()


# --- evaluation ---


def evaluation(sizes: list[int], num_timepoints: int, num_parcels: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--sizes", str(size), "--parcels", str(num_parcels)]
            command += ["--short-timepoints", str(num_timepoints), "--threads", "1"]
            subprocess.run([*command, "--simulate", folder], check=True)
            done = subprocess.run([*command, "--measure", folder], stdout=subprocess.PIPE, text=True, check=True)
            records += json.loads(done.stdout.splitlines()[-1])
    return records


def show_evaluation(records: list[dict[str, Any]], sizes: list[int]) -> None:
    by_case = {record["case"]: record for record in records}

    def line(title: str, values: list[float], form: str, *, with_growth: bool = True) -> None:
        growth = [f"{b / a:8.1f}x" for a, b in itertools.pairwise(values)] if with_growth else []
        print(f"{title:28}" + "".join(f"{value:12{form}}" for value in values) + "".join(growth))

    print(f"{'evaluation':28}" + "".join(f"{size:12,}" for size in sizes) + "   growth")
    for kind, title in (("seconds", "s"), ("cpu_seconds", "CPU s")):
        for stage in STAGES:
            line(f"{stage}, {title}", [by_case[f"evaluation {size} {stage}"][kind] for size in sizes], ".2f")
    for stage in STAGES[1:]:
        each = [by_case[f"evaluation {size} {stage}"]["cpu_seconds"] / size * 1e3 for size in sizes]
        line(f"{stage}, CPU ms a recording", each, ".2f")
    for stage in STAGES:
        peaks = [by_case[f"evaluation {size} {stage}"]["peak_mb"] for size in sizes]
        line(f"peak after {stage}, MB", peaks, ".0f", with_growth=False)
    units = [by_case[f"evaluation {size} units"] for size in sizes]
    line("tables, MB", [unit["tables_mb"] for unit in units], ".2f", with_growth=False)
    for (a, first), (b, second) in itertools.pairwise(zip(sizes, units, strict=True)):
        more, tables = second["peak_mb"] - first["peak_mb"], second["tables_mb"] - first["tables_mb"]
        print(
            f"from {a:,} to {b:,}: {more:.1f} MB more while units are computed, their tables are {tables:.1f} MB more"
        )


def simulate(folder: str, size: int, num_timepoints: int, num_parcels: int) -> None:
    """Write the data set."""
    write_synthetic_dataset(
        f"{folder}/dataset", num_subjects={"train": NUM_FITTED, "val": NUM_FITTED, "test": size},
        num_timepoints=num_timepoints, window_len=SHORT_WINDOW, patch_len=SHORT_PATCH, num_parcels=num_parcels,
    )  # fmt: skip


def measure(folder: str, size: int) -> list[dict[str, Any]]:
    """Evaluate in this process, stage by stage."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    from brainlm.config import build
    from brainlm.store import Store
    from eval.fan_out import run_units
    from eval.planning import make_plan
    from eval.run import write_results
    from eval.settings import EvalSettings
    from eval.task import read_output

    records: list[dict[str, Any]] = []

    def note(stage: str) -> None:
        records.append({
            "case": f"evaluation {size} {stage}", "method": "ours", "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu_begin, "peak_mb": peak_mb(), "tables_mb": 0.0,
        })  # fmt: skip
        start()

    def start() -> None:
        nonlocal begin, cpu_begin
        begin, cpu_begin = time.perf_counter(), time.process_time()

    settings: EvalSettings = build(
        EvalSettings,
        {
            "dataset": f"{folder}/dataset", "out": f"{folder}/results", "tasks": ["reconstruction"], "report": False,
            "reconstruction": {"baselines": ["mean", "interpolation"], "max_windows_per_recording": 2},
            "ray": {"workers": 0},
        },
        "benchmark",
    )  # fmt: skip
    plan, store = make_plan(settings), Store(settings.out)
    note("begin")
    reports = run_units(plan, plan.units, say=lambda line: None)
    assert not any(report.error for report in reports), reports
    note("units")
    outputs = [read_output(store, unit) for unit in plan.units]
    tables = [table for output in outputs for table in (output.table, output.parcels) if table is not None]
    records[-1]["tables_mb"] = sum(float(table.memory_usage(deep=True).sum()) for table in tables) / 1e6
    del outputs, tables
    start()
    write_results(plan, store, list(plan.units))
    note("scores")
    return records


def peak_mb() -> float:
    """Return the largest resident memory of this process; that of `getrusage` may be the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    raise SystemExit(main())
