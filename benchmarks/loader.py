"""Time the reading of random training windows: 200 timepoints of 424 parcels, float16, from 64 recordings of 490.

    python benchmarks/loader.py [--repeats 5] [--windows 2048] [--json PATH] [--cases "1 thread" "cold remote"]

Cases: ``1 thread``, warm, in one process; ``2 workers``, warm, through a torch DataLoader with two worker processes;
``cold remote``, over HTTP from an S3 server on this machine, without anything cached, from opening on.

All methods give batches of 32 windows (B, W, P) as they are stored; those of one repeat read the same windows.

    ours           `SplitReader.gather` of shards (tars with an index), mapped; remote: shards through the disk cache
    memmap         slices of one flat file, `numpy.memmap`; remote: the whole file is fetched first
    datasets       slices of a Hugging Face data set on disk (Arrow), a row a timepoint
    webdataset     streaming of the same tars in their order, 4 windows of each record: not random
    zarr           slices of one array, a chunk a recording, not compressed
    ours, scaled   besides, the finished float32 batch (B, P, W) in contract units: `WindowLoader.windows`
    ours, batch    besides, masks, decoded tokens and the rest: `WindowLoader.batches_at`

The last two do more than the others and are there to show what training waits for. Every measurement runs in a process
of its own, the methods take turns. Records: {case, method, per_second (windows), peak_mb (growth of the resident memory
of the measuring process, files that are mapped included, worker processes not)}; ``cold remote`` also has
first_batch_s, and reads at most 512 windows.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainlm.dataset import open_dataset
from brainlm.loader import MaskSettings, WindowLoader
from brainlm.testing import write_synthetic_dataset

NUM_RECORDINGS, NUM_TIMEPOINTS, NUM_PARCELS, WINDOW_LEN, BATCH = 64, 490, 424, 200, 32
WINDOWS_PER_RECORD = 4
METHODS = ("ours", "memmap", "datasets", "webdataset", "zarr", "ours, scaled", "ours, batch")
CASES = ("1 thread", "2 workers", "cold remote")
BUCKET = "benchmark"

Batch = NDArray[Any] | torch.Tensor
ReadBatch = Callable[[NDArray[np.int64], int], Batch]


# ---------------------------------------------------------------------- methods


def open_method(method: str, url: str) -> ReadBatch:
    """Return a function of (rows (B, 2), batch number) that reads one batch; nothing is read before it is called."""
    if method.startswith("ours"):
        return _open_ours(method, url)
    return {"memmap": _open_memmap, "datasets": _open_datasets, "webdataset": _open_webdataset, "zarr": _open_zarr}[
        method
    ](url)


def _open_ours(method: str, url: str) -> ReadBatch:
    dataset = open_dataset(f"{url}/dataset")
    reader = dataset.split("train")
    if method == "ours":
        return lambda rows, number: reader.gather(rows, WINDOW_LEN)[0]
    masks = MaskSettings(ratios=(0.75,), num_decoded=424)
    loader = WindowLoader(reader, dataset.contract, masks, batch_size=BATCH, windows_per_recording=8, seed=0)
    if method == "ours, scaled":
        return lambda rows, number: loader.windows(rows)
    return lambda rows, number: loader.batches_at(number)[0].windows


def _cut(read: Callable[[int, int], NDArray[Any]]) -> ReadBatch:
    def batch(rows: NDArray[np.int64], number: int) -> NDArray[Any]:
        out = np.empty((len(rows), WINDOW_LEN, NUM_PARCELS), np.float16)
        for i, (recording, start) in enumerate(rows.tolist()):
            out[i] = read(recording, start)
        return out

    return batch


def _open_memmap(url: str) -> ReadBatch:
    path = f"{url}/flat.f16"
    if "://" in url:
        from fsspec.core import url_to_fs

        path = f"{os.environ['BRAINLM_CACHE']}/flat.f16"
        fs, remote = url_to_fs(f"{url}/flat.f16")
        fs.get_file(remote, path)
    flat = np.memmap(path, np.float16, "r", shape=(NUM_RECORDINGS, NUM_TIMEPOINTS, NUM_PARCELS))
    return _cut(lambda recording, start: flat[recording, start : start + WINDOW_LEN])


def _open_datasets(url: str) -> ReadBatch:
    from datasets import load_from_disk  # type: ignore[import-untyped,import-not-found,unused-ignore]

    rows = load_from_disk(f"{url}/arrow").with_format("arrow")

    def read(recording: int, start: int) -> NDArray[Any]:
        first = recording * NUM_TIMEPOINTS + start
        parts = rows[first : first + WINDOW_LEN]["bold"].chunks
        flat = [part.flatten().to_numpy().reshape(-1, NUM_PARCELS) for part in parts]
        return flat[0] if len(flat) == 1 else np.concatenate(flat)

    return _cut(read)


def _open_webdataset(url: str) -> ReadBatch:
    import webdataset
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    if "://" in url:
        schemes = importlib.import_module("webdataset.gopen").gopen_schemes  # of the module, not the function
        schemes["s3"] = lambda name, *args, **kwargs: fs.open(name, "rb")
    shards = sorted(name for name in fs.ls(f"{root}/dataset/shards", detail=False) if name.endswith(".tar"))
    names = [f"s3://{name}" if "://" in url else name for name in shards]
    info = torch.utils.data.get_worker_info()
    if info is not None:
        names = names[info.id :: info.num_workers]
    stream: Any = webdataset.WebDataset(names, shardshuffle=False, empty_check=False).decode().repeat()
    records: Iterator[Any] = iter(stream)

    def batch(rows: NDArray[np.int64], number: int) -> NDArray[Any]:
        out = np.empty((len(rows), WINDOW_LEN, NUM_PARCELS), np.float16)
        for i, start in enumerate(rows[:, 1].tolist()):
            if i % WINDOWS_PER_RECORD == 0:
                bold = next(records)["npy"]
            out[i] = bold[start : start + WINDOW_LEN]
        return out

    return batch


def _open_zarr(url: str) -> ReadBatch:
    import zarr

    array: Any = zarr.open_array(f"{url}/bold.zarr", mode="r")
    return _cut(lambda recording, start: array[recording, start : start + WINDOW_LEN])


def why_not(method: str, case: str) -> str:
    """Say why a method cannot be measured, "" if it can."""
    package = method if method in ("datasets", "webdataset", "zarr") else "numpy"
    if importlib.util.find_spec(package) is None:
        return f"the package is not installed (pip install {package})"
    if case == "cold remote" and method == "datasets":
        return "it has no random access to remote files"
    if case == "cold remote" and importlib.util.find_spec("s3fs") is None:
        return "the package s3fs is not installed"
    return ""


# ---------------------------------------------------------------------- data


def write_data(folder: Path) -> None:
    """Write the same recordings for all methods."""
    url = str(folder / "dataset")
    dataset = write_synthetic_dataset(
        url,
        num_subjects={"train": NUM_RECORDINGS},
        num_timepoints=NUM_TIMEPOINTS,
        window_len=WINDOW_LEN,
        patch_len=20,
        num_parcels=NUM_PARCELS,
        dtype="float16",
        recordings_per_shard=8,
    )
    rows = np.stack([np.arange(NUM_RECORDINGS), np.zeros(NUM_RECORDINGS, np.int64)], axis=1)
    flat = dataset.split("train").gather(rows, NUM_TIMEPOINTS)[0]
    flat.tofile(folder / "flat.f16")
    if not why_not("zarr", ""):
        import zarr

        array: Any = zarr.create_array(
            str(folder / "bold.zarr"), shape=flat.shape, chunks=(1, *flat.shape[1:]), dtype="float16", compressors=None
        )
        array[:] = flat
    if not why_not("datasets", ""):
        import pyarrow
        from datasets import Dataset, disable_progress_bars  # type: ignore[import-untyped,import-not-found,unused-ignore]

        disable_progress_bars()
        values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.reshape(-1)), NUM_PARCELS)
        Dataset(pyarrow.table({"bold": values})).save_to_disk(str(folder / "arrow"))


def upload(folder: Path, url: str) -> None:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    fs.mkdirs(BUCKET, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).parts[0] in ("dataset", "flat.f16", "bold.zarr"):
            fs.put_file(str(path), f"{root}/{path.relative_to(folder)}")


@contextmanager
def s3_server() -> Iterator[None]:
    """Run an S3 server on the loopback interface in a process of its own; `AWS_*` point at it meanwhile."""
    here, there = multiprocessing.get_context("fork").Pipe()

    def serve() -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        there.send(server.get_host_and_port()[1])
        time.sleep(24 * 3600)

    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield
    finally:
        process.terminate()  # this process alone, by its id
        process.join()


# ---------------------------------------------------------------------- measuring


class _Batches(torch.utils.data.Dataset[torch.Tensor]):
    """Batches by number, opened in the worker that reads them."""

    def __init__(self, method: str, url: str, rows: NDArray[np.int64]) -> None:
        self.method, self.url, self.rows = method, url, rows
        self._read: ReadBatch | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._read is None:
            torch.set_num_threads(1)
            self._read = open_method(self.method, self.url)
        return torch.as_tensor(self._read(self.rows[number], number))


def draw_rows(num_windows: int, seed: int) -> NDArray[np.int64]:
    """Return (number of batches, BATCH, 2)."""
    rng = np.random.default_rng(seed)
    recordings = rng.integers(0, NUM_RECORDINGS, num_windows // BATCH * BATCH)
    starts = rng.integers(0, NUM_TIMEPOINTS - WINDOW_LEN + 1, len(recordings))
    return np.stack([recordings, starts], axis=1).reshape(-1, BATCH, 2)


def measure(case: str, method: str, url: str, rows: NDArray[np.int64]) -> dict[str, float]:
    """Measure once, in the current process."""
    torch.set_num_threads(1)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    found: dict[str, float] = {}
    if case == "2 workers":
        warm_up = 8  # batches, until both workers run
        loader = torch.utils.data.DataLoader(
            _Batches(method, url, np.concatenate([rows[:warm_up], rows])), batch_size=None, num_workers=2
        )
        batches = iter(loader)
        for _ in range(warm_up):
            next(batches)
        started = time.perf_counter()
        for batch in batches:
            del batch
    else:
        started = time.perf_counter()
        read = open_method(method, url)
        if case == "1 thread":
            for number, some in enumerate(rows):
                read(some, number)
            started = time.perf_counter()
        for number, some in enumerate(rows):
            read(some, number)
            found.setdefault("first_batch_s", time.perf_counter() - started)
    found["per_second"] = rows.shape[0] * BATCH / (time.perf_counter() - started)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before_mb
    return found


def in_child(work: Callable[..., Any], *args: Any) -> Any:
    """Run in a process of its own and return the result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as cache:  # nothing is cached before
            os.environ["BRAINLM_CACHE"] = cache
            sender.send(work(*args))  # an error is printed and ends this process with status 1

    process = context.Process(target=run)
    process.start()
    sender.close()
    result = None
    with suppress(EOFError):
        result = receiver.recv()
    process.join()
    if process.exitcode != 0 or (result is None and work is measure):
        raise RuntimeError(f"{work.__name__}{args[:2]} failed, see above")
    return result


def run_case(case: str, url: str, num_windows: int, repeats: int) -> list[dict[str, Any]]:
    methods = []
    for method in METHODS:
        if reason := why_not(method, case):
            print(f"{case}: {method} left out: {reason}")
        else:
            methods.append(method)
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for repeat in range(repeats):
        for method in methods:
            found[method].append(in_child(measure, case, method, url, draw_rows(num_windows, repeat)))
    records: list[dict[str, Any]] = []
    for method, runs in found.items():
        names = ["per_second", "peak_mb"] + ["first_batch_s"] * (case == "cold remote")
        medians = {name: statistics.median(run[name] for run in runs) for name in names}
        records.append({"case": case, "method": method, **medians})
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    reference = next(record["per_second"] for record in records if record["method"] == "memmap")
    print(f"\n{records[0]['case']:14} {'windows/s':>10} {'x memmap':>9} {'peak MB':>8} {'first batch s':>14}")
    for record in records:
        first = f"{record['first_batch_s']:14.2f}" if "first_batch_s" in record else ""
        ratio = record["per_second"] / reference
        print(f"{record['method']:14} {record['per_second']:10.0f} {ratio:9.2f} {record['peak_mb']:8.0f} {first}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2048, help="windows in one measurement; at least 512")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_child(write_data, folder)
        for case in args.cases:
            if case == "cold remote":
                with s3_server():
                    url = f"s3://{BUCKET}/data"
                    in_child(upload, folder, url)
                    found = run_case(case, url, min(args.windows, 512), args.repeats)  # slow, and soon warm
            else:
                found = run_case(case, str(folder), args.windows, args.repeats)
            print_table(found)
            records += found
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
