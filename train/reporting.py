"""What a person and a plot see of a training run: console, metrics.jsonl and TensorBoard. Rank zero alone."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

# Peak dense bf16 rates (FLOP/s) from the makers' data sheets; model FLOPs utilisation is reported only where known.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


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
        from torch.utils.tensorboard import SummaryWriter

        self.num_steps, self.first_step = num_steps, first_step
        self.path = folder / "metrics.jsonl"
        self._drop_after(first_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder), purge_step=first_step)
        self._started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", smoothing=0.1)

    def _drop_after(self, step: int) -> None:
        """Remove lines that a killed run wrote after the snapshot from which this one resumes."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step (updates done)."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        shown = {k: metrics[k] for k in ("loss", "val_r2", "windows_per_s") if k in metrics}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        else:
            done = max(step - self.first_step, 1)
            left_s = (time.perf_counter() - self._started) / done * (self.num_steps - step)
            logger.info("step %d/%d  %s  %d s left", step, self.num_steps, text, left_s)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()
        if self._bar is not None:
            self._bar.close()
