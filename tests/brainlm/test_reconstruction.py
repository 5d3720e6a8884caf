"""Reconstructing what users hold in hand: arrays, windows of recordings, and whole windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brainlm.censoring import refill_censored
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import complementary_masks, make_mask, mask_generator
from brainlm.model import BrainLM, ModelConfig
from brainlm.recording import Recording
from brainlm.testing import synthetic_atlas
from brainlm.windows import Windows, cut_windows

P, W, PATCH, K = 7, 20, 5, 4


def contract_of() -> InputContract:
    return InputContract(
        atlas=synthetic_atlas(P),
        covered=np.ones(P, dtype=bool),
        median=np.full(P, 0.1, dtype=np.float32),
        iqr=np.full(P, 2.0, dtype=np.float32),
        tr_s=2.0,
        window_len=W,
        patch_len=PATCH,
    )


def model_of(**sizes: Any) -> BrainLM:
    small: dict[str, Any] = {
        "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 32, "decoder_width": 16, "decoder_mlp_width": 32,
        "window_len": W, "patch_len": PATCH, "parcel_embedding": False,
    }  # fmt: skip
    model = BrainLM(ModelConfig(**small | sizes), contract_of())
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def noise(num_windows: int = 2) -> Tensor:
    return torch.randn(num_windows, P, W, generator=torch.Generator().manual_seed(1))


def mask_of(model: BrainLM, num_windows: int = 2) -> Tensor:
    masks = [make_mask("random", model.num_rows, K, 0.5, mask_generator(i)) for i in range(num_windows)]
    return torch.stack(masks)


def test_arrays_and_single_windows_are_taken_as_tensors_are() -> None:
    model, values = model_of(), noise()
    mask = mask_of(model)
    expected = model.reconstruct(values, mask)
    assert torch.equal(expected.isnan(), ~model.hidden_values(mask))
    array = values.numpy().astype(np.float64)
    array.setflags(write=False)
    for found in (model.reconstruct(array, mask), model.reconstruct(Windows.of(values), mask)):
        torch.testing.assert_close(found, expected, equal_nan=True)
    for one in (values[0], values[0].numpy()):
        torch.testing.assert_close(model.reconstruct(one, mask[0]), expected[:1], equal_nan=True, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match=r"mask of shape \(28,\), these windows have tokens of shape \(2, 28\)"):
        model.reconstruct(array, mask[0])
    with pytest.raises(ConfigError, match="present and kept are part of Windows"):
        model.reconstruct(Windows.of(values), mask, torch.ones(2, P, dtype=torch.bool))


@pytest.mark.parametrize("decoder", ["cross", "full"])
@pytest.mark.parametrize("patch_parcels", [1, 3])
def test_a_whole_window_is_rebuilt_from_values_that_were_hidden(decoder: str, patch_parcels: int) -> None:
    model, values = model_of(decoder=decoder, patch_parcels=patch_parcels), noise()
    whole = model.reconstruct(values, num_parts=3, seed=5)
    assert whole.shape == (2, P, W)
    assert bool(whole.isfinite().all())
    assert torch.equal(whole, model.reconstruct(values, num_parts=3, seed=5))
    assert not torch.allclose(whole, model.reconstruct(values, num_parts=3, seed=6), atol=1e-4)
    for i in range(2):  # neither the batch nor another window of it matters
        torch.testing.assert_close(model.reconstruct(values[i], num_parts=3, seed=5)[0], whole[i], atol=1e-5, rtol=0)
    masks = complementary_masks(torch.ones(1, model.num_rows * K, dtype=torch.bool), 3, mask_generator(5))
    assert torch.equal(masks.sum(dim=0), torch.ones(1, model.num_rows * K, dtype=torch.int64))
    for mask in masks:
        expected = model.reconstruct(values[:1], mask)
        hidden = model.hidden_values(mask)
        torch.testing.assert_close(whole[:1][hidden], expected[hidden], atol=1e-5, rtol=0)


def test_a_value_has_no_part_in_its_own_reconstruction() -> None:
    model, values = model_of(), noise(1)
    before = model.reconstruct(values)
    changed = values.clone()
    changed[0, 3, 7] += 10
    after = model.reconstruct(changed)
    patch = slice(5, 10)
    assert torch.equal(before[0, 3, patch], after[0, 3, patch])
    assert not torch.allclose(before, after, atol=1e-3)


def test_parcels_that_are_missing_or_not_finite_stay_out_of_a_whole_window() -> None:
    model, values = model_of(), noise()
    present = torch.ones(2, P, dtype=torch.bool)
    present[0, 2] = False
    expected = model.reconstruct(values, present_BP=present)
    assert torch.equal(expected.isnan(), ~present[:, :, None].expand(-1, -1, W))
    broken = values.numpy().copy()
    broken[0, 2, 11] = np.nan
    before = broken.copy()
    torch.testing.assert_close(model.reconstruct(broken), expected, equal_nan=True, atol=0, rtol=0)
    assert np.array_equal(broken, before, equal_nan=True)
    mask_of(model)
    # With a mask, what counts is whether the value is visible.
    visible = torch.zeros(2, P * K, dtype=torch.bool)
    visible[:, 0] = True
    hidden = visible.clone()
    hidden[0, 2 * K : 3 * K] = True
    assert bool(model.reconstruct(broken, visible)[:, 0, :PATCH].isfinite().all())
    assert bool(model.reconstruct(broken, hidden)[0, 2].isfinite().all())
    hidden[0, 2 * K + 11 // PATCH] = False
    assert bool(model.reconstruct(broken, hidden)[0, 2].isnan().all())


@pytest.mark.parametrize("patch_parcels", [1, 3])
def test_censored_timepoints_of_windows_tell_nothing_of_hidden_values(patch_parcels: int) -> None:
    """Interpolated from hidden neighbours, a visible value would give them away."""
    model = model_of(patch_parcels=patch_parcels)
    keep = np.ones(40, dtype=bool)
    keep[[4, 5, 11, 24]] = False
    bold = np.random.default_rng(2).normal(100, 5, (40, P)).astype(np.float32)
    bold[~keep] = np.nan
    recording = Recording(recording_id="sub-1", subject="1", bold=bold, tr_s=2.0, keep_mask=keep)
    windows = cut_windows(recording, model.contract)
    mask = torch.zeros(2, model.num_rows, K, dtype=torch.bool)
    mask[:, :, 1] = True
    mask = mask.flatten(1)
    found = model.reconstruct(windows, mask)
    louder = windows.values.clone()
    louder[:, :, 5:10] += 3
    refilled = replace(windows, values=louder)
    for i in range(2):
        refill_censored(refilled.values[i].numpy(), np.ones((P, K), dtype=bool), windows.kept[i].numpy())
    assert not torch.equal(refilled.values[0, :, 4], windows.values[0, :, 4])  # the trap
    assert torch.equal(model.reconstruct(refilled, mask).nan_to_num(), found.nan_to_num())
    whole = model.reconstruct(windows)
    assert bool(whole.isfinite().all())
    censored = ~windows.kept[:, None].expand(-1, P, -1)
    assert torch.equal(model.reconstruct(replace(windows, values=windows.values.masked_fill(censored, 9))), whole)


def test_tokens_can_only_be_divided_into_as_many_parts_as_there_are() -> None:
    for num_parts in (1, 29):
        with pytest.raises(ConfigError, match=f"num_parts: expected 2 to 28, the number of tokens, found {num_parts}"):
            model_of().reconstruct(noise(), num_parts=num_parts)
