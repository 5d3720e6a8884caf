"""What the model may see, what it is scored on, and what it says about itself.

Masks: True = hidden. Most properties hold for both decoders, and are checked for both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.layers import Attention
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM, Encoded, Loss, ModelConfig
from brainlm.positions import time_features
from brainlm.testing import synthetic_atlas
from brainlm.tokens import gather_tokens, sample_hidden

B, P, W, PATCH = 3, 6, 20, 5
K = W // PATCH
L = P * K
MISSING = 2  # the parcel without signal in `PRESENT`
PRESENT = torch.ones(B, P, dtype=torch.bool)
PRESENT[1, MISSING] = PRESENT[2, MISSING] = PRESENT[2, 5] = False  # unequal numbers in one batch
both_decoders = pytest.mark.parametrize("decoder", ["cross", "full"])
with_and_without_missing = pytest.mark.parametrize("present", [None, PRESENT], ids=["all present", "some missing"])
Decoder = Literal["cross", "full"]


@pytest.fixture
def windows(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.normal(size=(B, P, W)).astype(np.float32))


def build(contract: InputContract, decoder: Decoder = "cross", seed: int = 0, **changes: Any) -> BrainLM:
    """A small model whose weights are all far from zero, so that nothing is hidden behind a small factor."""
    config = ModelConfig(
        **{
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "mlp_width": 32,
            "decoder": decoder,
            "decoder_width": 12,
            "decoder_depth": 2,
            "decoder_num_heads": 3,
            "decoder_mlp_width": 20,
            "window_len": W,
            "patch_len": PATCH,
            **changes,
        }
    )
    model = BrainLM(config, contract)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return model.eval()


def initialised(model: BrainLM) -> BrainLM:
    """The model with weights as training begins with them."""
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def mask_of(ratio: float = 0.5, present: Tensor | None = None, num_windows: int = B, seed: int = 0) -> Tensor:
    rows = [
        make_mask("random", P, K, ratio, mask_generator(seed, i), None if present is None else present[i])
        for i in range(num_windows)
    ]
    return torch.stack(rows)


def values(tokens_BL: Tensor) -> Tensor:
    """Mark values (B, P, W) as their tokens (B, L) are."""
    return tokens_BL.view(-1, P, K).repeat_interleave(PATCH, dim=2)


def scored_values(mask: Tensor, present: Tensor | None) -> Tensor:
    return values(mask) if present is None else values(mask) & present[:, :, None]


def assert_equal_where_finite(found: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------- tokens


def test_patches_are_parcel_major_and_come_back(contract: InputContract) -> None:
    model = build(contract)
    windows = (1000 * torch.arange(P)[:, None] + torch.arange(W)).float().expand(B, P, W)
    patches = model.patchify(windows)
    assert patches.shape == (B, L, PATCH)
    for parcel in range(P):
        for patch in range(K):
            expected = 1000 * parcel + PATCH * patch + torch.arange(PATCH)
            assert torch.equal(patches[1, parcel * K + patch], expected.float())
    assert torch.equal(model.unpatchify(patches), windows)


def test_windows_of_another_size_are_refused(contract: InputContract) -> None:
    with pytest.raises(DataError, match="windows of 7 parcels x 20 timepoints, expected 6 x 20: other parcels need"):
        build(contract).patchify(torch.zeros(B, P + 1, W))
    with pytest.raises(DataError, match="windows of 21 timepoints: expected a multiple of the patch length 5"):
        build(contract).patchify(torch.zeros(B, P, W + 1))
    with pytest.raises(DataError, match=r"mask of shape \(3, 23\), these windows have tokens of shape \(3, 24\)"):
        build(contract).encode(torch.zeros(B, P, W), torch.zeros(B, L - 1, dtype=torch.bool))


def test_patches_lie_at_their_centres_in_seconds(contract: InputContract) -> None:
    slow, fast = build(contract), build(replace(contract, tr_s=0.5))
    assert torch.equal(slow.time_features, time_features(torch.tensor([5.0, 15.0, 25.0, 35.0])))
    assert torch.equal(fast.time_features, time_features(torch.tensor([1.25, 3.75, 6.25, 8.75])))


def test_model_takes_its_window_from_its_own_sizes(contract: InputContract) -> None:
    model = build(contract, window_len=10)
    assert (model.contract.window_len, model.contract.patch_len) == (10, PATCH)
    assert contract.window_len == W


# ---------------------------------------------------------------------- what may be seen


@both_decoders
@with_and_without_missing
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_hidden_values_change_nothing_but_the_loss(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None, garbage: float
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    changed = windows.masked_fill(values(mask), garbage)
    encoded, other = model.encode(windows, mask, present), model.encode(changed, mask, present)
    assert torch.equal(encoded.latent, other.latent)
    assert torch.equal(encoded.ids_keep, other.ids_keep)
    before, after = model.reconstruct(windows, mask, present), model.reconstruct(changed, mask, present)
    assert_equal_where_finite(after, before, rtol=0, atol=0)
    assert before.isfinite().any()
    assert not torch.equal(model(windows, mask, present).sum, model(changed, mask, present).sum)


@both_decoders
def test_visible_values_change_the_prediction(contract: InputContract, windows: Tensor, decoder: Decoder) -> None:
    model, mask = build(contract, decoder), mask_of()
    before = model.reconstruct(windows, mask)
    for token in torch.nonzero(~mask[0])[:, 0].tolist():
        changed = model.patchify(windows).clone()
        changed[0, token] += 0.5
        after = model.reconstruct(model.unpatchify(changed), mask)
        assert not torch.equal(after[0].nan_to_num(), before[0].nan_to_num())
        assert torch.equal(after[1:].nan_to_num(), before[1:].nan_to_num())  # other windows stay as they are


@both_decoders
@pytest.mark.parametrize("garbage", [1e4, float("nan")])
@pytest.mark.parametrize("ids", [None, torch.arange(L).expand(B, L)], ids=["hidden decoded", "all decoded"])
def test_values_of_missing_parcels_change_nothing_at_all(
    contract: InputContract, windows: Tensor, decoder: Decoder, garbage: float, ids: Tensor | None
) -> None:
    model, mask = build(contract, decoder), mask_of()  # not hidden by the mask everywhere
    assert not values(mask)[~PRESENT].all()
    changed = windows.masked_fill(~PRESENT[:, :, None], garbage)
    for found, expected in zip(model(changed, mask, PRESENT, ids), model(windows, mask, PRESENT, ids)):
        assert torch.equal(found, expected)
    before, after = model.reconstruct(windows, mask, PRESENT), model.reconstruct(changed, mask, PRESENT)
    assert_equal_where_finite(after, before, rtol=0, atol=0)
    model(changed, mask, PRESENT, ids).mean.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both_decoders
def test_a_missing_parcel_is_as_if_the_atlas_did_not_have_it(
    contract: InputContract, windows: Tensor, decoder: Decoder
) -> None:
    keep = [i for i in range(P) if i != MISSING]
    atlas = contract.atlas
    smaller = InputContract(
        atlas=replace(
            atlas,
            labels=atlas.labels[keep],
            parcel_names=tuple(atlas.parcel_names[i] for i in keep),
            coords_mm=atlas.coords_mm[keep],
            networks=None,
        ),
        covered=contract.covered[keep],
        median=contract.median[keep],
        iqr=contract.iqr[keep],
        tr_s=contract.tr_s,
        window_len=W,
        patch_len=PATCH,
    )
    whole, part = (build(c, decoder, parcel_embedding=False) for c in (contract, smaller))
    present = torch.ones(B, P, dtype=torch.bool)
    present[:, MISSING] = False
    mask = mask_of(present=present)
    mask_part = mask.view(B, P, K)[:, keep].flatten(1)
    found, expected = whole(windows, mask, present), part(windows[:, keep], mask_part)
    assert int(found.num_values) == int(expected.num_values)
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-5, atol=0)
    assert_equal_where_finite(
        whole.reconstruct(windows, mask, present)[:, keep],
        part.reconstruct(windows[:, keep], mask_part),
        rtol=1e-4,
        atol=1e-5,
    )


@both_decoders
def test_a_parcel_that_the_contract_calls_unusable_is_missing(
    contract: InputContract, windows: Tensor, decoder: Decoder
) -> None:
    iqr = contract.iqr.copy()
    iqr[MISSING] = 0
    unusable = build(replace(contract, iqr=iqr), decoder)
    present = torch.ones(B, P, dtype=torch.bool)
    present[:, MISSING] = False
    expected = build(contract, decoder)(windows, mask_of(), present)
    for also in (None, torch.ones(B, P, dtype=torch.bool)):
        found = unusable(windows, mask_of(), also)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@both_decoders
@with_and_without_missing
def test_windows_of_a_batch_do_not_meet(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    model = build(contract, decoder)
    mask = torch.stack([mask_of(ratio, present, seed=i)[i] for i, ratio in enumerate((0.25, 0.5, 0.9))])
    assert len(set(mask.sum(dim=1).tolist())) == B  # unequal numbers of visible tokens
    together = model.reconstruct(windows, mask, present)
    sums = []
    for i in range(B):
        one = None if present is None else present[i : i + 1]
        alone = model.reconstruct(windows[i : i + 1], mask[i : i + 1], one)
        assert_equal_where_finite(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        sums.append(model(windows[i : i + 1], mask[i : i + 1], one))
    loss = model(windows, mask, present)
    for name in Loss._fields:
        torch.testing.assert_close(getattr(loss, name), torch.stack([getattr(s, name) for s in sums]).sum())


@both_decoders
def test_the_order_of_parcels_does_not_matter(contract: InputContract, windows: Tensor, decoder: Decoder) -> None:
    order = [3, 5, 0, 1, 4, 2]
    atlas = contract.atlas
    shuffled = replace(contract, atlas=replace(atlas, coords_mm=atlas.coords_mm[order]))
    mask = mask_of()
    found = build(shuffled, decoder, parcel_embedding=False).reconstruct(
        windows[:, order], mask.view(B, P, K)[:, order].flatten(1)
    )
    expected = build(contract, decoder, parcel_embedding=False).reconstruct(windows, mask)[:, order]
    assert_equal_where_finite(found, expected, rtol=1e-4, atol=1e-5)


def test_only_visible_tokens_are_encoded_in_their_order(contract: InputContract, windows: Tensor) -> None:
    model, mask = build(contract), mask_of(0.75)
    encoded = model.encode(windows, mask)
    assert encoded.latent.shape == (B, 1 + L // 4, 16)  # CLS first
    assert encoded.valid is None
    for i in range(B):
        assert encoded.ids_keep[i].tolist() == torch.nonzero(~mask[i])[:, 0].tolist()


def test_a_window_with_nothing_visible_is_refused(contract: InputContract, windows: Tensor) -> None:
    mask = mask_of()
    mask[1] = True
    with pytest.raises(DataError, match="a window has no visible token"):
        build(contract).encode(windows, mask)


# ---------------------------------------------------------------------- what is scored


@both_decoders
@with_and_without_missing
def test_loss_is_the_squared_error_of_hidden_values(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    loss, scored = model(windows, mask, present), scored_values(mask, present)
    error = (model.reconstruct(windows, mask, present) - windows)[scored]
    assert int(loss.num_values) == len(error) == int(scored.sum())
    torch.testing.assert_close(loss.sum, error.square().sum())
    torch.testing.assert_close(loss.target_sum, windows[scored].square().sum())
    torch.testing.assert_close(loss.mean, error.square().mean())


@both_decoders
@with_and_without_missing
def test_reconstruction_is_nan_exactly_where_it_is_not_trained(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    mask = mask_of(0.6)
    found = build(contract, decoder).reconstruct(windows, mask, present)
    assert found.shape == (B, P, W)
    assert torch.equal(~found.isnan(), scored_values(mask, present))


@both_decoders
@with_and_without_missing
def test_decoding_some_tokens_gives_the_same_as_decoding_all(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    encoded = model.encode(windows, mask, present)
    every = model.decode(encoded, torch.arange(L).expand(B, L))
    some = torch.tensor([[7, 0, 21], [3, 4, 5], [23, 1, 12]])
    torch.testing.assert_close(model.decode(encoded, some), gather_tokens(every, some))


@both_decoders
@with_and_without_missing
def test_loss_of_some_tokens_counts_those_that_are_scored(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    scored = mask & model.token_grid(windows, present).present
    ids = torch.stack([sample_hidden(scored[i], 5, mask_generator(0, i)) for i in range(B)])
    ids = torch.cat([ids, torch.argsort(scored.int(), dim=1)[:, :2]], dim=1)  # two that are not scored
    loss = model(windows, mask, present, ids)
    error = model.patchify(model.reconstruct(windows, mask, present) - windows)
    assert int(loss.num_values) == B * 5 * PATCH
    torch.testing.assert_close(loss.sum, gather_tokens(error, ids[:, :5]).square().sum())
    target = gather_tokens(model.patchify(windows), ids[:, :5])
    torch.testing.assert_close(loss.target_sum, target.square().sum())


@both_decoders
@with_and_without_missing
@pytest.mark.parametrize("chosen", [False, True], ids=["all decoded", "some decoded"])
def test_the_loss_leaves_censored_timepoints_out(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None, chosen: bool
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    kept = torch.rand(B, W, generator=torch.Generator().manual_seed(0)) < 0.6
    ids = torch.stack([torch.randperm(L, generator=torch.Generator().manual_seed(i))[:9] for i in range(B)])
    loss = model(windows, mask, present, ids if chosen else None, kept)
    scored = scored_values(mask, present) & kept[:, None, :]
    if chosen:
        scored &= values(torch.zeros(B, L, dtype=torch.bool).scatter(1, ids, True))
    error = (model.reconstruct(windows, mask, present) - windows)[scored]
    assert int(loss.num_values) == len(error) == int(scored.sum()) > 0
    torch.testing.assert_close(loss.sum, error.square().sum())
    torch.testing.assert_close(loss.target_sum, windows[scored].square().sum())

    other = torch.where(scored_values(mask, None) & ~kept[:, None, :], torch.nan, windows)
    changed = model(other, mask, present, ids if chosen else None, kept)
    assert all(torch.equal(a, b) for a, b in zip(loss, changed))


@both_decoders
def test_gradients_of_censored_timepoints_are_zero(contract: InputContract, windows: Tensor, decoder: Decoder) -> None:
    """With all but one timepoint censored, only the weights of that timepoint's prediction learn."""
    model, mask = build(contract, decoder), mask_of()
    kept = torch.zeros(B, W, dtype=torch.bool)
    kept[:, PATCH + 2] = True
    model(windows, mask, None, None, kept).sum.backward()
    grad = model.decoder_pred.bias.grad
    assert grad is not None
    assert torch.nonzero(grad)[:, 0].tolist() == [2]


