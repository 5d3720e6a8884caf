"""What a head predicts: columns of phenotypes, how they are put into numbers, and back into their own units.

Transforms are those of the paper (Ortega Caro et al. 2024): z-score for age, min-max for neuroticism, log(1 + x) and
min-max for PCL-5 and GAD-7. They are fitted on the subjects that a head is trained on, and on no other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.config import Section
from brainlm.errors import DataError

Kind = Literal["regression", "classification"]
Transform = Literal["zscore", "minmax", "log1p_minmax", "none"]
MAX_LISTED = 5
MAX_CLASSES = 50
MISSING = {"", "n/a", "na", "nan", "none", "null"}


@dataclass(frozen=True, kw_only=True)
class TargetSettings(Section):
    """A column to predict."""

    column: str
    """Of subjects.parquet, or else of recordings.parquet (``site``, ``task`` ...)."""
    kind: Kind = "regression"
    transform: Transform = "zscore"
    """Of a regression. ``log1p_minmax``: log(1 + x), then min-max."""
    class_weights: Literal["balanced"] | None = None
    """``balanced``: rare classes count as much as frequent ones in the loss; probabilities are then those of a
    population in which all classes are equally frequent. null: every subject counts the same."""


@dataclass(frozen=True, kw_only=True)
class Target(Section):
    """A column as it was found among the subjects that a head is trained on.

    A regression is learned as ``(t(x) - mean) / sd``, t the transform, mean and SD of the training subjects: the answer
    0 is the best constant. A classification is learned as logits that are added to those of the classes' shares: there,
    too, 0 is the best constant answer.
    """

    column: str
    kind: Kind
    transform: Transform = "none"
    offset: float = 0.0
    """``t(x) = (f(x) - offset) / scale``, f = log(1 + x) or x."""
    scale: float = 1.0
    mean: float = 0.0
    """Of t(x) over the training subjects."""
    sd: float = 1.0
    classes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    """Of the classes among the training subjects, after `weights`."""
    weights: tuple[float, ...] = ()
    """Of the classes in the loss."""
    num_subjects: int = 0
    """Training subjects with a value."""

    @classmethod
    def fit(cls, settings: TargetSettings, values: Sequence[object]) -> Target:
        """Fit to the values of the training subjects, one each; None and NaN are missing.

        Raises
        ------
        DataError
            If there is nothing to learn (all missing, constant, one class), or a regression finds text.
        """
        if settings.kind == "classification":
            return cls._fit_classes(settings, values)
        column = settings.column
        x = numbers(column, values)
        x = x[np.isfinite(x)]
        if len(x) == 0:
            raise DataError(f"target {column}: all training subjects lack a value")
        if x.min() == x.max():
            raise DataError(f"target {column}: constant, all {len(x)} training subjects have {x[0]:g}")
        f = _before(settings.transform, x, column)
        if settings.transform == "zscore":
            offset, scale = float(f.mean()), float(f.std())
        elif settings.transform == "none":
            offset, scale = 0.0, 1.0
        else:
            offset, scale = float(f.min()), float(f.max() - f.min())
        t = (f - offset) / scale
        return cls(
            column=column, kind="regression", transform=settings.transform, offset=offset, scale=scale,
            mean=float(t.mean()), sd=float(t.std()), num_subjects=len(x),
        )  # fmt: skip

    @classmethod
    def _fit_classes(cls, settings: TargetSettings, values: Sequence[object]) -> Target:
        column = settings.column
        counts = Counter(label for label in map(label_of, values) if label)
        if not counts:
            raise DataError(f"target {column}: all training subjects lack a value")
        if len(counts) == 1:
            raise DataError(f"target {column}: one class, all training subjects are {next(iter(counts))!r}")
        if len(counts) > MAX_CLASSES:
            raise DataError(
                f"target {column}: {len(counts)} classes among {counts.total()} training subjects, at most "
                f"{MAX_CLASSES} are taken; a number is learned with kind=regression"
            )
        classes = tuple(sorted(counts))
        share = np.array([counts[label] for label in classes]) / counts.total()
        weights = 1 / (len(classes) * share) if settings.class_weights == "balanced" else np.ones(len(classes))
        return cls(
            column=column, kind="classification", classes=classes, shares=tuple((share * weights).tolist()),
            weights=tuple(weights.tolist()), num_subjects=counts.total(),
        )  # fmt: skip

    @property
    def num_outputs(self) -> int:
        return len(self.classes) if self.kind == "classification" else 1

    def encode(self, values: Sequence[object]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return what a head learns, and which values are known; where they are not, 0.

        Raises
        ------
        DataError
            If a class is none of those that the target was fitted on, or a regression finds text.
        """
        if self.kind == "classification":
            labels = [label_of(value) for value in values]
            unknown = sorted({label for label in labels if label} - set(self.classes))
            if unknown:
                raise DataError(
                    f"target {self.column}: no training subject is {', '.join(unknown[:MAX_LISTED])}; classes are "
                    f"{', '.join(self.classes)}"
                )
            known = np.array([bool(label) for label in labels], dtype=bool)
            wanted = np.array([self.classes.index(label) if label else 0 for label in labels], dtype=np.float32)
            return wanted, known
        u = (self.transformed(values) - self.mean) / self.sd
        known = np.isfinite(u)
        return np.where(known, u, 0.0).astype(np.float32), known

    def transformed(self, values: Sequence[object]) -> NDArray[np.float64]:
        """Return t(x) of a regression, NaN where missing: the units of the paper's errors."""
        return (_before(self.transform, numbers(self.column, values), self.column) - self.offset) / self.scale

    def loss(self, outputs_BO: Tensor, wanted_B: Tensor) -> Tensor:
        """Return the loss of each row, in units of that of the best constant answer over the training subjects.

        Squared error of a regression, weighted cross-entropy of a classification.
        """
        if self.kind == "regression":
            return (outputs_BO[:, 0] - wanted_B).square()
        shares = outputs_BO.new_tensor(self.shares)
        log_p = torch.log_softmax(outputs_BO + shares.log(), dim=1)
        ids = wanted_B.long()
        weights = outputs_BO.new_tensor(self.weights)
        entropy = -(shares * shares.log()).sum()  # shares hold the weights
        return -weights[ids] * log_p.gather(1, ids[:, None])[:, 0] / entropy

    def answers(self, outputs_BO: Tensor) -> Tensor:
        """Return what is averaged over the windows of a recording: outputs of a regression, or probabilities."""
        if self.kind == "regression":
            return outputs_BO
        return torch.softmax(outputs_BO + outputs_BO.new_tensor(self.shares).log(), dim=1)

    def original(self, answer: float) -> float:
        """Return the answer of a regression in the units of the column.

        With ``log1p_minmax`` this is what the mean of the logarithms stands for, which lies below the mean.
        """
        f = (answer * self.sd + self.mean) * self.scale + self.offset
        if self.transform != "log1p_minmax":
            return f
        return math.expm1(f) if f < 700 else math.inf


def numbers(column: str, values: Sequence[object]) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where missing.

    Raises
    ------
    DataError
        If it holds text.
    """
    out, text = np.full(len(values), np.nan), []
    for i, value in enumerate(values):
        if value is None or str(value).strip().lower() in MISSING:
            continue
        try:
            out[i] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            text.append(str(value))
    if text:
        raise DataError(
            f"target {column}: expected numbers, found text in {len(text)} of {len(values)} rows "
            f"({', '.join(sorted(set(text))[:MAX_LISTED])}): correct the column, or set kind=classification"
        )
    return np.where(np.isfinite(out), out, np.nan)


def label_of(value: object) -> str:
    """Return a class as text, "" where missing; 1 and 1.0 are the same class."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in MISSING else text


def _before(transform: Transform, x: NDArray[np.float64], column: str) -> NDArray[np.float64]:
    if transform != "log1p_minmax":
        return x
    if (x <= -1).any():
        raise DataError(f"target {column}: log(1 + x) needs values above -1, found {np.nanmin(x):g}")
    return np.log1p(x)
