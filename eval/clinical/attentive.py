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
from brainlm.heads import SHRINKAGE
from eval.clinical.coordinates import standardised
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
        return Attention(inputs, num_outputs)


class Parcels(Inputs):
    """Embeddings of parcels as differences from the mean of their parcel, confounds removed.

    Confounds are removed by a regression of each dimension of each parcel.

    Parameters
    ----------
    embeddings : ndarray, shape (rows, P, D)
    problem : Problem
        Its training rows are what regressions, means and variances are of.

    Attributes
    ----------
    mean_PD : Tensor
        Of each parcel.
    centre_D, sd_D : Tensor
        Mean and standard deviation over rows and parcels.
    cov_DD : ndarray
        Covariance of the differences.
    """

    def __init__(self, embeddings: NDArray[np.floating], problem: Problem, device: str) -> None:
        self.embeddings, self.device = embeddings, device
        rows = problem.train
        self.confounds = _standard_confounds(problem, len(embeddings))
        _, P, D = embeddings.shape
        known = np.zeros(P, dtype=bool)
        mean, slopes = np.zeros((P, D)), np.zeros((self.confounds.shape[1], P, D))
        num, total, squares, products = 0, np.zeros(D), np.zeros(D), np.zeros((D, D))
        for p in range(P):  # one parcel at a time: all at once would be a copy of all embeddings
            x: FloatArray = np.asarray(embeddings[rows, p], dtype=np.float64)
            seen = ~np.isnan(x).any(axis=1)
            if not seen.any():
                continue
            known[p] = True
            x, confounds = x[seen], self.confounds[rows][seen]
            design = np.concatenate([np.ones((len(x), 1)), confounds], axis=1)
            fitted = np.linalg.lstsq(design, x, rcond=None)[0]
            mean[p], slopes[:, p] = fitted[0], fitted[1:]
            cleaned = x - confounds @ slopes[:, p]
            num += len(x)
            total += cleaned.sum(axis=0)
            squares += np.square(cleaned).sum(axis=0)
            products += (cleaned - mean[p]).T @ (cleaned - mean[p])
        centre = total / max(num, 1)
        variance = squares / max(num, 1) - centre**2
        self.known = torch.from_numpy(known).to(device)
        self.mean_PD, self.slopes_CPD, self.centre_D = self._tensor(mean), self._tensor(slopes), self._tensor(centre)
        self.sd_D = self._tensor(np.sqrt(np.where(variance > 1e-12, variance, 1.0)))
        self.cov_DD: FloatArray = products / max(num, 1)

    def views(self, rows: IntArray) -> tuple[tuple[Tensor, ...], IntArray]:
        """Return differences (B, P, D), 0 where a parcel is not seen, and which are seen (B, P)."""
        x = torch.from_numpy(np.asarray(self.embeddings[rows], dtype=np.float32)).to(self.device)
        here = ~x.isnan().any(dim=2) & self.known
        expected = self.mean_PD
        if self.confounds.shape[1]:
            confounds = self._tensor(self.confounds[rows])
            expected = expected + torch.einsum("bc,cpd->bpd", confounds, self.slopes_CPD)
        return ((x - expected).masked_fill(~here[:, :, None], 0.0), here), np.arange(len(rows))

    def _tensor(self, array: FloatArray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(self.device)


class Attention(nn.Module):
    """A query, which begins at 0, the mean over parcels, and a linear output.

    The query is compared with all of an embedding, in units of the standard deviation of each dimension: it can tell
    parcels apart. What is averaged is the difference from the mean of its parcel, since parcels differ more from each
    other than people do. The average is whitened for the reason that `brainlm.heads.Head` whitens.
    """

    sd_D: Tensor
    parcels_PD: Tensor
    whitener_DD: Tensor

    def __init__(self, inputs: Parcels, num_outputs: int) -> None:
        super().__init__()
        width = len(inputs.sd_D)
        self.query = nn.Parameter(torch.zeros(width))
        self.output = output_layer(width, num_outputs)
        self.register_buffer("sd_D", inputs.sd_D, persistent=False)
        self.register_buffer("parcels_PD", (inputs.mean_PD - inputs.centre_D) / inputs.sd_D, persistent=False)
        self.register_buffer("whitener_DD", _whitener(inputs.cov_DD), persistent=False)

    def attention(self, differences_BPD: Tensor, here_BP: Tensor) -> Tensor:
        """Return the weights of parcels (B, P): 1 in all, 0 for those that are not seen."""
        scores = differences_BPD @ (self.query / self.sd_D) + self.parcels_PD @ self.query
        lowest = torch.finfo(scores.dtype).min  # not -inf, of which nothing is left where no parcel is seen
        return (scores * len(self.query) ** -0.5).masked_fill(~here_BP, lowest).softmax(dim=1)

    def forward(self, differences_BPD: Tensor, here_BP: Tensor) -> Tensor:
        weights = self.attention(differences_BPD, here_BP)
        out: Tensor = self.output((weights[:, None] @ differences_BPD)[:, 0] @ self.whitener_DD)
        return out


def _standard_confounds(problem: Problem, num_rows: int) -> FloatArray:
    """Return confounds (rows of all people, C) in units of the training rows; C = 0 where none are to be removed."""
    if problem.nuisance is None:
        return np.zeros((num_rows, 0))
    return standardised(problem.nuisance[problem.train], problem.nuisance)[1]


def _whitener(cov_DD: FloatArray) -> Tensor:
    """Return (C + lambda trace(C) / D)^-1/2, the matrix of `brainlm.heads.Head`."""
    values, vectors = np.linalg.eigh(cov_DD)
    average = max(float(values.mean()), 1e-12)  # embeddings that do not vary at all
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + SHRINKAGE * average)) @ vectors.T
    return torch.from_numpy(matrix.astype(np.float32))