@both_decoders
@with_and_without_missing
def test_keeping_every_timepoint_changes_no_bit_of_the_loss(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    every = torch.ones(B, W, dtype=torch.bool)
    losses = model(windows, mask, present), model(windows, mask, present, kept_BW=every)
    assert all(torch.equal(a, b) for a, b in zip(*losses))
    none = model(windows, mask, present, kept_BW=~every)
    assert [float(part.detach()) for part in none] == [0.0, 0.0, 0.0]


def test_tokens_are_drawn_among_the_scored_without_repetition() -> None:
    scored = torch.zeros(30, dtype=torch.bool)
    scored[[1, 4, 9, 16, 25]] = True
    drawn = [tuple(sorted(sample_hidden(scored, 3, mask_generator(0, i)).tolist())) for i in range(200)]
    assert all(len(set(ids)) == 3 and scored[list(ids)].all() for ids in drawn)
    assert len(set(drawn)) == 10  # all of 5 choose 3
    assert torch.equal(sample_hidden(scored, 3, mask_generator(1)), sample_hidden(scored, 3, mask_generator(1)))


def test_where_too_few_are_scored_others_fill_the_place() -> None:
    scored = torch.zeros(30, dtype=torch.bool)
    scored[[1, 4]] = True
    found = sample_hidden(scored, 6, mask_generator(0))
    assert sorted(found[:2].tolist()) == [1, 4]
    assert len(set(found.tolist())) == 6
    assert not scored[found[2:]].any()


# ---------------------------------------------------------------------- weights


@both_decoders
@pytest.mark.parametrize("parcel_embedding", [True, False])
def test_gradient_reaches_every_parameter(
    contract: InputContract, windows: Tensor, decoder: Decoder, parcel_embedding: bool
) -> None:
    model = initialised(build(contract, decoder, parcel_embedding=parcel_embedding))
    model(windows, mask_of()).mean.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []
    codes = [module for name, module in model.named_modules() if name.endswith(".parcel")]
    assert len(codes) == 2 * parcel_embedding
    for code in codes:
        assert (code.weight.grad.abs().sum(dim=1) > 0).all()


@both_decoders
def test_bfloat16_is_close_to_float32(contract: InputContract, windows: Tensor, decoder: Decoder) -> None:
    model, mask = build(contract, decoder), mask_of(present=PRESENT)
    expected = model.reconstruct(windows, mask, PRESENT)
    loss = model(windows, mask, PRESENT).mean.item()
    model = model.bfloat16()
    found = model.reconstruct(windows, mask, PRESENT)
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), expected.isnan())
    error = (found - expected)[~expected.isnan()]
    assert error.square().mean().sqrt() < 0.03 * expected[~expected.isnan()].std()
    assert model(windows, mask, PRESENT).mean.item() == pytest.approx(loss, rel=0.03)


