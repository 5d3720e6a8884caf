"""Named sizes, and what they cost."""

from __future__ import annotations

from brainlm.errors import ConfigError
from brainlm.model import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    # Learns within minutes on a laptop's CPU: one layer each way, one head, wide enough for waveforms.
    "tiny": ModelConfig(
        width=64, depth=1, num_heads=1, mlp_width=128,
        decoder="cross", decoder_width=64, decoder_depth=1, decoder_num_heads=1, decoder_mlp_width=128,
    ),
    # The paper's 13M: 4 encoder and 2 decoder layers of width 512, 4 heads, feed-forward 1024, decoder over all tokens.
    "13m": ModelConfig(
        width=512, depth=4, num_heads=4, mlp_width=1024,
        decoder="full", decoder_width=512, decoder_depth=2, decoder_num_heads=4, decoder_mlp_width=1024,
    ),
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


def flops_per_window(config: ModelConfig, num_parcels: int, mask_ratio: float, num_decoded: int | None = None) -> int:
    """Count the floating-point operations of one forward pass of one window (a multiply-add is two).

    Matrix products only: embeddings, projections, attention and feed-forward. A training step is three times this.

    Parameters
    ----------
    num_decoded : int, optional
        Hidden tokens decoded per window; None = all. The ``full`` decoder always runs over all tokens.
    """
    tokens = num_parcels * config.num_patches
    hidden = round(mask_ratio * tokens)
    visible = tokens - hidden + 1
    decoded = hidden if num_decoded is None else min(num_decoded, hidden)

    def block(queries: int, keys: int, width: int, mlp_width: int) -> int:
        projections = 2 * width * width * (2 * queries + 2 * keys)
        attention = 2 * 2 * queries * keys * width
        return projections + attention + 2 * 2 * queries * width * mlp_width

    encoder = 2 * (visible - 1) * config.patch_len * config.width  # CLS is no patch
    encoder += config.depth * block(visible, visible, config.width, config.mlp_width)
    width = config.decoder_width
    decoder = 2 * visible * config.width * width + 2 * decoded * width * config.patch_len
    queries, keys = (decoded, visible) if config.decoder == "cross" else (tokens + 1, tokens + 1)
    return encoder + decoder + config.decoder_depth * block(queries, keys, width, config.decoder_mlp_width)
