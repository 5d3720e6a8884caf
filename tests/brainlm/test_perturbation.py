"""Perturbation of small models: gradients reach every patch, distances fall, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.perturbation import PerturbationSettings, perturb, perturb_in_batches
from brainlm.testing import small_model, write_synthetic_dataset
from brainlm.windows import Windows

WINDOW_LEN, PATCH_LEN, NUM_PARCELS = 40, 10, 12


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> InputContract:
    dataset = write_synthetic_dataset(
        str(tmp_path_factory.mktemp("data") / "dataset"),
        num_subjects={"train": 4, "val": 1, "test": 1},
        num_timepoints=60,
        num_parcels=NUM_PARCELS,
        window_len=WINDOW_LEN,
        patch_len=PATCH_LEN,
    )
    return dataset.contract


@pytest.fixture(scope="module")
def model(contract: InputContract) -> BrainLM:
    return small_model(contract)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y() -> Tensor:
    return torch.randn(5, NUM_PARCELS, WINDOW_LEN, generator=torch.Generator().manual_seed(2))


def cls(model: BrainLM, values: Tensor) -> Tensor:
    with torch.no_grad():
        return model.embed_windows(values).cls


def test_a_gradient_reaches_every_patch_from_the_cls_token(model: BrainLM, x: Tensor) -> None:
    values = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.embed_windows(values).cls.square().sum(), values)
    patches = gradient.reshape(5, NUM_PARCELS, WINDOW_LEN // PATCH_LEN, PATCH_LEN)
    assert bool((patches.abs().amax(dim=3) > 0).all())


def test_windows_come_to_their_targets(model: BrainLM, x: Tensor, y: Tensor) -> None:
    found = perturb(model, x, y, PerturbationSettings(steps=150, batch_size=2))
    assert bool((found.distance < 0.05).all())
    start = (cls(model, x) - cls(model, y)).square().sum(dim=1)
    torch.testing.assert_close(found.start_distance, start)
    end = (cls(model, x + found.change) - cls(model, y)).square().sum(dim=1)
    torch.testing.assert_close(found.distance, end / start, rtol=1e-3, atol=1e-5)
    assert found.num_steps.tolist() == [150] * 5


def test_one_window_is_what_a_plain_loop_of_adam_finds(model: BrainLM, x: Tensor, y: Tensor) -> None:
    settings = PerturbationSettings(steps=20, lr=0.03, norm_penalty=0.1)
    target = cls(model, y[:1])
    theta = torch.zeros_like(x[:1], requires_grad=True)
    adam = torch.optim.Adam([theta], lr=0.03)
    start = (cls(model, x[:1]) - target).square().sum()
    losses, thetas = [], []
    for _ in range(21):
        loss = (model.embed_windows(x[:1] + theta).cls - target).square().sum() / start + 0.1 * theta.square().mean()
        losses.append(float(loss.detach()))
        thetas.append(theta.detach().clone())
        adam.zero_grad()
        (theta.grad,) = torch.autograd.grad(loss, theta)
        adam.step()
    found = perturb(model, x[:1], target, settings)
    torch.testing.assert_close(found.change, thetas[int(np.argmin(losses))], rtol=1e-3, atol=1e-4)


def test_windows_know_nothing_of_their_batch(model: BrainLM, x: Tensor, y: Tensor) -> None:
    for target in ("cls", "decoded"):
        settings = PerturbationSettings(steps=10, target=target, batch_size=5)  # type: ignore[arg-type]
        together, alone = perturb(model, x, y, settings), perturb(model, x, y, replace(settings, batch_size=2))
        torch.testing.assert_close(together.change, alone.change, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.distance, alone.distance, rtol=1e-3, atol=1e-4)


def test_only_what_may_change_does(model: BrainLM, x: Tensor, y: Tensor) -> None:
    present = torch.ones(5, NUM_PARCELS, dtype=torch.bool)
    present[:, 3] = False
    kept = torch.ones(5, WINDOW_LEN, dtype=torch.bool)
    kept[:, 7] = False
    values = x.clone()
    values[:, 3] = float("nan")
    windows = Windows.of(values, present, kept)
    settings = PerturbationSettings(steps=5)
    change = perturb(model, windows, y, settings).change
    assert bool((change != 0)[:, [p for p in range(NUM_PARCELS) if p != 3]][:, :, kept[0]].all())
    assert not change[:, 3].any()
    assert not change[:, :, 7].any()
    part = perturb(model, windows, y, settings, parcels=[0, 5], timepoints=slice(10, 20)).change
    assert bool(part[:, [0, 5], 10:20].all())
    assert int((part != 0).sum()) == 5 * 2 * 10
    for nothing in ({"parcels": [3]}, {"timepoints": slice(7, 8)}):
        with pytest.raises(DataError, match="nothing may change"):
            perturb(model, windows, y, settings, **nothing)  # type: ignore[arg-type]


def test_a_gain_is_one_number_a_parcel(model: BrainLM, x: Tensor, y: Tensor) -> None:
    found = perturb(model, x, y, PerturbationSettings(steps=30, kind="gain"))
    gain = found.change / x
    torch.testing.assert_close(gain, gain[:, :, :1].expand_as(gain), rtol=1e-3, atol=1e-4)
    assert bool((found.distance < 1).all())


def test_a_penalty_keeps_the_change_small(model: BrainLM, x: Tensor, y: Tensor) -> None:
    free, held = (perturb(model, x, y, PerturbationSettings(steps=60, norm_penalty=penalty)) for penalty in (0.0, 10.0))
    assert float(held.change.square().mean()) < 0.5 * float(free.change.square().mean())
    assert bool((held.distance > free.distance).all())


def test_a_window_that_has_arrived_stays(model: BrainLM, x: Tensor, y: Tensor) -> None:
    y = torch.cat([x[:1], y[1:]])  # the first is there already
    settings = PerturbationSettings(steps=400, stop_distance=0.3)
    found = perturb(model, x, y, settings)
    assert bool((found.distance <= 0.3).all())
    assert found.num_steps[0] == 0
    assert not found.change[0].any()
    assert found.distance[0] == 0
    assert bool(((found.num_steps[1:] > 0) & (found.num_steps[1:] < 400)).all())
    one = perturb(model, x[2:3], y[2:3], settings)
    assert one.num_steps == found.num_steps[2]
    torch.testing.assert_close(one.change[0], found.change[2], rtol=1e-3, atol=1e-3)


def test_a_decoded_target_is_read_where_values_are_hidden(model: BrainLM, x: Tensor, y: Tensor) -> None:
    settings = PerturbationSettings(steps=40, target="decoded", seed=3)
    found = perturb(model, x, y, settings)
    assert bool((found.distance < 1).all())
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 1)  # of the second window
    half = torch.rand(NUM_PARCELS * 4, generator=generator).argsort() < NUM_PARCELS * 2
    decoded = torch.zeros(NUM_PARCELS, WINDOW_LEN)
    for mask in (half, ~half):
        predicted = model.reconstruct(x[1:2], mask[None])[0]
        decoded = torch.where(predicted.isfinite(), predicted, decoded)
    torch.testing.assert_close(found.start_distance[1], (decoded - y[1]).square().mean())
    with pytest.raises(DataError, match="needs windows to be compared with"):
        perturb(model, x, cls(model, y), settings)
    with pytest.raises(DataError, match="compared one by one"):
        perturb(model, x, y[:, :, :20], settings)


def test_the_model_is_as_it_was(model: BrainLM, x: Tensor, y: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.cls_token.requires_grad_(False)
    try:
        perturb(model, x, y, PerturbationSettings(steps=2))
        assert model.training
        assert not model.cls_token.requires_grad
        assert all(p.requires_grad for name, p in model.named_parameters() if name != "cls_token")
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()
        model.cls_token.requires_grad_(True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_targets_are_windows_or_tokens_one_each_or_one_for_all(model: BrainLM, x: Tensor, y: Tensor) -> None:
    settings = PerturbationSettings(steps=3, batch_size=2)
    by_windows, by_tokens = perturb(model, x, y, settings), perturb(model, x, cls(model, y), settings)
    torch.testing.assert_close(by_windows.change, by_tokens.change)
    for_all = perturb(model, x, cls(model, y).mean(dim=0), settings)
    assert len(for_all) == 5
    with pytest.raises(DataError, match="5 windows and 4 targets"):
        perturb(model, x, y[:4], settings)
    with pytest.raises(DataError, match="CLS tokens of width 32"):
        perturb(model, x, torch.zeros(5, 7), settings)
    with pytest.raises(ConfigError, match="from 0 to 11, found \\[12\\]"):
        perturb(model, x, y, settings, parcels=[12])
    with pytest.raises(DataError, match="not finite"):
        perturb(model, x * 1e30, y, settings)
    with pytest.raises(ConfigError, match="stop_distance"):
        PerturbationSettings(stop_distance=1.0)


def test_batches_are_given_one_by_one_and_progress_is_told(model: BrainLM, x: Tensor, y: Tensor) -> None:
    settings = PerturbationSettings(steps=1, batch_size=2)
    parts: Iterator[object] = perturb_in_batches(model, x, y, settings)
    assert [len(part) for part in parts] == [2, 2, 1]  # type: ignore[arg-type]
    said: list[tuple[int, int]] = []
    perturb(model, x, y, settings, progress=lambda done, total: said.append((done, total)))
    assert said == [(2, 5), (4, 5), (5, 5)]
