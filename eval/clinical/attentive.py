"""Linear probe with attentive pooling: a learned query chooses among the parcels of a recording.

As the attentive probes of self-supervised models of images and video (El-Nouby et al. 2024, AIM; Bardes et al. 2024,
V-JEPA), with one query and no further layer: what is read is what the encoder made of the chosen parcels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm.fitting import FitSettings
from eval.clinical.network_fit import Inputs, NetworkPredictor, output_layer
from eval.clinical.problem import FloatArray, IntArray, Problem


class AttentiveProbe(NetworkPredictor):
    """Softmax over parcels of how well each answers the query; the weighted mean is read by a linear layer.

    Parameters
    ----------
    embeddings : ndarray, shape (rows, P, D), float16 or float32
        Of all people; NaN for parcels that are not seen. Not modified.
    settings : FitSettings
    device : str
    """

    removes_confounds = True

    def __init__(self, embeddings: NDArray[np.floating], settings: FitSettings, device: str = "cpu") -> None:
        super().__init__(settings, device)
        self.embeddings = embeddings

    def read(self, problem: Problem) -> Parcels:
        return Parcels(self.embeddings, problem, self.device)

    def candidates(self, inputs: Parcels) -> Sequence[str]:
        return ["one query"]

    def build(self, candidate: str, inputs: Parcels, num_outputs: int) -> nn.Module:
        return Attention(self.embeddings.shape[2], num_outputs)


class Parcels(Inputs):
    """Embeddings of parcels, without confounds and standardised over the training rows.

    The query is compared with all of an embedding, by which it can tell parcels apart. What is averaged is its
    difference from the mean of its parcel: parcels differ more from each other than people do. Both have a standard
    deviation of 1 in each dimension. Confounds are removed by a regression of each dimension of each parcel.

    Parameters
    ----------
    embeddings : ndarray, shape (rows, P, D)
    problem : Problem
        Its training rows are what regressions, means and standard deviations are of.
    """

    def __init__(self, embeddings: NDArray[np.floating], problem: Problem, device: str) -> None:
        self.embeddings, self.device = embeddings, device
        rows = problem.train
        self.confounds = _standard_confounds(problem, len(embeddings))
        _, P, D = embeddings.shape
        self.known = np.zeros(P, dtype=bool)
        mean, slopes = np.zeros((P, D)), np.zeros((self.confounds.shape[1], P, D))
        num, total, squares, differences = 0, np.zeros(D), np.zeros(D), np.zeros(D)
        for p in range(P):  # one parcel at a time: all at once would be a copy of all embeddings
            x: FloatArray = np.asarray(embeddings[rows, p], dtype=np.float64)
            seen = ~np.isnan(x).any(axis=1)
            if not seen.any():
                continue
            self.known[p] = True
            x, confounds = x[seen], self.confounds[rows][seen]
            design = np.concatenate([np.ones((len(x), 1)), confounds], axis=1)
            fitted = np.linalg.lstsq(design, x, rcond=None)[0]
            mean[p], slopes[:, p] = fitted[0], fitted[1:]
            cleaned = x - confounds @ slopes[:, p]
            num += len(x)
            total += cleaned.sum(axis=0)
            squares += np.square(cleaned).sum(axis=0)
            differences += np.square(cleaned - mean[p]).sum(axis=0)
        centre = total / max(num, 1)
        self.mean_PD, self.slopes_CPD = self._tensor(mean), self._tensor(slopes)
        self.centre_D = self._tensor(centre)
        self.sd_D = self._tensor(_positive_root(squares / max(num, 1) - centre**2))
        self.difference_sd_D = self._tensor(_positive_root(differences / max(num, 1)))

    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        """Return keys (B, P, D), values (B, P, D), and which parcels are seen (B, P)."""
        x = torch.from_numpy(np.asarray(self.embeddings[rows], dtype=np.float32)).to(self.device)
        here = ~x.isnan().any(dim=2) & torch.from_numpy(self.known).to(self.device)
        x = x - torch.einsum("bc,cpd->bpd", self._tensor(self.confounds[rows]), self.slopes_CPD)
        keys = ((x - self.centre_D) / self.sd_D).masked_fill(~here[:, :, None], 0.0)
        values = ((x - self.mean_PD) / self.difference_sd_D).masked_fill(~here[:, :, None], 0.0)
        return (keys, values, here), np.arange(len(rows))

    def _tensor(self, array: FloatArray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(self.device)


class Attention(nn.Module):
    """The query begins at 0, the mean over parcels."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.output = output_layer(width, num_outputs)

    def attention(self, keys_BPD: Tensor, here_BP: Tensor) -> Tensor:
        """Return the weights of parcels (B, P): 1 in all, 0 for those that are not seen."""
        scores = (keys_BPD @ self.query) * keys_BPD.shape[2] ** -0.5
        lowest = torch.finfo(scores.dtype).min  # not -inf, of which nothing is left where no parcel is seen
        return scores.masked_fill(~here_BP, lowest).softmax(dim=1)

    def forward(self, keys_BPD: Tensor, values_BPD: Tensor, here_BP: Tensor) -> Tensor:
        weights = self.attention(keys_BPD, here_BP)
        out: Tensor = self.output((weights[:, None] @ values_BPD)[:, 0])
        return out


def _standard_confounds(problem: Problem, num_rows: int) -> FloatArray:
    """Return confounds (rows of all people, C) in units of the training rows; C = 0 where none are to be removed."""
    if problem.nuisance is None:
        return np.zeros((num_rows, 0))
    train = problem.nuisance[problem.train]
    out: FloatArray = (problem.nuisance - train.mean(axis=0)) / np.where(train.std(axis=0) > 0, train.std(axis=0), 1.0)
    return out


def _positive_root(variance: FloatArray) -> FloatArray:
    """Return the standard deviation, 1 where it is 0."""
    return np.sqrt(np.where(variance > 1e-12, variance, 1.0))
