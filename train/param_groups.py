"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide parameters into matrices of linear layers, which decay, and all others, which do not.

    Returns
    -------
    list of two dicts
        For a torch optimizer; together they hold every trainable parameter once.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[0 if id(parameter) in decayed else 1]["params"].append(parameter)
    return groups
