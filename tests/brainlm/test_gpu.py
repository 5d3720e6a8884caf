"""The GPU path. Skipped where there is no GPU; CI has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainlm.atlas import Atlas
from brainlm.input_contract import InputContract
from brainlm.layers import attend
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM, ModelConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU on this machine")
NUM_PARCELS = 48


def model_of(decoder: str) -> BrainLM:
    rng = np.random.default_rng(0)
    ones = np.ones(NUM_PARCELS)
    atlas = Atlas(
        name="gpu", sha256="", labels=np.arange(NUM_PARCELS), coords_mm=rng.normal(0, 40, (NUM_PARCELS, 3)),
        parcel_names=tuple(f"p{i}" for i in range(NUM_PARCELS)),
    )  # fmt: skip
    contract = InputContract(
        atlas=atlas, covered=ones > 0, median=0 * ones, iqr=ones, tr_s=2.0, window_len=100, patch_len=20
    )
    torch.manual_seed(0)
    config = ModelConfig(
        width=128, num_heads=2, mlp_width=128, decoder=decoder, decoder_width=128, window_len=100,  # type: ignore[arg-type]
    )  # fmt: skip
    return BrainLM(config, contract)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.randn(4, NUM_PARCELS, 100, generator=torch.Generator().manual_seed(1))
    masks = [make_mask("random", NUM_PARCELS, 5, 0.75, mask_generator(0, i)) for i in range(4)]
    return windows, torch.stack(masks)


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_loss_and_gradients_on_the_gpu_are_those_of_the_cpu(decoder: str) -> None:
    windows, mask = batch()
    here, there = model_of(decoder), model_of(decoder).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    here(windows, mask).mean.backward()
    there(windows.cuda(), mask.cuda()).mean.backward()
    for (name, ours), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None, name
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_bfloat16_on_the_gpu_is_near_float32(decoder: str) -> None:
    windows, mask = batch()
    exact = model_of(decoder)(windows, mask).mean
    rounded = model_of(decoder).cuda().bfloat16()(windows.cuda(), mask.cuda()).mean
    assert abs(rounded.item() - exact.item()) < 1e-2 * exact.item()


def test_attention_runs_in_a_flash_kernel() -> None:
    windows, mask = batch()
    model = model_of("full").cuda().bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        model(windows.cuda(), mask.cuda()).mean.backward()
        torch.cuda.synchronize()
    kernels = " ".join(event.key.lower() for event in profile.key_averages())
    assert "flash" in kernels or "cudnn" in kernels, kernels


@pytest.mark.parametrize("masked", [False, True])
def test_memory_of_attention_is_linear_in_length(masked: bool) -> None:
    def peak_bytes(num_tokens: int) -> int:
        q, k, v = (torch.randn(1, 4, num_tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        valid = torch.ones(1, num_tokens, dtype=torch.bool, device="cuda") if masked else None
        if valid is not None:
            valid[:, ::7] = False
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), valid).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak_bytes(16384) < 2.5 * peak_bytes(8192)


def test_reading_functions_work_on_the_gpu() -> None:
    windows, mask = batch()
    model = model_of("cross").eval()
    ours = model.reconstruct(windows, mask)
    attention = model.parcel_attention(windows, mask, part="decoder")
    model.cuda()
    torch.testing.assert_close(
        model.reconstruct(windows.cuda(), mask.cuda()).cpu(), ours, rtol=1e-3, atol=1e-4, equal_nan=True
    )
    theirs = model.parcel_attention(windows.cuda(), mask.cuda(), part="decoder").cpu()
    torch.testing.assert_close(theirs, attention, rtol=1e-3, atol=1e-5, equal_nan=True)
