"""The estimate of memory by `--dry-run`, beside what autograd keeps and what training runs have needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brainlm.config import load_config
from brainlm.dataset import open_dataset
from brainlm.model import BrainLM
from brainlm.presets import preset
from brainlm.tokens import hidden_ids
from tests.train.conftest import Trained, metrics
from train.activations import Sizes, kept, parts
from train.memory import Moment, describe, estimate
from train.plan import blank_contract
from train.settings import PretrainSettings

NUM_PARCELS, BATCH, NUM_DECODED = 40, 3, 50
TOLERANCE = 0.15
CHANGES: dict[str, tuple[str, dict[str, object]]] = {
    "cross": ("tiny", {}),
    "cross, deep": ("tiny", {"depth": 2, "decoder_depth": 3, "decoder_width": 32, "decoder_num_heads": 2}),
    "full": ("1m", {"width": 44, "mlp_width": 88, "decoder_width": 44}),
    "full, one block": ("1m", {"decoder_depth": 1, "decoder_width": 32, "decoder_mlp_width": 48}),
    "full, deep": ("4m", {"width": 48, "decoder_width": 24, "mlp_width": 40, "decoder_depth": 3}),
    "no code of parcels": ("tiny", {"parcel_embedding": False, "patch_len": 10}),
    "groups": ("1m", {"patch_parcels": 4, "width": 44}),
    "groups, cross": ("tiny", {"patch_parcels": 3}),
}


def kept_by_autograd(model: BrainLM, mask_ratio: float, num_decoded: int | None) -> int:
    """Return the bytes of distinct storages that a forward pass saves, without weights, buffers and the batch."""
    num_tokens = model.num_rows * model.config.num_patches
    mask = torch.rand(BATCH, num_tokens).argsort(dim=1) < round(mask_ratio * num_tokens)
    windows = torch.randn(BATCH, model.num_parcels, model.config.window_len)
    present = torch.ones(BATCH, model.num_parcels, dtype=torch.bool)
    ids = None if num_decoded is None else hidden_ids(mask)[:, :num_decoded].clone()
    given = [windows, mask, present, *model.parameters(), *model.buffers(), *([] if ids is None else [ids])]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(windows, mask, present, ids)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_decoded", [None, NUM_DECODED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHANGES)
def test_activations_are_those_that_autograd_keeps(
    name: str, dtype: torch.dtype, num_decoded: int | None, recompute: bool
) -> None:
    base, changes = CHANGES[name]
    config = dataclasses.replace(preset(base), **changes)  # type: ignore[arg-type]
    model = BrainLM(config, blank_contract(NUM_PARCELS, config)).to(dtype)
    model.recompute_activations = recompute
    for mask_ratio in (0.5, 0.9):
        sizes = Sizes(
            batch=BATCH, mask_ratio=mask_ratio, num_decoded=num_decoded, element=dtype.itemsize,
            recompute=recompute, blocked=dtype == torch.bfloat16,
        )  # fmt: skip
        assert kept(config, NUM_PARCELS, sizes) == kept_by_autograd(model, mask_ratio, num_decoded)
        assert sum(part.num_parameters for part in parts(config, NUM_PARCELS, sizes)) == model.num_parameters


def moments(config: Path, *overrides: str, world_size: int = 1) -> list[Moment]:
    settings = load_config(PretrainSettings, str(config), list(overrides))
    model = BrainLM(settings.model.resolved, open_dataset(settings.data.dataset).contract)
    return estimate(settings, model, world_size, on_gpu=False)


@pytest.mark.parametrize("batch_size", [4, 1024])
def test_the_estimate_is_near_what_a_run_needs(
    tmp_path: Path, write_config: Callable[[Path], Path], trained: Trained, batch_size: int
) -> None:
    options = ("run.steps=3", f"data.batch_size={batch_size}", "data.windows_per_recording=128", "masks.ratios=[0.5]")
    measured = max(row["memory_gb"] for row in metrics(trained(*options)).values())
    expected = moments(write_config(tmp_path), *options)[0].total / 1e9
    assert expected == pytest.approx(measured, rel=TOLERANCE)


def test_ranks_share_what_a_stage_divides(tmp_path: Path, write_config: Callable[[Path], Path]) -> None:
    config = write_config(tmp_path)
    sizes = "model.width=512", "model.mlp_width=4096", "run.max_skipped=0"
    needed = {
        (stage, ranks): moments(config, *sizes, f"engine.zero_stage={stage}", world_size=ranks)[0].total
        for stage in (0, 1, 2, 3)
        for ranks in (1, 4)
    }
    assert needed[0, 4] > needed[1, 4] >= needed[2, 4]
    for stage in (1, 2, 3):
        assert needed[stage, 4] < needed[stage, 1]


def test_checkpointing_leaves_the_inputs_of_blocks(tmp_path: Path, write_config: Callable[[Path], Path]) -> None:
    config = write_config(tmp_path)
    options = "data.batch_size=1024", "data.windows_per_recording=128", "model.depth=8"
    plain = moments(config, *options)[0]
    again = moments(config, *options, "engine.activation_checkpointing=true")[0]
    assert again.bytes["activations"] < 0.5 * plain.bytes["activations"]


def test_the_largest_moment_is_named_with_what_it_consists_of(
    tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    found = moments(write_config(tmp_path), "data.batch_size=1024", "data.windows_per_recording=128")
    first, second = describe(found, on_gpu=False)
    assert "in the backward pass: process" in first
    assert "activations" in first
    assert "update" in second
