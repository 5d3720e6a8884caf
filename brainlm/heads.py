"""Prediction heads: what turns the tokens of an encoder into numbers.

The head of the paper: a multilayer perceptron of three layers on the CLS token, with dropout. Widths and ReLU are those
of the published code. Dimension letters as in `brainlm.model`; `O` outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainlm.config import Section
from brainlm.errors import ConfigError

Pooling = Literal["cls", "mean", "attentive"]
SHRINKAGE = 0.1  # of the whitening; LOG.md has what else was tried


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Section):
    """Sizes of a head."""

    pooling: Pooling = "cls"
    """What it reads: the CLS token, the mean over the other tokens, or their mean weighted by a learned query."""
    hidden_width: int | None = None
    """Of both hidden layers; null = half of the encoder's width."""
    dropout: float = 0.4

    def __post_init__(self) -> None:
        if self.hidden_width is not None and self.hidden_width < 1:
            raise ConfigError(f"head.hidden_width: expected at least 1, found {self.hidden_width}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head.dropout: expected at least 0 and below 1, found {self.dropout}")


def moments(features_ND: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the number of rows, their sum (D,) and the sum of their products (D, D), float64."""
    features = features_ND.double()
    return float(len(features)), features.sum(dim=0), features.T @ features


class Head(nn.Module):
    """Three layers with ReLU and dropout between them.

    What it reads is whitened first, by a mean and a matrix that are set before training and not learned: features of a
    pretrained encoder differ little between people, beside what all have in common, and most in few directions, which
    alone would be learned from in the steps that there are. Both are kept in float32 in whatever format the weights
    are, or rounding the mean would move what is learned.

    Parameters
    ----------
    width : int
        Of the encoder.
    num_outputs : int
    """

    def __init__(self, config: HeadConfig, width: int, num_outputs: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_width or max(width // 2, 1)
        self.query = nn.Parameter(torch.zeros(width)) if config.pooling == "attentive" else None
        self.layer1 = nn.Linear(width, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, num_outputs)
        self.feature_mean = torch.zeros(width)  # no buffers: these are not to be rounded with the weights
        self.whitener = torch.eye(width)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set all initial values. The first answers are near the best constant."""
        with torch.no_grad():
            for layer in (self.layer1, self.layer2, self.out):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                layer.bias.zero_()
            self.out.weight.mul_(0.1)
            if self.query is not None:
                self.query.zero_()

    def set_whitening(self, num: float, sum_D: Tensor, products_DD: Tensor) -> None:
        """Take mean and covariance of features of the training subjects, from `moments` that may be added up.

        The matrix is (C + lambda trace(C) / D)^-1/2, symmetric: directions of less than that variance are raised no
        further, since they hold rounding and noise. lambda is `SHRINKAGE`, or D / num where there are fewer rows than
        features: most directions were then not seen at all.
        """
        mean = sum_D.double().cpu() / num
        cov = products_DD.double().cpu() / num - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(cov)
        shrinkage = SHRINKAGE if num >= len(mean) else len(mean) / num
        average = values.mean().clamp(min=1e-12)  # features that do not vary at all
        self.feature_mean = mean.float()
        self.whitener = ((vectors * (values.clamp(min=0) + shrinkage * average).rsqrt()) @ vectors.T).float()

    def pool(self, tokens_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        """Return the mean over tokens (B, D), weighted by how well each answers the query: ``attentive``."""
        assert self.query is not None
        scores = (tokens_BND @ self.query).float() * tokens_BND.shape[2] ** -0.5
        if valid_BN is not None:
            scores = scores.masked_fill(~valid_BN, float("-inf"))
            tokens_BND = tokens_BND.masked_fill(~valid_BN[:, :, None], 0.0)
        weights = scores.softmax(dim=1).to(tokens_BND.dtype)
        return (weights[:, None] @ tokens_BND)[:, 0]

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return outputs (B, O), float32."""
        mean, whitener = self.feature_mean.to(features_BD.device), self.whitener.to(features_BD.device)
        x = ((features_BD.float() - mean) @ whitener).to(self.layer1.weight.dtype)
        p = self.config.dropout
        x = F.dropout(F.relu(self.layer1(F.dropout(x, p, self.training))), p, self.training)
        x = F.dropout(F.relu(self.layer2(x)), p, self.training)
        return self.out(x).float()
