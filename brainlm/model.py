"""BrainLM: a masked autoencoder over a parcels x time grid.

Sources: He et al. 2022 (MAE); Ortega Caro et al. 2024 (BrainLM, Sec. 3). The encoder sees visible tokens only; the
decoder rebuilds hidden patches, either by self-attention over all tokens (``full``, the paper) or by attending from
hidden positions to the encoder's output (``cross``, cheaper). Only hidden patches are trained and only they are read.

A token is one patch in time of one parcel, or of a group of parcels (`brainlm.tokens`). Its position is given in mm and
seconds, so that any parcels with coordinates, any number of patches and any TR can be fed.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `R` rows (parcels or groups), `K` patches in time,
`L` = R * K tokens (row-major), `V` visible tokens, `Q` decoded tokens, `v` values per token, `D` width.
Masks: True = hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainlm.config import Section
from brainlm.embedding import Embedding, RecordingEmbedding, embed_recording, embedding_of
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.layers import Attention, Block
from brainlm.positions import TokenPosition
from brainlm.scaling import recording_mean
from brainlm.tokens import (
    TokenGrid,
    as_mask,
    check_sizes,
    gather_tokens,
    hidden_ids,
    parcel_groups,
    patch_features,
    row_features,
)
from brainlm.windows import Windows, as_windows

if TYPE_CHECKING:
    from brainlm.atlas import Atlas
    from brainlm.attention_maps import AttentionMap
    from brainlm.forecast import Forecast
    from brainlm.reading import Statistics
    from brainlm.recording import Recording
    from brainlm.train_subjects import TrainSubjects


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
    patch_parcels: int = 1
    """Parcels in a token. Above 1, parcels that lie together share tokens, and nothing can be said of a single one."""

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
            "patch_parcels",
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
        """Mean squared error; 0 where nothing is hidden, or nothing hidden was measured."""
        return self.sum / self.num_values.clamp(min=1)


class Encoded(NamedTuple):
    """``latent (B, 1 + V, D)``, CLS first; ``ids_keep (B, V)`` token numbers; ``valid (B, 1 + V)``, None = all."""

    latent: Tensor
    ids_keep: Tensor
    valid: Tensor | None
    grid: TokenGrid


class BrainLM(nn.Module):
    """Masked autoencoder of brain activity.

    Wherever a method takes ``windows``, these are `Windows`, or a tensor or ndarray of values (B, P, W) or (P, W) in
    contract units, for which `present_BP` and `kept_BW` may be given beside it. A tensor is taken as it is, and so are
    `Windows` that say so (`as_is`), as training feeds them. All others are moved to the weights' device and shown as
    they look under the mask: visible values at censored timepoints are interpolated anew, between values that are
    visible and kept, and parcels with visible values that are not finite count as missing. Masks are bool, or 0 and 1:
    True = hidden.

    Parameters
    ----------
    config : ModelConfig
    contract : InputContract
        What the model must be fed; its coordinates and TR give the positions of the tokens.
    """

    space_features: Tensor
    time_features: Tensor
    usable: Tensor
    groups: Tensor | None

    def __init__(self, config: ModelConfig, contract: InputContract) -> None:
        super().__init__()
        self.config = config
        self.contract = contract.with_windows(config.window_len, config.patch_len)
        self.manifest: dict[str, Any] = {}
        self.weights_sha256 = ""
        self.recompute_activations = False
        """In training: keep what enters each block alone, and compute the rest again for the gradient."""
        self.train_subjects: TrainSubjects | None = None
        coords_mm = torch.from_numpy(contract.atlas.coords_mm.copy())
        groups = parcel_groups(coords_mm, config.patch_parcels) if config.patch_parcels > 1 else None
        embedded = self.num_rows if config.parcel_embedding else None
        times = patch_features(config.num_patches, config.patch_len, torch.tensor(contract.tr_s, device="cpu"))
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("space_features", row_features(coords_mm, groups), persistent=False)
        self.register_buffer("time_features", times, persistent=False)
        self.register_buffer("usable", torch.from_numpy(contract.usable), persistent=False)

        values_per_token = config.patch_parcels * config.patch_len
        self.patch_embed = nn.Linear(values_per_token, config.width)
        # In a group, a missing parcel enters as 0; this tells it from a measured 0.
        self.presence_embed = nn.Linear(config.patch_parcels, config.width, bias=False) if groups is not None else None
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
        self.decoder_pred = nn.Linear(config.decoder_width, values_per_token)
        self.init_weights()

    # ------------------------------------------------------------------ set-up

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all initial values: Xavier-uniform matrices and zero biases as in MAE, with the changes said below."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
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
    def from_pretrained(cls, path_or_hub_id: str, revision: str | None = None) -> BrainLM:
        """Load a portable checkpoint, in float32 and evaluation mode. See `brainlm.checkpoint.load_checkpoint`."""
        from brainlm.checkpoint import load_checkpoint

        return load_checkpoint(path_or_hub_id, revision)

    def save_pretrained(self, folder: str, more_train_subjects: Iterable[str] = ()) -> str:
        """Write a portable checkpoint and return the sha256 of its weights. See `brainlm.checkpoint`."""
        from brainlm.checkpoint import save_pretrained

        return save_pretrained(self, folder, more_train_subjects)

    @classmethod
    def untrained_like(cls, model: BrainLM, seed: int) -> BrainLM:
        """Return the same sizes and contract with fresh weights, in evaluation mode: the control of probes."""
        with torch.random.fork_rng(devices=[]):  # whoever asks keeps his random numbers
            fresh = cls(model.config, model.contract)
        fresh.init_weights(torch.Generator().manual_seed(seed))
        return fresh.eval()

    @property
    def num_parcels(self) -> int:
        return self.contract.atlas.num_parcels

    @property
    def num_rows(self) -> int:
        """Rows of the token grid: parcels, or groups of parcels."""
        return -(-self.num_parcels // self.config.patch_parcels)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ------------------------------------------------------------------ tokens

    def token_grid(
        self, windows: Windows | Tensor, present_BP: Tensor | None = None, kept_BW: Tensor | None = None
    ) -> TokenGrid:
        """Say where the tokens of these windows are, and which of them carry signal.

        Raises
        ------
        DataError
            If the windows do not have the contract's parcels and bring no coordinates, or are not whole patches.
        ConfigError
            If they bring coordinates and the weights are tied to one atlas by a learned code per parcel.
        """
        if isinstance(windows, Tensor):
            windows = Windows.of(windows, present_BP, kept_BW)
        elif present_BP is not None or kept_BW is not None:
            raise ConfigError("present and kept are part of Windows: give them there")
        config = self.config
        check_sizes(windows, config.patch_len)
        groups, space = self.groups, self.space_features
        if windows.coords_mm is None:
            P, W = windows.values.shape[1:]
            if self.num_parcels != P:
                raise DataError(
                    f"windows of {P} parcels x {W} timepoints, expected {self.num_parcels} x {config.window_len}: "
                    "other parcels need their coordinates (Windows.coords_mm)"
                )
            if not bool(self.usable.all()):
                windows = windows.with_present(windows.present & self.usable)
        else:
            groups, space = self._other_parcels(windows.coords_mm)
        num_patches = windows.values.shape[2] // config.patch_len
        if windows.tr_s is not None:
            time = patch_features(num_patches, config.patch_len, windows.tr_s)
        elif num_patches == config.num_patches:
            time = self.time_features
        else:
            tr_s = torch.tensor(self.contract.tr_s, device=windows.values.device)
            time = patch_features(num_patches, config.patch_len, tr_s)
        return TokenGrid(windows=windows, space=space, time=time, patch_len=config.patch_len, groups=groups)

    def _other_parcels(self, coords_mm: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return groups and space features of parcels with coordinates of their own."""
        if self.config.parcel_embedding:
            raise ConfigError(
                "windows with coordinates of their own, but these weights hold a learned code for each parcel of "
                f"{self.contract.atlas.name}: a model that is to read other parcels is trained with "
                "model.parcel_embedding=false"
            )
        groups = None
        if self.groups is not None:
            if coords_mm.ndim == 3:
                if not bool((coords_mm == coords_mm[:1]).all()):
                    raise ConfigError("a grouped model takes windows of one atlas in a batch: feed each by itself")
                coords_mm = coords_mm[0]
            groups = parcel_groups(coords_mm, self.config.patch_parcels)
        return groups, row_features(coords_mm, groups)

    def patchify(self, windows: Windows | Tensor) -> Tensor:
        """Cut windows into patches: (B, P, W) -> (B, L, v), row-major."""
        grid = self.token_grid(windows)
        return grid.patchify(grid.windows.values)

    def unpatchify(self, patches_BLv: Tensor) -> Tensor:
        """Undo `patchify` for windows of the contract's parcels."""
        num_windows, num_tokens = patches_BLv.shape[:2]
        size = (num_windows, self.num_parcels, num_tokens // self.num_rows * self.config.patch_len)
        return self.token_grid(patches_BLv.new_zeros(size)).unpatchify(patches_BLv)

    def hidden_values(self, mask_BL: Tensor) -> Tensor:
        """Return (B, P, W), bool: the values that lie in masked tokens."""
        values_per_token = self.config.patch_parcels * self.config.patch_len
        mask_BL = as_mask(mask_BL, mask_BL.device)
        return self.unpatchify(mask_BL[:, :, None].expand(-1, -1, values_per_token))

    # ------------------------------------------------------------------ encoder and decoder

    def seen(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any] | None = None,
        present_BP: Tensor | None = None,
        kept_BW: Tensor | None = None,
    ) -> tuple[TokenGrid, Tensor]:
        """Return the tokens of windows as they look under a mask, and the mask (B, L), bool; None hides nothing.

        Raises
        ------
        DataError
            If the mask does not fit the windows, or holds other values than True and False.
        """
        found = as_windows(windows, present_BP, kept_BW)
        as_is = isinstance(windows, Tensor) or found.as_is
        if not as_is:
            found = found.to(self.patch_embed.weight.device)
        grid = self.token_grid(found)
        if mask_BL is None:
            mask_BL = torch.zeros_like(grid.present)
        else:
            mask_BL = as_mask(mask_BL, found.values.device)
            if mask_BL.ndim == 1 and len(found) == 1:
                mask_BL = mask_BL[None]
            if tuple(mask_BL.shape) != (size := (len(found), grid.num_tokens)):
                raise DataError(f"mask of shape {tuple(mask_BL.shape)}, these windows have tokens of shape {size}")
        if not as_is:
            hidden_BPW = grid.hidden_values(mask_BL)
            if not bool(found.values.isfinite().all()):
                ignored = hidden_BPW | ~found.kept[:, None, :]
                found = found.with_present(found.present & (found.values.isfinite() | ignored).all(dim=2))
            empty_P = torch.from_numpy(recording_mean(self.contract)) if found.coords_mm is None else None
            grid = self.token_grid(found.as_seen(hidden_BPW, empty_P))
        return grid, mask_BL

    def encode(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any],
        present_BP: Tensor | None = None,
        kept_BW: Tensor | None = None,
    ) -> Encoded:
        """Encode the visible tokens of present parcels that were measured. Hidden values are never looked at."""
        return self.encode_grid(*self.seen(windows, mask_BL, present_BP, kept_BW))

    def encode_grid(self, grid: TokenGrid, mask_BL: Tensor) -> Encoded:
        """Encode tokens that `seen` gave."""
        x_BVD, ids_keep, valid = self.embed_visible(grid, mask_BL)
        for block in self.encoder:
            x_BVD = self._through(block, x_BVD, None, valid)
        return Encoded(self.encoder_norm(x_BVD), ids_keep, valid, grid)

    def _through(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.recompute_activations and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            is_random = bool(block.dropout)
            out: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=is_random)
            return out
        return block(*inputs)

    def embed_visible(self, grid: TokenGrid, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the encoder's input (B, 1 + V, D), the token numbers (B, V), and which are valid (None = all)."""
        hidden_BL = mask_BL | ~grid.attendable
        num_visible = (~hidden_BL).sum(dim=1)
        longest = int(num_visible.max())
        if int(num_visible.min()) == 0 and bool((mask_BL | ~grid.present).all(dim=1).any()):
            # Where all that is visible is censored, CLS stands alone: such a window must not end a training run.
            raise DataError("a window has no visible token: lower the mask ratio, or leave this recording out")
        ids_keep = torch.argsort(hidden_BL.to(torch.uint8), dim=1, stable=True)[:, :longest]  # (B, V), in token order
        valid = None
        if int(num_visible.min()) != longest:  # unequal windows are padded with tokens that nothing attends to
            valid = torch.arange(longest, device=hidden_BL.device)[None] < num_visible[:, None]
            valid = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        dtype = self.patch_embed.weight.dtype
        patches_BVv = grid.patchify(grid.windows.values, ids_keep).to(dtype)
        if valid is not None:  # padding rows point at hidden tokens, whose values may be anything, NaN included
            patches_BVv = patches_BVv.masked_fill(~valid[:, 1:, None], 0.0)
        if self.presence_embed is not None:
            presence = grid.presence(ids_keep)  # (B, V, g)
            patches_BVv = patches_BVv.masked_fill(~presence.repeat_interleave(grid.patch_len, dim=2), 0.0)
            x_BVD = self.patch_embed(patches_BVv) + self.presence_embed(presence.to(dtype))
        else:
            x_BVD = self.patch_embed(patches_BVv)
        x_BVD = x_BVD + pick(self.position(grid.space, grid.time), ids_keep)
        cls_B1D = self.cls_token.to(dtype).expand(len(x_BVD), 1, -1)
        return torch.cat([cls_B1D, x_BVD], dim=1), ids_keep, valid

    def decoder_inputs(self, encoded: Encoded, ids_BQ: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return decoder tokens, memory (None for ``full``) and which keys are valid (None = all)."""
        grid = encoded.grid
        position = self.decoder_position(grid.space, grid.time)
        memory = self.decoder_embed(encoded.latent)
        cls_B1D, visible_BVD = memory[:, :1], memory[:, 1:]
        if self.config.decoder == "cross":
            visible_BVD = visible_BVD + pick(position, encoded.ids_keep)
            queries_BQD = self.mask_token + pick(position, ids_BQ)
            return queries_BQD, torch.cat([cls_B1D, visible_BVD], dim=1), encoded.valid
        B, L, D = len(memory), grid.num_tokens, self.config.decoder_width
        tokens_BLD = self.mask_token.expand(B, L, D).to(memory.dtype)
        if encoded.valid is not None:  # padding rows point at hidden tokens: leave these as they are
            old = gather_tokens(tokens_BLD, encoded.ids_keep)
            visible_BVD = torch.where(encoded.valid[:, 1:, None], visible_BVD, old)
        tokens_BLD = tokens_BLD.scatter(1, encoded.ids_keep[:, :, None].expand(-1, -1, D), visible_BVD)
        valid = None
        if not bool(grid.attendable.all()):
            valid = torch.cat([grid.attendable.new_ones(B, 1), grid.attendable], dim=1)
        return torch.cat([cls_B1D, tokens_BLD + position], dim=1), None, valid

    def decode(self, encoded: Encoded, ids_BQ: Tensor) -> Tensor:
        """Predict the patches at token numbers `ids_BQ`: shape (B, Q, v), float32."""
        x, memory, valid = self.decoder_inputs(encoded, ids_BQ)
        rows = ids_BQ + 1 if memory is None else None  # CLS is row 0; the last block computes only what is read
        for number, block in enumerate(self.decoder, start=1):
            x = self._through(block, x, memory, valid, rows if number == len(self.decoder) else None)
        return self.decoder_pred(self.decoder_norm(x)).float()

    def forward(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any],
        present_BP: Tensor | None = None,
        ids_decoded: Tensor | None = None,
        kept_BW: Tensor | None = None,
    ) -> Loss:
        """Compute the loss: squared error over hidden values of present parcels at kept timepoints.

        Parameters
        ----------
        windows : Windows, or Tensor of shape (B, P, W), float32
            Contract units.
        mask_BL : Tensor, shape (B, L), bool
            True = hidden.
        present_BP : Tensor, shape (B, P), bool, optional
            False = parcel without signal: neither seen nor scored.
        ids_decoded : Tensor, shape (B, Q), int64, optional
            Hidden tokens to decode and score (see `brainlm.tokens.sample_hidden`); None = all.
        kept_BW : Tensor, shape (B, W), bool, optional
            False = censored timepoint: hidden values there are not scored, and a patch without a kept one is not
            seen; None = all kept.
        """
        grid, mask_BL = self.seen(windows, mask_BL, present_BP, kept_BW)
        encoded = self.encode_grid(grid, mask_BL)
        if ids_decoded is None:
            ids_decoded = hidden_ids(mask_BL & grid.present)
        prediction = self.decode(encoded, ids_decoded)
        target = grid.patchify(grid.windows.values, ids_decoded).float()
        scored_BQv = grid.scored(mask_BL, ids_decoded)
        unscored_BQv = ~scored_BQv  # filled, not multiplied by 0: values of missing parcels may be NaN
        error = (prediction - target).masked_fill(unscored_BQv, 0.0).square().sum(dim=2)
        target_sum = target.masked_fill(unscored_BQv, 0.0).square().sum(dim=2).sum()
        return Loss(error.sum(), target_sum, scored_BQv.expand_as(target).sum())

    # ------------------------------------------------------------------ reading a trained model

    def embed_windows(self, windows: Windows | Tensor | NDArray[Any]) -> Embedding:
        """Return the embedding of whole windows, nothing hidden; gradients flow.

        Returns
        -------
        Embedding
            ``cls (B, D)`` and ``pooled (B, D)``, the mean over the tokens of present parcels.
        """
        return embedding_of(self.encode_grid(*self.seen(windows)))

    def embed(
        self,
        recording: Recording | NDArray[Any],
        *,
        tr_s: float | None = None,
        atlas: Atlas | None = None,
        contract: InputContract | None = None,
        statistics: Statistics = "contract",
        native_tr: bool = False,
        batch_size: int = 8,
        per_parcel: bool = False,
    ) -> RecordingEmbedding:
        """Embed a recording, one row a window, nothing hidden. See `brainlm.embedding.embed_recording`."""
        return embed_recording(
            self,
            recording,
            tr_s=tr_s,
            atlas=atlas,
            contract=contract,
            statistics=statistics,
            native_tr=native_tr,
            batch_size=batch_size,
            per_parcel=per_parcel,
        )

    def forecast(
        self,
        recording: Recording | NDArray[Any],
        horizon_s: float,
        *,
        tr_s: float | None = None,
        context_s: float | None = None,
        atlas: Atlas | None = None,
        contract: InputContract | None = None,
        statistics: Statistics = "contract",
        native_tr: bool = False,
    ) -> Forecast:
        """Forecast what follows a recording, in its own units. See `brainlm.forecast.forecast_recording`."""
        from brainlm.forecast import forecast_recording

        return forecast_recording(
            self,
            recording,
            horizon_s,
            tr_s=tr_s,
            context_s=context_s,
            atlas=atlas,
            contract=contract,
            statistics=statistics,
            native_tr=native_tr,
        )

    @torch.no_grad()
    def reconstruct(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any] | None = None,
        present_BP: Tensor | None = None,
        kept_BW: Tensor | None = None,
        *,
        num_parts: int = 4,
        seed: int = 0,
    ) -> Tensor:
        """Predict hidden values, in contract units.

        Parameters
        ----------
        windows : Windows, or Tensor or ndarray of shape (B, P, W) or (P, W)
            Contract units.
        mask_BL : Tensor, shape (B, L), or (L,) for one window, bool, optional
            True = hidden. None: every value is rebuilt, a part of the tokens at a time, as `num_parts` and `seed` of
            `brainlm.reconstruction.reconstruct_whole` say.

        Returns
        -------
        Tensor, shape (B, P, W), float32
            NaN wherever a value was visible or its parcel is missing: those outputs are not trained.
        """
        from brainlm.reconstruction import check_decoder, reconstruct_whole

        check_decoder(self.manifest)
        if mask_BL is None:
            grid = self.seen(as_windows(windows, present_BP, kept_BW))[0]
            return reconstruct_whole(self, grid.windows, grid.attendable, num_parts, seed)
        grid, mask_BL = self.seen(windows, mask_BL, present_BP, kept_BW)
        encoded = self.encode_grid(grid, mask_BL)
        wanted_BL = mask_BL & grid.present
        ids = hidden_ids(wanted_BL)
        prediction = self.decode(encoded, ids)
        out = prediction.new_full((*mask_BL.shape, prediction.shape[2]), float("nan"))
        prediction = prediction.masked_fill(~wanted_BL.gather(1, ids)[:, :, None], float("nan"))
        out.scatter_(1, ids[:, :, None].expand_as(prediction), prediction)
        return grid.unpatchify(out).masked_fill(~grid.windows.present[:, :, None], float("nan"))

    def attention(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any] | None = None,
        present_BP: Tensor | None = None,
        *,
        part: Literal["encoder", "decoder"] = "encoder",
        layers: int | Sequence[int] = (-1,),
        heads: int | Sequence[int] | None = None,
        queries: slice | None = None,
    ) -> list[AttentionMap]:
        """Recompute attention weights of chosen layers, heads and queries. See `brainlm.attention_maps`."""
        from brainlm.attention_maps import attention_maps

        return attention_maps(
            self, windows, mask_BL, present_BP, part=part, layers=layers, heads=heads, queries=queries
        )

    def parcel_attention(
        self,
        windows: Windows | Tensor | NDArray[Any],
        mask_BL: Tensor | NDArray[Any] | None = None,
        present_BP: Tensor | None = None,
        *,
        part: Literal["encoder", "decoder"] = "encoder",
        layer: int = -1,
    ) -> Tensor:
        """Return attention from parcel to parcel, (B, P, P). See `brainlm.attention_maps`."""
        from brainlm.attention_maps import parcel_attention

        return parcel_attention(self, windows, mask_BL, present_BP, part=part, layer=layer)


def pick(position: Tensor, ids_BN: Tensor) -> Tensor:
    """Pick codes (L, D), or (B, L, D) where windows differ, by token number: (B, N, D)."""
    return position[ids_BN] if position.ndim == 2 else gather_tokens(position, ids_BN)
