"""The training loop: fetch, step, log, validate, save."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import torch

from brainlm.errors import TrainingError
from brainlm.world import World
from train.engine import Engine
from train.interruption import Interruption
from train.not_finite import suspects
from train.objective import Objective
from train.reporting import Reporter, peak_flops, peak_memory_gb
from train.schedule import learning_rate_at
from train.settings import TrainSettings
from train.snapshots import PATIENCE_S, Snapshots
from train.state import TrainState
from train.step import Step, train_step

logger = logging.getLogger(__name__)
_DROPOUT = 0xD0


def train(
    engine: Engine,
    objective: Objective,
    state: TrainState,
    settings: TrainSettings,
    snapshots: Snapshots,
    num_steps: int,
    world: World,
    reporter: Reporter | None,
    interruption: Interruption,
) -> bool:
    """Train from ``state.step`` to `num_steps`, or until validation no longer improves. All ranks take part.

    A step whose loss or gradient is not finite, on any rank, changes no weight and is counted; its data are not seen
    again.

    Returns
    -------
    bool
        True if training is over; False if the run was asked to stop, after a snapshot was saved.

    Raises
    ------
    TrainingError
        On all ranks, when more than ``run.max_skipped`` steps were not finite, or the last snapshot cannot be written.
    """
    run, mix, patience = settings.run, objective.mix, settings.validation.patience
    peak = peak_flops()
    since = _Since()
    engine.module.train()
    if patience is not None and state.since_best >= patience:
        return True  # it was over when the snapshot was taken
    for batches in mix.iterate(state.step, num_steps):
        step_started = time.perf_counter()
        lr = learning_rate_at(state.step, num_steps, settings.optimizer, settings.data.batch_size)
        torch.manual_seed(_dropout_seed(run.seed, state.step, world.rank))  # nothing random is kept between steps
        step = train_step(engine, batches, lr)
        if step.is_finite:
            since.add(step)
        else:
            state.num_skipped += 1
            what = "gradient" if math.isfinite(step.loss) else "loss"
            problem = (
                f"the {what} of step {state.step + 1} is not finite: the weights were not changed by it. "
                f"{suspects(mix, batches, state.step, engine.sum_over_ranks)}"
            )
            if state.num_skipped > run.max_skipped:
                raise TrainingError(
                    f"{problem}. More than run.max_skipped={run.max_skipped} steps were like this. The same command "
                    "goes on from the newest snapshot"
                )
            logger.warning("%s. Step %d of at most %d that are left out", problem, state.num_skipped, run.max_skipped)
        state.step += 1
        state.windows_seen += settings.data.batch_size
        state.seconds_trained += time.perf_counter() - step_started

        metrics: dict[str, float] = {}
        last = state.step == num_steps
        if (state.step % run.log_every == 0 or last) and since.num_steps:  # all ranks compute, rank zero writes
            rate = since.num_steps * settings.data.batch_size / since.elapsed_s
            metrics = {
                "loss": since.mean_loss,
                "train_r2": 1 - since.mean_loss / since.mean_target,
                "lr": lr,
                "grad_norm": since.grad_norm,
                "windows_per_s": rate,
                "tokens_per_s": rate * objective.tokens_per_window,
                "data_wait": engine.max_over_ranks(mix.data_wait_s / since.elapsed_s),
                "save_wait": since.saving_s / (since.saving_s + since.elapsed_s),
                "seconds_trained": state.seconds_trained,
                "memory_gb": engine.max_over_ranks(peak_memory_gb()),
                "num_skipped": state.num_skipped,
            }
            if objective.flops_per_window is not None:
                metrics["tflops_per_s"] = rate * objective.flops_per_window / 1e12
                if peak is not None:
                    metrics["mfu"] = rate * objective.flops_per_window / (peak * world.size)
            mix.data_wait_s = 0.0
            since = _Since()
        is_best = False
        if state.step % settings.validation.every == 0 or last:  # all ranks
            started = time.perf_counter()
            scores = objective.score(engine)
            metrics |= scores
            state.val_r2 = scores["val_r2"]
            is_best = state.best_val_r2 is None or state.val_r2 > state.best_val_r2
            state.best_val_r2 = state.val_r2 if is_best else state.best_val_r2
            state.since_best = 0 if is_best else state.since_best + 1
            if patience is not None and state.since_best >= patience and not last:
                last = True
                logger.info(
                    "%d validations without a better score than %.4g: training ends after step %d of %d",
                    state.since_best, state.best_val_r2, state.step, num_steps,
                )  # fmt: skip
            number = state.step // settings.validation.every
            if reporter is not None and (last or number & (number - 1) == 0):  # the 1st, 2nd, 4th, 8th ...: rank zero
                for name, example in objective.examples().items():
                    reporter.picture(state.step, name, example)
            since.paused_s += time.perf_counter() - started
        if reporter is not None and metrics:  # rank zero
            reporter.log(state.step, metrics)
        if run.max_hours is not None and interruption.hours_since_start() >= run.max_hours:
            interruption.request(f"run.max_hours={run.max_hours:g} is over")
        interruption.look_for_launcher()
        stopping = engine.sum_over_ranks([float(interruption.requested)])[0] > 0  # all ranks stop together
        saving = state.step % run.snapshot_every == 0 or last or stopping
        if saving or (is_best and run.keep_best):  # all ranks
            started = time.perf_counter()
            patience_s = math.inf if last or stopping else PATIENCE_S
            best = is_best and run.keep_best
            if problem := snapshots.begin(state, snapshot=saving, best=best, patience_s=patience_s):
                logger.warning("%s; training goes on", problem)
            if (last or stopping) and (problem := snapshots.wait()):
                raise TrainingError(
                    f"{problem}. See to it and give the same command again: it goes on from the newest snapshot"
                )
            since.add_saving(time.perf_counter() - started)
        if last:
            return True
        if stopping:
            return False
    return True


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed for one rank's part of one step: dropout is the same again when a run resumes."""
    return int(np.random.SeedSequence([_DROPOUT, seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Since:
    """Means since the last log line."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.paused_s = self.saving_s = 0.0  # the second is part of the first
        self.num_steps = 0
        self.grad_norm = 0.0  # of the newest step that was not left out
        self._loss = self._target = 0.0

    def add(self, step: Step) -> None:
        self.num_steps += 1
        self.grad_norm = step.gradient_norm
        self._loss += step.loss
        self._target += step.target

    def add_saving(self, seconds: float) -> None:
        self.saving_s += seconds
        self.paused_s += seconds

    @property
    def elapsed_s(self) -> float:
        return max(time.perf_counter() - self.started - self.paused_s, 1e-9)

    @property
    def mean_loss(self) -> float:
        return self._loss / self.num_steps

    @property
    def mean_target(self) -> float:
        return self._target / self.num_steps
