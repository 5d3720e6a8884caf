"""What the model keeps in memory between forward and backward pass, counted from the layers as they are written.

Letters: `B` windows, `N` tokens that enter a block, `M` that it attends to, `Q` that leave it, `D` width, `F` width of
the feed-forward layer. Sizes are bytes; every parcel is taken to be present, and nothing censored.
"""

from __future__ import annotations

from dataclasses import dataclass

from brainlm.model import ModelConfig
from brainlm.positions import NUM_SPACE, NUM_TIME

INT64, FLOAT32 = 8, 4


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the network, in the order of the forward pass."""

    kept: int
    """Until the backward pass of this part is over."""
    beside: int
    """The most that its backward pass has in memory beside what the forward pass kept."""
    forward_only: int = 0
    """The most that it has in memory where no gradient is wanted."""
    num_parameters: int = 0
    largest: int = 0
    """The largest tensor of a block."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a forward pass is over.

    Parameters
    ----------
    batch : int
        Windows of one pass.
    mask_ratio : float
    num_decoded : int or None
        As `brainlm.loader.MaskSettings` has it: None = every hidden token.
    element : int
        Bytes of a number of the model: 4, or 2 in bfloat16.
    recompute : bool
        Whether blocks keep their inputs alone.
    blocked : bool
        Whether attention is computed by `brainlm.layers.BlockedAttention`: on a CPU in bfloat16.
    """

    batch: int
    mask_ratio: float
    num_decoded: int | None = None
    element: int = FLOAT32
    recompute: bool = False
    blocked: bool = False


def block(sizes: Sizes, N: int, M: int, Q: int, D: int, F: int, heads: int, *, cross: bool, gathered: bool) -> Part:
    """Return the part of one `brainlm.layers.Block`; the memory of a cross-attention block is not in it."""
    B, e = sizes.batch, sizes.element
    enters = N * D  # the input of a norm
    norms = 2 * (N + Q + (M if cross else 0))  # mean and inverse deviation of each row
    attention = N * D + (M * D if cross else 0) + 2 * M * D + 2 * Q * D  # normalised; key and value; query, result
    if gathered:
        attention += Q * D
    feed_forward = 2 * Q * D + 2 * Q * F  # input of the norm, normalised; before and after GELU
    kept = B * e * (enters + norms + attention + feed_forward)
    if not sizes.blocked:
        kept += B * FLOAT32 * heads * Q  # log-sum-exp
    through_mlp = 2 * Q * D + Q * F
    through_attention = 2 * Q * D + 4 * M * D - (2 * M * D + 4 * Q * D + 2 * Q * F)  # less what is free by then
    beside = B * e * max(through_mlp, through_attention)
    forward_only = B * e * (enters + max(N * D + 2 * M * D + 2 * Q * D, 2 * Q * D + 2 * Q * F))
    num_parameters = 4 * D * D + 2 * D * F + 9 * D + F + (2 * D if cross else 0)
    if sizes.recompute:
        kept, beside = B * e * enters, kept + beside
    return Part(
        kept=kept, beside=beside, forward_only=forward_only, num_parameters=num_parameters,
        largest=B * e * max(Q * F, 2 * M * D),
    )  # fmt: skip


def parts(config: ModelConfig, num_parcels: int, sizes: Sizes) -> list[Part]:
    """Return the parts of a forward pass of `brainlm.model.BrainLM`: embedding, blocks, and what stands between them.

    Their `kept` add up to what autograd holds at the end of it, apart from weights and the batch itself.
    """
    B, e = sizes.batch, sizes.element
    rows, values = -(-num_parcels // config.patch_parcels), config.patch_parcels * config.patch_len
    L = rows * config.num_patches
    hidden = round(sizes.mask_ratio * L)
    V = L - hidden
    Q = hidden if sizes.num_decoded is None else min(sizes.num_decoded, hidden)
    D, E = config.width, config.decoder_width
    position = NUM_SPACE + 2 * NUM_TIME + 2 + (rows if config.parcel_embedding else 0)

    presence = config.patch_parcels if config.patch_parcels > 1 else 0
    embed = Part(
        kept=B * (e * V * (values + presence) + INT64 * L),
        beside=B * e * 2 * V * D,
        num_parameters=D * (values + presence + 2 + position),
    )
    encoder = block(sizes, 1 + V, 1 + V, 1 + V, D, config.mlp_width, config.num_heads, cross=False, gathered=False)
    between = Part(kept=B * e * (1 + V) * (2 * D + 2), beside=0, num_parameters=2 * D + (D + 1) * E)

    cross = config.decoder == "cross"
    N, M = (Q, 1 + V) if cross else (1 + L, 1 + L)

    def decoder_block(last: bool) -> Part:
        return block(
            sizes, N, M, Q if last else N, E, config.decoder_mlp_width, config.decoder_num_heads,
            cross=cross, gathered=last and not cross,
        )  # fmt: skip

    decoder = [decoder_block(number + 1 == config.decoder_depth) for number in range(config.decoder_depth)]
    if cross:
        tokens = e * M * E + (INT64 * L if sizes.num_decoded is None else 0)  # its memory; which tokens are hidden
    else:
        tokens = INT64 * Q  # which rows the last block returns
    inputs = Part(kept=B * tokens, beside=B * e * 2 * (N + M) * E, num_parameters=E * (position + 1))
    scored = Q * (values if presence else 1)
    predict = Part(
        kept=B * (e * Q * (2 * E + 2) + FLOAT32 * Q * values + scored),
        beside=B * (e * 2 * Q * E + 3 * FLOAT32 * Q * values),
        forward_only=B * FLOAT32 * (Q * E + 3 * L * values),
        num_parameters=2 * E + (E + 1) * values,
    )
    return [embed, *[encoder] * config.depth, between, inputs, *decoder, predict]


def kept(config: ModelConfig, num_parcels: int, sizes: Sizes) -> int:
    """Return what autograd keeps of a forward pass for the backward pass, in bytes."""
    return sum(part.kept for part in parts(config, num_parcels, sizes))
