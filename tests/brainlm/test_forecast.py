"""Forecasts: better than the mean where the truth is known, and a function of the past alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainlm.atlas import Atlas
from brainlm.errors import ConfigError, DataError
from brainlm.forecast import forecast_recording
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM, ModelConfig
from brainlm.recording import Recording
from brainlm.state_space import LinearStateSpace
from brainlm.testing import synthetic_atlas, synthetic_system
from brainlm.windows import Windows

P, W, PATCH, K, TR = 6, 16, 4, 4, 2.0
LEVEL, GAIN = 100.0, 10.0


@pytest.fixture(scope="module")
def system() -> LinearStateSpace:
    return synthetic_system(synthetic_atlas(P, 2), phi=0.95, noise=0.1)


def contract_of(system: LinearStateSpace) -> InputContract:
    """The statistics are those of the stationary distribution: known, not estimated."""
    return InputContract(
        atlas=synthetic_atlas(P, 2),
        covered=np.ones(P, dtype=bool),
        median=np.linspace(-1, 1, P).astype(np.float32),
        iqr=(1.349 * GAIN * np.sqrt(system.marginal_variance())).astype(np.float32),
        tr_s=TR,
        window_len=W,
        patch_len=PATCH,
    )


@pytest.fixture(scope="module")
def model(system: LinearStateSpace) -> BrainLM:
    """Trained to fill the last patch in, on windows of simulated series."""
    contract = contract_of(system)
    config = ModelConfig(
        width=32, mlp_width=64, decoder_width=32, decoder_mlp_width=64, window_len=W, patch_len=PATCH,
        parcel_embedding=False,
    )  # fmt: skip
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    bold = GAIN * system.simulate(6000, rng)
    series = ((bold - contract.median) / contract.iqr).astype(np.float32)
    mask = torch.zeros(P, K, dtype=torch.bool)
    mask[:, -1] = True
    steps = 120
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        windows = np.stack([series[start : start + W].T for start in rng.integers(0, len(series) - W, 24)])
        optimizer.zero_grad()
        model(torch.from_numpy(windows), mask.view(1, -1).expand(24, -1)).mean.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def past_of(num_timepoints: int = 40, seed: int = 3, **changes: Any) -> Recording:
    system = synthetic_system(synthetic_atlas(P, 2), phi=0.95, noise=0.1)
    bold = LEVEL + GAIN * system.simulate(num_timepoints, np.random.default_rng(seed))
    given: dict[str, Any] = {"recording_id": "sub-1", "subject": "1", "bold": bold.astype(np.float32), "tr_s": TR}
    return Recording(**given | changes)


def test_a_trained_model_forecasts_better_than_the_mean_and_no_better_than_the_optimum(
    model: BrainLM, system: LinearStateSpace
) -> None:
    num_past, sse = 300, dict.fromkeys(("model", "short", "optimum", "mean"), 0.0)
    for seed in range(40):
        series = system.simulate(num_past + PATCH, np.random.default_rng(100 + seed))
        bold = (LEVEL + GAIN * series).astype(np.float32)
        past, future = bold[:num_past], bold[num_past:]
        expected = {
            "model": model.forecast(past, PATCH * TR, tr_s=TR).bold,
            "short": model.forecast(past, PATCH * TR, tr_s=TR, context_s=5 * TR).bold,
            "optimum": LEVEL + GAIN * system.forecast(series[:num_past], PATCH),
            "mean": past.mean(axis=0),
        }
        for name, guess in expected.items():
            sse[name] += float(np.square(guess - future).sum())
    r2 = {name: 1 - value / sse["mean"] for name, value in sse.items()}
    assert r2["optimum"] > r2["model"] > 0.6 * r2["optimum"]
    assert r2["optimum"] > r2["short"] > 0.6 * r2["optimum"]


@pytest.mark.parametrize("decoder", ["cross", "full"])
def test_the_forecast_is_the_hidden_end_of_the_window_in_the_units_of_the_recording(
    system: LinearStateSpace, decoder: Any
) -> None:
    model = BrainLM(ModelConfig(decoder=decoder, window_len=W, patch_len=PATCH), contract_of(system)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    past = past_of()
    found = model.forecast(past, 6 * TR)  # one patch and a half: two are hidden
    mean = past.bold.mean(axis=0, dtype=np.float64)
    contract = model.contract
    window = torch.zeros(1, P, W)
    window[0, :, :8] = torch.from_numpy(((past.bold - mean - contract.median) / contract.iqr)[-8:].T.copy())
    mask = torch.zeros(1, P, K, dtype=torch.bool)
    mask[:, :, 2:] = True
    hidden = model.reconstruct(window, mask.flatten(1))[0, :, 8:14].numpy()
    np.testing.assert_allclose(found.bold, hidden.T * contract.iqr + contract.median + mean, rtol=1e-5)
    assert found.bold.dtype == np.float32
    assert found.bold.shape == (6, P)
    np.testing.assert_allclose(found.times_s, np.arange(40, 46) * TR)
    assert not found.missing.any()
    for horizon_s in (5.1 * TR, 6 * TR, 0.1 * 120):
        assert np.array_equal(model.forecast(past, horizon_s).bold, found.bold)
    assert np.array_equal(model.forecast(past, 8 * TR).bold[:6], found.bold)
    assert np.array_equal(model.forecast(past.bold, 6 * TR, tr_s=TR).bold, found.bold)


def test_gain_and_level_of_a_recording_pass_through(model: BrainLM) -> None:
    past, contract = past_of(), model.contract
    found = model.forecast(past, 4 * TR).bold
    loud = replace(past, bold=3 * past.bold + 50)
    own = replace(contract, median=3 * contract.median, iqr=3 * contract.iqr)
    np.testing.assert_allclose(model.forecast(loud, 4 * TR, contract=own).bold, 3 * found + 50, rtol=1e-4)
    alone = model.forecast(past, 4 * TR, statistics="recording").bold
    np.testing.assert_allclose(model.forecast(loud, 4 * TR, statistics="recording").bold, 3 * alone + 50, rtol=1e-4)


def test_only_the_context_is_seen(model: BrainLM) -> None:
    """What came before has a part in the mean alone, to which the order of timepoints is nothing."""
    past = past_of()
    bold = past.bold.copy()
    bold[:30] = bold[:30][::-1]
    keep = np.ones(40, dtype=bool)
    keep[[30, 34]] = False  # the first of the context must not be filled in from before it
    one, other = replace(past, keep_mask=keep), replace(past, bold=bold, keep_mask=keep)
    found = [model.forecast(recording, 4 * TR, context_s=10 * TR).bold for recording in (one, other)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert not np.allclose(model.forecast(one, 4 * TR).bold, model.forecast(other, 4 * TR).bold, rtol=1e-4)
    whole = model.forecast(one, 4 * TR, context_s=12 * TR)
    assert np.array_equal(whole.bold, model.forecast(one, 4 * TR).bold)


class Recorder(nn.Module):
    """Another kind of model, which takes values at censored timepoints as they are, and keeps what it was given."""

    def __init__(self, contract: InputContract) -> None:
        super().__init__()
        self.contract = contract
        self.gain = nn.Parameter(torch.ones(()))
        self.given: list[tuple[Windows, Tensor]] = []

    def reconstruct(self, windows: Windows, mask_BL: Tensor) -> Tensor:
        self.given.append((windows, mask_BL))
        return windows.values * 0 + self.gain


def test_any_model_is_given_the_context_and_a_mask_of_the_end(system: LinearStateSpace) -> None:
    contract, past = contract_of(system), past_of()
    keep = np.ones(40, dtype=bool)
    keep[[30, 34]] = False
    model = Recorder(contract)
    found = forecast_recording(model, replace(past, keep_mask=keep), 4 * TR, context_s=10 * TR)
    ((windows, mask),) = model.given
    assert windows.kept.tolist() == [[False] * 3 + [True] * 3 + [False] + [True] * 9]
    assert mask.view(P, K).tolist() == [[False, False, False, True]] * P
    mean = past.bold[keep].mean(axis=0, dtype=np.float64)
    series = torch.from_numpy(((past.bold - mean - contract.median) / contract.iqr).T).float()
    torch.testing.assert_close(windows.values[0, :, 3:6], series[:, 31:34], atol=1e-4, rtol=0)
    torch.testing.assert_close(windows.values[0, :, 7:12], series[:, 35:], atol=1e-4, rtol=0)
    torch.testing.assert_close(windows.values[0, :, :3], series[:, 31:32].expand(-1, 3), atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.bold, np.tile(contract.iqr + contract.median + mean, (4, 1)), rtol=1e-6)


@pytest.mark.parametrize("num_timepoints", [3, 4, 7, 11])
def test_a_short_recording_is_a_short_context(model: BrainLM, num_timepoints: int) -> None:
    """The same as a long one of which no more is seen, with the same mean."""
    past = past_of(num_timepoints)
    longer = replace(
        past,
        bold=np.concatenate([past.bold[::-1], past.bold]),
        keep_mask=np.ones(2 * num_timepoints, dtype=bool),
        coverage=past.coverage,
    )
    found = model.forecast(past, 3 * TR)
    expected = model.forecast(longer, 3 * TR, context_s=num_timepoints * TR)
    np.testing.assert_allclose(found.bold, expected.bold, rtol=1e-6)
    np.testing.assert_allclose(found.times_s, (num_timepoints + np.arange(3)) * TR)


def test_missing_parcels_are_nan_and_what_was_not_measured_has_no_influence(model: BrainLM) -> None:
    past = past_of()
    keep = np.ones(40, dtype=bool)
    keep[[2, 31, 39]] = False
    bold = past.bold.copy()
    bold[:, 4] = 0
    expected = model.forecast(replace(past, bold=bold, keep_mask=keep), 4 * TR)
    assert expected.missing.tolist() == [False, False, False, False, True, False]
    assert np.array_equal(np.isnan(expected.bold), np.tile(expected.missing, (4, 1)))
    bold[~keep] = np.nan
    bold[5, 4] = np.nan
    before = bold.copy()
    found = model.forecast(replace(past, bold=bold, keep_mask=keep), 4 * TR)
    assert np.array_equal(found.bold, expected.bold, equal_nan=True)
    assert np.array_equal(bold, before, equal_nan=True)


def test_other_parcels_are_forecast_where_they_lie(model: BrainLM) -> None:
    past, contract, order = past_of(), model.contract, np.random.default_rng(0).permutation(P)
    atlas = Atlas(
        name="other",
        sha256="",
        labels=np.arange(P),
        parcel_names=tuple("abcdef"),
        coords_mm=contract.atlas.coords_mm[order],
    )
    own = replace(contract, atlas=atlas, median=contract.median[order], iqr=contract.iqr[order])
    found = model.forecast(past.bold[:, order], 4 * TR, contract=own).bold
    np.testing.assert_allclose(found, model.forecast(past, 4 * TR).bold[:, order], rtol=1e-5)
    with pytest.raises(ConfigError, match="nothing says how they are scaled"):
        model.forecast(past.bold[:, order], 4 * TR, tr_s=TR, atlas=atlas)


@pytest.mark.parametrize("decoder", ["cross", "full"])
def test_models_whose_tokens_hold_several_parcels_forecast_each(system: LinearStateSpace, decoder: Any) -> None:
    config = ModelConfig(decoder=decoder, patch_parcels=4, window_len=W, patch_len=PATCH, parcel_embedding=False)
    grouped = BrainLM(config, contract_of(system)).eval()
    found = grouped.forecast(past_of(tr_s=0.5), 5 * 0.5, native_tr=True)
    assert np.isfinite(found.bold).all()
    np.testing.assert_allclose(found.times_s, 20 + 0.5 * np.arange(5))


@pytest.mark.parametrize(
    ("horizon_s", "options", "message"),
    [
        (25.0, {}, r"a forecast of 25 s: windows .* span 16 timepoints \(32 s\).*forecast 24 s at most"),
        (0.0, {}, "horizon_s: expected seconds above 0, found 0.0"),
        (float("nan"), {}, "horizon_s: expected seconds above 0, found nan"),
        (8.0, {"context_s": -1.0}, "context_s: expected seconds above 0, found -1.0"),
        (8.0, {"context_s": 25.0}, "a context of 25 s before a forecast of 8 s: .* room for 24 s of context"),
        (8.0, {"context_s": 4.0}, "sub-1: no timepoint was kept in the last 4 s"),
    ],
)
def test_what_cannot_be_forecast_is_refused(
    model: BrainLM, horizon_s: float, options: dict[str, Any], message: str
) -> None:
    keep = np.ones(40, dtype=bool)
    keep[-2:] = False
    past = past_of(keep_mask=keep)
    assert np.isfinite(model.forecast(past, 24.0).bold).all()
    with pytest.raises(DataError, match=message):
        model.forecast(past, horizon_s, **options)
