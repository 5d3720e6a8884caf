"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def param_groups(
    model: nn.Module, weight_decay: float, lr_ratios: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Divide parameters into matrices of linear layers, which decay, and all others, which do not.

    Parameters
    ----------
    lr_ratios : mapping, optional
        By the beginning of a parameter's name: its learning rate as a multiple of that of the others.

    Returns
    -------
    list of dicts
        For a torch optimizer; together they hold every trainable parameter once. ``lr_ratio``: see above.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, weight_decay): [], (1.0, 0.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = next((ratio for prefix, ratio in (lr_ratios or {}).items() if name.startswith(prefix)), 1.0)
            decay = weight_decay if id(parameter) in decayed else 0.0
            groups.setdefault((ratio, decay), []).append(parameter)
    return [{"params": found, "weight_decay": decay, "lr_ratio": ratio} for (ratio, decay), found in groups.items()]
