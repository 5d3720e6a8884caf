"""The published 111M and 650M BrainLM: a ViT masked autoencoder over a recording drawn as an image.

Source: Ortega Caro et al. 2024, "BrainLM: A foundation model for brain activity recordings"; the network is He et al.
2022, "Masked autoencoders are scalable vision learners", with pre-LN layers as in ViT. Written anew from the published
state dicts and from what the published code computes. Attribute names are those of the state dicts, so that every
parameter and gradient keeps its published name. Faults are kept only where the same numbers need them: padding is
encoded like signal, tokens are shuffled although nothing here depends on their order, and `mask` is per value.

A window of 424 parcels and 200 timepoints is the image: one row per parcel in ascending y (`rows_by_y`), one column
per timepoint, the same values in each of 3 channels, padded with -1 to a square of whole patches.

Dimension letters: `B` windows, `C` channels, `P` parcels (rows), `W` timepoints (columns), `S` side of the square,
`L` tokens, `V` visible tokens, `D` width, `H` heads, `E` head width, `p` side of a patch.

The modules hold no initial values worth training from: build them on the meta device and load a state dict.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainlm.embedding import Embedding
from brainlm.errors import ConfigError, DataError
from brainlm.official_config import VitMaeConfig
from brainlm.official_layers import (
    Dense,
    Encoded,
    LayerList,
    OfficialOutput,
    SelfAttention,
    noise_of_mask,
    restore_order,
    shuffle_tokens,
    take_noise,
)
from brainlm.tokens import gather_tokens

PADDING_VALUE = -1.0  # what the published code fills the margins of the image with
NUM_PARCELS, WINDOW_LEN = 424, 200  # of all published models; a configuration says only how large the square is


class FineTunedOutput(NamedTuple):
    """``pred (B, 1)``; ``loss`` None without labels; ``mask (B, L)`` 1 = hidden; the rest as in `OfficialOutput`."""

    pred: Tensor
    loss: Tensor | None
    mask: Tensor
    ids_restore: Tensor
    latent: Tensor


class HiddenColumns(NamedTuple):
    """What a predict mode hides and scores. Columns are of the padded image, patch columns of its patch grid."""

    patches: range
    """Hidden patch columns."""
    zeroed: range
    """Columns set to 0 in the input."""
    num_scored: int
    """Last timepoints that are scored."""


def hidden_columns(config: VitMaeConfig, num_timepoints: int) -> HiddenColumns:
    """Return what ``predict_last`` or ``predict_last_pixel`` hides in windows of `num_timepoints`.

    Patch columns are whole, the signal's end is not at a patch's edge, and so ``predict_last`` scores more than the
    ``mask_ratio`` it is given, while ``predict_last_pixel`` zeroes the part that fills no patch column.
    """
    num_asked = int(config.mask_ratio * num_timepoints)
    return columns_at_end(config, num_timepoints, num_asked, whole_patches=config.train_mode == "predict_last")


def columns_at_end(config: VitMaeConfig, num_timepoints: int, num_asked: int, *, whole_patches: bool) -> HiddenColumns:
    """Return what hides the last `num_asked` timepoints: whole patch columns alone, or the rest by zeros."""
    p = config.patch_size
    signal_end = (config.side - num_timepoints) // 2 + num_timepoints
    patch_end = -(-signal_end // p)  # the patch column that holds the last timepoint ends here
    first_scored = signal_end - num_asked
    num_hidden = (patch_end * p - first_scored) // p
    if whole_patches:
        num_hidden += first_scored % p != 0
        first_hidden = patch_end - num_hidden
        scored = min(max(signal_end - first_hidden * p, 0), num_timepoints)
        return HiddenColumns(range(first_hidden, patch_end), range(0), scored)
    first_hidden = patch_end - num_hidden
    num_zeroed = num_asked - (signal_end - first_hidden * p)
    return HiddenColumns(
        range(first_hidden, patch_end), range(first_hidden * p - num_zeroed, first_hidden * p), num_asked
    )


def rows_by_y(coords_mm_P3: Tensor) -> Tensor:
    """Return the order of the parcels that the image expects: ascending y, ties in atlas order, shape (P,), int64.

    The sort must be stable: with 77 different values of y for 424 parcels, ties decide most rows.
    """
    return torch.argsort(coords_mm_P3[:, 1], stable=True)


class VitAttention(nn.Module):
    """``attention.attention`` (query, key, value) and ``attention.output.dense``."""

    def __init__(self, width: int, num_heads: int, config: VitMaeConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, config.qkv_bias, config.attention_probs_dropout_prob)
        self.output = Dense(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.output(self.attention(x_BLD))


class VitLayer(nn.Module):
    """Pre-LN Transformer layer: ``intermediate`` and ``output`` are the two maps of its MLP."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, config: VitMaeConfig) -> None:
        super().__init__()
        self.attention = VitAttention(width, num_heads, config)
        self.intermediate = Dense(width, mlp_width)
        self.output = Dense(mlp_width, width)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.dropout(self.attention(self.layernorm_before(x_BLD)))
        return x_BLD + self.dropout(self.output(F.gelu(self.intermediate(self.layernorm_after(x_BLD)))))


