"""Windows from recordings, unequal ones in one batch, other parcels, other TRs, and parcels that share tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM, ModelConfig
from brainlm.recording import Recording
from brainlm.testing import synthetic_atlas
from brainlm.tokens import parcel_groups, parcel_mask, present_rows
from brainlm.windows import Windows, cut_windows, pad_windows

Decoder = Literal["cross", "full"]
P, W, PATCH = 7, 20, 5
both_decoders = pytest.mark.parametrize("decoder", ["cross", "full"])


def contract_of(num_parcels: int = P, **changes: object) -> InputContract:
    rng = np.random.default_rng(0)
    contract = InputContract(
        atlas=synthetic_atlas(num_parcels),
        covered=np.ones(num_parcels, dtype=bool),
        median=rng.normal(0, 0.1, num_parcels).astype(np.float32),
        iqr=rng.uniform(1, 2, num_parcels).astype(np.float32),
        tr_s=2.0,
        window_len=W,
        patch_len=PATCH,
    )
    return replace(contract, **changes)  # type: ignore[arg-type]


def model_of(contract: InputContract, decoder: Decoder = "cross", seed: int = 0, **sizes: int) -> BrainLM:
    config = ModelConfig(
        width=16, depth=2, num_heads=2, mlp_width=32, decoder=decoder, decoder_width=16, decoder_depth=2,
        decoder_num_heads=2, decoder_mlp_width=32, window_len=W, patch_len=PATCH, parcel_embedding=False, **sizes,
    )  # fmt: skip
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(num_rows: int, num_patches: int, seed: int = 0) -> Tensor:
    return make_mask("random", num_rows, num_patches, 0.5, mask_generator(seed))


def with_coords(values: Tensor, seed: int, tr_s: float = 2.0) -> Windows:
    coords = 60 * (torch.rand(values.shape[1], 3, generator=torch.Generator().manual_seed(seed)) - 0.5)
    return replace(Windows.of(values), coords_mm=coords, tr_s=torch.full((len(values),), tr_s))


# ---------------------------------------------------------------------- cutting


def recording_of(num_timepoints: int, keep: object = None, tr_s: float = 2.0, seed: int = 3) -> Recording:
    bold = np.random.default_rng(seed).normal(100, 5, (num_timepoints, P)).astype(np.float32)
    keep_mask = np.ones(num_timepoints, dtype=bool) if keep is None else np.asarray(keep)
    return Recording(recording_id="sub-1_task-rest", subject="1", bold=bold, tr_s=tr_s, keep_mask=keep_mask)


def test_windows_are_the_centred_scaled_recording_side_by_side() -> None:
    contract, recording = contract_of(), recording_of(50)
    windows = cut_windows(recording, contract)
    assert windows.starts == (0, 20, 40)
    expected = (recording.bold - recording.bold.mean(0) - contract.median) / contract.iqr
    np.testing.assert_allclose(windows.values[1].T, expected[20:40], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(windows.values[2, :, :10].T, expected[40:], rtol=1e-4, atol=1e-4)
    assert windows.kept.sum(dim=1).tolist() == [20, 20, 10]
    assert windows.present.all()


def test_what_is_censored_never_reaches_a_window() -> None:
    keep = np.ones(40, dtype=bool)
    keep[[0, 7, 8, 39]] = False
    one = recording_of(40, keep)
    bold = one.bold.copy()
    bold[~keep] = 1e6
    other = replace(one, bold=bold)
    a, b = (cut_windows(recording, contract_of()) for recording in (one, other))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.kept.flatten(), torch.from_numpy(keep))


def test_a_missing_parcel_is_marked() -> None:
    recording = recording_of(40)
    bold = recording.bold.copy()
    bold[:, 2] = np.nan
    windows = cut_windows(replace(recording, bold=bold), contract_of())
    assert windows.present[0].tolist() == [True, True, False, True, True, True, True]
    assert windows.values.isfinite().all()


def test_a_recording_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 7 parcels, the contract .* has 8: parcellate it with that atlas"):
        cut_windows(recording_of(40), contract_of(8))
    with pytest.raises(DataError, match=r"TR of 0.72 s, the contract has 2 s: resample it"):
        cut_windows(recording_of(40, tr_s=0.72), contract_of())
    with pytest.raises(DataError, match="has 40 timepoints: no window can begin at 40"):
        cut_windows(recording_of(40), contract_of(), starts=[0, 40])
    with pytest.raises(DataError, match="no kept timepoints"):
        cut_windows(recording_of(40, np.zeros(40, dtype=bool)), contract_of())
    native = cut_windows(recording_of(40, tr_s=0.72), contract_of(), native_tr=True)
    torch.testing.assert_close(native.tr_s, torch.full((2,), 0.72))


def test_windows_whose_parts_disagree_are_refused() -> None:
    values = noise(2, P, W)
    with pytest.raises(DataError, match=r"present must be bool of shape \(2, 7\), found torch.bool of shape \(2, 6\)"):
        Windows.of(values, torch.ones(2, P - 1, dtype=torch.bool))
    with pytest.raises(DataError, match="kept must be bool"):
        Windows.of(values, None, torch.ones(2, W))
    with pytest.raises(DataError, match=r"windows of 7 parcels: coords_mm has shape \(6, 3\)"):
        replace(Windows.of(values), coords_mm=torch.zeros(6, 3))
    with pytest.raises(DataError, match="one positive number for each of 2 windows"):
        replace(Windows.of(values), tr_s=torch.tensor([2.0, 0.0]))


# ---------------------------------------------------------------------- unequal windows, other parcels


@both_decoders
def test_a_padded_window_gives_what_it_gives_alone(decoder: Decoder) -> None:
    model = model_of(contract_of(), decoder)
    sizes = [(7, 4), (12, 2), (3, 6)]  # parcels, patches
    parts = [with_coords(noise(1, p, k * PATCH, seed=p), seed=p, tr_s=0.5 * k) for p, k in sizes]
    joined = pad_windows(parts, model.contract)
    assert joined.values.shape == (3, 12, 6 * PATCH)
    masks = torch.zeros(3, 12, 6, dtype=torch.bool)
    for i, (p, k) in enumerate(sizes):
        masks[i, :p, :k] = mask_of(p, k, seed=i).view(p, k)
    poisoned = replace(joined, values=joined.values.clone())
    for i, (p, k) in enumerate(sizes):
        poisoned.values[i, p:] = 1e6
        poisoned.values[i, :, k * PATCH :] = 1e6
    together = model.reconstruct(poisoned, masks.flatten(1))
    embedded, loss = model.embed_windows(poisoned), model(poisoned, masks.flatten(1))
    sums = []
    for i, ((p, k), part) in enumerate(zip(sizes, parts)):
        mask = masks[i, :p, :k].flatten()[None]
        alone = model.reconstruct(part, mask)[0]
        torch.testing.assert_close(together[i, :p, : k * PATCH], alone, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert together[i, p:].isnan().all()
        for found, expected in zip(embedded, model.embed_windows(part)):
            torch.testing.assert_close(found[i], expected[0], rtol=1e-4, atol=1e-5)
        sums.append(model(part, mask))
    torch.testing.assert_close(loss.sum, sum(one.sum for one in sums), rtol=1e-4, atol=1e-4)
    assert int(loss.num_values) == sum(int(one.num_values) for one in sums)


@both_decoders
def test_shuffling_parcels_with_their_coordinates_shuffles_the_output(decoder: Decoder) -> None:
    model = model_of(contract_of(), decoder)
    windows = with_coords(noise(2, 11, W), seed=0)
    mask = torch.stack([mask_of(11, 4, seed) for seed in range(2)])
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = replace(windows, values=windows.values[:, order], coords_mm=windows.coords_mm[order])  # type: ignore[index]
    mask_shuffled = mask.view(2, 11, 4)[:, order].flatten(1)
    found, expected = model.reconstruct(shuffled, mask_shuffled), model.reconstruct(windows, mask)[:, order]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_contract_coordinates_given_by_hand_change_nothing() -> None:
    contract = contract_of()
    model, windows = model_of(contract), Windows.of(noise(2, P, W))
    explicit = replace(windows, coords_mm=torch.from_numpy(contract.atlas.coords_mm), tr_s=torch.full((2,), 2.0))
    for found, expected in zip(model.embed_windows(explicit), model.embed_windows(windows)):
        torch.testing.assert_close(found, expected)


def test_seconds_and_not_samples_place_a_patch() -> None:
    model = model_of(contract_of())
    values = noise(1, P, W)
    slow, fast = (replace(Windows.of(values), tr_s=torch.tensor([tr_s])) for tr_s in (2.0, 0.5))
    assert torch.equal(model.embed_windows(slow).cls, model.embed_windows(values).cls)
    assert not torch.allclose(model.embed_windows(fast).cls, model.embed_windows(values).cls, atol=1e-4)
    twin = model_of(contract_of(tr_s=0.5))
    torch.testing.assert_close(model.embed_windows(fast).cls, twin.embed_windows(values).cls)


def test_a_learned_code_per_parcel_ties_a_model_to_its_atlas() -> None:
    contract = contract_of()
    config = replace(model_of(contract).config, parcel_embedding=True)
    with pytest.raises(ConfigError, match="a learned code for each parcel of synthetic"):
        BrainLM(config, contract).embed_windows(with_coords(noise(1, 5, W), 0))


def test_longer_and_shorter_windows_can_be_fed() -> None:
    model = model_of(contract_of())
    values = noise(1, P, 3 * W)
    mask = mask_of(P, 3 * W // PATCH)[None]
    out = model.reconstruct(values, mask)
    assert out.isfinite().sum() == mask.sum() * PATCH
    assert model.embed_windows(values[:, :, :PATCH]).cls.isfinite().all()


# ---------------------------------------------------------------------- censored patches


@both_decoders
def test_a_patch_without_a_kept_timepoint_is_not_seen(decoder: Decoder) -> None:
    model = model_of(contract_of(), decoder)
    values = noise(2, P, W)
    kept = torch.ones(2, W, dtype=torch.bool)
    kept[0, PATCH : 2 * PATCH] = False  # a whole patch of the first window
    mask = torch.stack([mask_of(P, 4, seed) for seed in range(2)])
    other = values.clone()
    other[0, :, PATCH : 2 * PATCH] = torch.nan
    found = [model.reconstruct(Windows.of(x, None, kept), mask) for x in (values, other)]
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert found[0].isfinite().sum() == mask.sum() * PATCH  # answered where it is asked for, censored or not
    for a, b in zip(*(model.embed_windows(Windows.of(x, None, kept)) for x in (values, other))):
        assert torch.equal(a, b)
    losses = [model(Windows.of(x, None, kept), mask) for x in (values, other)]
    assert losses[0].sum == losses[1].sum


def test_a_window_that_is_censored_throughout_leaves_a_finite_loss() -> None:
    model = model_of(contract_of())
    kept = torch.ones(2, W, dtype=torch.bool)
    kept[0] = False
    mask = torch.stack([mask_of(P, 4, seed) for seed in range(2)])
    loss = model(Windows.of(noise(2, P, W), None, kept), mask)
    assert loss.sum.isfinite()
    assert int(loss.num_values) == int(mask[1].sum()) * PATCH


# ---------------------------------------------------------------------- parcels that share tokens


def test_groups_lie_together_and_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[-60, -20, 0], [60, -20, 0], [-60, 20, 0], [60, 20, 0]])
    coords = torch.from_numpy((centres[:, None] + rng.normal(0, 3, (4, 4, 3))).reshape(16, 3)).float()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    groups = parcel_groups(coords[order], 4)
    found = {frozenset(order[group].tolist()) for group in groups}
    assert found == {frozenset(range(4 * i, 4 * i + 4)) for i in range(4)}
    assert sorted(parcel_groups(coords[:14], 4).flatten().tolist()) == [-1, -1, *range(14)]
    assert (parcel_groups(coords[:14], 4)[:-1] >= 0).all()


def group_mask(model: BrainLM, seed: int = 0) -> Tensor:
    return torch.stack([mask_of(model.num_rows, 4, seed + i) for i in range(2)])


@both_decoders
def test_hidden_groups_change_nothing_but_the_loss(decoder: Decoder) -> None:
    model = model_of(contract_of(), decoder, patch_parcels=3)
    assert (model.num_rows, model.patchify(noise(2, P, W)).shape) == (3, (2, 12, 15))
    windows, mask = noise(2, P, W), group_mask(model)
    hidden = model.hidden_values(mask)
    for i in range(2):
        assert torch.equal(hidden[i], parcel_mask(mask[i], P, model.groups).repeat_interleave(PATCH, dim=1))
    before, after = model.reconstruct(windows, mask), model.reconstruct(windows.masked_fill(hidden, torch.nan), mask)
    assert torch.equal(before.isfinite(), hidden)
    assert torch.equal(before.nan_to_num(), after.nan_to_num())
    loss = model(windows, mask)
    assert int(loss.num_values) == int(hidden.sum())
    torch.testing.assert_close(loss.sum, (before - windows)[hidden].square().sum())
    assert torch.equal(model.unpatchify(model.patchify(windows)), windows)


@both_decoders
def test_a_missing_parcel_of_a_group_changes_nothing_and_is_not_a_measured_zero(decoder: Decoder) -> None:
    model = model_of(contract_of(), decoder, patch_parcels=3)
    present = torch.ones(2, P, dtype=torch.bool)
    present[0, 2] = False
    windows, mask = noise(2, P, W), group_mask(model)
    lost = windows.clone()
    lost[0, 2] = torch.nan
    found = [model.reconstruct(x, mask, present) for x in (windows, lost)]
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert found[0][0, 2].isnan().all()
    losses = [model(x, mask, present) for x in (windows, lost)]
    assert losses[0].sum == losses[1].sum
    assert int(losses[0].num_values) == int((model.hidden_values(mask) & present[:, :, None]).sum())
    zero = windows.clone()
    zero[0, 2] = 0
    assert not torch.equal(model.encode(zero, mask).latent, model.encode(zero, mask, present).latent)


def test_a_group_without_any_parcel_is_missing() -> None:
    model = model_of(contract_of(), patch_parcels=3)
    assert model.groups is not None
    present = torch.ones(1, P, dtype=torch.bool)
    members = model.groups[0]
    present[0, members[members >= 0]] = False
    assert present_rows(present, model.groups)[0].tolist()[0] == 0
    grid = model.token_grid(noise(1, P, W), present)
    assert grid.present.view(3, 4)[:, 0].tolist() == [False, True, True]


def test_every_parameter_of_a_grouped_model_learns() -> None:
    model = model_of(contract_of(), patch_parcels=3)
    present = torch.ones(2, P, dtype=torch.bool)
    present[0, 2] = False
    model(noise(2, P, W), group_mask(model), present).mean.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_grouped_models_say_nothing_of_single_parcels() -> None:
    model = model_of(contract_of(), patch_parcels=3)
    with pytest.raises(ConfigError, match=r"3 parcels in a token: use a model with model.patch_parcels=1"):
        model.parcel_attention(noise(2, P, W))
    (layer,) = model.attention(noise(2, P, W), group_mask(model))
    assert layer.weights.shape[1] == 2


def test_one_head_of_one_layer_is_that_head() -> None:
    model = model_of(contract_of())
    every = model.attention(noise(2, P, W), layers=[0, 1])
    (one,) = model.attention(noise(2, P, W), layers=[1], heads=[1])
    torch.testing.assert_close(one.weights[:, 0], every[1].weights[:, 1])
    with pytest.raises(ConfigError, match="head 2 asked for, the layer has 2"):
        model.attention(noise(2, P, W), heads=[2])
