"""Fields of the published ``config.json``, under their published names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brainlm.config import Section
from brainlm.errors import ConfigError

TrainMode = Literal["auto_encode", "predict_last", "predict_last_pixel"]


@dataclass(frozen=True, kw_only=True)
class LayerSizes(Section):
    """Fields of the published ``config.json`` that both families read, under their published names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    mask_ratio: float
    # defaults, as in the published code, for fine-tuned models: they have no decoder
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    num_channels: int = 3
    patch_size: int = 16

    def __post_init__(self) -> None:
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, heads) < 1 or getattr(self, width) % getattr(self, heads):
                raise ConfigError(
                    f"{width}={getattr(self, width)} must be a multiple of {heads}={getattr(self, heads)}"
                )
        for name in ("hidden_size", "decoder_hidden_size", "num_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.mask_ratio <= 1:
            raise ConfigError(f"mask_ratio={self.mask_ratio} must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class NystromConfig(LayerSizes):
    """Fields of ``config.json`` that the 13M family reads. `attention_probs_dropout_prob` has no effect in it."""

    num_brain_voxels: int
    timepoint_patching_size: int
    num_landmarks: int
    segment_means_seq_len: int
    conv_kernel_size: int | None
    num_timepoints_per_voxel: int = 200
    use_tanh_decoder: bool = False
    loss_fn: Literal["mse", "mae"] = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_landmarks != self.segment_means_seq_len:
            raise ConfigError(
                f"num_landmarks={self.num_landmarks} must equal segment_means_seq_len={self.segment_means_seq_len}: "
                "the approximate attention of Nystromformer is not built, as no published checkpoint uses it"
            )
        if self.hidden_size != self.decoder_hidden_size:
            raise ConfigError(
                f"hidden_size={self.hidden_size} must equal decoder_hidden_size={self.decoder_hidden_size}: "
                "the published decoder adds positions of the encoder's width"
            )
        if self.timepoint_patching_size < 1 or self.num_timepoints_per_voxel % self.timepoint_patching_size:
            raise ConfigError(
                f"num_timepoints_per_voxel={self.num_timepoints_per_voxel} must be a multiple of "
                f"timepoint_patching_size={self.timepoint_patching_size}"
            )
        if self.num_brain_voxels < 1 or self.num_landmarks < 1:
            raise ConfigError(
                f"num_brain_voxels={self.num_brain_voxels} and num_landmarks={self.num_landmarks} must be at least 1"
            )
        if self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ConfigError(f"conv_kernel_size={self.conv_kernel_size} must be odd")


@dataclass(frozen=True, kw_only=True)
class VitMaeConfig(LayerSizes):
    """Fields of ``config.json`` that the 111M and 650M models and their fine-tuned variants read."""

    image_size: int | tuple[int, int]
    train_mode: TrainMode = "auto_encode"
    norm_pix_loss: bool = False
    # fine-tuned models alone
    loss_fn: str = "mse"
    sigmoid_outputs: bool = False
    use_mean_pooling: bool = False
    pos_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        if sides[0] != sides[1] or sides[0] % self.patch_size:
            raise ConfigError(f"image_size={sides} must be a square of whole patches of patch_size={self.patch_size}")

    @property
    def side(self) -> int:
        """Rows, and columns, of the padded image."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def grid(self) -> int:
        """Patches along each side of the padded image."""
        return self.side // self.patch_size
