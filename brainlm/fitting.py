"""Fit small networks: the one training loop of all trained baselines, so that none is trained worse than another.

AdamW, a stated number of steps, warm-up and cosine; the weights that are best on validation are kept, those at the
start included; candidates (learning rates, sizes) are tried one after the other with the same budget, and the one that
is best on validation wins. For BrainLM itself see ``train/``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from brainlm.config import Section
from brainlm.errors import ConfigError, TrainingError

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class FitSettings(Section):
    """How long, and how carefully. The budget of a baseline is `steps` x `batch_size` for each of its candidates."""

    steps: int = 400
    batch_size: int = 16
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates that are tried; the one that is best on validation is taken."""
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    clip_grad_norm: float = 1.0
    check_every: int = 25
    """Steps between looks at validation."""
    patience: int = 6
    """Looks without a better score after which a candidate is given up."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.check_every, self.patience) < 1:
            raise ConfigError("fit: steps, batch_size, check_every and patience must be at least 1")
        if not self.lrs or min(self.lrs) <= 0 or not 0 <= self.warmup_ratio < 1:
            raise ConfigError("fit: lrs must lie above 0, and warmup_ratio between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What became of a candidate: validation error by step, and the step whose weights were kept."""

    errors: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    candidate: str = ""

    @property
    def best_error(self) -> float:
        return self.errors[self.best_step]


def fit(
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    validation_error: Callable[[], float],
    settings: FitSettings,
    lr: float,
) -> Fitted:
    """Train a module in place and leave it with the weights that are best on validation.

    Parameters
    ----------
    module : nn.Module
    loss_at : callable
        Returns the loss of a step's batch, a function of the step's number.
    validation_error : callable
        Lower is better; called in evaluation mode without gradients.
    lr : float
        Of the steps after warm-up; falls to 0 along a cosine.

    Raises
    ------
    TrainingError
        If the error at the start is not finite. Steps whose loss or gradient is not finite are left out.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=settings.weight_decay)
    errors = {0: _checked(module, validation_error)}
    if not math.isfinite(errors[0]):
        raise TrainingError(f"{type(module).__name__}: the validation error before the first step is {errors[0]}")
    best_step, best = 0, copy.deepcopy(module.state_dict())
    looks_since = 0
    module.train()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, settings)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_at(step)
        if torch.isfinite(loss):
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip_grad_norm)
            if torch.isfinite(norm):
                optimizer.step()
        if step % settings.check_every == 0 or step == settings.steps:
            errors[step] = _checked(module, validation_error)
            looks_since += 1
            if errors[step] < errors[best_step]:  # never true of NaN
                best_step, best, looks_since = step, copy.deepcopy(module.state_dict()), 0
            if looks_since >= settings.patience:
                break
    module.load_state_dict(best)
    module.eval()
    return Fitted(errors=errors, best_step=best_step)


def fit_best(
    candidates: Sequence[C],
    build: Callable[[C], M],
    loss_of: Callable[[M], Callable[[int], Tensor]],
    error_of: Callable[[M], Callable[[], float]],
    settings: FitSettings,
) -> tuple[M, Fitted]:
    """Fit each candidate at each learning rate and return what is best on validation, and how it went.

    Every fit begins with the same seed. Ties go to the earlier candidate.
    """
    found: tuple[M, Fitted] | None = None
    for candidate in candidates:
        for lr in settings.lrs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                module = build(candidate)
                fitted = fit(module, loss_of(module), error_of(module), settings, lr)
            fitted = Fitted(errors=fitted.errors, best_step=fitted.best_step, candidate=f"{candidate}, lr {lr:g}")
            if found is None or fitted.best_error < found[1].best_error:
                found = module, fitted
    if found is None:
        raise ConfigError("nothing to fit: no candidates")
    return found


def _schedule(step: int, settings: FitSettings) -> float:
    warmup = max(1, round(settings.warmup_ratio * settings.steps))
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def _checked(module: nn.Module, validation_error: Callable[[], float]) -> float:
    module.eval()
    with torch.no_grad():
        error = validation_error()
    module.train()
    return error
