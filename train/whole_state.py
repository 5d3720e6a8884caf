"""Weights and optimizer state as whole float32 tensors by parameter name, whatever ZeRO divided among ranks.

What is whole fits any number of ranks and any ZeRO stage. Tensors are gathered, and sent to the ranks, one at a time:
besides what rank zero holds, no more than one parameter is whole at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brainlm.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's first and second moment


@dataclass(frozen=True, eq=False)
class WholeState:
    """What AdamW goes on from: by parameter name, float32, on the CPU."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """By `MOMENTS`; empty before the first update."""
    num_updates: int


def gather(engine: Any, optimizer: torch.optim.Optimizer, *, keep: bool) -> WholeState | None:
    """Gather the state of a DeepSpeed engine. All ranks take part; those that do not `keep` it get None.

    Parameters
    ----------
    engine : DeepSpeedEngine
    optimizer : torch.optim.AdamW
        The one that the engine was made with.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    num_updates = _num_updates(optimizer)
    _link(engine)
    moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS} if num_updates else {}
    for key, found in moments.items():
        for name, parameter in _trained(engine).items():
            full = safe_get_full_optimizer_state(parameter, key)  # None in float32 at stage 0
            if keep:
                found[name] = _kept(optimizer.state[parameter][key] if full is None else full)
    weights = gather_weights(engine, keep=keep)
    return WholeState(weights, moments, num_updates) if keep else None


def gather_weights(engine: Any, *, keep: bool) -> dict[str, Tensor]:
    """Gather the float32 weights. All ranks take part; those that do not `keep` them get none."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # None in float32 at stage 0: the weights themselves
        if keep:
            weights[name] = _kept(parameter if full is None else full)
    return weights


def restore(engine: Any, optimizer: torch.optim.Optimizer, whole: WholeState | None) -> None:
    """Put a state back. All ranks take part; `whole` is that of rank zero, and of no interest elsewhere.

    Raises
    ------
    CheckpointError
        On all ranks, before anything is changed, if names or shapes are not those of the model.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    parameters, trained = dict(engine.module.named_parameters()), _trained(engine)
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    num_updates = _agree(whole, shapes, trained)
    if num_updates:
        _make_room(stage, zero, optimizer, parameters, num_updates)
        _link(engine)
    for name, parameter in parameters.items():
        weight = _from_rank_zero(None if whole is None else whole.weights[name], shapes[name], engine.device)
        if stage == 3:
            _set_partitioned(parameter, weight)
        elif stage == 0 or name not in trained:
            parameter.data.copy_(weight)
        if stage != 0 and name in trained:
            safe_set_full_fp32_param(parameter, weight)
        for key in MOMENTS if num_updates and name in trained else ():
            ours = None if whole is None else whole.moments[key][name]
            value = _from_rank_zero(ours, shapes[name], engine.device)
            if stage == 0:
                optimizer.state[parameter][key].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    if stage in (1, 2):
        zero.update_lp_params()  # what the model computes with


def _trained(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that have an optimizer state."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def _num_updates(optimizer: torch.optim.Optimizer) -> int:
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(steps) <= 1, steps
    return steps.pop() if steps else 0


def _agree(whole: WholeState | None, all_shapes: dict[str, tuple[int, ...]], trained: Iterable[str]) -> int:
    """Check the state on rank zero, and return its number of updates on every rank."""
    said: list[Any] = [None, 0]
    if whole is not None:
        found = [whole.weights, *(whole.moments[key] for key in MOMENTS if whole.num_updates)]
        for tensors in found:
            theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            shapes = all_shapes if tensors is whole.weights else {name: all_shapes[name] for name in trained}
            differs = sorted(name for name in theirs.keys() | shapes.keys() if theirs.get(name) != shapes.get(name))
            if differs:
                name = differs[0]
                said[0] = f"{name} has shape {theirs.get(name)}, the model's has {shapes.get(name)}"
        said[1] = whole.num_updates
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(said, src=0)
    if said[0]:
        raise CheckpointError(f"the snapshot is of another model: {said[0]}")
    return int(said[1])


def _from_rank_zero(tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if tensor is None:
        found = torch.empty(shape, dtype=torch.float32, device=device)
    else:
        found = tensor.to(device=device, dtype=torch.float32).contiguous()
    if several:
        torch.distributed.broadcast(found, src=0)
    return found


def _make_room(
    stage: int, zero: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], num_updates: int
) -> None:
    """Give the optimizer moments of 0: it makes them in its first update, and there was none in this process."""
    if stage == 0:
        owners = [p for p in parameters.values() if p.requires_grad]
    elif stage == 3:
        owners = zero.fp32_partitioned_groups_flat
    else:
        owners = zero.single_partition_of_fp32_groups
    for owner in owners:
        optimizer.state[owner] = {
            "step": torch.tensor(float(num_updates), dtype=torch.float32),
            **{key: torch.zeros_like(owner, memory_format=torch.preserve_format) for key in MOMENTS},
        }


def _link(engine: Any) -> None:
    """Tell each parameter where in the flat moments its own are (ZeRO 1 and 2).

    DeepSpeed does so after the update of the first parameter group, when the others have no moments yet.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_partitioned(parameter: torch.nn.Parameter, weight: Tensor) -> None:
    """Set what the model computes with at ZeRO 3, where each rank holds a part of every parameter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(weight)
