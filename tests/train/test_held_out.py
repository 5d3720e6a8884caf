"""Validation scores every hidden value, also where a model gives none."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from brainlm.censoring import Ranges
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import DataError, TrainingError
from brainlm.testing import small_model, write_synthetic_dataset
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


def censored_dataset(folder: Path, ranges: Ranges, fill: float | None = None) -> Dataset:
    return write_synthetic_dataset(
        str(folder),
        num_subjects={"train": 4, "val": 2},
        num_timepoints=50,
        missing={"sub-val000_task-rest": (3,)},
        censored={f"sub-{name}_task-rest": ranges for name in ("val000", "val001", "train002")},
        censored_fill=fill,
    )


def scores(dataset: Dataset) -> dict[str, float]:
    held_out = HeldOut(dataset.split("val"), dataset.contract, ValidationSettings())
    return held_out.score(OneRank(small_model(dataset.contract)))  # type: ignore[arg-type]


def test_what_is_stored_at_censored_timepoints_changes_no_validation_score(tmp_path: Path) -> None:
    ranges = ((0, 3), (18, 27), (44, 46))
    one = scores(censored_dataset(tmp_path / "interpolated", ranges))
    assert one == scores(censored_dataset(tmp_path / "nonsense", ranges, fill=1e4))
    assert one["val_r2"] < 1


def test_validation_of_censored_recordings_agrees_with_a_direct_computation(tmp_path: Path) -> None:
    dataset = censored_dataset(tmp_path, ((0, 3), (18, 27), (44, 46)))
    contract, reader = dataset.contract, dataset.split("val")
    held_out = HeldOut(reader, contract, ValidationSettings())
    model = small_model(contract)
    sse = sst = squared = count = 0.0
    start = 5  # the middle: 50 timepoints, a window of 40
    for number, held in enumerate(held_out.windows):
        window, mask, present = held.batch.values[0], held.mask, held.batch.present[0]
        series = reader.recording(number).astype(np.float64)
        kept = reader.kept(number, 0, 50)
        error = (model.reconstruct(window[None], mask[None], present[None])[0].numpy().T * contract.iqr
                 + contract.median - series[start : start + 40])  # fmt: skip
        scored = np.isfinite(error) & kept[start : start + 40, None]
        sd = np.where(present.numpy(), series[kept].std(axis=0), 1.0)
        sse += (error / sd)[scored].__pow__(2).sum()
        sst += (series[start : start + 40] / sd)[scored].__pow__(2).sum()
        squared += (error / contract.iqr)[scored].__pow__(2).sum()
        count += scored.sum()
    found = held_out.score(OneRank(model))  # type: ignore[arg-type]
    assert found["val_r2"] == pytest.approx(1 - sse / sst, rel=1e-4)
    assert found["val_loss"] == pytest.approx(squared / count, rel=1e-4)


def test_validation_without_any_measured_hidden_value_is_refused(tmp_path: Path) -> None:
    dataset = censored_dataset(tmp_path, ((2, 50),))
    with pytest.raises(DataError, match="no hidden value of the validation windows was measured"):
        scores(dataset)
