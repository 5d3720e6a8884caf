"""Steps of training as `train/pretrain.py` takes them, beside plain loops: windows/s, memory, and where the time goes.

    python benchmarks/train_step.py [--cases 13m 111m] [--repeats 3] [--steps 4] [--json PATH]

Methods, each with the same windows a rank and step, mask ratio 0.75, AdamW, in the number format that
`train.precision` chooses:

* `ours`: the loop of `train.loop` over our engine (DeepSpeed, ZeRO 1), loader, validation, snapshots and log;
* `ours-2ranks`: the same on two ranks, each with as many windows;
* `plain`: our network in a loop of its own, without DeepSpeed, checks, log or snapshots;
* `published`: the published network of that size, with random weights, in such a loop.

Data are simulated shards of 424 parcels on local disk, read by our loader in every method. Every measurement is a fresh
process, and methods take turns. Time goes to: waiting for data, forward, backward, optimizer, communication
(collectives of any of these), other. `lost` is what log lines, pictures, validation and snapshots would take of a run
with the intervals of the configuration that is shipped for the case, computed from the time that each of them took
here, a snapshot with all of its writing, though training goes on meanwhile. On a GPU the second half of the steps has a
synchronisation around each part: shares are of these, rates of the first half.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import train.loop
from benchmarks.model import CASES as MODEL_CASES
from benchmarks.model import make
from brainlm.checkpoint import save_checkpoint
from brainlm.config import load_config
from brainlm.dataset import open_dataset
from brainlm.loader import WindowBatch
from brainlm.model import BrainLM, Loss
from brainlm.store import Store
from brainlm.testing import write_synthetic_dataset
from brainlm.world import read_world
from train.checkpoints import Checkpoints
from train.data import build_held_out, build_mix
from train.engine import Engine
from train.held_out import HeldOut
from train.interruption import Interruption
from train.mix import Mix
from train.objective import rebuild_hidden
from train.precision import resolve_precision
from train.reporting import Reporter, peak_memory_gb
from train.settings import PretrainSettings
from train.snapshots import Snapshots
from train.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
NUM_PARCELS, WINDOW_LEN = 424, 200
METHODS = ("ours", "ours-2ranks", "plain", "published")
PARTS = ("data", "forward", "backward", "optimizer", "communication", "other")
EVENTS = ("log", "picture", "validation", "snapshot")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast",
    "broadcast_object_list", "barrier",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """`shipped`: the configuration whose intervals count; windows a rank on a CPU and on a GPU."""

    preset: str
    decoder: str
    shipped: str
    batch: dict[str, int]
    published: str | None = None


CASES = {
    "tiny": Case(preset="tiny", decoder="cross", shipped="demo.yaml", batch={"cpu": 4, "cuda": 256}),
    "1m": Case(preset="1m", decoder="full", shipped="13m.yaml", batch={"cpu": 2, "cuda": 128}),
    "13m": Case(preset="13m", decoder="full", shipped="13m.yaml", batch={"cpu": 1, "cuda": 64}, published="13m"),
    "111m": Case(
        preset="111m-grouped", decoder="full", shipped="13m.yaml", batch={"cpu": 1, "cuda": 256}, published="111m"
    ),
}


class Clock:
    """Divides the time of a process among named parts that may lie in each other; each second counts once."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.events: dict[str, list[float]] = defaultdict(list)
        self.fine = True
        self._open = ["other"]
        self._totals: dict[str, float] = defaultdict(float)
        self._last = self._now()
        self._cpu = time.process_time()

    def _now(self) -> float:
        if self.fine and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        self._totals[self._open[-1]] += now - self._last
        self._last = now

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a function as `part`."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._open[-1] in EVENTS:
                return function(*args, **kwargs)  # all that an event does is the event's
            self._charge()
            self._open.append(part)
            started, cpu_started = self._last, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()
                if part in EVENTS:
                    self.events[part].append(self._last - started)
                    self._cpu += time.process_time() - cpu_started  # no part of the step

        setattr(owner, name, watched)

    def end_step(self) -> None:
        """Begin to count the next step."""
        self._charge()
        cpu = time.process_time()
        self.steps.append({part: self._totals[part] for part in PARTS} | {"cpu": cpu - self._cpu})
        self._totals.clear()
        self._cpu = cpu


def watch_loader(clock: Clock, mix: Mix, num_coarse: int) -> None:
    """Count the wait for batches, and end a step with each; the first `num_coarse` without more on a GPU."""
    iterate = mix.iterate

    def watched(first_step: int, last_step: int) -> Iterator[list[WindowBatch]]:
        batches = iterate(first_step, last_step)
        fetch = _Fetch(lambda: next(batches, None))
        clock.watch(fetch, "get", "data")
        while (batch := fetch.get()) is not None:
            yield batch
            clock.end_step()
            clock.fine = len(clock.steps) >= num_coarse

    mix.iterate = watched  # type: ignore[method-assign]


class _Fetch:
    def __init__(self, get: Callable[[], Any]) -> None:
        self.get = get


