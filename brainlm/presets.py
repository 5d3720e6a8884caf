"""Named sizes, and what they cost.

The ladder of scaling studies follows one rule: feed-forward layers of twice the width, as many heads as encoder layers,
half as many decoder layers (rounded up) of the same width, and a width of 96 times the depth. Where no depth comes
within 8 % of the number in the name with that, heads are wider or narrower: 88 for ``1m``, 112 for ``35m``, and 128 for
``13m``, which is the paper's.
"""

from __future__ import annotations

from dataclasses import replace

from brainlm.errors import ConfigError
from brainlm.model import ModelConfig
from brainlm.positions import NUM_SPACE, NUM_TIME


def rung(depth: int, head_width: int) -> ModelConfig:
    """Return the sizes that the rule of the ladder gives for a depth and a head width."""
    width, decoder_depth = depth * head_width, (depth + 1) // 2
    return ModelConfig(
        width=width,
        depth=depth,
        num_heads=depth,
        mlp_width=2 * width,
        decoder="full",
        decoder_width=width,
        decoder_depth=decoder_depth,
        decoder_num_heads=depth,
        decoder_mlp_width=2 * width,
    )


LADDER: dict[str, ModelConfig] = {
    "1m": rung(2, 88),
    "4m": rung(3, 96),
    # The paper's 13M: 4 encoder and 2 decoder layers of width 512, 4 heads, feed-forward 1024, decoder over all tokens.
    "13m": rung(4, 128),
    "35m": rung(6, 112),
    "111m": rung(10, 96),
    "300m": rung(14, 96),
    "650m": rung(18, 96),
}
PRESETS: dict[str, ModelConfig] = {
    # Learns within minutes on a laptop's CPU: one layer each way, one head, wide enough for waveforms.
    "tiny": ModelConfig(
        width=64, depth=1, num_heads=1, mlp_width=128,
        decoder="cross", decoder_width=64, decoder_depth=1, decoder_num_heads=1, decoder_mlp_width=128,
    ),
    **LADDER,
    # 16 parcels x 20 timepoints in a token, 320 values, about as many as in a token of the published 111M (256): 270
    # tokens a window of 424 parcels. Says nothing about single parcels.
    "111m-grouped": replace(LADDER["111m"], patch_parcels=16),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Return the named sizes.

    Raises
    ------
    ConfigError
        Listing the known names.
    """
    if name not in PRESETS:
        raise ConfigError(f"model.preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]


def num_parameters(config: ModelConfig, num_parcels: int) -> int:
    """Count the parameters of a model without building it."""

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    def blocks(depth: int, width: int, mlp_width: int, num_norms: int) -> int:
        attention = 4 * linear(width, width)
        return depth * (attention + linear(width, mlp_width) + linear(mlp_width, width) + num_norms * 2 * width)

    rows = -(-num_parcels // config.patch_parcels)
    values = config.patch_parcels * config.patch_len

    def position(width: int) -> int:
        return linear(NUM_SPACE, width) + linear(2 * NUM_TIME, width) + config.parcel_embedding * rows * width

    width, decoder_width = config.width, config.decoder_width
    encoder = linear(values, width) + position(width) + blocks(config.depth, width, config.mlp_width, 2)
    if config.patch_parcels > 1:
        encoder += config.patch_parcels * width  # which parcels of a group are present
    norms = 3 if config.decoder == "cross" else 2
    decoder = linear(width, decoder_width) + position(decoder_width) + linear(decoder_width, values)
    decoder += blocks(config.decoder_depth, decoder_width, config.decoder_mlp_width, norms)
    tokens_and_norms = 3 * width + 3 * decoder_width  # CLS, the mask token, and the norm after each stack
    return encoder + decoder + tokens_and_norms


def flops_per_window(config: ModelConfig, num_parcels: int, mask_ratio: float, num_decoded: int | None = None) -> int:
    """Count the floating-point operations of one forward pass of one window (a multiply-add is two).

    Matrix products only: embeddings, projections, attention and feed-forward. A training step is three times this.

    Parameters
    ----------
    num_decoded : int, optional
        Hidden tokens decoded per window; None = all. The ``full`` decoder always attends to all tokens, and all but its
        last layer run over all of them.
    """
    values = config.patch_parcels * config.patch_len
    tokens = -(-num_parcels // config.patch_parcels) * config.num_patches
    hidden = round(mask_ratio * tokens)
    visible = tokens - hidden + 1
    decoded = hidden if num_decoded is None else min(num_decoded, hidden)

    def block(queries: int, keys: int, width: int, mlp_width: int) -> int:
        projections = 2 * width * width * (2 * queries + 2 * keys)
        attention = 2 * 2 * queries * keys * width
        return projections + attention + 2 * 2 * queries * width * mlp_width

    encoder = 2 * (visible - 1) * values * config.width  # CLS is no patch
    if config.patch_parcels > 1:
        encoder += 2 * (visible - 1) * config.patch_parcels * config.width
    encoder += config.depth * block(visible, visible, config.width, config.mlp_width)
    width = config.decoder_width
    decoder = 2 * visible * config.width * width + 2 * decoded * width * values
    mlp_width = config.decoder_mlp_width
    if config.decoder == "cross":
        return encoder + decoder + config.decoder_depth * block(decoded, visible, width, mlp_width)
    decoder += (config.decoder_depth - 1) * block(tokens + 1, tokens + 1, width, mlp_width)
    return encoder + decoder + block(decoded, tokens + 1, width, mlp_width)
