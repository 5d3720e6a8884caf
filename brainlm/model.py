"""BrainLM: a masked autoencoder over a parcels x time grid.

Sources: He et al. 2022 (MAE); Ortega Caro et al. 2024 (BrainLM, Sec. 3). The encoder sees visible tokens only; the
decoder rebuilds hidden patches, either by self-attention over all tokens (``full``, the paper) or by attending from
hidden positions to the encoder's output (``cross``, cheaper). Only hidden patches are trained and only they are read.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `K` patches in time, `L` = P * K tokens (parcel-major),
`V` visible tokens, `Q` decoded tokens, `D` width. Masks: True = hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from brainlm.config import Section
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.layers import Attention, Block, TokenPosition, space_features, time_features

ATTENTION_BLOCK = 256  # queries whose attention weights are in memory at a time


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Sizes of a model. See `brainlm.presets` for named ones."""

    width: int = 64
    depth: int = 1
    num_heads: int = 2
    mlp_width: int = 128
    decoder: Literal["full", "cross"] = "cross"
    decoder_width: int = 64
    decoder_depth: int = 1
    decoder_num_heads: int = 2
    decoder_mlp_width: int = 128
    parcel_embedding: bool = True
    """A learned code per parcel besides its coordinates; ties the weights to one atlas."""
    window_len: int = 200
    patch_len: int = 20

    def __post_init__(self) -> None:
        for name in (
            "width",
            "num_heads",
            "mlp_width",
            "decoder_width",
            "decoder_num_heads",
            "decoder_mlp_width",
            "depth",
            "decoder_depth",
            "window_len",
            "patch_len",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: expected at least 1, found {getattr(self, name)}")
        for width, heads in (("width", "num_heads"), ("decoder_width", "decoder_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ConfigError(
                    f"model.{width}={getattr(self, width)} must be a multiple of model.{heads}={getattr(self, heads)}"
                )
        if self.window_len % self.patch_len or self.window_len < 2 * self.patch_len:
            raise ConfigError(
                f"model.window_len={self.window_len} must be two or more times model.patch_len={self.patch_len}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of one parcel in one window."""
        return self.window_len // self.patch_len


class Loss(NamedTuple):
    """Sums over the decoded hidden values of one batch: squared error, squared target (contract units), and count."""

    sum: Tensor
    target_sum: Tensor
    num_values: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / self.num_values


class Encoded(NamedTuple):
    """``latent (B, 1 + V, D)``, CLS first; ``ids_keep (B, V)`` token numbers; ``valid (B, 1 + V)``, None = all."""

    latent: Tensor
    ids_keep: Tensor
    valid: Tensor | None


class BrainLM(nn.Module):
    """Masked autoencoder of brain activity.

    Parameters
    ----------
    config : ModelConfig
    contract : InputContract
        What the model must be fed; its coordinates and TR give the positions of the tokens.
    """

    space_features: Tensor
    time_features: Tensor
    usable: Tensor

    def __init__(self, config: ModelConfig, contract: InputContract) -> None:
        super().__init__()
        self.config = config
        self.contract = contract.with_windows(config.window_len, config.patch_len)
        self.manifest: dict[str, Any] = {}
        self.weights_sha256 = ""
        num_parcels = contract.atlas.num_parcels
        embedded = num_parcels if config.parcel_embedding else None
        centres = (torch.arange(config.num_patches) + 0.5) * config.patch_len * contract.tr_s
        coords_mm = torch.from_numpy(contract.atlas.coords_mm.copy())
        self.register_buffer("space_features", space_features(coords_mm), persistent=False)
        self.register_buffer("time_features", time_features(centres), persistent=False)
        self.register_buffer("usable", torch.from_numpy(contract.usable), persistent=False)

        self.patch_embed = nn.Linear(config.patch_len, config.width)
        self.position = TokenPosition(config.width, embedded)
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.encoder = nn.ModuleList(
            Block(config.width, config.num_heads, config.mlp_width) for _ in range(config.depth)
        )
        self.encoder_norm = nn.LayerNorm(config.width)

        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.decoder_position = TokenPosition(config.decoder_width, embedded)
        self.mask_token = nn.Parameter(torch.zeros(config.decoder_width))
        cross = config.decoder == "cross"
        self.decoder = nn.ModuleList(
            Block(config.decoder_width, config.decoder_num_heads, config.decoder_mlp_width, cross=cross)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_width)
        self.decoder_pred = nn.Linear(config.decoder_width, config.patch_len)
        self.init_weights()

    # ------------------------------------------------------------------ set-up

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all initial values: Xavier-uniform matrices and zero biases as in MAE, with the changes said below."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.25, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Attention):  # keys = queries: a token first attends to those near it
                    module.key_value.weight[: module.query.out_features].copy_(module.query.weight)
                elif isinstance(module, TokenPosition):  # near in time before near in space: BOLD is shared at one time
                    module.time.weight.mul_(1.5)
            self.decoder_pred.weight.mul_(0.1)  # begin near the mean, not with noise that must be unlearned first
        nn.init.normal_(self.cls_token, std=0.02, generator=generator)
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)

    @classmethod
    def from_pretrained(cls, folder: str) -> BrainLM:
        """Load a portable checkpoint, in float32 and evaluation mode. See `brainlm.checkpoint.load_checkpoint`."""
        from brainlm.checkpoint import load_checkpoint

        return load_checkpoint(folder)

    @classmethod
    def untrained_like(cls, model: BrainLM, seed: int) -> BrainLM:
        """Return the same sizes and contract with fresh weights, in evaluation mode: the control of probes."""
        fresh = cls(model.config, model.contract)
        fresh.init_weights(torch.Generator().manual_seed(seed))
        return fresh.eval()

    @property
    def num_parcels(self) -> int:
        return self.contract.atlas.num_parcels

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ------------------------------------------------------------------ tokens

    def patchify(self, windows_BPW: Tensor) -> Tensor:
        """Cut windows into patches: (B, P, W) -> (B, L, patch_len), parcel-major."""
        B, P, W = windows_BPW.shape
        if self.num_parcels != P or self.config.window_len != W:
            raise DataError(
                f"windows of {P} parcels x {W} timepoints, expected {self.num_parcels} x {self.config.window_len}"
            )
        return windows_BPW.reshape(B, P * self.config.num_patches, self.config.patch_len)

    def unpatchify(self, patches_BLp: Tensor) -> Tensor:
        """Undo `patchify`."""
        return patches_BLp.reshape(patches_BLp.shape[0], self.num_parcels, self.config.window_len)

    def present_tokens(self, present_BP: Tensor | None, num_windows: int) -> Tensor:
        """Return (B, L): False for tokens of parcels that carry no signal here or in the contract."""
        here = self.usable[None].expand(num_windows, -1) if present_BP is None else present_BP & self.usable
        return here.repeat_interleave(self.config.num_patches, dim=1)

    # ------------------------------------------------------------------ encoder and decoder

    def encode(self, windows_BPW: Tensor, mask_BL: Tensor, present_BP: Tensor | None = None) -> Encoded:
        """Encode the visible tokens of present parcels. Hidden values are never looked at."""
        mask_BL = mask_BL | ~self.present_tokens(present_BP, len(windows_BPW))
        x_BVD, ids_keep, valid = self._embed_visible(windows_BPW, mask_BL)
        for block in self.encoder:
            x_BVD = block(x_BVD, valid_BM=valid)
        return Encoded(self.encoder_norm(x_BVD), ids_keep, valid)

    def _embed_visible(self, windows_BPW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        num_visible = (~mask_BL).sum(dim=1)
        longest = int(num_visible.max())
        if int(num_visible.min()) == 0:
            raise DataError("a window has no visible token: lower the mask ratio, or leave this recording out")
        ids_keep = torch.argsort(mask_BL.to(torch.uint8), dim=1, stable=True)[:, :longest]  # (B, V), in token order
        valid = None
        if int(num_visible.min()) != longest:  # unequal windows are padded with tokens that nothing attends to
            valid = torch.arange(longest, device=mask_BL.device)[None] < num_visible[:, None]
            valid = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        dtype = self.patch_embed.weight.dtype
        patches_BVp = gather_tokens(self.patchify(windows_BPW), ids_keep).to(dtype)
        if valid is not None:  # padding rows point at hidden tokens, whose values may be anything, NaN included
            patches_BVp = patches_BVp.masked_fill(~valid[:, 1:, None], 0.0)
        position_LD = self.position(self.space_features, self.time_features)
        x_BVD = self.patch_embed(patches_BVp) + position_LD[ids_keep]
        cls_B1D = self.cls_token.to(dtype).expand(len(x_BVD), 1, -1)
        return torch.cat([cls_B1D, x_BVD], dim=1), ids_keep, valid

    def _decoder_inputs(self, encoded: Encoded, ids_BQ: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return decoder tokens, memory (None for ``full``) and which keys are valid."""
        position_LD = self.decoder_position(self.space_features, self.time_features)
        memory = self.decoder_embed(encoded.latent)
        cls_B1D, visible_BVD = memory[:, :1], memory[:, 1:]
        if self.config.decoder == "cross":
            visible_BVD = visible_BVD + position_LD[encoded.ids_keep]
            queries_BQD = self.mask_token + position_LD[ids_BQ]
            return queries_BQD, torch.cat([cls_B1D, visible_BVD], dim=1), encoded.valid
        B, L, D = len(memory), len(position_LD), self.config.decoder_width
        tokens_BLD = self.mask_token.expand(B, L, D).to(memory.dtype)
        if encoded.valid is not None:  # padding rows point at hidden tokens: leave these as they are
            old = gather_tokens(tokens_BLD, encoded.ids_keep)
            visible_BVD = torch.where(encoded.valid[:, 1:, None], visible_BVD, old)
        tokens_BLD = tokens_BLD.scatter(1, encoded.ids_keep[:, :, None].expand(-1, -1, D), visible_BVD)
        return torch.cat([cls_B1D, tokens_BLD + position_LD], dim=1), None, None

    def decode(self, encoded: Encoded, ids_BQ: Tensor, present_BL: Tensor | None = None) -> Tensor:
        """Predict the patches at token numbers `ids_BQ`: shape (B, Q, patch_len), float32."""
        x, memory, valid = self._decoder_inputs(encoded, ids_BQ)
        if memory is None and present_BL is not None and not bool(present_BL.all()):
            valid = torch.cat([present_BL.new_ones(len(present_BL), 1), present_BL], dim=1)
        for block in self.decoder:
            x = block(x, memory, valid)
        if memory is None:
            x = gather_tokens(x[:, 1:], ids_BQ)  # CLS dropped
        return self.decoder_pred(self.decoder_norm(x)).float()

    def forward(
        self,
        windows_BPW: Tensor,
        mask_BL: Tensor,
        present_BP: Tensor | None = None,
        ids_decoded: Tensor | None = None,
        kept_BW: Tensor | None = None,
    ) -> Loss:
        """Compute the loss: squared error over hidden values of present parcels at kept timepoints.

        Parameters
        ----------
        windows_BPW : Tensor, shape (B, P, W), float32
            Contract units.
        mask_BL : Tensor, shape (B, L), bool
            True = hidden.
        present_BP : Tensor, shape (B, P), bool, optional
            False = parcel without signal: neither seen nor scored.
        ids_decoded : Tensor, shape (B, Q), int64, optional
            Hidden tokens to decode and score (see `sample_hidden`); None = all.
        kept_BW : Tensor, shape (B, W), bool, optional
            False = censored timepoint: hidden values there are not scored; None = all kept.
        """
        present_BL = self.present_tokens(present_BP, len(windows_BPW))
        scored_BL = mask_BL & present_BL
        encoded = self.encode(windows_BPW, mask_BL, present_BP)
        if ids_decoded is None:
            ids_decoded = torch.argsort((~scored_BL).to(torch.uint8), dim=1, stable=True)
            ids_decoded = ids_decoded[:, : int(scored_BL.sum(dim=1).max())]
        prediction = self.decode(encoded, ids_decoded, present_BL)
        target = gather_tokens(self.patchify(windows_BPW), ids_decoded).float()
        scored_BQp = scored_BL.gather(1, ids_decoded)[:, :, None]  # (B, Q, 1), or by timepoint where some are censored
        if kept_BW is not None:
            kept_BKp = kept_BW.unflatten(1, (self.config.num_patches, self.config.patch_len))
            scored_BQp = scored_BQp & gather_tokens(kept_BKp, ids_decoded % self.config.num_patches)
        unscored_BQp = ~scored_BQp  # filled, not multiplied by 0: values of missing parcels may be NaN
        error = (prediction - target).masked_fill(unscored_BQp, 0.0).square().sum(dim=2)
        target_sum = target.masked_fill(unscored_BQp, 0.0).square().sum(dim=2).sum()
        return Loss(error.sum(), target_sum, scored_BQp.expand_as(target).sum())

    # ------------------------------------------------------------------ reading a trained model

    @torch.no_grad()
    def reconstruct(self, windows_BPW: Tensor, mask_BL: Tensor, present_BP: Tensor | None = None) -> Tensor:
        """Predict hidden values, in contract units.

        Returns
        -------
        Tensor, shape (B, P, W), float32
            NaN wherever a value was visible or its parcel is missing: those outputs are not trained.
        """
        present_BL = self.present_tokens(present_BP, len(windows_BPW))
        wanted_BL = mask_BL & present_BL
        encoded = self.encode(windows_BPW, mask_BL, present_BP)
        ids = torch.argsort((~wanted_BL).to(torch.uint8), dim=1, stable=True)[:, : int(wanted_BL.sum(dim=1).max())]
        prediction = self.decode(encoded, ids, present_BL)
        out = prediction.new_full((*mask_BL.shape, self.config.patch_len), float("nan"))
        prediction = prediction.masked_fill(~wanted_BL.gather(1, ids)[:, :, None], float("nan"))
        out.scatter_(1, ids[:, :, None].expand_as(prediction), prediction)
        return self.unpatchify(out)

    @torch.no_grad()
    def attention(
        self,
        windows_BPW: Tensor,
        mask_BL: Tensor | None = None,
        present_BP: Tensor | None = None,
        *,
        part: Literal["encoder", "decoder"] = "encoder",
        layer: int = -1,
        queries: slice | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Recompute attention weights of one layer from q and k; the fast path stays as it is.

        Parameters
        ----------
        mask_BL : Tensor or None
            None = nothing hidden, which only the encoder can answer.
        part, layer
            Encoder layers attend among CLS and visible tokens. Decoder layers attend from hidden tokens to CLS and
            visible ones (``cross``) or among CLS and all tokens (``full``).
        queries : slice, optional
            Rows wanted, for large models; None = all.

        Returns
        -------
        weights : Tensor, shape (B, H, N, M), float32
            Rows sum to 1 over the keys that are valid.
        query_ids, key_ids : Tensor, shapes (B, N) and (B, M), int64
            Token number of each row and column; -1 = CLS, -2 = padding.
        """
        x, memory, valid, query_ids, key_ids, block = self._attention_inputs(
            windows_BPW, mask_BL, present_BP, part, layer
        )
        rows = slice(None) if queries is None else queries
        q_in, k_in = block.attention_inputs(x, memory)
        return block.attention.attention_weights(q_in[:, rows], k_in, valid), query_ids[:, rows], key_ids

    @torch.no_grad()
    def parcel_attention(
        self,
        windows_BPW: Tensor,
        mask_BL: Tensor | None = None,
        present_BP: Tensor | None = None,
        *,
        part: Literal["encoder", "decoder"] = "encoder",
        layer: int = -1,
    ) -> Tensor:
        """Return attention from parcel to parcel: summed over key tokens, averaged over query tokens and heads.

        Computed in blocks of queries, so memory does not grow with the square of the tokens. CLS is left out.

        Returns
        -------
        Tensor, shape (B, P, P), float32
            Row p: attention of parcel p's tokens to every parcel. NaN where parcel p had no query token.
        """
        x, memory, valid, query_ids, key_ids, block = self._attention_inputs(
            windows_BPW, mask_BL, present_BP, part, layer
        )
        q_in, k_in = block.attention_inputs(x, memory)
        B, P, K = len(windows_BPW), self.num_parcels, self.config.num_patches
        device = q_in.device
        # The last row and column of the sums collect CLS and padding and are dropped.
        key_parcel = torch.where(key_ids >= 0, key_ids // K, P)
        query_parcel = torch.where(query_ids >= 0, query_ids // K, P)
        total = torch.zeros(B, P + 1, P + 1, device=device)
        for start in range(0, q_in.shape[1], ATTENTION_BLOCK):
            rows = slice(start, start + ATTENTION_BLOCK)
            weights = block.attention.attention_weights(q_in[:, rows], k_in, valid).mean(dim=1)  # (B, n, M)
            by_key = torch.zeros(B, weights.shape[1], P + 1, device=device)
            by_key.scatter_add_(2, key_parcel[:, None, :].expand_as(weights), weights)
            total.scatter_add_(1, query_parcel[:, rows, None].expand_as(by_key), by_key)
        counts = torch.zeros(B, P + 1, device=device)
        counts.scatter_add_(1, query_parcel, torch.ones_like(query_parcel, dtype=torch.float32))
        return total[:, :P, :P] / counts[:, :P, None].masked_fill(counts[:, :P, None] == 0, float("nan"))

    def _attention_inputs(
        self, windows_BPW: Tensor, mask_BL: Tensor | None, present_BP: Tensor | None, part: str, layer: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Block]:
        if part not in ("encoder", "decoder"):
            raise ConfigError(f"part: expected encoder or decoder, found {part!r}")
        if mask_BL is None and part == "decoder":
            raise DataError("decoder attention needs a mask: the decoder is only asked for hidden patches")
        blocks = self.encoder if part == "encoder" else self.decoder
        if not -len(blocks) <= layer < len(blocks):
            raise ConfigError(f"layer {layer} asked for, the {part} has {len(blocks)}")
        layer %= len(blocks)
        B, L = len(windows_BPW), self.num_parcels * self.config.num_patches
        present_BL = self.present_tokens(present_BP, B)
        hidden_BL = ~present_BL if mask_BL is None else mask_BL | ~present_BL
        if part == "encoder":
            x, ids_keep, valid = self._embed_visible(windows_BPW, hidden_BL)
            for block in blocks[:layer]:
                x = block(x, valid_BM=valid)
            ids = _with_cls(ids_keep, valid)
            return x, None, valid, ids, ids, _block(blocks, layer)
        assert mask_BL is not None
        wanted_BL = mask_BL & present_BL
        encoded = self.encode(windows_BPW, mask_BL, present_BP)
        ids_hidden = torch.argsort((~wanted_BL).to(torch.uint8), dim=1, stable=True)[:, : int(wanted_BL.sum(1).max())]
        x, memory, valid = self._decoder_inputs(encoded, ids_hidden)
        if memory is None:
            all_ids = torch.arange(L, device=x.device).expand(B, L)
            query_ids = key_ids = _with_cls(all_ids, None)
            if not bool(present_BL.all()):
                valid = torch.cat([present_BL.new_ones(B, 1), present_BL], dim=1)
        else:
            query_ids = ids_hidden.masked_fill(~wanted_BL.gather(1, ids_hidden), -2)
            key_ids = _with_cls(encoded.ids_keep, encoded.valid)
        for block in blocks[:layer]:
            x = block(x, memory, valid)
        return x, memory, valid, query_ids, key_ids, _block(blocks, layer)


def _block(blocks: nn.ModuleList, layer: int) -> Block:
    block = blocks[layer]
    assert isinstance(block, Block)
    return block


def _with_cls(ids_BV: Tensor, valid: Tensor | None) -> Tensor:
    """Put CLS (-1) before token numbers; padding becomes -2."""
    if valid is not None:
        ids_BV = ids_BV.masked_fill(~valid[:, 1:], -2)
    return torch.cat([ids_BV.new_full((len(ids_BV), 1), -1), ids_BV], dim=1)


def gather_tokens(x_BLD: Tensor, ids_BN: Tensor) -> Tensor:
    """Pick tokens by number: (B, L, D) and (B, N) -> (B, N, D)."""
    return x_BLD.gather(1, ids_BN[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def sample_hidden(scored_L: Tensor, num_decoded: int, generator: torch.Generator) -> Tensor:
    """Draw which hidden tokens of one window are decoded, without replacement.

    Returns shape (num_decoded,), int64. Where fewer tokens are scored, the rest are tokens that are not scored: the
    loss leaves them out.
    """
    scored = torch.nonzero(scored_L)[:, 0]
    picked = scored[torch.randperm(len(scored), generator=generator)[:num_decoded]]
    if len(picked) < num_decoded:
        others = torch.nonzero(~scored_L)[:, 0]
        picked = torch.cat([picked, others[: num_decoded - len(picked)]])
    return picked
