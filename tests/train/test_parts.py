"""The parts of training that need no process of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch

from brainlm.dataset import open_dataset
from brainlm.errors import ConfigError
from brainlm.testing import small_model
from brainlm.windows import Windows
from brainlm.world import World
from train.engine import deepspeed_dict
from train.held_out import HeldOut
from train.param_groups import param_groups
from train.pictures import draw_example
from train.precision import resolve_precision
from train.schedule import learning_rate_at
from train.settings import (
    DataSettings,
    EngineSettings,
    ModelChoice,
    OptimizerSettings,
    PretrainSettings,
    RunSettings,
    ValidationSettings,
    check_settings,
    num_steps,
)


def settings(**data: int) -> PretrainSettings:
    return PretrainSettings(run=RunSettings(out="unused"), data=DataSettings(dataset="unused", **data))


def test_the_learning_rate_warms_up_and_ends_at_its_floor() -> None:
    optimizer = OptimizerSettings(lr=1.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate_at(step, 100, optimizer) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate_at(100, 100, optimizer) == pytest.approx(0.1)


def test_the_learning_rate_stays_and_decays_at_the_end() -> None:
    optimizer = OptimizerSettings(lr=2.0, warmup_steps=4, schedule="wsd", decay_steps=10, final_lr_ratio=0.5)
    rates = [learning_rate_at(step, 50, optimizer) for step in range(51)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert set(rates[4:41]) == {2.0}
    assert rates[40:] == pytest.approx([2.0 - 0.1 * i for i in range(11)])
    tenth = dataclasses.replace(optimizer, decay_steps=None)
    assert [learning_rate_at(step, 50, tenth) for step in (45, 50)] == [2.0, 1.0]
    constant = OptimizerSettings(lr=2.0, warmup_steps=4, schedule="constant")
    assert {learning_rate_at(step, 50, constant) for step in range(4, 50)} == {2.0}


def test_the_peak_follows_the_batch_and_the_warm_up_the_steps() -> None:
    optimizer = OptimizerSettings(base_lr=1e-3, warmup_ratio=0.05)
    assert optimizer.peak_lr(512) == pytest.approx(2e-3)
    assert optimizer.num_warmup_steps(1000) == 50
    assert learning_rate_at(49, 1000, optimizer, 512) == pytest.approx(2e-3)
    assert (OptimizerSettings().peak_lr(512), OptimizerSettings().num_warmup_steps(5000)) == (1e-3, 100)


def test_a_run_is_as_long_as_its_steps_or_epochs() -> None:
    def steps(optimizer: OptimizerSettings, **run: Any) -> int:
        chosen = dataclasses.replace(settings(), run=RunSettings(out="unused", **run), optimizer=optimizer)
        return num_steps(chosen, steps_per_epoch=30)

    short = OptimizerSettings(warmup_steps=1)
    assert steps(short, steps=7) == 7
    assert steps(short, epochs=2.5) == 75
    assert steps(short) == 1000
    with pytest.raises(ConfigError, match=r"warmup_steps=100 must be below run\.steps=30 \(of run\.epochs=1\)"):
        steps(OptimizerSettings(), epochs=1)
    with pytest.raises(ConfigError, match="warmup_steps=5 and decay_steps=6 are more than"):
        steps(OptimizerSettings(warmup_steps=5, schedule="wsd", decay_steps=6), steps=10)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (RunSettings, {"out": "x", "steps": 1, "epochs": 1.0}),
        (RunSettings, {"out": "x", "max_hours": 0.0}),
        (RunSettings, {"out": "x", "max_skipped": -1}),
        (OptimizerSettings, {"lr": 1e-3, "base_lr": 1e-3}),
        (OptimizerSettings, {"warmup_steps": 1, "warmup_ratio": 0.1}),
        (OptimizerSettings, {"decay_steps": 5}),
        (OptimizerSettings, {"base_lr": 0.0}),
    ],
)
def test_settings_that_contradict_are_refused(section: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        section(**wrong)


def test_parts_may_learn_at_rates_of_their_own(dataset_url: str) -> None:
    model = small_model(open_dataset(dataset_url).contract, seed=0)
    groups = param_groups(model, 0.05, {"encoder.": 0.1})
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    slow = {id(p) for group in groups if group["lr_ratio"] == 0.1 for p in group["params"]}
    assert slow == {id(p) for p in model.encoder.parameters()}
    assert {group["weight_decay"] for group in groups if group["lr_ratio"] == 0.1} == {0.05, 0.0}


def test_only_matrices_of_linear_layers_decay(dataset_url: str) -> None:
    model = small_model(open_dataset(dataset_url).contract, seed=0)
    decayed, spared = (group["params"] for group in param_groups(model, 0.05))
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in decayed)
    assert any(p is model.cls_token for p in spared)
    assert any(p is model.patch_embed.weight for p in decayed)
    assert all(p is not model.position.parcel.weight for p in decayed)  # type: ignore[union-attr]


def test_the_deepspeed_dictionary_follows_from_the_settings() -> None:
    chosen = dataclasses.replace(settings(batch_size=16, micro_batch_size=2), engine=EngineSettings(precision="bf16"))
    generated = deepspeed_dict(chosen, world_size=4, num_parameters=1000)
    assert generated["train_batch_size"] == 16
    assert generated["train_micro_batch_size_per_gpu"] == 2
    assert generated["gradient_accumulation_steps"] == 2
    assert generated["bf16"] == {"enabled": True}
    assert generated["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}


def test_a_preset_keeps_its_sizes_where_none_are_given() -> None:
    chosen = ModelChoice(preset="13m", depth=2).resolved
    assert (chosen.depth, chosen.width, chosen.decoder) == (2, 512, "full")


@pytest.mark.parametrize("world_size", [3, 5])
def test_ranks_that_do_not_divide_the_batch_are_refused(world_size: int) -> None:
    with pytest.raises(ConfigError, match="must be a multiple"):
        check_settings(settings(batch_size=64), world_size)


def test_a_url_as_output_folder_is_refused_with_the_setting_that_takes_it() -> None:
    with pytest.raises(ConfigError, match=r"give the URL as run\.storage"):
        RunSettings(out="s3://bucket/run")


class OneRank:
    """What validation needs of an engine, in one process."""

    world = World(rank=0, local_rank=0, size=1)
    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def whole_tokens(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values


def test_validation_scores_the_recording_mean_as_zero_and_truth_as_one(
    dataset_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(dataset_url)
    model = small_model(dataset.contract, seed=0)
    contract = model.contract
    held_out = HeldOut(dataset.split("val"), contract, ValidationSettings(mask_ratio=0.5))
    engine = OneRank(model)

    def constant(windows: Windows, mask: torch.Tensor) -> torch.Tensor:
        guess = torch.from_numpy(-contract.median / contract.iqr)[None, :, None].expand_as(windows.values)
        return torch.where(model.unpatchify(hidden(mask)), guess, torch.nan)

    def truth(windows: Windows, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(model.unpatchify(hidden(mask)), windows.values, torch.nan)

    def hidden(mask: torch.Tensor) -> torch.Tensor:
        return mask[:, :, None].expand(-1, -1, contract.patch_len)

    monkeypatch.setattr(model, "reconstruct", constant)
    assert held_out.score(engine)["val_r2"] == pytest.approx(0.0, abs=1e-6)  # type: ignore[arg-type]
    monkeypatch.setattr(model, "reconstruct", truth)
    assert held_out.score(engine) == {"val_loss": 0.0, "val_r2": 1.0}  # type: ignore[arg-type]


def test_validation_agrees_with_a_direct_computation(dataset_url: str) -> None:
    dataset = open_dataset(dataset_url)
    model = small_model(dataset.contract, seed=1).eval()
    contract, reader = model.contract, dataset.split("val")
    held_out = HeldOut(reader, contract, ValidationSettings(mask_ratio=0.5))
    sse = sst = 0.0
    for number, held in enumerate(held_out.windows):
        window = held.batch.values[0]
        predicted = model.reconstruct(window[None], held.mask[None], held.batch.present)[0].numpy().T
        series = reader.recording(number)  # one window a recording here
        start = next(s for s in range(len(series)) if np.allclose(
            (series[s] - contract.median) / contract.iqr, window[:, 0].numpy(), atol=1e-5))  # fmt: skip
        scored = np.isfinite(predicted)
        values = series[start : start + contract.window_len]
        error = predicted * contract.iqr + contract.median - values
        sse += float((error / series.std(axis=0))[scored].astype(float).__pow__(2).sum())
        sst += float((values / series.std(axis=0))[scored].astype(float).__pow__(2).sum())
    assert held_out.score(OneRank(model))["val_r2"] == pytest.approx(1 - sse / sst, rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fast", "stage", "expected"), [(True, 1, "bf16"), (False, 1, "fp32"), (True, 0, "fp32")])
def test_precision_is_what_the_machine_does_fast(
    fast: bool, stage: Literal[0, 1], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    automatic = dataclasses.replace(settings(), engine=EngineSettings(zero_stage=stage))
    assert resolve_precision(automatic).engine.precision == expected
    chosen = dataclasses.replace(settings(), engine=EngineSettings(zero_stage=1, precision="bf16"))
    assert resolve_precision(chosen) == chosen


def test_a_gpu_that_only_emulates_bf16_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    automatic = dataclasses.replace(settings(), engine=EngineSettings(zero_stage=1))
    assert resolve_precision(automatic).engine.precision == "fp32"


def test_an_example_shows_what_was_measured_and_rebuilt(dataset_url: str) -> None:
    dataset = open_dataset(dataset_url)
    held_out = HeldOut(dataset.split("val"), dataset.contract, ValidationSettings(mask_ratio=0.5))
    held_out.score(OneRank(small_model(dataset.contract)))  # type: ignore[arg-type]
    assert held_out.example is not None
    shown = np.isfinite(held_out.example.rebuilt)
    assert (shown <= held_out.example.hidden).all()
    assert 0.4 < shown.mean() < 0.6
    figure = draw_example(held_out.example)
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    measured, visible, rebuilt = (np.ma.filled(image, np.nan) for image in images)
    np.testing.assert_array_equal(measured, held_out.example.truth)
    np.testing.assert_array_equal(np.isnan(visible), held_out.example.hidden)
    np.testing.assert_array_equal(rebuilt[shown], held_out.example.rebuilt[shown])
