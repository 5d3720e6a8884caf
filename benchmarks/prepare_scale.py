"""Time and memory of what `prepare.py` does with many recordings, beside the work on each: does it grow linearly?

    python benchmarks/prepare_scale.py [--sizes 1000 10000 100000] [--json PATH] [--timepoints 24] [--parcels 16]

The recordings are simulated short series that lie staged already, as the workers leave them; another process makes
them. For each size there is a fresh driver, with one worker in a process of its own (a pipe between them, in place of
Ray), so that the peak memory is the driver's alone; the worker's is measured beside it. Stages: `manifest`
(list the table and stamp the files), `rows` (gather the staged rows), `splits`, `statistics` (three passes over all
train recordings), `merge` (the driver's part of them alone: summing the counts that tasks send, at 424 parcels),
`archive`, `shards`, `tables` (parquet, contract, page, dataset.json). Records: {case, method, seconds, cpu_seconds,
peak_mb}, with the driver's own CPU time, which other work on the machine does not change much, and its largest resident
memory up to the end of the stage; one more, `worker`, has the worker's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from brainlm.store import Store
from data_prep.work import Tasks, Workers

# Counts that a task sends in each pass, as seen with real series at 424 parcels (rows x digits).
MERGED_COUNTS = ((424, 2048), (1359, 2048), (2513, 1024))
STAGES = ("manifest", "rows", "splits", "statistics", "merge", "archive", "shards", "tables")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--timepoints", type=int, default=24)
    parser.add_argument("--parcels", type=int, default=16)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--simulate", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(Path(args.measure), args.sizes[0], args.timepoints, args.parcels)))
        return 0
    if args.simulate:
        simulate(Path(args.simulate), args.sizes[0], args.timepoints, args.parcels)
        return 0
    records: list[dict[str, Any]] = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--sizes", str(size)]
            command += ["--timepoints", str(args.timepoints), "--parcels", str(args.parcels)]
            subprocess.run([*command, "--simulate", folder], check=True)
            done = subprocess.run([*command, "--measure", folder], stdout=subprocess.PIPE, text=True, check=True)
            records += json.loads(done.stdout.splitlines()[-1])
    show(records, args.sizes)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


def show(records: list[dict[str, Any]], sizes: list[int]) -> None:
    for kind, title in (("seconds", "seconds"), ("cpu_seconds", "driver CPU s")):
        seconds = {(record["case"], record["method"]): record[kind] for record in records}
        print(f"{title:12}" + "".join(f"{size:>12,}" for size in sizes) + f"{'per ten-fold':>16}")
        for stage in STAGES:
            line = [seconds[f"{size} {stage}", "ours"] for size in sizes]
            growth = [b / a for a, b in itertools.pairwise(line)]
            print(f"{stage:12}" + "".join(f"{value:12.2f}" for value in line) + "".join(f"{g:8.1f}x" for g in growth))
        told = [sum(seconds[f"{size} {stage}", "ours"] for stage in ("manifest", "splits", "merge")) for size in sizes]
        print(f"{'m + s + m':12}" + "".join(f"{value:12.2f}" for value in told) + "   manifest + splits + merge")
    peak_mb = {(record["case"], record["method"]): record["peak_mb"] for record in records}
    for what, stage in (("driver MB", STAGES[-1]), ("worker MB", "worker")):
        print(f"{what:12}" + "".join(f"{peak_mb[f'{size} {stage}', 'ours']:12.0f}" for size in sizes))


# --- one worker in a process of its own ---


@dataclass(frozen=True)
class _Shared:
    """Stands for a value that the worker holds already."""

    number: int


class OneWorker(Workers):
    """Run tasks in another process, one after the other, as `Workers` runs them on Ray."""

    def __init__(self) -> None:
        super().__init__(None)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._num_shared = 0
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()

    def share(self, value: Any) -> Any:
        self._num_shared += 1
        self._pipe.send((None, (value,)))
        return _Shared(self._num_shared - 1)

    def end(self) -> float:
        """End the worker; return its largest resident memory in MB."""
        self._pipe.send((_peak_mb, ()))
        peak_mb = float(self._pipe.recv())
        self._process.terminate()
        self._process.join()
        return peak_mb

    def _stream(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        when_lost: Callable[[int, str], Any] | None,
    ) -> Iterator[tuple[int, Any]]:
        for position, task in enumerate(tasks):
            self._pipe.send((function, task))
            result = self._pipe.recv()
            if isinstance(result, Exception):
                raise result
            yield position, result


def _work(pipe: Connection) -> None:
    shared: list[Any] = []
    while True:
        function, task = pipe.recv()
        if function is None:
            shared += task
            continue
        try:
            result = function(*(shared[value.number] if isinstance(value, _Shared) else value for value in task))
        except Exception as error:
            result = error
        pipe.send(result)


def _peak_mb() -> float:
    """Return the largest resident memory of this process; that of `getrusage` may be the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def _staged_row(staging: Store, entry: Any) -> dict[str, Any]:
    row: dict[str, Any] = staging.read_json(f"{entry.recording_id}.json")["row"]
    return row