def test_untrained_predictions_are_near_the_mean(contract: InputContract, windows: Tensor) -> None:
    loss = initialised(build(contract))(windows, mask_of())
    assert (loss.sum / loss.target_sum).item() == pytest.approx(1.0, abs=0.1)


def test_the_generator_decides_the_initial_weights(contract: InputContract) -> None:
    model = BrainLM(build(contract).config, contract)
    states: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # no matter
        model.init_weights(torch.Generator().manual_seed(seed))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_keys_begin_as_queries(contract: InputContract) -> None:
    model = BrainLM(build(contract).config, contract)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == 4
    for layer in layers:
        assert torch.equal(layer.key_value.weight[: layer.query.out_features], layer.query.weight)


def test_the_untrained_control_has_the_same_sizes_and_other_weights(contract: InputContract) -> None:
    model = build(contract)
    fresh, same, other = (BrainLM.untrained_like(model, seed) for seed in (0, 0, 1))
    assert fresh.config == model.config
    assert not fresh.training
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), same.parameters()))
    for another in (model, other):
        assert not torch.equal(fresh.patch_embed.weight, another.patch_embed.weight)


# ---------------------------------------------------------------------- attention


def watched_inputs(layer: nn.Module, run: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """What an attention layer was given while `run` ran."""
    seen: list[tuple] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    run()
    handle.remove()
    (args,) = seen
    return args


def used_rows(mask: Tensor, present: Tensor | None) -> Tensor:
    """Rows of the hidden tokens after CLS, windows with fewer filled up as the model does."""
    wanted = mask if present is None else mask & present.repeat_interleave(K, dim=1)
    return 1 + torch.argsort((~wanted).to(torch.uint8), dim=1, stable=True)[:, : int(wanted.sum(dim=1).max())]


@both_decoders
@with_and_without_missing
@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_is_the_softmax_that_the_model_used(
    contract: InputContract, windows: Tensor, decoder: Decoder, present: Tensor | None, part: Any, layer: int
) -> None:
    model, mask = build(contract, decoder), mask_of(present=present)
    weights, query_ids, key_ids = model.attention(windows, mask, present, part=part, layers=[layer])[0]
    attention = getattr(model, part)[layer].attention
    x, memory, valid = watched_inputs(attention, lambda: model.reconstruct(windows, mask, present))
    heads, width = attention.num_heads, attention.query.out_features
    q = attention.query(x).double().view(B, -1, heads, width // heads)
    k = attention.key_value(memory)[..., :width].double().view(B, -1, heads, width // heads)
    scores = torch.einsum("bnhe,bmhe->bhnm", q, k) / (width // heads) ** 0.5
    if valid is not None:
        scores[~valid[:, None, None].expand_as(scores)] = -torch.inf
    if x.shape[1] < weights.shape[2]:  # the last layer of a full decoder computes the hidden tokens alone
        assert (part, decoder, layer % 2) == ("decoder", "full", 1)
        weights_used = weights.gather(2, used_rows(mask, present)[:, None, :, None].expand_as(scores))
    else:
        weights_used = weights
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(weights_used.double(), expected, atol=1e-6, rtol=0)
    assert weights.shape == (B, heads, query_ids.shape[1], key_ids.shape[1])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


@both_decoders
def test_attention_says_which_token_each_row_and_column_is(
    contract: InputContract, windows: Tensor, decoder: Decoder
) -> None:
    model, mask = build(contract, decoder), mask_of(present=PRESENT)
    here = PRESENT.repeat_interleave(K, dim=1)
    _, queries, keys = model.attention(windows, mask, PRESENT)[0]
    assert torch.equal(queries, keys)
    _, hidden, memory = model.attention(windows, mask, PRESENT, part="decoder")[0]
    for i in range(B):
        visible = torch.nonzero(~mask[i] & here[i])[:, 0].tolist()
        padding = [-2] * (keys.shape[1] - 1 - len(visible))
        assert keys[i].tolist() == [-1, *visible, *padding]
        if decoder == "cross":
            assert memory[i].tolist() == keys[i].tolist()
            wanted = torch.nonzero(mask[i] & here[i])[:, 0].tolist()
            assert hidden[i].tolist() == wanted + [-2] * (hidden.shape[1] - len(wanted))
        else:
            assert memory[i].tolist() == hidden[i].tolist() == [-1, *range(L)]


@both_decoders
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_padding_and_missing_parcels_are_not_attended_to(
    contract: InputContract, windows: Tensor, decoder: Decoder, part: Any
) -> None:
    mask = mask_of(present=PRESENT)
    weights, _, key_ids = build(contract, decoder).attention(windows, mask, PRESENT, part=part)[0]
    absent = ~PRESENT.repeat_interleave(K, dim=1)
    ignored = (key_ids == -2) | ((key_ids >= 0) & absent.gather(1, key_ids.clamp(min=0)))
    assert ignored.any()
    assert (weights[ignored[:, None, None, :].expand_as(weights)] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many values the largest tensor had that an operation gave."""

    num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.num_values = max(self.num_values, found.numel())
        return found


def test_attention_weights_are_in_memory_for_a_block_of_queries_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainlm.attention_maps.QUERY_BLOCK", 2)
    num_parcels = 100
    ones = np.ones(num_parcels, dtype=np.float32)
    contract = InputContract(
        atlas=synthetic_atlas(num_parcels), covered=ones > 0, median=0 * ones, iqr=ones, tr_s=2.0,
        window_len=W, patch_len=PATCH,
    )  # fmt: skip
    model, one, tokens = build(contract), torch.zeros(1, num_parcels, W), num_parcels * K + 1
    heads, width = model.config.num_heads, model.config.mlp_width
    most = max(2 * heads * tokens, 2 * tokens * width, (num_parcels + 1) ** 2)
    assert most < heads * tokens**2 / 4  # or nothing would be shown
    with LargestTensor() as largest:
        model.parcel_attention(one)
    assert largest.num_values <= most
    with LargestTensor() as largest:
        model.attention(one, queries=slice(0, 3))
    assert largest.num_values <= max(most, 3 * heads * tokens)


def test_attention_of_some_queries_is_those_rows(contract: InputContract, windows: Tensor) -> None:
    model = build(contract)
    weights, query_ids, key_ids = model.attention(windows)[0]  # nothing hidden
    assert weights.shape == (B, 2, 1 + L, 1 + L)
    some, some_ids, same_keys = model.attention(windows, queries=slice(3, 8))[0]
    torch.testing.assert_close(some, weights[:, :, 3:8])
    assert torch.equal(some_ids, query_ids[:, 3:8])
    assert torch.equal(same_keys, key_ids)


@both_decoders
@with_and_without_missing
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parcel_attention_is_attention_summed_over_keys_and_averaged_over_queries(
    contract: InputContract,
    windows: Tensor,
    decoder: Decoder,
    present: Tensor | None,
    part: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("brainlm.attention_maps.QUERY_BLOCK", 5)  # several blocks of queries
    model, mask = build(contract, decoder), mask_of(present=present)
    mask.view(B, P, K)[0, 3] = part == "encoder"  # a parcel without query tokens
    found = model.parcel_attention(windows, mask, present, part=part)
    weights, query_ids, key_ids = model.attention(windows, mask, present, part=part)[0]
    expected = torch.full((B, P, P), float("nan"))
    for i in range(B):
        for to in range(P):
            rows = [n for n, token in enumerate(query_ids[i].tolist()) if token >= 0 and token // K == to]
            for parcel in range(P if rows else 0):
                columns = [m for m, token in enumerate(key_ids[i].tolist()) if token >= 0 and token // K == parcel]
                expected[i, to, parcel] = weights[i][:, rows][:, :, columns].sum(dim=-1).mean()
    assert_equal_where_finite(found, expected, rtol=1e-5, atol=1e-6)
    if part == "encoder" or decoder == "cross":
        assert found[0, 3].isnan().all()


def test_attention_that_does_not_exist_is_refused(contract: InputContract, windows: Tensor) -> None:
    model = build(contract)
    with pytest.raises(DataError, match="decoder attention needs a mask"):
        model.attention(windows, part="decoder")
    for layer in (2, -3):
        with pytest.raises(ConfigError, match=f"layer {layer} asked for, the encoder has 2"):
            model.attention(windows, layers=[layer])


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "model.depth: expected at least 1, found 0"),
        ({"width": 10, "num_heads": 4}, "model.width=10 must be a multiple of model.num_heads=4"),
        ({"decoder_width": 9}, "model.decoder_width=9 must be a multiple of model.decoder_num_heads=2"),
        ({"window_len": 50}, "model.window_len=50 must be two or more times model.patch_len=20"),
        ({"window_len": 20}, "model.window_len=20 must be two or more times model.patch_len=20"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changes)  # type: ignore[arg-type]


def test_no_size_is_without_use(contract: InputContract) -> None:
    """Every field of the sizes changes the model, so none is kept for nothing."""
    base = build(contract)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    other: dict[str, Any] = {
        "width": 24, "depth": 1, "num_heads": 4, "mlp_width": 8, "decoder": "full", "decoder_width": 6,
        "decoder_depth": 1, "decoder_num_heads": 2, "decoder_mlp_width": 8, "parcel_embedding": False,
        "window_len": 10, "patch_len": 2, "patch_parcels": 2,
    }  # fmt: skip
    assert set(other) == {field.name for field in dataclasses.fields(ModelConfig)}
    for name, value in other.items():
        changed = build(contract, **{name: value})
        same_shapes = {n: tuple(p.shape) for n, p in changed.named_parameters()} == shapes
        assert not same_shapes or name in ("num_heads", "decoder_num_heads", "window_len")
    windows, mask = torch.ones(1, P, W) * torch.arange(W), mask_of(num_windows=1)
    for name in ("num_heads", "decoder_num_heads"):
        found = build(contract, **{name: other[name]}).reconstruct(windows, mask)
        assert not torch.equal(found.nan_to_num(), base.reconstruct(windows, mask).nan_to_num())


def test_encoded_latents_can_be_read_without_a_mask(contract: InputContract, windows: Tensor) -> None:
    nothing_hidden = torch.zeros(B, L, dtype=torch.bool)
    encoded = build(contract).encode(windows, nothing_hidden)
    assert isinstance(encoded, Encoded)
    assert encoded.latent.shape == (B, 1 + L, 16)