class ImageEmbeddings(nn.Module):
    """``vit.embeddings``: the patch map, the frozen 2-D sin-cos table over CLS and the whole grid, and CLS."""

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.grid**2 + 1, D), requires_grad=False)
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(config.num_channels, D, p, stride=p)})

    def forward(self, image_BCSS: Tensor) -> Tensor:
        """Return the patch tokens with their positions, (B, L, D); CLS is added after masking."""
        x = self.patch_embeddings["projection"](image_BCSS).flatten(2).transpose(1, 2)
        return x + self.position_embeddings[:, 1:]

    def cls(self) -> Tensor:
        return self.cls_token + self.position_embeddings[:, :1]


class VitEncoder(nn.Module):
    """``vit``: embeddings, layers over the visible tokens after CLS, and ``layernorm``."""

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__()
        c = config
        self.embeddings = ImageEmbeddings(c)
        self.encoder = LayerList(
            VitLayer(c.hidden_size, c.num_attention_heads, c.intermediate_size, c) for _ in range(c.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, image_BCSS: Tensor, noise_BL: Tensor, num_keep: int) -> Encoded:
        x_BLD = self.embeddings(image_BCSS)
        ids_keep, mask, ids_restore = shuffle_tokens(noise_BL, num_keep)
        cls_B1D = self.embeddings.cls().expand(len(x_BLD), -1, -1)
        x_BLD = torch.cat([cls_B1D, gather_tokens(x_BLD, ids_keep)], dim=1)  # visible tokens only
        return Encoded(self.layernorm(self.encoder(x_BLD)), mask, ids_restore)


class VitDecoder(nn.Module):
    """``decoder``: all tokens in grid order, from the visible latents and ``mask_token``, to the values of a patch."""

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__()
        c, D = config, config.decoder_hidden_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, c.grid**2 + 1, D), requires_grad=False)
        self.decoder_embed = nn.Linear(c.hidden_size, D)
        self.decoder_layers = nn.ModuleList(
            VitLayer(D, c.decoder_num_attention_heads, c.decoder_intermediate_size, c)
            for _ in range(c.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.decoder_pred = nn.Linear(D, c.patch_size**2 * c.num_channels)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        x = torch.cat([x[:, :1], restore_order(x[:, 1:], self.mask_token, ids_restore)], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # CLS dropped


class VitMae(nn.Module):
    """What the pretraining and the fine-tuned model share: the padded image and its encoder ``vit``."""

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VitEncoder(config)

    def pad(self, pixel_values: Tensor) -> Tensor:
        """Return the image in the middle of its square, (B, C, S, S)."""
        S, C = self.config.side, self.config.num_channels
        rows, columns = (S - size for size in pixel_values.shape[-2:])
        if pixel_values.ndim != 4 or pixel_values.shape[1] != C or min(rows, columns) < 0 or rows % 2 or columns % 2:
            raise DataError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (windows, {C} channels, parcels, "
                f"timepoints) that leave even margins in {S} x {S}"
            )
        return F.pad(pixel_values, (columns // 2, columns // 2, rows // 2, rows // 2), value=PADDING_VALUE)

    def crop(self, square: Tensor, shape: torch.Size) -> Tensor:
        """Cut the margins off (..., S, S) and leave the last two sizes of `shape`."""
        top, left = ((self.config.side - size) // 2 for size in shape[-2:])
        return square[..., top : top + shape[-2], left : left + shape[-1]]

    def encode(self, image: Tensor, noise: Tensor | None, generator: torch.Generator | None = None) -> Encoded:
        """Encode the padded image with a random part of its tokens hidden."""
        L = self.config.grid**2
        return self.vit(image, take_noise(noise, image, L, generator), int(L * (1 - self.config.mask_ratio)))

    def encode_visible(self, image: Tensor, hidden_BL: Tensor) -> Encoded:
        """Encode the tokens of the padded image that are not hidden, in grid order; equally many in every window."""
        if hidden_BL.shape != (len(image), self.config.grid**2):
            raise DataError(f"mask of shape {tuple(hidden_BL.shape)}, expected {(len(image), self.config.grid**2)}")
        noise, num_keep = noise_of_mask(hidden_BL)
        encoded: Encoded = self.vit(image, noise, num_keep)
        return encoded

    def latent_of(self, pixel_values: Tensor, hidden_BL: Tensor | None = None) -> Tensor:
        """Return the latent of whole windows (B, 1 + V, D), CLS first: nothing hidden, tokens in grid order."""
        image = self.pad(pixel_values)
        if hidden_BL is None:
            hidden_BL = torch.zeros(len(image), self.config.grid**2, dtype=torch.bool, device=image.device)
        return self.encode_visible(image, hidden_BL).latent

    def embed(self, pixel_values: Tensor, hidden_BL: Tensor | None = None) -> Embedding:
        """Return the embedding of whole windows: nothing hidden, tokens in grid order, so the same each time.

        Gradients flow. `Embedding.pooled` is over all patches, those of the padding among them, as the model was
        trained. `hidden_BL` leaves tokens out that hold no measurement.
        """
        latent = self.latent_of(pixel_values, hidden_BL)
        return Embedding(latent[:, 0], latent[:, 1:].mean(dim=1))


class VitMaeBrainLM(VitMae):
    """The published ``ViTMAEForPreTraining`` with padding: 111M and 650M.

    Parameters
    ----------
    config : VitMaeConfig
    """

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__(config)
        self.decoder = VitDecoder(config)

    def forward(
        self, pixel_values: Tensor, noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> OfficialOutput:
        """Reconstruct hidden values.

        Parameters
        ----------
        pixel_values : Tensor, shape (B, C, P, W), float32
            Rows in the order of `rows_by_y`, the signal repeated in every channel.
        noise : Tensor, shape (B, L), optional
            The tokens with the lowest noise are visible. None: uniform, from `generator`. The published code draws its
            own whatever it is given. The predict modes hide fixed columns and take no notice of it.
        """
        image = self.pad(pixel_values)
        if self.config.train_mode == "auto_encode":
            encoded = self.encode(image, noise, generator)
        else:
            grid, hidden = self.config.grid, hidden_columns(self.config, pixel_values.shape[3])
            image[..., hidden.zeroed.start : hidden.zeroed.stop] = 0  # in the margins above and below, too
            order = image.new_zeros(len(image), grid, grid)
            order[:, :, hidden.patches.start : hidden.patches.stop] = 1
            encoded = self.vit(image, order.flatten(1), grid * (grid - len(hidden.patches)))
        values = self.decoder(encoded.latent, encoded.ids_restore)  # (B, L, p * p * C)
        logits = self.crop(self._unpatchify(values), pixel_values.shape)
        if self.config.train_mode == "auto_encode":
            per_value = encoded.mask[:, :, None].expand(-1, -1, self.config.patch_size**2)
            mask = self.crop(self._unpatchify(per_value), pixel_values.shape)
        else:
            mask = torch.zeros_like(logits)
            mask[..., mask.shape[-1] - hidden.num_scored :] = 1
        target = pixel_values.mean(dim=1)
        if self.config.norm_pix_loss:  # as published: over the whole row, with the unbiased variance
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = ((logits - target).square() * mask).sum() / mask.sum()
        return OfficialOutput(loss, logits, mask, encoded.ids_restore, encoded.latent)

    def reconstruct(self, pixel_values: Tensor, hidden_BL: Tensor, zeroed: range = range(0)) -> Tensor:
        """Predict every value, (B, P, W), from the tokens that are not hidden.

        Only hidden tokens were trained, and with ``predict_last_pixel`` the columns `zeroed` of the padded image, which
        are 0 in what is seen.
        """
        image = self.pad(pixel_values)
        if zeroed:
            image[..., zeroed.start : zeroed.stop] = 0
        encoded = self.encode_visible(image, hidden_BL)
        values = self.decoder(encoded.latent, encoded.ids_restore)
        return self.crop(self._unpatchify(values), pixel_values.shape)

    def _unpatchify(self, values_BLv: Tensor) -> Tensor:
        """Put the values of patches (row, column, channel fastest) in place; mean over channels, (B, S, S)."""
        g, p, S = self.config.grid, self.config.patch_size, self.config.side
        x = values_BLv.view(len(values_BLv), g, g, p, p, -1).mean(dim=-1)
        return x.transpose(2, 3).reshape(-1, S, S)


class MlpHead(nn.Module):
    """``mlp_pred_head``: three linear maps with ReLU and dropout between."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, width // 2)
        self.lin2 = nn.Linear(width // 2, width // 2)
        self.lin3 = nn.Linear(width // 2, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = F.relu(self.dropout(self.lin1(x_BD)))
        return self.lin3(F.relu(self.dropout(self.lin2(x_BD))))


class VitMaeFineTuned(VitMae):
    """The published ``ViTMAEForFinetuning``: one number per window from ``vit`` and ``mlp_pred_head``.

    Tokens are hidden at ``config.mask_ratio`` as in pretraining, so predictions depend on the noise; `predict` hides
    nothing. ``sigmoid_outputs`` applies to ``pred`` beside labels, and to `predict`; where it is called without labels,
    the published code leaves it out, and so does this.

    Parameters
    ----------
    config : VitMaeConfig
    """

    def __init__(self, config: VitMaeConfig) -> None:
        super().__init__(config)
        self.mlp_pred_head = MlpHead(config.hidden_size, config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> FineTunedOutput:
        """Predict, and compute ``config.loss_fn`` where `labels (B,)` are given. `pixel_values`, `noise` as above."""
        encoded = self.encode(self.pad(pixel_values), noise, generator)
        pred = self._head(encoded.latent, sigmoid=labels is not None)
        loss = None if labels is None else self._loss(pred.squeeze(-1), labels)
        return FineTunedOutput(pred, loss, encoded.mask, encoded.ids_restore, encoded.latent)

    def predict(self, pixel_values: Tensor, hidden_BL: Tensor | None = None) -> Tensor:
        """Return ``pred (B, 1)`` from whole windows: nothing hidden, tokens in grid order, so the same each time."""
        return self._head(self.latent_of(pixel_values, hidden_BL))

    def _head(self, latent: Tensor, *, sigmoid: bool = True) -> Tensor:
        # the published mean pooling takes CLS in
        pred: Tensor = self.mlp_pred_head(latent.mean(dim=1) if self.config.use_mean_pooling else latent[:, 0])
        return pred.sigmoid() if sigmoid and self.config.sigmoid_outputs else pred

    def _loss(self, pred_B: Tensor, labels_B: Tensor) -> Tensor:
        if self.config.loss_fn == "mse":
            return F.mse_loss(pred_B, labels_B)
        if self.config.loss_fn == "mae":
            return F.l1_loss(pred_B, labels_B)
        if self.config.loss_fn == "binary_cross_entropy":
            weight = None if self.config.pos_weight is None else pred_B.new_tensor(self.config.pos_weight)
            return F.binary_cross_entropy_with_logits(pred_B, labels_B, pos_weight=weight)
        raise ConfigError(f"loss_fn={self.config.loss_fn!r} is not built: use mse, mae or binary_cross_entropy")
