"""Validation scores every hidden value, also where a model gives none."""

from __future__ import annotations

import contextlib

import pytest
import torch

from brainlm.dataset import open_dataset
from brainlm.errors import TrainingError
from brainlm.testing import small_model
from brainlm.world import World
from train.held_out import HeldOut
from train.settings import ValidationSettings


class OneRank:
    """What `HeldOut` needs of an engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.world, self.device = model, World(0, 0, 1), torch.device("cpu")

    def whole_tokens(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values


def test_a_prediction_that_is_not_finite_is_an_error_and_not_left_out(dataset_url: str) -> None:
    dataset = open_dataset(dataset_url)
    held_out = HeldOut(dataset.split("val"), dataset.contract, ValidationSettings())
    model = small_model(dataset.contract)
    engine = OneRank(model)
    assert held_out.score(engine)["val_r2"] < 1  # type: ignore[arg-type]
    with torch.no_grad():
        model.decoder_pred.bias[0] = float("nan")  # one timepoint of every patch
    with pytest.raises(TrainingError, match="not finite"):
        held_out.score(engine)  # type: ignore[arg-type]
