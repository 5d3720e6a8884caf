"""The published 13M BrainLM (`BrainLMForPretraining`; its 5M checkpoint too).

Source: Ortega Caro et al. 2024, "BrainLM: A foundation model for brain activity recordings". Written anew from the
published state dicts and from what the published code computes. Attribute names are those of the state dicts, so that
every parameter and gradient keeps its published name; what a name means is said where it is made.

A token is 20 consecutive timepoints of one parcel, parcel-major. Layers are post-LN; attention is an exact softmax plus
a depthwise convolution of the values along the tokens (Nystromformer, Xiong et al. 2021, with as many landmarks as
segment means, where its approximation is switched off). Faults kept because the same numbers need them: the convolution
runs over tokens in *shuffled* order, so even at mask ratio 0 the latents depend on the noise (`embed` and
`reconstruct` keep atlas order, so that there is one answer); CLS has no position; `decoder.decoder_pred` is in the
state dict and never used.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `K` patches of a parcel, `p` timepoints of a patch,
`L` tokens, `V` visible tokens, `D` width, `H` heads, `E` head width.

The modules hold no initial values worth training from: build them on the meta device and load a state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainlm.embedding import Embedding
from brainlm.errors import DataError
from brainlm.official_config import NystromConfig
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

POSITIONS = 5000  # rows of the published sinusoid table
POSITION_DROPOUT = 0.1  # fixed in the published code, no field of its configuration


class PositionTable(nn.Module):
    """The fixed sinusoid over patches in time, kept in the state dict as ``pos_embedding.pe``, then dropout."""

    pe: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.zeros(POSITIONS, width))
        self.dropout = nn.Dropout(POSITION_DROPOUT)

    def forward(self, x_BPKD: Tensor) -> Tensor:
        return self.dropout(x_BPKD + self.pe[: x_BPKD.shape[2]])


class AddNorm(nn.Module):
    """``dense`` of the branch, plus the trunk, then ``LayerNorm``: the end of both halves of a post-LN layer."""

    def __init__(self, width: int, out_width: int, config: NystromConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out_width)
        self.LayerNorm = nn.LayerNorm(out_width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, branch: Tensor, trunk: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(branch)) + trunk)


class NystromAttention(nn.Module):
    """``attention.self`` (query, key, value, conv) and ``attention.output`` (dense, LayerNorm)."""

    def __init__(self, width: int, num_heads: int, config: NystromConfig) -> None:
        super().__init__()
        self.self = SelfAttention(width, num_heads, bias=True, conv_len=config.conv_kernel_size)
        self.output = AddNorm(width, width, config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.output(self.self(x_BLD), x_BLD)


class NystromLayer(nn.Module):
    """Post-LN Transformer layer: ``intermediate`` and ``output`` are the two maps of its MLP."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, config: NystromConfig) -> None:
        super().__init__()
        self.attention = NystromAttention(width, num_heads, config)
        self.intermediate = Dense(width, mlp_width)
        self.output = AddNorm(mlp_width, width, config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.attention(x_BLD)
        return self.output(F.gelu(self.intermediate(x_BLD)), x_BLD)


class SignalEmbeddings(nn.Module):
    """``vit.embeddings``: maps of a patch and of its parcel's coordinates to the width, the sinusoid, and CLS."""

    def __init__(self, config: NystromConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.patch_len = config.timepoint_patching_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.signal_embedding_projection = nn.Linear(self.patch_len, D)
        self.xyz_embedding_projection = nn.Linear(3, D)
        self.pos_embedding = PositionTable(D)

    def forward(self, signal_BPW: Tensor, xyz_BP3: Tensor) -> Tensor:
        x = self.signal_embedding_projection(signal_BPW.unflatten(2, (-1, self.patch_len)))  # (B, P, K, D)
        x = x + self.xyz_embedding_projection(xyz_BP3)[:, :, None]
        return self.pos_embedding(x).flatten(1, 2)  # (B, L, D)


class NystromEncoder(nn.Module):
    """``vit``: embeddings, layers over the visible tokens after CLS, and ``layernorm``."""

    def __init__(self, config: NystromConfig) -> None:
        super().__init__()
        c = config
        self.embeddings = SignalEmbeddings(c)
        self.encoder = LayerList(
            NystromLayer(c.hidden_size, c.num_attention_heads, c.intermediate_size, c)
            for _ in range(c.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, signal_BPW: Tensor, xyz_BP3: Tensor, noise_BL: Tensor, num_keep: int) -> Encoded:
        x_BLD = self.embeddings(signal_BPW, xyz_BP3)
        ids_keep, mask, ids_restore = shuffle_tokens(noise_BL, num_keep)
        cls_B1D = self.embeddings.cls_token.expand(len(x_BLD), -1, -1)
        x_BLD = torch.cat([cls_B1D, gather_tokens(x_BLD, ids_keep)], dim=1)  # visible tokens only
        return Encoded(self.layernorm(self.encoder(x_BLD)), mask, ids_restore)


class NystromDecoder(nn.Module):
    """``decoder``: all tokens in atlas order, from visible latents and ``mask_token``, with positions of its own."""

    def __init__(self, config: NystromConfig) -> None:
        super().__init__()
        c, D = config, config.decoder_hidden_size
        self.num_parcels, self.use_tanh = c.num_brain_voxels, c.use_tanh_decoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_embed = nn.Linear(c.hidden_size, D)
        self.decoder_layers = nn.ModuleList(
            NystromLayer(D, c.decoder_num_attention_heads, c.decoder_intermediate_size, c)
            for _ in range(c.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=c.layer_norm_eps)
        # Never used: the image head of the class that the published one inherits from. It is in the state dict.
        self.decoder_pred = nn.Linear(D, c.patch_size**2 * c.num_channels).requires_grad_(False)
        self.decoder_xyz_projection = nn.Linear(3, D)
        self.pos_embedding = PositionTable(D)
        self.decoder_pred1 = nn.Linear(D, D // 2)
        self.decoder_pred2 = nn.Linear(D // 2, c.timepoint_patching_size)

    def forward(self, latent: Tensor, xyz_BP3: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        tokens = restore_order(x[:, 1:], self.mask_token, ids_restore).unflatten(1, (self.num_parcels, -1))
        tokens = tokens + self.decoder_xyz_projection(xyz_BP3)[:, :, None]  # (B, P, K, D)
        x = torch.cat([x[:, :1], self.pos_embedding(tokens).flatten(1, 2)], dim=1)
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred2(F.leaky_relu(self.decoder_pred1(self.decoder_norm(x)), 0.1))[:, 1:]  # CLS dropped
        return (x.tanh() if self.use_tanh else x).unflatten(1, (self.num_parcels, -1))  # (B, P, K, p)


class NystromBrainLM(nn.Module):
    """The published ``BrainLMForPretraining``: 13M, and 5M at half the width.

    Parameters
    ----------
    config : NystromConfig
    """

    def __init__(self, config: NystromConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = NystromEncoder(config)
        self.decoder = NystromDecoder(config)

    def forward(
        self,
        signal_vectors: Tensor,
        xyz_vectors: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> OfficialOutput:
        """Reconstruct hidden patches.

        Parameters
        ----------
        signal_vectors : Tensor, shape (B, P, W), float32
            Parcels in atlas order, in the published input scale, which was never documented.
        xyz_vectors : Tensor, shape (B, P, 3), float32
            Parcel coordinates, MNI mm, not scaled.
        noise : Tensor, shape (B, L), optional
            The tokens with the lowest noise are visible, in ascending order. None: uniform, from `generator`.
        """
        L = self._num_tokens(signal_vectors, xyz_vectors)
        noise = take_noise(noise, signal_vectors, L, generator)
        encoded = self.vit(signal_vectors, xyz_vectors, noise, int(L * (1 - self.config.mask_ratio)))
        logits = self.decoder(encoded.latent, xyz_vectors, encoded.ids_restore)
        mask = encoded.mask.view(logits.shape[:3])
        error = logits - signal_vectors.reshape(logits.shape)
        error = error.square() if self.config.loss_fn == "mse" else error.abs()
        loss = (error * mask[..., None]).sum() / (mask.sum() * logits.shape[3])
        return OfficialOutput(loss, logits, mask, encoded.ids_restore, encoded.latent)

    def encode_visible(self, signal_vectors: Tensor, xyz_vectors: Tensor, hidden_BL: Tensor) -> Encoded:
        """Encode the tokens that are not hidden, in atlas order; equally many in every window."""
        L = self._num_tokens(signal_vectors, xyz_vectors)
        if hidden_BL.shape != (len(signal_vectors), L):
            raise DataError(f"mask of shape {tuple(hidden_BL.shape)}, expected {(len(signal_vectors), L)}")
        noise, num_keep = noise_of_mask(hidden_BL)
        encoded: Encoded = self.vit(signal_vectors, xyz_vectors, noise, num_keep)
        return encoded

    def reconstruct(self, signal_vectors: Tensor, xyz_vectors: Tensor, hidden_BL: Tensor) -> Tensor:
        """Predict every value, (B, P, W), from the tokens that are not hidden; only hidden ones were trained."""
        encoded = self.encode_visible(signal_vectors, xyz_vectors, hidden_BL)
        logits: Tensor = self.decoder(encoded.latent, xyz_vectors, encoded.ids_restore)
        return logits.flatten(2)

    def embed(self, signal_vectors: Tensor, xyz_vectors: Tensor, hidden_BL: Tensor | None = None) -> Embedding:
        """Return the embedding of windows: nothing hidden, tokens in atlas order, so the same each time.

        Gradients flow. `hidden_BL` leaves tokens out that hold no measurement.
        """
        if hidden_BL is None:
            size = (len(signal_vectors), self._num_tokens(signal_vectors, xyz_vectors))
            hidden_BL = torch.zeros(size, dtype=torch.bool, device=signal_vectors.device)
        latent = self.encode_visible(signal_vectors, xyz_vectors, hidden_BL).latent
        return Embedding(latent[:, 0], latent[:, 1:].mean(dim=1))

    def _num_tokens(self, signal: Tensor, xyz: Tensor) -> int:
        P, p = self.config.num_brain_voxels, self.config.timepoint_patching_size
        if signal.ndim != 3 or signal.shape[1] != P or signal.shape[2] % p or not 0 < signal.shape[2] <= POSITIONS * p:
            raise DataError(
                f"signal_vectors has shape {tuple(signal.shape)}, expected (windows, {P} parcels, multiple of {p})"
            )
        if xyz.shape != (len(signal), P, 3):
            raise DataError(f"xyz_vectors has shape {tuple(xyz.shape)}, expected {(len(signal), P, 3)}")
        return P * (signal.shape[2] // p)
