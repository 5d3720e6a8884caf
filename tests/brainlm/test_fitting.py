"""The training loop of small baselines: what it keeps, when it stops, and that it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brainlm.errors import ConfigError, TrainingError
from brainlm.fitting import FitSettings, fit, fit_best

SETTINGS = FitSettings(steps=200, batch_size=8, lrs=(0.05,), check_every=10, weight_decay=0.0)
TRUE = torch.tensor([[1.0, -2.0, 0.5]])


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    return x, x @ TRUE.T


def loss_of(module: nn.Module) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        x, y = batch(step)
        return torch.as_tensor((module(x) - y).square().mean())

    return loss


def error_of(module: nn.Module) -> Callable[[], float]:
    return lambda: float(loss_of(module)(10**6))


def build(_: object = None) -> nn.Linear:
    return nn.Linear(3, 1, bias=False)


def test_a_linear_map_is_found() -> None:
    module, fitted = fit_best([None], build, loss_of, error_of, SETTINGS)
    torch.testing.assert_close(module.weight.detach(), TRUE, atol=0.05, rtol=0)
    assert fitted.best_error < 0.01 * fitted.errors[0]
    assert not module.training


def test_the_same_seed_gives_the_same_weights_and_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, _ = fit_best([None], build, loss_of, error_of, SETTINGS)
    assert torch.equal(torch.rand(2), expected)
    second, _ = fit_best([None], build, loss_of, error_of, SETTINGS)
    assert torch.equal(first.weight, second.weight)


def test_the_best_weights_are_kept_also_those_at_the_start() -> None:
    module = build()
    with torch.no_grad():
        module.weight.copy_(TRUE)
    backwards = lambda step: -loss_of(module)(step) + module.weight.square().mean()  # noqa: E731
    fitted = fit(module, backwards, error_of(module), SETTINGS, 0.05)
    assert fitted.best_step == 0
    assert torch.equal(module.weight, TRUE)


def test_it_gives_up_when_validation_no_longer_improves() -> None:
    module = build()
    errors = iter([1.0, 0.5, *[0.7] * 100])
    fitted = fit(module, loss_of(module), lambda: next(errors), SETTINGS, 0.05)
    assert fitted.best_step == 10
    assert max(fitted.errors) == 10 * (1 + SETTINGS.patience)


def test_candidates_compete_on_validation() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.value.expand(len(x), 1)

    chosen, fitted = fit_best(["constant", "linear"], lambda c: Constant() if c == "constant" else build(), loss_of,
                              error_of, FitSettings(steps=100, lrs=(0.01, 0.05), check_every=20))  # fmt: skip
    assert isinstance(chosen, nn.Linear)
    assert fitted.candidate == "linear, lr 0.05"


def test_steps_that_are_not_finite_are_left_out() -> None:
    module = build()
    broken = lambda step: loss_of(module)(step) * (math.nan if step % 3 == 0 else 1.0)  # noqa: E731
    fitted = fit(module, broken, error_of(module), SETTINGS, 0.05)
    assert torch.isfinite(module.weight).all()
    assert fitted.best_error < 0.05 * fitted.errors[0]


def test_what_cannot_be_fitted_is_refused() -> None:
    module = build()
    with pytest.raises(TrainingError, match="before the first step"):
        fit(module, loss_of(module), lambda: math.nan, SETTINGS, 0.05)
    with pytest.raises(ConfigError, match="no candidates"):
        fit_best([], build, loss_of, error_of, SETTINGS)
    with pytest.raises(ConfigError, match="lrs"):
        FitSettings(lrs=())
