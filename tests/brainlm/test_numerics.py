"""What docs/numerics.md says, with some room: repeats to the bit, company without influence, precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM
from brainlm.presets import preset
from brainlm.testing import synthetic_atlas
from brainlm.windows import Windows, pad_windows

P, W, LONGER, PATCH = 40, 200, 260, 20
SAME = 1e-5  # in SD of the predictions; what the order of sums in float32 may change

both_decoders = pytest.mark.parametrize("decoder", ["cross", "full"])


def contract_of(order: np.ndarray | slice = slice(None)) -> InputContract:
    atlas = synthetic_atlas(P)
    ones = np.ones(P, dtype=np.float32)
    return InputContract(
        atlas=replace(atlas, coords_mm=atlas.coords_mm[order]), covered=ones > 0, median=0 * ones, iqr=ones, tr_s=2.0,
        window_len=W, patch_len=PATCH,
    )  # fmt: skip


def model_of(decoder: str) -> BrainLM:
    """Return `tiny`, with predictions of the size of the signal: initial ones are near 0, and errors with them."""
    model = BrainLM(replace(preset("tiny"), decoder=decoder), contract_of())  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.decoder_pred.weight.mul_(10)
    return model.eval()


def noise(count: int, length: int = W, seed: int = 0) -> Tensor:
    return torch.randn(count, P, length, generator=torch.Generator().manual_seed(seed))


def masks(count: int, length: int = W, seed: int = 0) -> Tensor:
    return torch.stack([make_mask("random", P, length // PATCH, 0.75, mask_generator(seed, i)) for i in range(count)])


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of hidden values, in SD of the expected ones."""
    assert torch.equal(found.isnan(), expected.isnan())
    hidden = ~expected.isnan()
    return float((found[hidden].double() - expected[hidden].double()).abs().max() / expected[hidden].std())


def gradients(model: BrainLM, values: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the loss and the gradient of every weight."""
    model.zero_grad(set_to_none=True)
    loss = model(values, mask).mean
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of the difference of all gradients over their norm."""
    flat, truth = (torch.cat([x.double().flatten() for x in some[1:]]) for some in (found, expected))
    return float((flat - truth).norm() / truth.norm())


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@both_decoders
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_same_step_gives_the_same_bits(decoder: str, num_threads: int, two_threads: None) -> None:
    model, values, mask = model_of(decoder), noise(3), masks(3)  # three: of two windows, any order gives the same sum
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(num_threads > 1)  # else threads add to one gradient in any order
    try:
        first = gradients(model, values, mask)
        for _ in range(3):
            again = gradients(model, values, mask)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@both_decoders
def test_company_does_not_change_a_prediction(decoder: str) -> None:
    model, values, mask = model_of(decoder), noise(8), masks(8)
    alone = model.reconstruct(values[:1], mask[:1])
    assert distance(model.reconstruct(values, mask)[:1], alone) < SAME

    joined = pad_windows([Windows.of(values[:1]), Windows.of(noise(1, LONGER, seed=1))], model.contract)
    padded = torch.ones(2, P, LONGER // PATCH, dtype=torch.bool)
    padded[0, :, : W // PATCH] = mask[0].view(P, -1)
    padded[1] = masks(1, LONGER, seed=1).view(P, -1)
    assert distance(model.reconstruct(joined, padded.flatten(1))[:1, :, :W], alone) < SAME


@both_decoders
def test_parcels_in_another_order_with_their_codes_give_the_same(decoder: str) -> None:
    model, values, mask = model_of(decoder), noise(1), masks(1)
    order = np.random.default_rng(0).permutation(P)
    state = model.state_dict()
    for part in ("position", "decoder_position"):
        state[f"{part}.parcel.weight"] = state[f"{part}.parcel.weight"][order]
    other = BrainLM(model.config, contract_of(order))
    other.load_state_dict(state)
    found = other.eval().reconstruct(values[:, order], mask.view(1, P, -1)[:, order].flatten(1))
    assert distance(found, model.reconstruct(values, mask)[:, order]) < SAME


@both_decoders
def test_threads_change_no_more_than_the_order_of_sums(decoder: str, two_threads: None) -> None:
    model, values, mask = model_of(decoder), noise(2), masks(2)
    found = {}
    for num in (2, 1):
        torch.set_num_threads(num)
        found[num] = model.reconstruct(values, mask), gradients(model, values, mask)
    assert distance(found[2][0], found[1][0]) < SAME
    assert relative(found[2][1], found[1][1]) < SAME


@both_decoders
def test_float32_is_near_float64(decoder: str) -> None:
    values, mask = noise(1), masks(1)
    exact, found = gradients(model_of(decoder).double(), values, mask), gradients(model_of(decoder), values, mask)
    assert relative(found, exact) < 1e-5
    assert float((found[0] - exact[0]).abs() / exact[0]) < 1e-5
    ours, theirs = model_of(decoder).reconstruct(values, mask), model_of(decoder).double().reconstruct(values, mask)
    assert distance(ours, theirs) < 1e-5


@both_decoders
def test_bfloat16_is_within_the_errors_of_its_eight_bits(decoder: str) -> None:
    values, mask = noise(1), masks(1)
    exact, found = gradients(model_of(decoder), values, mask), gradients(model_of(decoder).bfloat16(), values, mask)
    assert 1e-4 < relative(found, exact) < 3e-2  # below the first bound nothing was rounded
    assert float((found[0] - exact[0]).abs() / exact[0]) < 1e-3
    ours, theirs = model_of(decoder).bfloat16().reconstruct(values, mask), model_of(decoder).reconstruct(values, mask)
    assert distance(ours, theirs) < 0.1
