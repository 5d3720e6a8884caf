"""Named sizes: their parameters by an independent formula, their cost against torch's own counter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brainlm.errors import ConfigError
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.model import BrainLM, ModelConfig
from brainlm.presets import LADDER, PRESETS, flops_per_window, num_parameters, preset, rung
from brainlm.testing import synthetic_atlas
from brainlm.tokens import sample_hidden

PAPER_PARCELS = 424
ROW = r"^\| `([\w-]+)` \|" + r" ([^|]+) \|" * 7 + "$"


def contract_of(num_parcels: int, config: ModelConfig) -> InputContract:
    return InputContract(
        atlas=synthetic_atlas(num_parcels),
        covered=np.ones(num_parcels, dtype=bool),
        median=np.zeros(num_parcels, dtype=np.float32),
        iqr=np.ones(num_parcels, dtype=np.float32),
        tr_s=2.0,
        window_len=config.window_len,
        patch_len=config.patch_len,
    )


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def block(width: int, mlp_width: int, num_norms: int) -> int:
    """Query, key, value and output; two feed-forward layers; norms of a scale and a shift."""
    return 4 * linear(width, width) + linear(width, mlp_width) + linear(mlp_width, width) + num_norms * 2 * width


def position(width: int) -> int:
    """27 features of space (3 coordinates, sine and cosine of 4 waves each), 32 of time, one code a parcel."""
    return linear(27, width) + linear(32, width) + PAPER_PARCELS * width


def parameters(width: int, depth: int, mlp_width: int, decoder_depth: int, decoder_norms: int) -> int:
    encoder = linear(20, width) + position(width) + width + depth * block(width, mlp_width, 2) + 2 * width
    decoder = linear(width, width) + position(width) + width + decoder_depth * block(width, mlp_width, decoder_norms)
    return encoder + decoder + 2 * width + linear(width, 20)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", parameters(64, 1, 128, 1, 3)),
        ("13m", parameters(512, 4, 1024, 2, 2)),
        ("111m", parameters(960, 10, 1920, 5, 2)),
    ],
)
def test_parameters_of_a_preset_are_the_ones_counted_by_hand(name: str, expected: int) -> None:
    assert num_parameters(preset(name), PAPER_PARCELS) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("decoder", ["full", "cross"])
def test_parameters_of_a_preset_are_those_of_the_module(name: str, decoder: Literal["full", "cross"]) -> None:
    config = replace(preset(name), decoder=decoder)
    contract = contract_of(PAPER_PARCELS, config)
    with torch.device("meta"):
        model = BrainLM(config, contract)
    assert num_parameters(config, PAPER_PARCELS) == model.num_parameters


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_follows_its_rule(name: str) -> None:
    config = preset(name)
    millions = int(name.removesuffix("m"))
    assert num_parameters(config, PAPER_PARCELS) / 1e6 == pytest.approx(millions, rel=0.08)
    assert config.mlp_width == 2 * config.width
    assert config.num_heads == config.depth
    assert config.decoder_depth == -(-config.depth // 2)
    head_width = config.width // config.num_heads
    misses = [abs(num_parameters(rung(depth, 96), PAPER_PARCELS) / 1e6 / millions - 1) for depth in range(1, 25)]
    assert (head_width == 96) == (min(misses) < 0.08)


def test_the_13m_preset_has_the_size_of_the_published_one() -> None:
    config = preset("13m")
    assert parameters(512, 4, 1024, 2, 2) == pytest.approx(13e6, rel=0.05)
    # Ortega Caro et al. 2024: 200 timepoints in patches of 20, 4 encoder and 2 decoder layers over all tokens.
    assert (config.window_len, config.patch_len, config.depth, config.decoder_depth) == (200, 20, 4, 2)
    assert (config.num_heads, config.decoder) == (4, "full")


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"model.preset: expected one of {', '.join(PRESETS)}, found 'huge'"):
        preset("huge")


def counted(model: BrainLM, num_windows: int, num_decoded: int | None) -> int:
    """Operations of a forward pass, as torch counts them."""
    config = model.config
    masks, ids = [], []
    for i in range(num_windows):
        masks.append(make_mask("random", model.num_rows, config.num_patches, 0.75, mask_generator(0, i)))
        if num_decoded is not None:
            ids.append(sample_hidden(masks[-1], num_decoded, mask_generator(1, i)))
    windows = torch.zeros(num_windows, model.num_parcels, config.window_len)
    # The fused kernel of a CPU is not among the operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(windows, torch.stack(masks), None, torch.stack(ids) if ids else None)
    return counter.get_total_flops()


@pytest.mark.parametrize("decoder", ["cross", "full"])
@pytest.mark.parametrize("num_decoded", [None, 7])
@pytest.mark.parametrize("patch_parcels", [1, 3])
def test_cost_of_a_window_is_what_torch_counts(
    decoder: Literal["cross", "full"], num_decoded: int | None, patch_parcels: int
) -> None:
    config = replace(
        preset("tiny"),
        decoder=decoder,
        depth=3,
        width=32,
        num_heads=2,
        decoder_width=48,
        decoder_depth=2,
        window_len=80,
        patch_parcels=patch_parcels,
    )
    model = BrainLM(config, contract_of(10, config))
    one_more_window = counted(model, 3, num_decoded) - counted(model, 2, num_decoded)  # positions are paid once a batch
    assert flops_per_window(config, 10, 0.75, num_decoded) == one_more_window


def test_no_more_tokens_are_decoded_than_are_hidden() -> None:
    config = preset("tiny")
    assert flops_per_window(config, 10, 0.5, 1000) == flops_per_window(config, 10, 0.5)
    assert flops_per_window(config, 10, 0.5, 5) < flops_per_window(config, 10, 0.5)


def test_the_table_of_the_docs_is_what_the_code_says() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(ROW, page, re.MULTILINE)}
    assert rows.keys() == PRESETS.keys()
    for name, config in PRESETS.items():
        width, layers, heads, tokens, parameters, full, cross = rows[name]
        assert (int(width), int(heads)) == (config.width, config.num_heads)
        assert layers == f"{config.depth} + {config.decoder_depth}"
        num_rows = -(-PAPER_PARCELS // config.patch_parcels)
        assert int(tokens.replace(",", "")) == num_rows * config.num_patches
        assert int(parameters.replace(",", "")) == num_parameters(config, PAPER_PARCELS)
        for decoder, found in (("full", full), ("cross", cross)):
            flops = flops_per_window(replace(config, decoder=decoder), PAPER_PARCELS, 0.75)  # type: ignore[arg-type]
            assert float(found.replace(",", "")) == pytest.approx(flops / 1e9, abs=0.5 if "." not in found else 0.05)
