"""Transformer layers: pre-LN blocks with self- or cross-attention (Vaswani et al. 2017; pre-LN as in ViT and MAE).

Dimension letters: `B` windows, `N` query tokens, `M` key tokens, `D` width, `H` heads, `E` head width.
Attention runs through `scaled_dot_product_attention`, which is flash attention on a GPU; on a CPU in bfloat16, where
that is slow, through `BlockedAttention`. Attention weights are never read from the fast path: `brainlm.attention_maps`
recomputes them from q and k for the layers and queries that are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERY_BLOCK = 128  # queries whose probabilities are in memory at a time; they stay in a core's cache


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt E) v in blocks of queries, with probabilities recomputed in the backward pass.

    The same function as `scaled_dot_product_attention`, for a CPU in bfloat16. Gradients of k and v are summed over
    blocks in float32. Memory beyond the inputs is one block of probabilities.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, valid_BM)
        y = torch.empty_like(q)
        for start in range(0, q.shape[2], QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            y[:, :, rows] = _probabilities(q[:, :, rows], k, valid_BM) @ v
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, valid_BM = ctx.saved_tensors
        dy, scale = grad_outputs[0], q.shape[-1] ** -0.5
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for start in range(0, q.shape[2], QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            q_rows, dy_rows = q[:, :, rows], dy[:, :, rows]
            p = _probabilities(q_rows, k, valid_BM)
            dv += p.transpose(-1, -2) @ dy_rows
            ds = torch._softmax_backward_data(dy_rows @ v.transpose(-1, -2), p, -1, p.dtype)  # p * (dp - sum dp p)
            dq[:, :, rows] = (ds @ k) * scale
            dk += ds.transpose(-1, -2) @ (q_rows * scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _probabilities(q: Tensor, k: Tensor, valid_BM: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if valid_BM is not None:
        scores = scores.masked_fill(~valid_BM[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, valid_BM: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt E) v by the fastest way here.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, E)
    k, v : Tensor, shape (B, H, M, E)
    valid_BM : Tensor, shape (B, M), bool, optional
        True = may be attended to.

    Notes
    -----
    Error of the output and of the gradients of q, k and v on a CPU, as the largest difference from float64 over the
    largest value, with 1061 normal tokens and 4 heads of 128 (`benchmarks/attention.py`): 2.5e-6 in float32; 1.1e-2 in
    bfloat16, as with all probabilities in memory, because scores are rounded to bfloat16 (torch's own, which keeps them
    in float32 and takes longer: 5.9e-3).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        y: Tensor = BlockedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), valid_BM)
        return y
    allowed = None if valid_BM is None else valid_BM[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class Attention(nn.Module):
    """Multi-head attention of `x` to itself, or of `x` to `memory`.

    Parameters
    ----------
    width, num_heads : int
        `width` must be a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _heads(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        return x_BND.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)  # (B, H, N, E)

    def forward(self, x_BND: Tensor, memory_BMD: Tensor, valid_BM: Tensor | None = None) -> Tensor:
        """Attend from every row of `x` to the valid rows of `memory`. `valid_BM`: True = may be attended to."""
        q = self._heads(self.query(x_BND))
        k, v = (self._heads(part) for part in self.key_value(memory_BMD).chunk(2, dim=-1))
        return self.out(attend(q, k, v, valid_BM).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-LN Transformer block. With `memory` it is a cross-attention block, else a self-attention block."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, *, cross: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_memory = nn.LayerNorm(width) if cross else None
        self.attention = Attention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.dropout = 0.0
        """In training: share of what attention and feed-forward add to the tokens that is left out."""

    def attention_inputs(self, x_BND: Tensor, memory_BMD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what the attention of this block sees: normalised queries and normalised keys."""
        normed = self.norm_attention(x_BND)
        if self.norm_memory is None:
            return normed, normed
        assert memory_BMD is not None
        return normed, self.norm_memory(memory_BMD)

    def forward(
        self,
        x_BND: Tensor,
        memory_BMD: Tensor | None = None,
        valid_BM: Tensor | None = None,
        rows_BQ: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens after attention and feed-forward: (B, N, D), or (B, Q, D) with `rows_BQ`.

        Parameters
        ----------
        x_BND : Tensor, shape (B, N, D)
        memory_BMD : Tensor, shape (B, M, D), optional
            Needed by a cross-attention block; ignored by a self-attention block, whose M is N.
        valid_BM : Tensor, shape (B, M), bool, optional
            True = may be attended to.
        rows_BQ : Tensor, shape (B, Q), int64, optional
            Numbers of the rows of `x` to return, with the values they have without it: a last block computes no more
            than is read. All rows are still attended to. None = all.
        """
        queries, keys = self.attention_inputs(x_BND, memory_BMD)
        if rows_BQ is not None:
            ids_BQD = rows_BQ[:, :, None].expand(-1, -1, x_BND.shape[2])
            x_BND, queries = x_BND.gather(1, ids_BQD), queries.gather(1, ids_BQD)
        x_BND = x_BND + self._dropped(self.attention(queries, keys, valid_BM))
        return x_BND + self._dropped(self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x_BND)))))

    def _dropped(self, added_BND: Tensor) -> Tensor:
        return F.dropout(added_BND, self.dropout, self.training) if self.dropout else added_BND
