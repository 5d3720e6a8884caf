"""Ridge regression of a number, and logistic regression of a class, on principal coordinates."""

from __future__ import annotations

import warnings

import numpy as np

from eval.clinical.coordinates import Coordinates
from eval.clinical.problem import Answer, FloatArray, Problem, constant_answer, loss

RIDGE = tuple(np.logspace(-6, 4, 21).tolist())
"""Penalties, as multiples of the mean squared coordinate."""
LOGISTIC = tuple(np.logspace(-3, 4, 8).tolist())
MAX_ITER = 2000


class Linear:
    """A linear model whose penalty is the one that is best within the training rows.

    Parameters
    ----------
    features : Coordinates
    """

    def __init__(self, features: Coordinates) -> None:
        self.features = features

    def answer(self, problem: Problem) -> Answer:
        penalties = RIDGE if problem.is_regression else LOGISTIC
        inner = problem.inner()
        total, num = np.zeros(len(penalties)), 0
        for fit, validate in inner if len(inner) > 1 else ():
            found = _answers(self.features, problem.within(fit, validate), penalties)
            total += [len(validate) * loss(problem.target, problem.y[validate], values) for values in found]
            num += len(validate)
        best = int(np.argmin(total)) if num else len(penalties) - 1
        values = _answers(self.features, problem, penalties[best : best + 1])[0]
        return Answer(
            values=values,
            validation_loss=float(total[best] / num) if num else float("nan"),
            chosen=f"penalty {penalties[best]:.3g}",
        )


def _answers(features: Coordinates, problem: Problem, penalties: tuple[float, ...]) -> list[FloatArray]:
    train, test = features.of(problem)
    return (
        _ridge(problem, train, test, penalties) if problem.is_regression else _logistic(problem, train, test, penalties)
    )


def _ridge(problem: Problem, train: FloatArray, test: FloatArray, penalties: tuple[float, ...]) -> list[FloatArray]:
    """Coordinates are orthogonal, so that each has its coefficient by itself (Hastie et al. 2009, eq. 3.47)."""
    mean, squares = problem.y.mean(), np.square(train).sum(axis=0)
    products = train.T @ (problem.y - mean)
    unit = max(float(squares.mean()), 1e-300)
    return [(mean + test @ (products / (squares + penalty * unit)))[:, None] for penalty in penalties]


def _logistic(problem: Problem, train: FloatArray, test: FloatArray, penalties: tuple[float, ...]) -> list[FloatArray]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    here = np.unique(problem.y).astype(np.int64)
    if len(here) < 2:  # an inner fold of one class
        return [constant_answer(problem, len(test)) for _ in penalties]
    balanced = len(set(problem.target.weights)) > 1
    unit = max(float(np.sqrt(np.square(train).mean())), 1e-300)
    found = []
    for penalty in penalties:
        model = LogisticRegression(
            C=1 / (penalty * len(train)), class_weight="balanced" if balanced else None, max_iter=MAX_ITER, tol=1e-6
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # nearly there is as good: validation decides
            model.fit(train / unit, problem.y.astype(np.int64))
        values = np.zeros((len(test), len(problem.target.classes)))
        values[:, here] = model.predict_proba(test / unit)
        found.append(values)
    return found
