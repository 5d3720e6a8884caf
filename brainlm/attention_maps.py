"""Attention weights, recomputed from q and k for the layers, heads and queries that are asked for.

The training path never forms them. Here they are computed in float32, in blocks of queries, so that besides what is
asked for, memory holds the weights of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.errors import ConfigError, DataError
from brainlm.layers import Attention, Block
from brainlm.tokens import TokenGrid, hidden_ids
from brainlm.windows import Windows

if TYPE_CHECKING:
    from brainlm.model import BrainLM

QUERY_BLOCK = 256  # queries whose attention weights are in memory at a time
Part = Literal["encoder", "decoder"]


class AttentionMap(NamedTuple):
    """Attention of one layer.

    ``weights (B, H, N, M)`` float32, rows sum to 1 over the keys that are valid; ``query_ids (B, N)`` and
    ``key_ids (B, M)`` int64, the token number of each row and column; -1 = CLS, -2 = padding.
    """

    weights: Tensor
    query_ids: Tensor
    key_ids: Tensor


@torch.no_grad()
def attention_maps(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    mask_BL: Tensor | NDArray[Any] | None = None,
    present_BP: Tensor | None = None,
    *,
    part: Part = "encoder",
    layers: int | Sequence[int] = (-1,),
    heads: int | Sequence[int] | None = None,
    queries: slice | None = None,
) -> list[AttentionMap]:
    """Recompute attention weights.

    Parameters
    ----------
    mask_BL : Tensor or None
        None = nothing hidden, which only the encoder can answer.
    part, layers
        Encoder layers attend among CLS and visible tokens. Decoder layers attend from hidden tokens to CLS and visible
        ones (``cross``) or among CLS and all tokens (``full``). Negative numbers count from the last layer.
    heads : int or sequence of int, optional
        None = all.
    queries : slice, optional
        Rows wanted, for large models; None = all.

    Returns
    -------
    list of AttentionMap
        In the order of `layers`.
    """
    found: dict[int, AttentionMap] = {}
    wanted = _layer_numbers(model, part, (layers,) if isinstance(layers, int) else layers)
    heads = (heads,) if isinstance(heads, int) else heads
    rows = slice(None) if queries is None else queries
    grid, mask_BL = _seen(model, windows, mask_BL, present_BP, part)
    for number, block, x, memory, valid, query_ids, key_ids in _walk(model, grid, mask_BL, part, wanted):
        q_in, k_in = block.attention_inputs(x, memory)
        query, key = query_key(block.attention, q_in[:, rows], k_in, heads)
        weights = query.new_empty(*query.shape[:3], key.shape[2])
        for start in range(0, query.shape[2], QUERY_BLOCK):
            part_rows = slice(start, start + QUERY_BLOCK)
            weights[:, :, part_rows] = softmax_weights(query[:, :, part_rows], key, valid)
        found[number] = AttentionMap(weights, query_ids[:, rows], key_ids)
    return [found[number] for number in wanted]


@torch.no_grad()
def parcel_attention(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    mask_BL: Tensor | NDArray[Any] | None = None,
    present_BP: Tensor | None = None,
    *,
    part: Part = "encoder",
    layer: int = -1,
) -> Tensor:
    """Return attention from parcel to parcel: summed over key tokens, averaged over query tokens and heads.

    CLS is left out.

    Returns
    -------
    Tensor, shape (B, P, P), float32
        Row p: attention of parcel p's tokens to every parcel. NaN where parcel p had no query token.

    Raises
    ------
    ConfigError
        If a token of the model holds several parcels.
    """
    if model.config.patch_parcels > 1:
        raise ConfigError(
            f"attention between single parcels is not known to a model with {model.config.patch_parcels} parcels in a "
            "token: use a model with model.patch_parcels=1"
        )
    wanted = _layer_numbers(model, part, (layer,))
    grid, mask_BL = _seen(model, windows, mask_BL, present_BP, part)
    ((_, block, x, memory, valid, query_ids, key_ids),) = _walk(model, grid, mask_BL, part, wanted)
    q_in, k_in = block.attention_inputs(x, memory)
    B, P, K = len(grid.windows), grid.num_rows, grid.num_patches
    # The last row and column of the sums collect CLS and padding and are dropped.
    key_parcel = torch.where(key_ids >= 0, key_ids // K, P)
    query_parcel = torch.where(query_ids >= 0, query_ids // K, P)
    total = torch.zeros(B, P + 1, P + 1, device=q_in.device)
    query, key = query_key(block.attention, q_in, k_in, None)
    for start in range(0, q_in.shape[1], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        weights = softmax_weights(query[:, :, rows], key, valid).mean(dim=1)  # (B, n, M)
        by_key = torch.zeros(B, weights.shape[1], P + 1, device=q_in.device)
        by_key.scatter_add_(2, key_parcel[:, None, :].expand_as(weights), weights)
        total.scatter_add_(1, query_parcel[:, rows, None].expand_as(by_key), by_key)
    counts = torch.zeros(B, P + 1, device=q_in.device)
    counts.scatter_add_(1, query_parcel, torch.ones_like(query_parcel, dtype=torch.float32))
    return total[:, :P, :P] / counts[:, :P, None].masked_fill(counts[:, :P, None] == 0, float("nan"))


class _Layer(NamedTuple):
    """One layer that is asked for, with what goes into it."""

    number: int
    block: Block
    x: Tensor
    memory: Tensor | None
    valid: Tensor | None
    query_ids: Tensor
    key_ids: Tensor


def _seen(
    model: BrainLM,
    windows: Windows | Tensor | NDArray[Any],
    mask_BL: Tensor | NDArray[Any] | None,
    present_BP: Tensor | None,
    part: Part,
) -> tuple[TokenGrid, Tensor]:
    if mask_BL is None and part == "decoder":
        raise DataError("decoder attention needs a mask: the decoder is only asked for hidden patches")
    return model.seen(windows, mask_BL, present_BP)


def _walk(model: BrainLM, grid: TokenGrid, mask_BL: Tensor, part: Part, wanted: Sequence[int]) -> Iterator[_Layer]:
    """Run the blocks as the fast path does, and stop at the wanted ones, in ascending order."""
    memory: Tensor | None = None
    if part == "encoder":
        x, ids_keep, valid = model.embed_visible(grid, mask_BL)
        query_ids = key_ids = _with_cls(ids_keep, valid)
    else:
        encoded = model.encode_grid(grid, mask_BL)
        wanted_BL = mask_BL & grid.present
        ids = hidden_ids(wanted_BL)
        x, memory, valid = model.decoder_inputs(encoded, ids)
        if memory is None:
            every = torch.arange(grid.num_tokens, device=x.device).expand(len(x), -1)
            query_ids = key_ids = _with_cls(every, None)
        else:
            query_ids = ids.masked_fill(~wanted_BL.gather(1, ids), -2)
            key_ids = _with_cls(encoded.ids_keep, encoded.valid)
    for number, block in enumerate(model.encoder if part == "encoder" else model.decoder):
        assert isinstance(block, Block)
        if number in wanted:
            yield _Layer(number, block, x, memory, valid, query_ids, key_ids)
        if number == max(wanted):
            return
        x = block(x, memory, valid)


def _layer_numbers(model: BrainLM, part: str, layers: Sequence[int]) -> list[int]:
    if part not in ("encoder", "decoder"):
        raise ConfigError(f"part: expected encoder or decoder, found {part!r}")
    count = len(model.encoder if part == "encoder" else model.decoder)
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(f"layer {layer} asked for, the {part} has {count}")
    return [layer % count for layer in layers]


def query_key(
    attention: Attention, x_BND: Tensor, memory_BMD: Tensor, heads: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Return scaled q (B, H, N, E) and k (B, H, M, E) of the chosen heads, float32."""
    q = attention.query(x_BND).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    k = attention.key_value(memory_BMD).chunk(2, dim=-1)[0].unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    if heads is not None:
        if wrong := [head for head in heads if not 0 <= head < attention.num_heads]:
            raise ConfigError(f"head {wrong[0]} asked for, the layer has {attention.num_heads}")
        q, k = q[:, list(heads)], k[:, list(heads)]
    return q.float() * q.shape[-1] ** -0.5, k.float()


def softmax_weights(q_BHnE: Tensor, k_BHME: Tensor, valid_BM: Tensor | None) -> Tensor:
    """Return softmax(q k^T) over the valid keys, (B, H, n, M); `q` is scaled already."""
    scores = q_BHnE @ k_BHME.transpose(-1, -2)
    if valid_BM is not None:
        scores = scores.masked_fill(~valid_BM[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def _with_cls(ids_BV: Tensor, valid: Tensor | None) -> Tensor:
    """Put CLS (-1) before token numbers; padding becomes -2."""
    if valid is not None:
        ids_BV = ids_BV.masked_fill(~valid[:, 1:], -2)
    return torch.cat([ids_BV.new_full((len(ids_BV), 1), -1), ids_BV], dim=1)
