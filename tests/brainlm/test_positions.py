"""Position codes against waves written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from brainlm.positions import NUM_TIME, SPACE_MM, TIME_S, TokenPosition, space_features, time_features


def test_space_features_are_coordinates_and_waves_in_mm() -> None:
    coords_mm = torch.tensor([[0.0, 0.0, 0.0], [SPACE_MM[0] / 4, -50.0, SPACE_MM[-1] / 2]])
    found = space_features(coords_mm)
    waves = 3 * len(SPACE_MM)
    assert found.shape == (2, 3 + 2 * waves)
    torch.testing.assert_close(found[0], torch.tensor([0.0] * 3 + [0.0] * waves + [1.0] * waves))
    torch.testing.assert_close(found[1, :3], coords_mm[1] / 100)
    sines, cosines = found[1, 3 : 3 + waves].view(3, -1), found[1, 3 + waves :].view(3, -1)
    torch.testing.assert_close(sines[0, 0].item(), 1.0)  # a quarter of the longest wave
    torch.testing.assert_close(cosines[2, -1].item(), -1.0)  # half of the shortest
    torch.testing.assert_close(sines[1, 1].item(), math.sin(-2 * math.pi * 50 / SPACE_MM[1]))


def test_time_features_are_waves_in_seconds() -> None:
    times_s = torch.tensor([0.0, TIME_S[0] / 4, TIME_S[1] / 4, 777.0])
    found = time_features(times_s)
    assert found.shape == (4, 2 * NUM_TIME)
    assert found.dtype == torch.float32
    periods = np.geomspace(*TIME_S, NUM_TIME)
    for row, time_s in zip(found.tolist(), times_s.tolist()):
        phase = 2 * np.pi * time_s / periods
        np.testing.assert_allclose(row, np.concatenate([np.sin(phase), np.cos(phase)]), atol=2e-4)
    assert found[1, 0].item() == pytest.approx(1.0)
    assert found[2, NUM_TIME - 1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("num_parcels", [None, 3], ids=["coordinates alone", "with a code per parcel"])
def test_positions_are_parcel_major_sums_of_space_and_time(num_parcels: int | None) -> None:
    torch.manual_seed(0)
    position = TokenPosition(8, num_parcels)
    space, time = space_features(50 * torch.randn(3, 3)), time_features(torch.tensor([10.0, 30.0]))
    found = position(space, time)
    assert found.shape == (6, 8)
    for parcel in range(3):
        for patch in range(2):
            code = position.space(space[parcel]) + position.time(time[patch])
            if position.parcel is not None:
                code = code + position.parcel.weight[parcel]
            torch.testing.assert_close(found[2 * parcel + patch], code)
