"""DeepSpeed, set up from our settings. The only file that imports it.

The DeepSpeed dictionary is generated, so batch size and precision are written once. The optimizer is torch's AdamW:
with it, resuming is exact (DeepSpeed's own CPU Adam recomputes its bias correction).
"""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from brainlm.errors import ConfigError
from brainlm.layers import Block
from brainlm.loader import WindowBatch
from brainlm.model import BrainLM, Loss
from brainlm.world import World, set_single_process_environment
from train.compile_operators import load_operator
from train.param_groups import param_groups
from train.settings import TrainSettings, micro_batches
from train.watchdog import LostRankError, Watchdog, is_of_a_link
from train.whole_state import WholeState, gather, gather_weights, restore

T = TypeVar("T")
WATCHDOG_NEEDS_S = 120.0
MAX_BUCKET = 50_000_000  # gradients that DeepSpeed sums over ranks at a time


def deepspeed_dict(settings: TrainSettings, world_size: int, num_parameters: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration that the settings mean.

    DeepSpeed allocates a buffer for as many gradients as are reduced at a time, whatever the model has: by default half
    a billion.
    """
    assert settings.engine.precision != "auto", "the entry resolves it (train.precision)"
    accumulation = micro_batches(settings, world_size)
    return {
        "train_batch_size": settings.data.batch_size,
        "train_micro_batch_size_per_gpu": settings.data.batch_size // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.optimizer.clip_grad_norm,
        "bf16": {"enabled": settings.engine.precision == "bf16"},
        "zero_optimization": {
            "stage": settings.engine.zero_stage,
            "reduce_bucket_size": min(num_parameters, MAX_BUCKET),
            **({"offload_optimizer": {"device": "cpu"}} if settings.engine.offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # ours is torch's, there too
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A model under DeepSpeed: forward and backward, update, and collectives over all ranks.

    Parameters
    ----------
    settings : TrainSettings
    model : nn.Module
        In float32, the same weights on every rank; called with a batch's inputs, it returns a `Loss`. Weights that need
        no gradient stay as they are.
    world : World
    """

    def __init__(self, settings: TrainSettings, model: nn.Module, world: World) -> None:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        set_single_process_environment()
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError('DeepSpeed is not installed: pip install -e ".[train]"') from error

        # Notes of torch to DeepSpeed's authors, repeated by every rank, are nothing a user can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        if on_gpu:
            torch.cuda.set_device(world.local_rank)
        # The watchdog comes first, and has time to find out for whom this rank waits.
        timeout = datetime.timedelta(seconds=2 * settings.engine.timeout_s + WATCHDOG_NEEDS_S)
        with contextlib.redirect_stdout(io.StringIO()):  # every rank prints which operator it built
            if not on_gpu:
                load_operator()
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, verbose=False, auto_mpi_discovery=False
            )
        for part in model.modules():
            if isinstance(part, BrainLM):
                part.recompute_activations = settings.engine.activation_checkpointing
            if isinstance(part, Block) and settings.engine.compile:
                part.compile(dynamic=True)  # the number of visible tokens changes from step to step
        self.world = world
        # There DeepSpeed has no optimizer of its own around torch's, and so no norm either.
        self._own_norm = settings.engine.precision == "fp32" and settings.engine.zero_stage == 0
        self._norm = float("nan")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.config = deepspeed_dict(settings, world.size, trained)
        # DeepSpeed rounds these to the training precision, and has no exact copy of them.
        frozen = {name: p.detach().float().cpu().clone() for name, p in model.named_parameters() if not p.requires_grad}
        self._frozen = frozen if settings.engine.precision != "fp32" else {}
        self._torch_optimizer = optimizer = torch.optim.AdamW(
            param_groups(model, settings.optimizer.weight_decay, settings.lr_ratios),
            lr=settings.optimizer.peak_lr(settings.data.batch_size),
            betas=settings.optimizer.betas,
            eps=settings.optimizer.eps,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.config)
        self.device = torch.device(self._engine.device)
        self._watchdog: Watchdog | None = None
        if world.size > 1:
            self._watchdog = Watchdog(world, settings.engine.timeout_s, self.from_rank_zero)

    @property
    def module(self) -> nn.Module:
        """What is trained. Its weights may be partitioned (ZeRO 3) and are in the training precision."""
        module: nn.Module = self._engine.module
        return module

    @property
    def model(self) -> BrainLM:
        """What is trained, where that is a masked autoencoder."""
        assert isinstance(self.module, BrainLM)
        return self.module

    def forward(self, batch: WindowBatch) -> Loss:
        self._beat()
        loss = self._engine(**batch.inputs())
        assert isinstance(loss, Loss)
        return loss

    def _beat(self) -> None:
        """Tell the watchdog that this process has come on."""
        if self._watchdog is not None:
            self._watchdog.beat()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch; DeepSpeed averages over micro-batches and ranks."""
        self._engine.backward(loss)

    def micro_step(self) -> None:
        """End a micro-batch. After the last one of a step: clip, update, clear gradients.

        Where the gradient is not finite, on any rank, nothing is updated on all of them.
        """
        if self._own_norm and self._engine.is_gradient_accumulation_boundary():
            grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))  # already averaged over ranks
            if not math.isfinite(self._norm):
                self._engine.module.zero_grad(set_to_none=True)
                self._engine.micro_steps += 1  # the step is over, without an update
                return
        self._engine.step()

    def set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def gradient_norm(self) -> float:
        """Return the norm of the last update's gradient before clipping."""
        if self._own_norm:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Add numbers over all ranks; every rank gets the sums."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.all_reduce(tensor)
        return [float(v) for v in tensor.tolist()]

    def all_reduce(self, sums: Tensor) -> None:
        """Add a tensor on this rank's device over all ranks, in place. All ranks take part."""
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        self._beat()

    def max_over_ranks(self, value: float) -> float:
        """Return the largest of the ranks' values on every rank. All ranks take part."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        self._beat()
        return float(tensor)

    def barrier(self) -> None:
        if self.world.size > 1:
            torch.distributed.barrier()
        self._beat()

    def whole_weights(self) -> dict[str, Tensor]:
        """Gather float32 weights (the optimizer's own, not the rounded ones) on rank zero. All ranks take part."""
        weights = gather_weights(self._engine, keep=self.world.is_rank_zero)
        return weights | self._frozen if self.world.is_rank_zero else weights

    @contextlib.contextmanager
    def whole_tokens(self) -> Iterator[None]:
        """Make CLS and mask token whole on every rank while the model is read outside its forward pass (ZeRO 3)."""
        self._beat()
        if self.config["zero_optimization"]["stage"] < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([self.model.cls_token, self.model.mask_token]):
            yield

    def whole_state(self) -> WholeState | None:
        """Gather weights and optimizer state on rank zero; None elsewhere. All ranks take part."""
        whole = gather(self._engine, self._torch_optimizer, keep=self.world.is_rank_zero)
        if whole is not None:
            whole.weights.update(self._frozen)
        return whole

    def restore(self, whole: WholeState | None) -> None:
        """Go on from a state that rank zero has. All ranks take part."""
        restore(self._engine, self._torch_optimizer, whole)

    def from_rank_zero(self, value: T) -> T:
        """Return rank zero's value on every rank; it must be picklable. All ranks take part."""
        said = [value]
        if self.world.size > 1:
            torch.distributed.broadcast_object_list(said, src=0)
        self._beat()
        return said[0]

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Raise `LostRankError`, which says who is gone, where torch says only that a connection is."""
        try:
            yield
        except RuntimeError as error:
            if self._watchdog is None or not is_of_a_link(error):
                raise
            raise LostRankError(self._watchdog.who_is_lost(error)) from error

    def close(self) -> None:
        """Leave the process group; what is left of gloo must not decide the exit status."""
        if self._watchdog is not None:
            self._watchdog.close()
        self._engine.destroy()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
