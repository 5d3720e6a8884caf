"""Support vector regression, and classification, with a radial kernel on principal coordinates."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np

from eval.clinical.coordinates import Coordinates
from eval.clinical.problem import Answer, FloatArray, IntArray, Problem, constant_answer, loss

COSTS = (0.1, 1.0, 10.0)
WIDTHS = (0.1, 1.0)
"""Of the kernel: exp(-width |a - b|^2 / mean |a|^2)."""
EPSILON = 0.1  # of a standard deviation


class SupportVectors:
    """Cost and width are those that are best within the training rows.

    Decisions about classes are turned into probabilities by a logistic regression on decisions about rows that were not
    fitted on (Platt 1999).

    Parameters
    ----------
    features : Coordinates
    num_components : int, optional
        Read so many principal components; None = all.
    """

    def __init__(self, features: Coordinates, num_components: int | None = None) -> None:
        self.features, self.num_components = features, num_components

    def answer(self, problem: Problem) -> Answer:
        candidates = list(product(COSTS, WIDTHS))
        inner = problem.inner()
        rows: list[IntArray] = []
        decisions: list[list[FloatArray]] = [[] for _ in candidates]
        for fit, validate in inner if len(inner) > 1 else ():
            part = problem.within(fit, validate)
            coordinates = self._coordinates(part)
            rows.append(validate)
            for number, candidate in enumerate(candidates):
                decisions[number].append(_decide(part, *coordinates, *candidate))
        if not rows:
            return Answer(values=constant_answer(problem, len(problem.test)), validation_loss=float("nan"))
        order = np.concatenate(rows)
        losses = [_validation_loss(problem, rows, found) for found in decisions]
        best = int(np.argmin(losses))
        link = _Link(problem, problem.y[order], np.concatenate(decisions[best]))
        values = link(_decide(problem, *self._coordinates(problem), *candidates[best]))
        cost, width = candidates[best]
        return Answer(values=values, validation_loss=losses[best], chosen=f"cost {cost:g}, width {width:g}")

    def _coordinates(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        train, test = self.features.of(problem)
        return train[:, : self.num_components], test[:, : self.num_components]


def _decide(problem: Problem, train: FloatArray, test: FloatArray, cost: float, width: float) -> FloatArray:
    """Return predicted values (M, 1), or decisions about classes (M, classes), or (M, 1) of two."""
    from sklearn.svm import SVC, SVR

    gamma = width / max(float(np.square(train).sum(axis=1).mean()), 1e-300)
    if problem.is_regression:
        model = SVR(C=cost, gamma=gamma, epsilon=EPSILON).fit(train, problem.y)
        return np.asarray(model.predict(test), dtype=np.float64)[:, None]
    classes = np.unique(problem.y).astype(np.int64)
    num = len(problem.target.classes)
    found = np.zeros((len(test), 1 if num == 2 else num))
    if len(classes) < 2:
        return found
    balanced = len(set(problem.target.weights)) > 1
    decider = SVC(C=cost, gamma=gamma, class_weight="balanced" if balanced else None, decision_function_shape="ovr")
    values = np.asarray(decider.fit(train, problem.y.astype(np.int64)).decision_function(test), dtype=np.float64)
    if num == 2:
        found[:, 0] = values
    elif len(classes) == 2:
        found[:, classes[0]], found[:, classes[1]] = -values, values
    else:
        found[:, classes] = values
    return found


def _validation_loss(problem: Problem, rows: list[IntArray], decisions: list[FloatArray]) -> float:
    """Return the loss of answers whose link was fitted on the decisions of the other inner folds."""
    total = 0.0
    for k, validate in enumerate(rows):
        others = [i for i in range(len(rows)) if i != k]
        link = _Link(
            problem,
            problem.y[np.concatenate([rows[i] for i in others])],
            np.concatenate([decisions[i] for i in others]),
        )
        total += len(validate) * loss(problem.target, problem.y[validate], link(decisions[k]))
    return total / sum(map(len, rows))


class _Link:
    """From decisions to answers, fitted on rows that the decisions were not fitted on."""

    def __init__(self, problem: Problem, y: FloatArray, decisions: FloatArray) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        self.problem, self.model, self.classes = problem, None, np.unique(y).astype(np.int64)
        if not problem.is_regression and len(self.classes) > 1:
            balanced = len(set(problem.target.weights)) > 1
            model = LogisticRegression(class_weight="balanced" if balanced else None, max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                self.model = model.fit(decisions, y.astype(np.int64))

    def __call__(self, decisions: FloatArray) -> FloatArray:
        if self.problem.is_regression:
            return decisions
        if self.model is None:
            return constant_answer(self.problem, len(decisions))
        values = np.zeros((len(decisions), len(self.problem.target.classes)))
        values[:, self.classes] = self.model.predict_proba(decisions)
        return values
