"""What the networks of the clinical task share: they learn from four fifths of the training rows, and stop by the rest.

The first of the inner folds is the validation set of every network. What is fitted to features (means, scales,
regressions on confounds) is fitted on the rows that the weights are fitted on, so that validation rows are as new to a
network as test rows are. Outputs begin at 0, the best constant answer, and the weights that are best on validation are
kept: a network that learns nothing answers the constant.

The validation loss is the lowest of many looks at the same rows, and so a little too good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainlm.errors import ConfigError, DataError
from brainlm.fitting import FitSettings, Fitted, fit_best
from brainlm.targets import Target
from eval.clinical.problem import Answer, FloatArray, IntArray, Problem, constant_answer, loss

PREDICT_BATCH = 64
_BATCH = 0xC1


class Inputs(ABC):
    """What a network reads of rows. A row has one view or more; the answer for it is the mean over its views."""

    @abstractmethod
    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        """Return all views of rows: what the network is called with, and the position in `rows` that each is of."""

    def drawn(self, rows: IntArray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Return one view of each row, to train on."""
        return self.views(rows)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Division:
    """Rows that weights are fitted on, rows that validate them, and rows that are asked for.

    Parameters
    ----------
    problem : Problem
        As it is given to a network: its training rows are those that are fitted on; its test rows, those that validate
        and then those that are asked for.
    validate : ndarray, shape (K,), int64
    y_validate : ndarray, shape (K,), float64
    test : ndarray, shape (M,), int64
    """

    problem: Problem
    validate: IntArray
    y_validate: FloatArray
    test: IntArray


def divide(problem: Problem) -> Division:
    """Take the first inner fold for validation.

    Raises
    ------
    DataError
        If the training rows are all of one group.
    """
    folds = problem.inner()
    if not folds:
        raise DataError(
            f"target {problem.target.column}: a network needs people to validate it on besides those it is fitted on, "
            f"and the {len(problem.train)} training rows are of {len(set(problem.groups.tolist()))} group: give more "
            "subjects, or leave the networks out of clinical.baselines"
        )
    fit, validate = folds[0]
    within = problem.within(fit, validate)
    return Division(
        problem=replace(within, test=np.concatenate([within.test, problem.test])),
        validate=within.test, y_validate=problem.y[validate], test=problem.test,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """A fitted network, and what it reads."""

    module: Any
    inputs: Inputs
    fitted: Fitted


class NetworkPredictor(ABC):
    """A predictor that is a network, fitted by `brainlm.fitting`.

    Parameters
    ----------
    settings : FitSettings
    device : str
    """

    removes_confounds = False
    """Whether a problem with `nuisance` is taken."""

    def __init__(self, settings: FitSettings, device: str = "cpu") -> None:
        self.settings = settings
        self.device = device

    @abstractmethod
    def read(self, problem: Problem) -> Inputs:
        """Return what the network reads of the rows of a problem; what is fitted to it, is fitted on training rows."""

    @abstractmethod
    def candidates(self, inputs: Any) -> Sequence[Any]:
        """List what is chosen from on validation."""

    @abstractmethod
    def build(self, candidate: Any, inputs: Any, num_outputs: int) -> nn.Module:
        """Return a module from views to outputs (B, O), 0 at first."""

    def answer(self, problem: Problem) -> Answer:
        """Learn from the training rows and answer for the test rows.

        Raises
        ------
        ConfigError
            If confounds are to be removed from what they cannot be removed from.
        DataError
            If the training rows are all of one group.
        """
        learned = self.learn(problem)
        return Answer(
            cross_validated=False,
            values=answers_for(learned.module, learned.inputs, problem.target, problem.test),
            validation_loss=learned.fitted.best_error,
            chosen=f"{learned.fitted.candidate}, step {learned.fitted.best_step}",
        )

    def learn(self, problem: Problem) -> Learned:
        """Fit every candidate at every learning rate, and keep what is best on validation."""
        if problem.nuisance is not None and not self.removes_confounds:
            raise ConfigError(
                f"{type(self).__name__}: confounds cannot be removed from what this network reads: give no nuisance"
            )
        target, division = problem.target, divide(problem)
        inputs = self.read(division.problem)
        rows, y = division.problem.train, torch.from_numpy(division.problem.y.astype(np.float32))
        size = min(self.settings.batch_size, len(rows))
        unit = loss(target, division.y_validate, constant_answer(problem, len(division.validate)))

        def batch_loss(module: nn.Module, step: int) -> Tensor:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_BATCH, problem.seed, step])))
            chosen = rng.choice(len(rows), size=size, replace=False)
            return target.loss(module(*inputs.drawn(rows[chosen], rng)), y[chosen].to(self.device)).mean()

        def error(module: nn.Module) -> float:
            found = answers_for(module, inputs, target, division.validate)
            return loss(target, division.y_validate, found) / (unit or 1.0)  # 0 if all of them have the mean

        module, fitted = fit_best(
            self.candidates(inputs),
            lambda candidate: self.build(candidate, inputs, target.num_outputs).to(self.device),
            lambda module: lambda step: batch_loss(module, step),
            lambda module: lambda: error(module),
            self.settings,
        )
        return Learned(module=module, inputs=inputs, fitted=fitted)


def answers_for(module: nn.Module, inputs: Inputs, target: Target, rows: IntArray) -> FloatArray:
    """Return the answers (rows, O) of a module in evaluation mode: means over views, as `Target.answers` gives them."""
    out = np.zeros((len(rows), target.num_outputs))
    with torch.no_grad():
        for begin in range(0, len(rows), PREDICT_BATCH):
            batch = rows[begin : begin + PREDICT_BATCH]
            views, owner = inputs.views(batch)
            answers = target.answers(module(*views)).double().cpu().numpy()
            np.add.at(out, begin + owner, answers)
            out[begin : begin + len(batch)] /= np.bincount(owner, minlength=len(batch))[:, None]
    return out


def output_layer(width: int, num_outputs: int) -> nn.Linear:
    """Return a linear layer that begins at 0."""
    layer = nn.Linear(width, num_outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
