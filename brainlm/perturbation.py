"""In silico perturbation: the smallest road from one recording to what a model would see in another.

Algorithm 1 of BrainLM (Ortega Caro et al. 2024, Sec. 3.5): theta* = argmin over theta of the distance between the
model's answer about G(x, theta) and a target, by gradient descent from theta = 0, the weights fixed. The paper leaves
open what the answer, G, the rate and the number of steps are; ours are stated at `PerturbationSettings`.

Every window has a theta and a target of its own, and nothing of another one: many pairs are optimised side by side, and
which ones are changes nothing but rounding.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.config import Section
from brainlm.errors import ConfigError, DataError
from brainlm.reading import evaluating
from brainlm.reconstruction import check_decoder
from brainlm.tokens import hidden_ids
from brainlm.windows import Windows, as_windows

if TYPE_CHECKING:
    from brainlm.model import BrainLM

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam (Kingma and Ba 2015)


@dataclass(frozen=True, kw_only=True)
class PerturbationSettings(Section):
    """How a window is changed, and for how long."""

    kind: Literal["additive", "gain"] = "additive"
    """``additive``: x + theta, a number for each value (the paper's). ``gain``: x (1 + theta), a number for each
    parcel."""
    target: Literal["cls", "decoded"] = "cls"
    """``cls``: squared distance of CLS tokens, nothing hidden. ``decoded``: squared distance of what the decoder
    predicts from the target window, read where values are hidden alone: a random half of the tokens, and the other."""
    steps: int = 200
    """Steps of Adam."""
    lr: float = 0.02
    """Rate, in contract units (``gain``: in multiples of the signal)."""
    norm_penalty: float = 0.0
    """Added to the relative distance: this times the mean squared theta over what may change."""
    stop_distance: float = 0.0
    """A window is left as it is once its relative distance is this or less; 0 = all steps."""
    seed: int = 0
    """Of the hidden halves."""
    batch_size: int = 8
    """Windows at a time: memory and time depend on it, the result does not."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ConfigError("perturbation: steps and batch_size must be at least 1, lr above 0")
        if self.norm_penalty < 0 or not 0 <= self.stop_distance < 1:
            raise ConfigError("perturbation: norm_penalty must be 0 or more, stop_distance from 0 to below 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturbed:
    """What became of some windows.

    Parameters
    ----------
    change : Tensor, shape (B, P, W), float32
        Perturbed window minus window, contract units; 0 where nothing may change. Of all steps the one with the lowest
        loss.
    start_distance : Tensor, shape (B,), float32
        Squared distance before: of CLS tokens a sum over their width, of decoded values a mean.
    distance : Tensor, shape (B,), float32
        After, as a share of `start_distance`: 0 = the target is reached. 0 where there was no distance.
    num_steps : Tensor, shape (B,), int64
        Steps until the end, or until `PerturbationSettings.stop_distance` was reached.
    """

    change: Tensor
    start_distance: Tensor
    distance: Tensor
    num_steps: Tensor

    def __len__(self) -> int:
        return len(self.change)


def perturb(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    target: Windows | Tensor | NDArray[Any],
    settings: PerturbationSettings = PerturbationSettings(),
    *,
    parcels: Sequence[int] | None = None,
    timepoints: slice | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perturbed:
    """Change windows so that the model takes them for their targets.

    Parameters
    ----------
    model : BrainLM
        Its weights are not changed.
    windows : Windows, or Tensor or ndarray of shape (B, P, W)
        Contract units.
    target : Windows, Tensor or ndarray
        Window by window, of any number of timepoints that the model takes; or, for ``target: cls``, CLS tokens of
        shape (B, D), or (D,) for all, such as the mean of a group.
    parcels : sequence of int, optional
        Columns that may change; None = all. Parcels that are not present and censored timepoints never change.
    timepoints : slice, optional
        Of each window, that may change; None = all.
    progress : callable, optional
        Told how many windows are done, and of how many.

    Raises
    ------
    ConfigError
        If the model does not let gradients through to its input, or parcels are not its own.
    DataError
        If windows and targets do not fit each other, or nothing may change.
    """
    found = as_windows(windows)
    parts = []
    for part in perturb_in_batches(model, found, target, settings, parcels=parcels, timepoints=timepoints):
        parts.append(part)
        if progress is not None:
            progress(sum(map(len, parts)), len(found))
    if not parts:
        raise DataError("perturbation: there is no window")
    names = ("change", "start_distance", "distance", "num_steps")
    return Perturbed(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def perturb_in_batches(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    target: Windows | Tensor | NDArray[Any],
    settings: PerturbationSettings = PerturbationSettings(),
    *,
    parcels: Sequence[int] | None = None,
    timepoints: slice | None = None,
) -> Iterator[Perturbed]:
    """Yield the results of `perturb` batch by batch, on the CPU: memory is that of one batch."""
    if not hasattr(model, "encode_grid"):
        raise ConfigError("perturbation: published models let no gradient through; train or load a BrainLM")
    if settings.target == "decoded":
        check_decoder(model.manifest)
    found = as_windows(windows)
    for first in range(0, len(found), settings.batch_size):
        rows = slice(first, first + settings.batch_size)
        with _fixed(model) as device:
            batch = _as_fed(model, found[rows].to(device))
            objective = _objective(model, batch, _rows_of(target, rows, len(found)), settings, first)
            free = _free(batch, parcels, timepoints)
            part = _descend(batch, objective, free, settings)
        yield part


class _Objective(Protocol):
    def __call__(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the squared distance (b,) of values (b, P, W), which belong to these rows of the batch."""


def _objective(
    model: BrainLM, batch: Windows, target: Windows | Tensor, settings: PerturbationSettings, first: int
) -> _Objective:
    if settings.target == "cls":
        return _ClsDistance(model, batch, target)
    if isinstance(target, Tensor):
        raise DataError("perturbation: target: decoded needs windows to be compared with, found vectors")
    return _DecodedDistance(model, batch, target, settings.seed, first)


class _ClsDistance:
    """Squared Euclidean distance of CLS tokens, nothing hidden."""

    def __init__(self, model: BrainLM, batch: Windows, target: Windows | Tensor) -> None:
        self.model, self.batch = model, batch
        device = batch.values.device
        if isinstance(target, Windows):
            with torch.no_grad():
                cls = model.embed_windows(target.to(device)).cls
        else:
            cls = target.to(device)
        width = model.config.width
        if tuple(cls.shape) != (len(batch), width):
            raise DataError(
                f"perturbation: expected {len(batch)} targets for as many windows, windows or CLS tokens of width "
                f"{width}, found shape {tuple(cls.shape)}"
            )
        self.target = cls.float()

    def __call__(self, values: Tensor, rows: Tensor) -> Tensor:
        cls = self.model.embed_windows(_rows(self.batch, rows, values)).cls.float()
        return (cls - self.target[rows]).square().sum(dim=1)


class _DecodedDistance:
    """Mean squared distance of decoded values and a target window, where values are hidden; over two halves."""

    def __init__(self, model: BrainLM, batch: Windows, target: Windows, seed: int, first: int) -> None:
        target = target.to(batch.values.device)
        if target.values.shape != batch.values.shape:
            raise DataError(
                f"perturbation: windows of shape {tuple(batch.values.shape)} and targets of shape "
                f"{tuple(target.values.shape)}: decoded values are compared one by one"
            )
        self.model, self.batch, self.target = model, batch, _as_fed(model, target)
        num_tokens = model.token_grid(batch).num_tokens
        halves = []
        for number in range(first, first + len(batch)):  # of a window, wherever it stands in a batch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            halves.append(torch.rand(num_tokens, generator=generator).argsort() < num_tokens // 2)
        self.half = torch.stack(halves).to(batch.values.device)
        # A value counts where both have it.
        self.both = batch.present & self.target.present, batch.kept & self.target.kept

    def __call__(self, values: Tensor, rows: Tensor) -> Tensor:
        fed, half = _rows(self.batch, rows, values), self.half[rows]
        present, kept = (part[rows] for part in self.both)
        scored_BPW = present[:, :, None] & kept[:, None, :]
        total = values.new_zeros(len(rows))
        for mask_BL in (half, ~half):
            grid, mask_BL = self.model.seen(fed, mask_BL)
            ids = hidden_ids(mask_BL & grid.present)
            prediction = self.model.decode(self.model.encode_grid(grid, mask_BL), ids)
            is_hidden = (mask_BL & grid.present).gather(1, ids)[:, :, None]
            wanted = is_hidden & grid.patchify(scored_BPW, ids)
            difference = prediction - grid.patchify(self.target.values[rows], ids).float()
            total = total + difference.masked_fill(~wanted, 0.0).square().sum(dim=(1, 2))
        return total / scored_BPW.sum(dim=(1, 2)).clamp(min=1)


def _descend(batch: Windows, objective: _Objective, free: Tensor, settings: PerturbationSettings) -> Perturbed:
    """Run Adam on the theta of each window; windows that have arrived take no further part."""
    x, gain = batch.values, settings.kind == "gain"
    B = len(batch)
    num_free = free.sum(dim=(1, 2)).clamp(min=1) if not gain else free.any(dim=2).sum(dim=1).clamp(min=1)
    theta = x.new_zeros(B, x.shape[1], 1) if gain else torch.zeros_like(x)
    moments = [torch.zeros_like(theta), torch.zeros_like(theta)]
    active = torch.arange(B, device=x.device)
    best_loss, best_theta = x.new_full((B,), float("inf")), theta.clone()
    start, distance = x.new_zeros(B), x.new_zeros(B)
    num_steps = torch.zeros(B, dtype=torch.int64, device=x.device)

    def changed(theta: Tensor, rows: Tensor) -> Tensor:
        step = x[rows] * theta if gain else theta
        return x[rows] + step.masked_fill(~free[rows], 0.0)

    for step in range(settings.steps + 1):
        theta = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            absolute = objective(changed(theta, active), active)
            if step == 0:
                start = absolute.detach().clone()
                if not bool(start.isfinite().all()):
                    raise DataError("perturbation: the distance is not finite: are the windows in contract units?")
            scale = torch.where(start[active] > 0, start[active], 1.0)
            relative = absolute / scale
            loss = relative + settings.norm_penalty * theta.square().sum(dim=(1, 2)) / num_free[active]
        found = loss.detach()
        better = found < best_loss[active]
        best_loss[active[better]] = found[better]
        best_theta[active[better]] = theta.detach()[better]
        distance[active[better]] = relative.detach()[better]
        num_steps[active] = step
        going = relative.detach() > settings.stop_distance
        if step == settings.steps or not bool(going.any()):
            break
        (gradient,) = torch.autograd.grad(loss, theta, torch.ones_like(loss))
        theta = theta.detach()
        if not bool(going.all()):
            theta, gradient, active = theta[going], gradient[going], active[going]
            moments = [moment[going] for moment in moments]
        for moment, beta, value in zip(moments, BETAS, (gradient, gradient.square()), strict=True):
            moment.lerp_(value, 1 - beta)
        mean, square = (moment / (1 - beta ** (step + 1)) for moment, beta in zip(moments, BETAS, strict=True))
        theta = theta - settings.lr * mean / (square.sqrt() + EPSILON)
    everything = torch.arange(B, device=x.device)
    change = changed(best_theta, everything) - x
    change = change.masked_fill(~free, 0.0)
    return Perturbed(
        change=change.cpu(), start_distance=start.cpu(), distance=distance.cpu(), num_steps=num_steps.cpu()
    )


def _free(batch: Windows, parcels: Sequence[int] | None, timepoints: slice | None) -> Tensor:
    """Return which values may change, (B, P, W)."""
    P, W = batch.values.shape[1:]
    free = batch.present[:, :, None] & batch.kept[:, None, :]
    if parcels is not None:
        strange = [parcel for parcel in parcels if not 0 <= parcel < P]
        if strange:
            raise ConfigError(f"perturbation: parcels are numbered from 0 to {P - 1}, found {strange}")
        chosen = torch.zeros(P, dtype=torch.bool, device=free.device)
        chosen[list(parcels)] = True
        free = free & chosen[None, :, None]
    if timepoints is not None:
        chosen = torch.zeros(W, dtype=torch.bool, device=free.device)
        chosen[timepoints] = True
        free = free & chosen[None, None]
    if not bool(free.any(dim=(1, 2)).all()):
        raise DataError(
            "perturbation: in a window nothing may change: its parcels are missing, or its time is censored"
        )
    return free


def _as_fed(model: BrainLM, windows: Windows) -> Windows:
    """Return windows as the model sees them with nothing hidden, to be taken as they are from now on."""
    grid, _ = model.seen(windows)
    fed = grid.windows
    values = fed.values.float().masked_fill(~fed.present[:, :, None], 0.0)
    return replace(fed, values=values, as_is=True)


def _rows(windows: Windows, rows: Tensor, values: Tensor) -> Windows:
    shared = windows.coords_mm is None or windows.coords_mm.ndim == 2
    return replace(
        windows,
        values=values,
        present=windows.present[rows],
        kept=windows.kept[rows],
        coords_mm=windows.coords_mm if shared else windows.coords_mm[rows],  # type: ignore[index]
        tr_s=None if windows.tr_s is None else windows.tr_s[rows],
        starts=(),
    )


def _rows_of(target: Windows | Tensor | NDArray[Any], rows: slice, num_windows: int) -> Windows | Tensor:
    """Return the targets of some windows: windows, or CLS tokens."""
    if not isinstance(target, Windows):
        tensor = torch.as_tensor(target, dtype=torch.float32)
        if tensor.ndim < 3:
            tensor = tensor.expand(num_windows, -1) if tensor.ndim == 1 else tensor
            if len(tensor) != num_windows:
                raise DataError(f"perturbation: {num_windows} windows and {len(tensor)} targets")
            return tensor[rows]
        target = Windows.of(tensor)
    if len(target) != num_windows:
        raise DataError(f"perturbation: {num_windows} windows and {len(target)} targets")
    return target[rows]


@contextmanager
def _fixed(model: BrainLM) -> Iterator[torch.device]:
    """Hold the weights fixed, which halves the work of a step, and put back what was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with evaluating(model) as device:
            yield device
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
