"""Multilayer perceptron on the first principal components of feature vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brainlm.errors import DataError
from brainlm.fitting import FitSettings
from eval.clinical.network_fit import Inputs, NetworkPredictor, output_layer
from eval.clinical.problem import FloatArray, IntArray, Problem

HIDDEN = 128
DROPOUT = 0.3


class PrincipalCoordinates(Protocol):
    """What gives the principal coordinates of feature vectors."""

    def of(self, problem: Problem) -> tuple[FloatArray, FloatArray]:
        """Return those of the training rows (N, r) and of the test rows (M, r), by falling variance.

        Directions, means and regressions on confounds are of the training rows.
        """


class MLPOnComponents(NetworkPredictor):
    """Two hidden layers with dropout, on as many components as validation chooses.

    Components are divided by one number and not whitened: what varies little between people counts little at first.

    Parameters
    ----------
    coordinates : PrincipalCoordinates
    settings : FitSettings
    num_components : sequence of int
        To choose from; at most as many as there are.
    device : str
    """

    removes_confounds = True  # the coordinates are without them

    def __init__(
        self,
        coordinates: PrincipalCoordinates,
        settings: FitSettings,
        num_components: Sequence[int] = (32, 128),
        device: str = "cpu",
    ) -> None:
        super().__init__(settings, device)
        self.coordinates = coordinates
        self.num_components = tuple(num_components)

    def read(self, problem: Problem) -> Components:
        train, test = self.coordinates.of(problem)
        if train.shape[1] == 0:
            raise DataError(f"target {problem.target.column}: features do not vary over {len(train)} training rows")
        return Components(problem, train, test, self.device)

    def candidates(self, inputs: Components) -> Sequence[str]:
        return [f"{num} components" for num in sorted({min(num, inputs.num) for num in self.num_components})]

    def build(self, candidate: str, inputs: Components, num_outputs: int) -> nn.Module:
        num = int(candidate.split()[0])
        return Perceptron(num, inputs.scale(num), num_outputs)


class Components(Inputs):
    """Principal coordinates of the rows of a problem.

    Parameters
    ----------
    train : ndarray, shape (N, r), float64
    test : ndarray, shape (M, r), float64
    """

    def __init__(self, problem: Problem, train: FloatArray, test: FloatArray, device: str) -> None:
        self.train, self.device = train, device
        self.values = np.concatenate([train, test]).astype(np.float32)
        self.place = {int(row): i for i, row in enumerate(np.concatenate([problem.train, problem.test]))}

    @property
    def num(self) -> int:
        return self.train.shape[1]

    def scale(self, num: int) -> float:
        """Return the root mean square of the first components over the training rows."""
        return float(np.sqrt(np.square(self.train[:, :num]).mean())) or 1.0

    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        values = self.values[[self.place[int(row)] for row in rows]]
        return (torch.from_numpy(values).to(self.device),), np.arange(len(rows))


class Perceptron(nn.Module):
    """Reads the first components, divided by `scale`."""

    def __init__(self, num_components: int, scale: float, num_outputs: int) -> None:
        super().__init__()
        self.num_components, self.scale = num_components, scale
        self.layers = nn.Sequential(
            nn.Linear(num_components, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT),
            output_layer(HIDDEN, num_outputs),
        )  # fmt: skip

    def forward(self, z_BR: Tensor) -> Tensor:
        out: Tensor = self.layers(z_BR[:, : self.num_components] / self.scale)
        return out
