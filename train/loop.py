"""The training loop: fetch, forward, backward, agree it is finite, update, log, validate, save."""

from __future__ import annotations

import logging
import math
import time

import torch

from brainlm.errors import TrainingError
from brainlm.loader import WindowLoader
from brainlm.presets import flops_per_window
from brainlm.world import World
from train.engine import Engine
from train.held_out import HeldOut
from train.interruption import Interruption
from train.reporting import Reporter, peak_flops, peak_memory_gb
from train.schedule import learning_rate_at
from train.settings import PretrainSettings
from train.snapshots import Snapshots
from train.state import TrainState

logger = logging.getLogger(__name__)
MAX_LISTED = 8


def train(
    engine: Engine,
    loader: WindowLoader,
    held_out: HeldOut,
    state: TrainState,
    settings: PretrainSettings,
    snapshots: Snapshots,
    num_steps: int,
    world: World,
    reporter: Reporter | None,
    interruption: Interruption,
) -> bool:
    """Train from ``state.step`` to `num_steps`. All ranks take part.

    A step whose loss or gradient is not finite, on any rank, changes no weight and is counted; its data are not seen
    again.

    Returns
    -------
    bool
        True if every step is done; False if the run was asked to stop, after a snapshot was saved.

    Raises
    ------
    TrainingError
        On all ranks, when more than ``run.max_skipped`` steps were not finite, or the last snapshot cannot be written.
    """
    run = settings.run
    model_config = engine.model.config
    flops = {
        ratio: 3 * flops_per_window(model_config, engine.model.num_parcels, ratio, settings.masks.num_decoded)
        for ratio in settings.masks.ratios
    }
    mean_flops = sum(flops.values()) / len(flops)
    tokens_per_window = engine.model.num_rows * model_config.num_patches
    peak = peak_flops()
    since = _Since()
    engine.model.train()
    for batches in loader.iterate(state.step, num_steps):
        step_started = time.perf_counter()
        (num_values,) = engine.sum_over_ranks([float(sum(batch.num_scored_values for batch in batches))])
        num_values = max(num_values, 1.0)  # all that is hidden may be censored: the loss is 0 then
        lr = learning_rate_at(state.step, num_steps, settings.optimizer, settings.data.batch_size)
        engine.set_learning_rate(lr)
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for number, cpu_batch in enumerate(batches):
            batch = cpu_batch.to(engine.device)
            kept = None if bool(cpu_batch.kept.all()) else batch.kept
            loss = engine.forward(batch.windows, batch.mask, batch.present, batch.ids_decoded, kept)
            sums += torch.stack([loss.sum.detach(), loss.target_sum.detach()])  # not read here: a GPU need not wait
            # DeepSpeed averages over ranks and micro-batches; this makes it the mean over hidden values of the batch.
            scale = torch.tensor(world.size * len(batches) / num_values, device=engine.device)
            if number + 1 == len(batches):
                engine.all_reduce(sums)  # one rank's nan reaches all
                # so that the gradient is not finite either, and nothing is updated
                scale = scale.masked_fill(~sums[0].isfinite(), math.nan)
            engine.backward(loss.sum * scale)
            engine.micro_step()
        squared, target = sums.tolist()
        gradient_norm = engine.gradient_norm()  # the same on all ranks
        if math.isfinite(gradient_norm):
            since.add(squared / num_values, target / num_values)
        else:
            state.num_skipped += 1
            what = "gradient" if math.isfinite(squared) else "loss"
            problem = (
                f"the {what} of step {state.step + 1} is not finite: the weights were not changed by it. Its windows "
                f"(recording number, first timepoint): {loader.rows_at(state.step).tolist()[:MAX_LISTED]}"
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
                "grad_norm": gradient_norm,
                "windows_per_s": rate,
                "tokens_per_s": rate * tokens_per_window,
                "tflops_per_s": rate * mean_flops / 1e12,
                "data_wait": loader.data_wait_s / since.elapsed_s,
                "seconds_trained": state.seconds_trained,
                "memory_gb": engine.max_over_ranks(peak_memory_gb()),
                "num_skipped": state.num_skipped,
            }
            if peak is not None:
                metrics["mfu"] = rate * mean_flops / (peak * world.size)
            loader.data_wait_s = 0.0
            since = _Since()
        if state.step % settings.validation.every == 0 or last:  # all ranks
            started = time.perf_counter()
            scores = held_out.score(engine)
            metrics |= scores
            state.val_r2 = scores["val_r2"]
            state.best_val_r2 = max(state.val_r2, -math.inf if state.best_val_r2 is None else state.best_val_r2)
            since.paused_s += time.perf_counter() - started
        if reporter is not None and metrics:  # rank zero
            reporter.log(state.step, metrics)
        if run.max_hours is not None and interruption.hours_since_start() >= run.max_hours:
            interruption.request(f"run.max_hours={run.max_hours:g} is over")
        stopping = engine.sum_over_ranks([float(interruption.requested)])[0] > 0  # all ranks stop together
        if state.step % run.snapshot_every == 0 or last or stopping:  # all ranks
            started = time.perf_counter()
            if problem := snapshots.begin(state):
                logger.warning("%s; training goes on", problem)
            if (last or stopping) and (problem := snapshots.wait()):
                raise TrainingError(f"{problem}. Nothing after the snapshot before it is kept")
            since.paused_s += time.perf_counter() - started
        if stopping and not last:
            return False
    return True


class _Since:
    """Means since the last log line."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.paused_s = 0.0
        self.num_steps = 0
        self._loss = self._target = 0.0

    def add(self, loss: float, target: float) -> None:
        self.num_steps += 1
        self._loss += loss
        self._target += target

    @property
    def elapsed_s(self) -> float:
        return max(time.perf_counter() - self.started - self.paused_s, 1e-9)

    @property
    def mean_loss(self) -> float:
        return self._loss / self.num_steps

    @property
    def mean_target(self) -> float:
        return self._target / self.num_steps
