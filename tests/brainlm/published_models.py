"""Published architectures at a reduced size with random weights, and folders as they were published."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig, VitMaeConfig
from brainlm.official_vitmae import VitMaeBrainLM, VitMaeFineTuned

P, W = 424, 200

VIT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "mask_ratio": 0.75,
    "image_size": (432, 432),
    "patch_size": 16,
}
NYSTROM: dict[str, Any] = {key: VIT[key] for key in VIT if key != "image_size"} | {
    "num_brain_voxels": 12,
    "timepoint_patching_size": 20,
    "num_landmarks": 64,
    "segment_means_seq_len": 64,
    "conv_kernel_size": 5,
    "num_timepoints_per_voxel": 40,
}


def randomised(model: Any) -> Any:
    """Fill every weight from a fixed seed: published modules have no initial values of their own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_(0, 0.3, generator=generator)
    return model.eval()


def vit(**changes: Any) -> VitMaeBrainLM:
    return randomised(VitMaeBrainLM(VitMaeConfig(**VIT | changes)))


def nystrom(**changes: Any) -> NystromBrainLM:
    return randomised(NystromBrainLM(NystromConfig(**NYSTROM | changes)))


def fine_tuned(**changes: Any) -> VitMaeFineTuned:
    return randomised(VitMaeFineTuned(VitMaeConfig(**VIT | changes)))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 1) -> torch.Tensor:
    return normal(2, 1, P, W, seed=seed).expand(-1, 3, -1, -1)


def write(folder: Path, model: Any, *, pickled: bool = False, **changes: Any) -> Path:
    """Write a model as a published folder, with changes to its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "brainlm_mae" if isinstance(model, NystromBrainLM) else "vit_mae"
    tree = asdict(model.config) | {"model_type": kind, "transformers_version": "4.28.1", "top_k": 50} | changes
    (folder / "config.json").write_text(json.dumps(tree))
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder
