"""What a person and a plot see of a training run: console, metrics.jsonl and TensorBoard. Rank zero alone."""

from __future__ import annotations

import json
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from train.pictures import Example, draw_example

logger = logging.getLogger(__name__)

# Peak dense bf16 rates (FLOP/s) from the makers' data sheets; model FLOPs utilisation is reported only where known.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
BOARD = "TensorBoard's file"


def peak_flops() -> float | None:
    """Return the peak bf16 rate of this process's GPU, or None where it is not known (a CPU, another GPU)."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)


def peak_memory_gb() -> float:
    """Return the most memory that this process has had: on its GPU, by torch's allocator; without one, in all."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # getrusage would count what the parent had when it began this process, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # in bytes, on a Mac


class Reporter:
    """Writes metrics as they come. Use as a context manager.

    What cannot be written, because the disk is full, is said once and costs no training.

    Parameters
    ----------
    folder : Path
        The training run.
    num_steps : int
        For progress and the time left.
    first_step : int
        Step at which this process began.
    """

    def __init__(self, folder: Path, num_steps: int, first_step: int) -> None:
        self.num_steps, self.first_step = num_steps, first_step
        self.path = folder / "metrics.jsonl"
        self._failed: set[str] = set()
        self._drop_after(first_step)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""
        self._board: Any = None
        self._other_threads, threading.excepthook = threading.excepthook, self._thread_failed
        self._attempt(BOARD, lambda: self._open_board(folder))
        self._started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", smoothing=0.1)

    def _open_board(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=self.first_step)

    def _drop_after(self, step: int) -> None:
        """Cut off the lines that a killed run wrote after the snapshot from which this one resumes.

        Cutting needs no space, and there is no moment at which the lines before are not there.
        """
        if not self.path.exists():
            return
        kept = 0
        with self.path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"}\n") or json.loads(line)["step"] > step:
                    break
                kept += len(line)
            file.truncate(kept)

    def _attempt(self, what: str, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._say(what, error)

    def _say(self, what: str, error: OSError) -> None:
        if what not in self._failed:
            self._failed.add(what)
            logger.warning("%s cannot be written: %s; training goes on", what, error)

    def _write_lines(self) -> None:
        while self._unwritten:  # also what could not be written before
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step (updates done)."""
        self._unwritten += f"{json.dumps({'step': step, **metrics})}\n".encode()
        self._attempt(str(self.path), self._write_lines)
        for name, value in metrics.items() if self._board is not None else ():
            self._attempt(BOARD, partial(self._board.add_scalar, name, value, step))
        shown = {k: metrics[k] for k in ("loss", "val_r2", "windows_per_s") if k in metrics}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        else:
            done = max(step - self.first_step, 1)
            left_s = (time.perf_counter() - self._started) / done * (self.num_steps - step)
            logger.info("step %d/%d  %s  %d s left", step, self.num_steps, text, left_s)

    def picture(self, step: int, name: str, example: Example | None) -> None:
        """Show one validation window of a data set, as measured and as rebuilt."""
        if example is not None and self._board is not None and BOARD not in self._failed:
            figure = draw_example(example)
            self._attempt(BOARD, partial(self._board.add_figure, f"reconstruction/{name}", figure, step))

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Take the errors of TensorBoard's own thread, which writes the file and which nobody else listens to."""
        error = failed.exc_value
        if isinstance(error, OSError) and type(failed.thread).__module__.startswith("tensorboard."):
            self._say(BOARD, error)
        else:
            self._other_threads(failed)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._attempt(BOARD, self._board.close)
        threading.excepthook = self._other_threads
        if self._bar is not None:
            self._bar.close()
