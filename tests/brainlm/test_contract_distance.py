"""The distance of recordings from an input contract, where it is known."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainlm.censoring import kept_timepoints
from brainlm.contract_distance import ContractDistance, measure_distance, read_recordings
from brainlm.errors import DataError
from brainlm.input_contract import InputContract, distance
from brainlm.masking import make_mask
from brainlm.official_contract import Gain, published_contract
from brainlm.published import PublishedModel
from brainlm.recording import Recording
from brainlm.testing import small_model, synthetic_atlas, write_synthetic_dataset
from brainlm.windows import cut_windows, pad_windows
from tests.brainlm.published_models import nystrom, vit

NUM_PARCELS, T = 8, 120


def contract_of(num_parcels: int = NUM_PARCELS, window_len: int = 40, iqr: float = 2.0) -> InputContract:
    return InputContract(
        atlas=synthetic_atlas(num_parcels),
        covered=np.ones(num_parcels, dtype=bool),
        median=np.zeros(num_parcels, dtype=np.float32),
        iqr=np.full(num_parcels, iqr, dtype=np.float32),
        tr_s=2.0,
        window_len=window_len,
        patch_len=10,
    )


def square_wave(amplitude: float, name: str = "sub-1_task-rest", tr_s: float = 2.0, num_parcels: int = NUM_PARCELS):
    """All parcels at +amplitude or -amplitude at once, half of each patch at either: IQR 2 x amplitude."""
    series = np.tile(np.repeat([1.0, -1.0], 5), T // 10)[:, None] * np.full(num_parcels, amplitude)
    return Recording(recording_id=name, subject="sub-1", bold=1000 + series, tr_s=tr_s)


class RightAtOne:
    """Says ``m (1 + (|m| - 1) / 2)`` for a hidden value, m being the mean of what is visible at that timepoint.

    All parcels are alike in `square_wave`, so this is exact where the wave it is fed is of +1 and -1, too large above
    and too small below: the one right gain is 1 / amplitude in contract units.
    """

    def __init__(self, contract: InputContract) -> None:
        self.contract = contract
        self.calls = 0

    def hidden_values(self, mask: torch.Tensor) -> torch.Tensor:
        rows = mask.unflatten(1, (self.contract.atlas.num_parcels, -1))
        return rows.repeat_interleave(self.contract.patch_len, dim=2)

    def reconstruct(
        self, windows: torch.Tensor, mask: torch.Tensor, present_BP: torch.Tensor, kept_BW: torch.Tensor
    ) -> torch.Tensor:
        self.calls += 1
        hidden = self.hidden_values(mask)
        visible = ~hidden & present_BP[:, :, None]
        m = (windows * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
        answer = m * (1 + (m.abs() - 1) / 2)
        return answer.expand_as(windows).masked_fill(~hidden, float("nan"))


@pytest.mark.parametrize("amplitude", [0.5, 1.0, 3.0, 10.0])
def test_gain_of_known_recordings_is_found(amplitude: float) -> None:
    """In contract units (IQR 2, so +-1 is an amplitude of 2) the wave is amplitude / 2 x 2 = `amplitude`."""
    model = RightAtOne(contract_of(iqr=1.0))
    found = distance(model, [square_wave(amplitude)], mask_ratio=0.3)
    assert found.gain == pytest.approx(1 / amplitude, rel=2 ** (1 / 16) - 1)
    assert found.r2_at_gain > 0.99
    assert found.amplitude_ratio == pytest.approx(2 * amplitude)
    assert found.gain_matters == (amplitude != 1.0)
    assert ("The scale fits" in found.summary()) == (amplitude == 1.0)
    if amplitude == 3.0:
        assert "multiply the input by 0.3" in found.verdict()
        assert found.r2_at_1 == pytest.approx(1 - (3 * (1 + 2 / 2) / 3 - 1) ** 2)  # says 6 where it is 3


def test_error_is_relative_to_each_recordings_own_variance() -> None:
    """The same numbers with contract units that differ between parcels, and a median that is not 0."""
    plain = contract_of(iqr=1.0)
    other = replace(plain, median=np.full(NUM_PARCELS, 4.0, dtype=np.float32))
    loud, quiet = square_wave(1.0), square_wave(1e-3, "sub-2_task-rest")
    exact = measure_distance(RightAtOne(plain), [loud], mask_ratio=0.3)
    both = measure_distance(RightAtOne(plain), [loud, quiet], mask_ratio=0.3)
    assert exact.r2_at_1 == pytest.approx(1.0)
    # the quiet one is called half of what it is: an error of a quarter of its variance, and it counts as much
    assert both.r2_at_1 == pytest.approx(1 - 0.25 / 2, abs=1e-3)
    shifted = measure_distance(RightAtOne(other), [loud], mask_ratio=0.3)  # is fed 1 - 4 and -1 - 4
    m = np.array([-3.0, -5.0])
    error = (m * (1 + (np.abs(m) - 1) / 2) - m) ** 2
    assert shifted.r2_at_1 == pytest.approx(1 - error.mean(), rel=1e-4)


def test_what_does_not_come_from_the_model_is_compared_with_the_contract() -> None:
    contract = contract_of()
    fast = square_wave(1.0, "sub-2_task-rest", tr_s=0.8)
    lacking = replace(square_wave(1.0), coverage=np.array([1, 0, 1, 1, 0, 1, 1, 1], dtype=np.float32))
    own = replace(contract, high_pass_hz=0.01)
    model = RightAtOne(contract)
    found = measure_distance(
        model, [square_wave(1.0, "sub-3_task-rest"), fast, lacking], contract=own, search_gain=False
    )
    assert model.calls == 0
    assert found.other_tr_s == (0.8,)
    assert (found.num_parcels, found.num_missing_parcels, found.most_missing_parcels) == (8, 0, 2)
    assert found.differences == ("high_pass_hz: None against 0.01",)
    assert found.amplitude_ratio == pytest.approx(1.0)
    assert math.isnan(found.gain)
    lines = found.summary().split("\n")
    assert lines[1] == "The model was fed a TR of 2 s; some recordings have 0.8 s: resample them."
    assert lines[2] == "Prepared differently: high_pass_hz: None against 0.01."
    assert lines[3].endswith("a recording lacks 0 (median; at most 2).")
    assert lines[4].startswith("Their amplitude is 1 times that of the contract, about the same")
    assert lines[5] == "Whether the scale is right was not asked of the model."
    unknown = measure_distance(model, [fast], search_gain=False)
    assert "How the recordings were filtered is not known here" in unknown.summary()


def test_censored_timepoints_have_no_influence() -> None:
    recording = square_wave(3.0)
    keep = kept_timepoints(((12, 15), (70, 78)), T)
    one, two = (np.where(keep[:, None], recording.bold, value) for value in (0.0, 5e4))
    first, second = (
        measure_distance(
            RightAtOne(contract_of(iqr=1.0)), [replace(recording, bold=bold, keep_mask=keep)], num_windows=3
        )
        for bold in (one, two)
    )
    assert first == second
    assert first.gain == pytest.approx(1 / 3, rel=0.1)


def test_no_optimum_is_said_so() -> None:
    class Constant(RightAtOne):
        def reconstruct(
            self, windows: torch.Tensor, mask: torch.Tensor, present_BP: torch.Tensor, kept_BW: torch.Tensor
        ) -> torch.Tensor:
            return torch.full_like(windows, 0.5)

    found = measure_distance(Constant(contract_of()), [square_wave(1.0)])
    assert found.gain_at_edge  # the larger the gain, the less 0.5 / gain harms
    assert "At no gain does the model predict" in found.verdict()


def test_recordings_that_cannot_be_compared_are_refused() -> None:
    model = RightAtOne(contract_of(window_len=200))
    with pytest.raises(DataError, match="no recordings to compare"):
        measure_distance(model, [])
    with pytest.raises(DataError, match=r"sub-1_task-rest has 6 parcels, the contract .* has 8"):
        measure_distance(model, [square_wave(1.0, num_parcels=6)])
    with pytest.raises(DataError, match="no recording has the 200 timepoints of a window"):
        measure_distance(model, [square_wave(1.0)])
    assert isinstance(measure_distance(model, [square_wave(1.0)], search_gain=False), ContractDistance)


def test_the_input_contract_alone_does_not_load_torch() -> None:
    code = "import sys, brainlm.input_contract; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_trained_model_asks_for_the_amplitude_of_its_training(tmp_path: Path) -> None:
    """Trained on unit amplitude; the same recordings three times as loud want a gain of a third of what they want."""
    dataset = write_synthetic_dataset(str(tmp_path), num_parcels=12, num_networks=2, gain_sd=0.0, noise=0.1, phi=0.95)
    model = small_model(dataset.contract).train()
    recordings = list(read_recordings(dataset))
    cut = pad_windows([cut_windows(r, dataset.contract, starts=(0, 10, 20)) for r in recordings], dataset.contract)
    generator = torch.Generator().manual_seed(1)
    for step in range(120):
        rows = torch.randperm(len(cut), generator=generator)[:8]
        masks = torch.stack([make_mask("random", 12, 4, 0.5, generator) for _ in rows])
        model.zero_grad()
        model(cut.values[rows], masks).mean.backward()
        with torch.no_grad():  # steps of one size, by the sign: as good as Adam here, whose import takes seconds
            for value in model.parameters():
                value -= 3e-3 * (1 - step / 120) * value.grad.sign()
    model.eval()
    test = list(read_recordings(dataset, "test"))
    plain = measure_distance(model, test, num_windows=8)
    loud = [replace(r, bold=3 * r.bold) for r in test]
    found = measure_distance(model, loud, num_windows=8)
    assert plain.r2_at_1 > 0.3
    assert 0.7 < plain.gain < 1.4
    assert found.gain == pytest.approx(plain.gain / 3, rel=0.1)
    assert found.amplitude_ratio == pytest.approx(3 * plain.amplitude_ratio, rel=1e-4)
    assert found.r2_at_gain == pytest.approx(plain.r2_at_gain, abs=0.02)
    assert "The scale does not fit: multiply the input by 0." in found.verdict()


@pytest.mark.parametrize("family", ["13M", "ViT-MAE"])
def test_published_models_of_any_weights_give_finite_numbers(family: str) -> None:
    network = nystrom() if family == "13M" else vit()
    num_parcels, length = (12, 80) if family == "13M" else (424, 210)
    fed = published_contract(contract_of(num_parcels), network.config, Gain(), "x")
    series = np.random.default_rng(1).standard_normal((length, num_parcels)).astype(np.float32)
    recording = Recording(recording_id="sub-1", subject="sub-1", bold=series, tr_s=2.0)
    found = distance(PublishedModel(network, fed), [recording], num_windows=1)
    assert all(math.isfinite(r2) for _, r2 in found.r2_by_gain)
    assert math.isfinite(found.gain)
    assert math.isfinite(found.amplitude_ratio)
    assert found.num_windows == 1
    assert len(found.summary().split("\n")) == 6
