"""The change of a forecast after a push, against two forecasts by hand."""

from __future__ import annotations

import pytest
import torch

from brainlm.dataset import Dataset
from brainlm.errors import ConfigError
from brainlm.impulse_response import forward_response
from brainlm.model import BrainLM
from brainlm.testing import small_model, write_synthetic_dataset
from brainlm.windows import Windows

WINDOW_LEN, PATCH_LEN, NUM_PARCELS = 40, 10, 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(
        str(tmp_path_factory.mktemp("data") / "dataset"),
        num_subjects={"train": 4, "val": 1, "test": 1},
        num_timepoints=60,
        num_parcels=NUM_PARCELS,
        window_len=WINDOW_LEN,
        patch_len=PATCH_LEN,
    )


@pytest.mark.parametrize("patch_parcels", [1, 3])
def test_a_response_is_the_difference_of_two_forecasts(dataset: Dataset, patch_parcels: int) -> None:
    model = small_model(dataset.contract, patch_parcels=patch_parcels)
    x = torch.randn(3, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(0))
    found = forward_response(model, x, [2, 5], amplitude=0.5, num_timepoints=4, horizon_patches=2, batch_size=2)
    assert found.shape == (3, NUM_PARCELS, 20)
    mask = (torch.arange(4) >= 2).repeat(NUM_PARCELS // patch_parcels).expand(3, -1)
    pushed = x.clone()
    pushed[:, [2, 5], 16:20] += 0.5
    with torch.no_grad():
        expected = (model.reconstruct(pushed, mask) - model.reconstruct(x, mask))[:, :, 20:] / 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool((found != 0).any())
    hidden = x.clone()
    hidden[:, :, 20:] = 1e6  # the future is not looked at
    again = forward_response(model, hidden, [2, 5], amplitude=0.5, num_timepoints=4, horizon_patches=2, batch_size=2)
    torch.testing.assert_close(again, found)


def test_missing_parcels_and_censored_time_are_not_pushed(dataset: Dataset) -> None:
    model: BrainLM = small_model(dataset.contract)
    x = torch.randn(2, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(0))
    present, kept = torch.ones(2, NUM_PARCELS, dtype=torch.bool), torch.ones(2, WINDOW_LEN, dtype=torch.bool)
    present[0, 4] = False
    kept[1, 29] = False
    found = forward_response(model, Windows.of(x, present, kept), [4])
    assert bool(found[0, 4].isnan().all())
    assert not found[0, [p for p in range(NUM_PARCELS) if p != 4]].any()
    assert not found[1].any()
    assert bool(forward_response(model, Windows.of(x, present, kept), [4], num_timepoints=2)[1].any())


def test_what_cannot_be_pushed_or_forecast_is_said(dataset: Dataset) -> None:
    model = small_model(dataset.contract)
    x = torch.zeros(1, NUM_PARCELS, WINDOW_LEN)
    for arguments, message in (
        ({"parcels": [12]}, "from 0 to 11, found \\[12\\]"),
        ({"parcels": []}, "found \\[\\]"),
        ({"parcels": [0], "horizon_patches": 4}, "1 to 3 can be hidden"),
        ({"parcels": [0], "num_timepoints": 31}, "found 1 and 31"),
        ({"parcels": [0], "amplitude": 0.0}, "amplitude must not be 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            forward_response(model, x, **arguments)  # type: ignore[arg-type]
