"""Attention against a reference written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brainlm.attention_maps import query_key, softmax_weights
from brainlm.layers import (
    QUERY_BLOCK,
    Attention,
    Block,
    BlockedAttention,
    attend,
)

B, H, N, M, E = 2, 3, 2 * QUERY_BLOCK + 37, 90, 8  # three blocks of queries, the last one not full
BF16_TOLERANCE = 2.0**-5  # of the largest value; bfloat16 keeps 8 bits, and a gradient passes three products
FLOAT32_ERROR, BF16_ERROR = 4e-6, 2e-2  # at most, of the largest value; `attend` states what was measured


def tensors(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, N, E), (B, H, M, E), (B, H, M, E), (B, H, N, E)]
    q, k, v, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy


def some_valid() -> Tensor:
    valid = torch.rand(B, M, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, 0] = True
    return valid


def reference(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Output and gradients of q, k and v in float64, term by term."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bhne,bhme->bhnm", q, k) / math.sqrt(E)
    weights = scores.exp() if valid is None else scores.exp() * valid[:, None, None, :]
    y = torch.einsum("bhnm,bhme->bhne", weights / weights.sum(dim=-1, keepdim=True), v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy.double())]


def blocked(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, valid: Tensor | None) -> list[Tensor]:
    y = BlockedAttention.apply(q, k, v, valid)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]


@pytest.mark.parametrize("valid", [None, some_valid()], ids=["all valid", "some valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_blocked_attention_and_its_gradients_equal_the_float64_reference(
    dtype: torch.dtype, valid: Tensor | None
) -> None:
    inputs = tensors(dtype)
    for name, found, expected in zip(["y", "dq", "dk", "dv"], blocked(*inputs, valid), reference(*inputs, valid)):
        assert found.dtype == dtype
        tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else 1e-5  # gradients of k and v are summed in float32
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: {error:.2g}"


def attended(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, valid: Tensor | None) -> list[Tensor]:
    y = attend(q, k, v, valid)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]


@pytest.mark.parametrize("valid", [None, some_valid()], ids=["all valid", "some valid"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "heads cut from rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_and_its_gradients_equal_the_float64_reference(
    dtype: torch.dtype, strided: bool, valid: Tensor | None
) -> None:
    inputs = tensors(dtype)
    if strided:
        cut = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
        inputs = cut[0].requires_grad_(), cut[1].requires_grad_(), cut[2].requires_grad_(), cut[3]
        assert not any(x.is_contiguous() for x in inputs)
    for name, found, expected in zip(["y", "dq", "dk", "dv"], attended(*inputs, valid), reference(*inputs, valid)):
        assert found.dtype == dtype
        tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else FLOAT32_ERROR
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: {error:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32_ERROR), (torch.bfloat16, BF16_ERROR)], ids=str)
def test_the_stated_error_holds_at_the_width_and_number_of_keys_of_the_13m_encoder(
    dtype: torch.dtype, bound: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, 4, n, 128, generator=generator).to(dtype) for n in (256, 1061, 1061, 256))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y = (exact[0] @ exact[1].transpose(-1, -2) / math.sqrt(128)).softmax(dim=-1) @ exact[2]
    expected = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    for name, found, wanted in zip(["y", "dq", "dk", "dv"], attended(q, k, v, dy, None), expected):
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        assert error < bound, f"{name}: {error:.2g}"


@pytest.mark.parametrize("valid", [None, some_valid()], ids=["all valid", "some valid"])
def test_blocked_attention_equals_scaled_dot_product_attention(valid: Tensor | None) -> None:
    q, k, v, dy = tensors(torch.float32)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if valid is None else valid[:, None, None, :])
    expected = [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]
    for found, wanted in zip(blocked(q, k, v, dy, valid), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_blocked_attention_sums_gradients_of_many_queries_without_losing_them() -> None:
    num_queries = 300 * QUERY_BLOCK
    q = torch.zeros(1, 1, num_queries, E, dtype=torch.bfloat16)
    k, v = (torch.zeros(1, 1, 2, E, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    BlockedAttention.apply(q, k, v, None).backward(torch.ones_like(q))
    assert v.grad is not None
    assert (
        v.grad == num_queries / 2
    ).all()  # each key has half of every query; a bfloat16 sum would stop at 256 blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_valid_are_never_seen(dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(dtype)
    valid = some_valid()
    changed_k, changed_v = (torch.where(valid[:, None, :, None], x, 100 * torch.ones_like(x)) for x in (k, v))
    assert torch.equal(attend(q, k, v, valid), attend(q, changed_k, changed_v, valid))


def test_bfloat16_on_a_cpu_takes_the_blocked_way() -> None:
    q, k, v, dy = tensors(torch.bfloat16)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # as heads are cut
    assert not strided[0].is_contiguous()
    assert torch.equal(attend(strided[0], strided[1], strided[2]), blocked(q, k, v, dy, None)[0])


@pytest.mark.parametrize("valid", [None, some_valid()], ids=["all valid", "some valid"])
def test_attention_weights_are_the_ones_that_attention_uses(valid: Tensor | None) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3)
    x, memory = torch.randn(B, 5, 12), torch.randn(B, M, 12)
    weights = softmax_weights(*query_key(layer, x, memory, None), valid)
    assert weights.shape == (B, 3, 5, M)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, 3, 5))
    if valid is not None:
        assert (weights[~valid[:, None, None, :].expand_as(weights)] == 0).all()
    v = layer.key_value(memory)[..., 12:].view(B, M, 3, 4).transpose(1, 2)
    torch.testing.assert_close(layer(x, memory, valid), layer.out((weights @ v).transpose(1, 2).flatten(2)))


def test_a_block_is_pre_norm_with_two_residuals() -> None:
    torch.manual_seed(0)
    x, memory = torch.randn(2, 4, 8), torch.randn(2, 6, 8)
    for cross in (False, True):
        block = Block(8, 2, 16, cross=cross)
        for norm in (block.norm_attention, block.norm_memory, block.norm_mlp):
            if norm is not None:
                torch.nn.init.normal_(norm.weight)
        normed = block.norm_attention(x)
        keys = normed if block.norm_memory is None else block.norm_memory(memory)
        y = x + block.attention(normed, keys)
        y = y + block.mlp_out(F.gelu(block.mlp_in(block.norm_mlp(y))))
        torch.testing.assert_close(block(x, memory if cross else None), y)


@pytest.mark.parametrize("valid", [None, some_valid()[:, :6]], ids=["all valid", "some valid"])
def test_a_self_attention_block_can_compute_only_the_rows_that_are_read(valid: Tensor | None) -> None:
    torch.manual_seed(0)
    block, rows = Block(8, 2, 16), torch.tensor([[4, 0], [1, 1]])
    x = torch.randn(2, 6, 8, requires_grad=True)
    gradient = torch.randn(2, 2, 8)
    wanted = block(x, valid_BM=valid).gather(1, rows[:, :, None].expand(-1, -1, 8))
    found = block(x, valid_BM=valid, rows_BQ=rows)
    torch.testing.assert_close(found, wanted)
    parameters = [x, *block.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(found, parameters, gradient), torch.autograd.grad(wanted, parameters, gradient)
    ):
        torch.testing.assert_close(ours, expected)