# --- the stages ---


def measure(folder: Path, size: int, num_timepoints: int, num_parcels: int) -> list[dict[str, Any]]:
    """Return the records of one size."""
    from brainlm.atlas import Atlas
    from brainlm.config import build
    from data_prep import contract_statistics
    from data_prep.atlas_image import series_atlas
    from data_prep.gather import gather
    from data_prep.held_dataset import HeldDataset
    from data_prep.make_contract import make_contract
    from data_prep.parquet_tables import PLACE_COLUMNS, RECORDING_COLUMNS, REJECTED_COLUMNS, table_of
    from data_prep.place import SPLIT_COLUMNS, find_relations, place_in_archive, place_in_splits
    from data_prep.settings import PrepareSettings
    from data_prep.sources import find_recordings, inputs_hash
    from data_prep.stored_table import StoredTable
    from data_prep.write_shards import ENTRY_COLUMNS, place_in_shards, write_shards
    from data_prep.zarr_store import ARCHIVE_COLUMNS, write_archive

    records: list[dict[str, Any]] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        started, cpu_before = time.perf_counter(), time.process_time()
        yield
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_before
        record = {"case": f"{size} {name}", "method": "ours", "seconds": seconds, "cpu_seconds": cpu_seconds}
        records.append(record | {"peak_mb": _peak_mb()})

    table_path, out = folder / "table.csv", Store(folder / "dataset")
    settings: PrepareSettings = build(
        PrepareSettings,
        {
            "name": "scale",
            "out": str(folder / "dataset"),
            "contract": "none",
            "statistics": "cohort",
            "source": {
                "kind": "table",
                "path": str(table_path),
                "columns": {"subject": "subject", "recording_id": "id", "site": "site", "file": "file"},
                "phenotypes": ["age"],
                "tr_s": 2.0,
            },
            "windows": {"window_len": num_timepoints, "patch_len": num_timepoints},
        },
        "benchmark",
    )
    rng = np.random.default_rng(0)
    names = tuple(f"p{i}" for i in range(num_parcels))
    coords_mm = rng.normal(0, 40, (num_parcels, 3)).astype(np.float32)
    atlas = series_atlas(
        Atlas(name="scale", sha256="", labels=np.arange(1, num_parcels + 1), parcel_names=names, coords_mm=coords_mm)
    )
    run, held = OneWorker(), None
    assert held is None or isinstance(held, HeldDataset)
    with stage("manifest"):
        source = find_recordings(settings.source)
        inputs_hash(source.entries, source.subjects)
    with stage("rows"):
        table = StoredTable(RECORDING_COLUMNS)
        staging = Store(folder / "staging")
        tasks = Tasks(size, lambda position: (staging, source.entries[position]))
        for position, row in run.stream(_staged_row, tasks, "recordings"):
            table.add(position, row)
    with stage("splits"):
        placed, _, items = place_in_splits(settings, table[SPLIT_COLUMNS], source.subjects, source.entries, held)
        placed = placed[["split"]].assign(num_timepoints=table["num_timepoints"])
        relations = find_relations(items, settings.splits)
        placed["cohort"], placed["addition"] = "scale", 0
        place_in_archive(placed, 0, 0)
        placed["shard"] = place_in_shards(placed, settings.shards, num_parcels, {})
        table.fill(placed[list(PLACE_COLUMNS)])
        del items, placed
    with stage("statistics"):
        contract, _ = make_contract(settings, atlas, staging, table, 2.0, None, run)
    with stage("merge"):
        merge_counts(-(-size // contract_statistics.RECORDINGS_PER_TASK), rng)
    with stage("archive"):
        write_archive(out, staging, table[ARCHIVE_COLUMNS], num_parcels, run)
    with stage("shards"):
        rows = table[[*ENTRY_COLUMNS, "shard", "split"]]
        shards = write_shards(out, staging, rows, num_parcels, settings.shards.dtype, run)
        del rows
    with stage("tables"):
        from data_prep.finish import write_dataset

        refused = table_of([], REJECTED_COLUMNS)
        contents = gather(
            settings, settings, source, atlas, held, table, refused, source.subjects, contract, shards, relations, []
        )
        write_dataset(out, contents)
    none = {"seconds": 0.0, "cpu_seconds": 0.0}
    records.append({"case": f"{size} worker", "method": "ours", **none, "peak_mb": run.end()})
    return records


def merge_counts(num_tasks: int, rng: np.random.Generator) -> None:
    """Sum the counts of many tasks, as the driver does in the three passes."""
    for shape in MERGED_COUNTS:
        total, part = np.zeros(shape, dtype=np.int64), rng.integers(0, 9, shape, dtype=np.uint16)
        for _ in range(num_tasks):
            total += part


def simulate(folder: Path, size: int, num_timepoints: int, num_parcels: int) -> None:
    """Write staged series and rows, small files that a table lists, and the table ``table.csv``."""
    from data_prep.one_recording import series_sha256

    rng = np.random.default_rng(1)
    for name in ("staging", "series"):
        (folder / name).mkdir(parents=True)
    lines = ["id,subject,site,age,file"]
    for number in range(size):
        recording_id, subject = f"sub-{number // 2:06d}_run-{number % 2}", f"{number // 2:06d}"
        bold = rng.standard_normal((num_timepoints, num_parcels), dtype=np.float32)
        keep_mask = np.ones(num_timepoints, dtype=bool)
        coverage = np.ones(num_parcels, dtype=np.float32)
        np.savez(folder / "staging" / f"{recording_id}.npz", bold=bold, coverage=coverage, keep_mask=keep_mask)
        row = {
            "recording_id": recording_id, "subject": subject, "session": "", "task": "rest", "run": str(number % 2),
            "site": f"site{number // 2 % 20}", "family": "", "tr_s": 2.0, "num_timepoints": num_timepoints,
            "num_kept": num_timepoints, "duration_s": 2.0 * num_timepoints, "source_tr_s": 2.0, "resampled": False,
            "num_dummy_scans": 0,
            "num_degrees_of_freedom": num_timepoints - 1, "denoised": "",
            "mean_fd_mm": float(rng.gamma(2.0, 0.1)), "dvars_z": 1.4,
            "lag1_autocorrelation": 0.0, "tsnr": None, "mean_coverage": 1.0, "num_missing_parcels": 0,
            "num_constant_parcels": 0, "space": "", "source": f"series/{recording_id}.npy", "source_bytes": 1,
            "source_etag": "", "source_sha256": "0" * 64, "confounds_sha256": "", "series_sha256": series_sha256(bold),
            "sha256": series_sha256(bold), "status": "prepared",
        }  # fmt: skip
        (folder / "staging" / f"{recording_id}.json").write_text(json.dumps({"row": row}))
        (folder / "series" / f"{recording_id}.npy").write_bytes(b"x")
        lines.append(
            f"{recording_id},{subject},site{number // 2 % 20},{20 + number // 2 % 60},series/{recording_id}.npy"
        )
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