def settings_of(case: Case, folder: Path, steps: int, ranks: int, out: str) -> PretrainSettings:
    """Return the settings of a run whose log, validation and snapshots come twice."""
    config = folder / "config.yaml"
    half = max(steps // 2, 1)
    config.write_text(
        f"run: {{out: {out}, steps: {steps}, log_every: {half}, snapshot_every: {half}}}\n"
        f"data: {{dataset: {folder / 'dataset'}, batch_size: {case.batch[device_type()] * ranks}, "
        "windows_per_recording: 512}\n"
        f"model: {{preset: {case.preset}, decoder: {case.decoder}}}\n"
        "masks: {ratios: [0.75]}\n"
        "optimizer: {lr: 1.0e-4, warmup_steps: 1}\n"
        f"validation: {{every: {half}, max_recordings: {2 * ranks}}}\n"
    )
    return resolve_precision(load_config(PretrainSettings, str(config), []))


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(case_name: str, method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train by one method in this process, which may be one of two ranks; the first step is warm-up."""
    case, clock, world = CASES[case_name], Clock(), read_world()
    for name in COLLECTIVES:  # before DeepSpeed is imported, which keeps some of them
        clock.watch(torch.distributed, name, "communication")
    torch.set_num_threads(1 if device_type() == "cpu" else 4)
    torch.manual_seed(0)
    settings = settings_of(case, folder, steps, world.size, str(folder / f"out-{world.rank}-{os.getpid()}"))
    dataset = open_dataset(settings.data.datasets[0])
    model = BrainLM(settings.model.resolved, dataset.contract)
    mix = build_mix([dataset], model, settings, world)
    num_coarse = (steps - 1) // 2 if device_type() == "cuda" else 0  # on a CPU looking at the clock costs nothing
    watch_loader(clock, mix, 1 + num_coarse)
    if method.startswith("ours"):
        run_ours(clock, settings, model, mix)
    else:
        run_plain(clock, case, method, settings, model, mix)
    return {
        "steps": clock.steps[1:],
        "num_coarse": num_coarse,
        "events": clock.events,
        "precision": settings.engine.precision,
        "windows": settings.data.batch_size,
        "peak_gb": peak_memory_gb(),
    }


def run_ours(clock: Clock, settings: PretrainSettings, model: BrainLM, mix: Mix) -> None:
    """Train as `train.run_training` does."""
    world, dataset = read_world(), open_dataset(settings.data.datasets[0])
    for name, part in (("forward", "forward"), ("backward", "backward"), ("micro_step", "optimizer")):
        clock.watch(Engine, name, part)
    clock.watch(Reporter, "log", "log")
    clock.watch(Reporter, "picture", "picture")
    clock.watch(HeldOut, "score", "validation")
    clock.watch(WrittenAtOnce, "begin", "snapshot")
    held_out = build_held_out([dataset], model, settings)
    engine = Engine(settings, model, world)
    out = Path(settings.run.out)
    out.mkdir(parents=True, exist_ok=True)

    def save(url: str, weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> str:
        return save_checkpoint(url, model, facts, [], weights)

    checkpoints = Checkpoints(Store(f"{out}/checkpoints"), save)
    snapshots = WrittenAtOnce(engine, Store(f"{out}/snapshots"), 1, checkpoints)
    reporter = Reporter(out, settings.run.steps or 0, 0) if world.is_rank_zero else None
    interruption = Interruption().install()
    num_steps = settings.run.steps or 0
    objective = rebuild_hidden(model, mix, settings.masks, held_out)
    train.loop.train(engine, objective, TrainState(), settings, snapshots, num_steps, world, reporter, interruption)
    snapshots.close()
    engine.barrier()
    engine.close()


class WrittenAtOnce(Snapshots):
    """Waits for the thread that writes: its whole time counts as the snapshot's, and none of it slows the steps."""

    def begin(self, *args: Any, **options: Any) -> str:
        problem = super().begin(*args, **options)
        return problem or self.wait()


def run_plain(clock: Clock, case: Case, method: str, settings: PretrainSettings, own: BrainLM, mix: Mix) -> None:
    """Train in the shortest loop there is; the published network draws masks of its own."""
    device = torch.device(device_type())
    dtype = torch.bfloat16 if settings.engine.precision == "bf16" else torch.float32
    if method == "plain":
        model: torch.nn.Module = own.to(device, dtype)
    else:
        assert case.published is not None
        sized = replace(MODEL_CASES[case.published], batch=case.batch)
        MODEL_CASES[case.published] = sized
        model, loss_of_its_own = make(sized, "published", device, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    calls = _Calls()
    for name, part in (("forward", "forward"), ("backward", "backward"), ("update", "optimizer")):
        clock.watch(calls, name, part)
    for (cpu_batch,) in mix.iterate(0, settings.run.steps or 0):
        batch = cpu_batch.to(device)
        if method == "plain":
            loss = calls.forward(functools.partial(own_loss, model, batch))
        else:
            loss = calls.forward(loss_of_its_own)
        calls.backward(loss.backward)
        calls.update(functools.partial(update, optimizer))


def own_loss(model: torch.nn.Module, batch: WindowBatch) -> torch.Tensor:
    loss: Loss = model(batch.windows, batch.mask, batch.present)
    return loss.mean


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Calls:
    """Three names under which a plain loop's parts are watched."""

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()

    def backward(self, work: Callable[[], Any]) -> Any:
        return work()

    def update(self, work: Callable[[], Any]) -> Any:
        return work()


def in_fresh_process(case: str, method: str, folder: Path, steps: int, port: int) -> dict[str, Any]:
    """Call `measure` in a new process, or in two."""
    launcher = [sys.executable]
    if method == "ours-2ranks":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    result = folder / "result.json"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*launcher, __file__, "--measure", case, method, str(folder), str(steps), str(result)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case}, {method} failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    read: dict[str, Any] = json.loads(result.read_text())
    return read


def summarise(case_name: str, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record: medians over the steps of all repeats."""
    steps = [step for run in runs for step in run["steps"]]
    coarse = [step for run in runs for step in run["steps"][: run["num_coarse"]]] or steps
    seconds = statistics.median(sum(step[part] for part in PARTS) for step in coarse)
    fine = [step for run in runs for step in run["steps"][run["num_coarse"] :]]
    whole = statistics.median(sum(step[part] for part in PARTS) for step in fine)
    windows = runs[0]["windows"]
    record: dict[str, Any] = {
        "case": case_name,
        "method": method,
        "windows_per_s": windows / seconds,
        "cpu_s_per_window": statistics.median(step["cpu"] for step in steps) / windows,
        "peak_gb": statistics.median(run["peak_gb"] for run in runs),
        "precision": runs[0]["precision"],
        "batch": windows,
        **{part: statistics.median(step[part] for step in fine) / whole for part in PARTS},
    }
    if method.startswith("ours"):
        events = {name: statistics.median([s for run in runs for s in run["events"][name]]) for name in EVENTS}
        record |= {"lost": lost(case_name, seconds / windows, events), "events_s": events}
    return record


def lost(case_name: str, seconds_per_window: float, events: dict[str, float]) -> float:
    """Return the share of a run that events take with the intervals of the shipped configuration."""
    shipped = load_config(PretrainSettings, str(ROOT / "train" / "configs" / CASES[case_name].shipped), [])
    validated = shipped.validation.max_recordings * shipped.validation.windows_per_recording / 2  # 2 a rank here
    num_pictures = 2 + int(math.log2((shipped.run.steps or 1) / shipped.validation.every))
    a_step = (
        events["log"] / shipped.run.log_every
        + events["snapshot"] / shipped.run.snapshot_every
        + events["validation"] * validated / shipped.validation.every
        + events["picture"] * num_pictures / (shipped.run.steps or 1)
    )
    return a_step / (a_step + seconds_per_window * shipped.data.batch_size)


def print_table(records: list[dict[str, Any]]) -> None:
    print(
        f"{'case':6}{'method':13}{'batch':>6}{'windows/s':>11}{'x':>6}{'CPU s':>8}{'x':>6}{'peak GB':>9}"
        + "".join(f"{part[:8]:>9}" for part in PARTS) + f"{'lost':>8}   (x: of `ours`; CPU s: of a window, rank zero)"
    )  # fmt: skip
    for r in records:
        ours = next((p for p in records if (p["case"], p["method"]) == (r["case"], "ours")), r)
        shares = "".join(f"{r[part]:9.1%}" for part in PARTS)
        share_lost = f"{r['lost']:8.2%}" if "lost" in r else ""
        print(
            f"{r['case']:6}{r['method']:13}{r['batch']:6}{r['windows_per_s']:11.3f}"
            f"{r['windows_per_s'] / ours['windows_per_s']:6.2f}{r['cpu_s_per_window']:8.3f}"
            f"{r['cpu_s_per_window'] / ours['cpu_s_per_window']:6.2f}{r['peak_gb']:9.3f}"
            f"{shares}{share_lost}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["13m", "111m"], choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per method")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in each")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        case, method, folder, steps, result = args.measure
        measured = measure(case, method, Path(folder), int(steps))
        if read_world().is_rank_zero:
            Path(result).write_text(json.dumps(measured))
        return 0

    records = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_synthetic_dataset(
            str(work / "dataset"), num_subjects={"train": 8, "val": 4, "test": 1}, num_timepoints=WINDOW_LEN + 20,
            num_parcels=NUM_PARCELS, window_len=WINDOW_LEN, patch_len=20,
        )  # fmt: skip
        for case_name in args.cases:
            published = CASES[case_name].published is not None
            methods = [method for method in args.methods if published or method != "published"]
            runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
            for repeat in range(args.repeats):
                for method in methods:
                    port = 29500 + (os.getpid() + repeat) % 1000
                    runs[method].append(in_fresh_process(case_name, method, work, 1 + args.steps, port))
                    print(f"  {case_name}, {method}: {repeat + 1} of {args.repeats}", flush=True)
            records += [summarise(case_name, method, done) for method, done in runs.items()]
    print(f"{device_type()}, torch {torch.__version__}, {records[0]['precision']}, a thread a rank on a CPU\n")
    print_table(records)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
