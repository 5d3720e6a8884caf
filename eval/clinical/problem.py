"""What a predictor of a clinical variable is given, and what it gives back.

A problem is one target in one fold. It holds the values of the training rows alone: nobody can look at what is asked.
Rows are recordings, numbered as in `eval.clinical.people.People`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from brainlm.folds import fold_of_group
from brainlm.targets import Target

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NUM_INNER = 5
"""Folds within the training rows, that settings are chosen by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """One target in one fold.

    Parameters
    ----------
    target : Target
        Fitted on the training rows: how values are put into numbers, and the loss.
    train : ndarray, shape (N,), int64
        Rows to learn from.
    y : ndarray, shape (N,), float64
        Their values as `Target.encode` gives them: standardised, or the number of the class.
    groups : ndarray, shape (N,), str
        Family, else subject of each: what may not be divided.
    test : ndarray, shape (M,), int64
        Rows to answer for.
    nuisance : ndarray, shape (rows of all people, C), float64, or None
        Confounds that are to be removed from the features, by a regression fitted on the training rows; no NaN.
    seed : int
        Of whatever is random.
    """

    target: Target
    train: IntArray
    y: FloatArray
    groups: NDArray[np.str_]
    test: IntArray
    nuisance: FloatArray | None = None
    seed: int = 0

    @property
    def is_regression(self) -> bool:
        return self.target.kind == "regression"

    def inner(self, num: int = NUM_INNER) -> list[tuple[IntArray, IntArray]]:
        """Return folds within the training rows: positions in `train` to fit on, and to validate on.

        Groups stay together; as many folds as there are groups, if these are fewer. A fold without anything to fit on
        or to validate on is left out.
        """
        names = [str(group) for group in self.groups]
        fold_of = fold_of_group(names, min(num, len(set(names))), self.seed)
        number = np.array([fold_of[name] for name in names], dtype=np.int64)
        found = [(np.flatnonzero(number != k), np.flatnonzero(number == k)) for k in range(number.max() + 1)]
        return [(fit, val) for fit, val in found if len(fit) and len(val)]

    def within(self, fit: IntArray, validate: IntArray) -> Problem:
        """Return the problem of an inner fold: positions in `train` that are fitted on, and that are answered for."""
        return replace(
            self, train=self.train[fit], y=self.y[fit], groups=self.groups[fit], test=self.train[validate]
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a predictor says of the test rows.

    Parameters
    ----------
    values : ndarray, shape (M, 1) or (M, classes), float64
        Standardised values of a regression as `Target.answers` gives them, or probabilities of the classes.
    validation_loss : float
        On rows that were not fitted on, in units of the best constant answer: 1 = no better than that.
    chosen : str
        The settings that validation chose, for the table of folds.
    cross_validated : bool
        Whether `validation_loss` is over all training rows by turns. Of what stops early it is the best of many looks
        at one fold, and too low to be compared with that.
    """

    values: FloatArray
    validation_loss: float
    chosen: str = ""
    cross_validated: bool = True


class Predictor(Protocol):
    """A way to learn a target."""

    def answer(self, problem: Problem) -> Answer:
        """Learn from the training rows, choose settings within them, and answer for the test rows."""


def constant_answer(problem: Problem, num: int) -> FloatArray:
    """Return the best constant answer for `num` rows: the mean, or the shares of the classes."""
    if problem.is_regression:
        return np.zeros((num, 1))
    return np.tile(np.asarray(problem.target.shares, dtype=np.float64), (num, 1))


def loss(target: Target, y: FloatArray, answers: FloatArray) -> float:
    """Return the mean loss in units of the best constant answer: squared error, or weighted log loss of a class."""
    if target.kind == "regression":
        return float(np.square(answers[:, 0] - y).mean())
    ids = y.astype(np.int64)
    weights = np.asarray(target.weights)[ids]
    shares = np.asarray(target.shares)
    found = -weights * np.log(np.maximum(answers[np.arange(len(ids)), ids], 1e-12))
    return float(found.mean() / -(shares * np.log(shares)).sum())
