"""Graph convolution on the functional connectivity of a recording.

Kipf & Welling, *Semi-Supervised Classification with Graph Convolutional Networks* (ICLR 2017), eq. 2, with one graph a
recording: nodes are parcels, two are joined where their correlation is among the strongest positive ones, and what is
known of a node is its row of correlations. Nodes are averaged before the output. The paper classifies nodes of one
graph; graphs of correlations and the mean over nodes are what is usual for fMRI.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm.errors import ConfigError
from brainlm.fitting import FitSettings
from eval.clinical.network_fit import Inputs, NetworkPredictor, output_layer
from eval.clinical.problem import FloatArray, IntArray, Problem

HIDDEN = 64
DROPOUT = 0.3
CHUNK = 64
"""Rows that are gone through at once."""


class GCN(NetworkPredictor):
    """Two graph convolutions.

    Confounds cannot be removed: a graph without them would not be the graph of a recording.

    Parameters
    ----------
    fisher_z : ndarray, shape (rows, P (P - 1) / 2), float32
        Fisher z of correlations of all people, the upper triangle in the order of `numpy.triu_indices`; 0 where a
        parcel is missing. Not modified.
    num_parcels : int
    settings : FitSettings
    density : float
        Share of the pairs of parcels with signal that are joined, at most: correlations above 0 alone are.
    device : str
    """

    def __init__(
        self,
        fisher_z: NDArray[np.float32],
        num_parcels: int,
        settings: FitSettings,
        density: float = 0.1,
        device: str = "cpu",
    ) -> None:
        super().__init__(settings, device)
        if fisher_z.shape[1] != num_parcels * (num_parcels - 1) // 2:
            raise ConfigError(f"GCN: {fisher_z.shape[1]} correlations are not those of {num_parcels} parcels")
        if not 0 < density <= 1:
            raise ConfigError(f"GCN: density must lie above 0 and be at most 1, found {density:g}")
        self.fisher_z, self.num_parcels, self.density = fisher_z, num_parcels, density

    def read(self, problem: Problem) -> Graphs:
        return Graphs(self.fisher_z, self.num_parcels, self.density, problem.train, self.device)

    def candidates(self, inputs: Graphs) -> Sequence[str]:
        return [f"{HIDDEN} units"]

    def build(self, candidate: str, inputs: Graphs, num_outputs: int) -> nn.Module:
        return GraphNetwork(self.num_parcels, num_outputs)


class Graphs(Inputs):
    """Connectivity of recordings, as graphs.

    Correlations that nodes are described by are differences from their mean over the training rows, in units of the
    root mean square of these differences: what all people have in common is most of a correlation.

    Parameters
    ----------
    train : ndarray, shape (N,), int64
    """

    def __init__(
        self, fisher_z: NDArray[np.float32], num_parcels: int, density: float, train: IntArray, device: str
    ) -> None:
        self.fisher_z, self.num_parcels, self.density, self.device = fisher_z, num_parcels, density, device
        self.upper = torch.triu_indices(num_parcels, num_parcels, offset=1, device=device)
        self.mean, self.scale = self._moments(train)
        self._weakest: dict[int, float] = {}

    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        """Return features of nodes (B, P, P), propagation between them (B, P, P), and which have signal (B, P)."""
        z = self.fisher_z[rows]
        features = np.where(z != 0, (np.tanh(z) - self.mean) / self.scale, np.float32(0))
        weakest = np.array([self._weakest_edge(int(row)) for row in rows], dtype=np.float32)
        adjacency = self._square(z >= weakest[:, None])
        here = self._square(z != 0).any(dim=2)
        return (self._square(features), propagation(adjacency), here), np.arange(len(rows))

    def _square(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> Tensor:
        pairs = torch.from_numpy(values).to(self.device)
        out = pairs.new_zeros((len(pairs), self.num_parcels, self.num_parcels))
        out[:, self.upper[0], self.upper[1]] = pairs
        return out | out.mT if out.dtype == torch.bool else out + out.mT

    def _weakest_edge(self, row: int) -> float:
        """Return Fisher z of the weakest pair that is joined; looked for once, since sorting is slow."""
        if row not in self._weakest:
            z = self.fisher_z[row]
            num = max(1, round(self.density * np.count_nonzero(z)))
            strongest = np.partition(z, len(z) - num)[len(z) - num]
            self._weakest[row] = max(float(strongest), float(np.finfo(np.float32).tiny))
        return self._weakest[row]

    def _moments(self, train: IntArray) -> tuple[NDArray[np.float32], np.float32]:
        """Return the mean of each correlation over rows that have it, and the RMS of all differences from it."""
        shape = self.fisher_z.shape[1]
        num, total, squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for begin in range(0, len(train), CHUNK):
            r: FloatArray = np.tanh(self.fisher_z[train[begin : begin + CHUNK]].astype(np.float64))
            num += (r != 0).sum(axis=0)
            total += r.sum(axis=0)
            squares += np.square(r).sum(axis=0)
        mean = total / np.maximum(num, 1)
        variance = (squares - num * mean**2).sum() / max(num.sum(), 1)
        return mean.astype(np.float32), np.float32(np.sqrt(variance) if variance > 0 else 1.0)


def propagation(adjacency_BPP: Tensor) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2, D the degrees of A + I: eq. 2 of the paper.

    Parameters
    ----------
    adjacency_BPP : Tensor, bool
        Symmetric; no node is joined to itself.
    """
    with_self = adjacency_BPP.float() + torch.eye(adjacency_BPP.shape[1], device=adjacency_BPP.device)
    factor = with_self.sum(dim=2).rsqrt()
    return factor[:, :, None] * with_self * factor[:, None, :]


class GraphConvolution(nn.Module):
    """Linear map of each node, then the sum over its neighbours and itself."""

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x_BPF: Tensor, propagation_BPP: Tensor) -> Tensor:
        return propagation_BPP @ self.linear(x_BPF) + self.bias


class GraphNetwork(nn.Module):
    """Two convolutions, mean over the nodes with signal, linear output."""

    def __init__(self, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.layer1 = GraphConvolution(num_features, HIDDEN)
        self.layer2 = GraphConvolution(HIDDEN, HIDDEN)
        self.output = output_layer(HIDDEN, num_outputs)

    def nodes(self, features_BPF: Tensor, propagation_BPP: Tensor) -> Tensor:
        """Return what is known of nodes after both convolutions (B, P, H)."""
        x = F.relu(self.layer1(F.dropout(features_BPF, DROPOUT, self.training), propagation_BPP))
        return F.relu(self.layer2(F.dropout(x, DROPOUT, self.training), propagation_BPP))

    def forward(self, features_BPF: Tensor, propagation_BPP: Tensor, here_BP: Tensor) -> Tensor:
        weights = here_BP.float() / here_BP.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = (self.nodes(features_BPF, propagation_BPP) * weights[:, :, None]).sum(dim=1)
        out: Tensor = self.output(pooled)
        return out
