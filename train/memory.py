"""How much memory a training run needs, by its settings: what `train/pretrain.py --dry-run` says of it.

Bytes of one rank, at the moments that can be the fullest. What DeepSpeed 0.19 holds, for N parameters of e bytes (4, or
2 in bf16) on R ranks, as its code has it and torch's allocator showed it (not at stage 3 in bf16 or on several ranks):

======================  ================  ===============================  ==========================================
                        stage 0           stages 1 and 2                   stage 3
======================  ================  ===============================  ==========================================
weights                 4N                eN, and 4N/R in float32          eN/R, 4N/R in float32, whole ones below 1e5
moments of AdamW        8N                8N/R                             8N/R
gradients, throughout                                                      eN/R, and a bucket of eN
gradients, in backward  4N                a bucket of eN, then eN/R
between micro-batches   4N                2eN (stage 1), eN/R (stage 2)
update, beside          3 x the largest   3 x the matrices, in float32/R   3 x the matrices, in float32/R
======================  ================  ===============================  ==========================================

A bucket has at most `train.engine.MAX_BUCKET` numbers. Stage 3 gathers eN of weights in each pass on more than one
rank, and keeps them from the forward to the backward pass: none of our sizes reaches its limit of 1e9. Activations:
`train.activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from brainlm.model import BrainLM
from train.activations import Part, Sizes, parts
from train.engine import MAX_BUCKET
from train.param_groups import param_groups
from train.settings import PretrainSettings, micro_batches

FLOAT32 = 4
ADAMW_COPIES = 3  # of what it updates at a time
KEPT_WHOLE = 100_000  # DeepSpeed's stage3_param_persistence_threshold
READ_AHEAD = 4  # steps' batches at once: in use, two that wait, one that is made (WindowLoader.iterate)
SNAPSHOT_COPIES = 4  # of N, on rank zero while training goes on: weights, two moments, and one of these as a file
# A process on a CPU without any tensor: torch 2.13 and DeepSpeed 0.19 with their kernels and threads, on Linux.
PROCESS_BYTES = 440 * 2**20
# glibc takes tensors up to this size from its heap, once flat tensors of ZeRO's were freed, and holes remain between
# them: so much of the activations, by `benchmarks/memory.py`.
HEAP_BELOW, HOLES = 32 * 2**20, 0.25


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is in memory at one moment: bytes by what they are of."""

    name: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def estimate(settings: PretrainSettings, model: BrainLM, world_size: int, *, on_gpu: bool) -> list[Moment]:
    """Estimate the memory of one rank, the one with most, at the fullest moments of a training run.

    On a CPU it is the peak of the process, without pages of shards, which the system takes back when it needs them; on
    a GPU, the peak of torch's allocator there.

    Parameters
    ----------
    settings : PretrainSettings
        ``engine.precision`` is resolved (`train.precision`).
    model : BrainLM
        On any device, ``meta`` too: its sizes alone are read.

    Returns
    -------
    list of Moment
        The fullest first.
    """
    config, P = model.config, model.num_parcels
    element = 2 if settings.engine.precision == "bf16" else FLOAT32
    accumulation = micro_batches(settings, world_size)
    share = settings.data.batch_size // world_size
    state = _state(settings, model, world_size, element)
    grads = _Gradients(settings, model, world_size, element)
    held = dict(state)
    if not on_gpu:
        tokens = model.num_rows * config.num_patches
        window = FLOAT32 * P * config.window_len + tokens + P + config.window_len
        drawn = 8 * (settings.masks.num_decoded or 0)
        validation = settings.validation.max_recordings * settings.validation.windows_per_recording * window
        held = {
            "process": PROCESS_BYTES,
            **state,
            "windows": READ_AHEAD * share * (window + drawn) + validation,
            "snapshot": SNAPSHOT_COPIES * FLOAT32 * model.num_parameters,
        }

    def passed(batch: int, ratio: float, num_decoded: int | None) -> list[Part]:
        return parts(config, P, Sizes(
            batch=batch, mask_ratio=ratio, num_decoded=num_decoded, element=element,
            recompute=settings.engine.activation_checkpointing, blocked=element == 2 and not on_gpu,
        ))  # fmt: skip

    def with_holes(passed: list[Part]) -> dict[str, int]:
        found = _backward(passed, grads, accumulation > 1, on_gpu)
        if not on_gpu and settings.engine.zero_stage > 0:
            on_heap = sum(part.kept + part.beside for part in passed if part.largest < HEAP_BELOW)
            found["holes"] = int(HOLES * min(on_heap, found["activations"]))
        return found

    passes = [passed(share // accumulation, ratio, settings.masks.num_decoded) for ratio in settings.masks.ratios]
    training = max(map(with_holes, passes), key=lambda found: sum(found.values()))
    gathered = _gathered(settings, model, world_size, element)
    validating = max(p.forward_only for p in passed(1, settings.validation.mask_ratio, None))
    moments = [
        Moment(name="backward pass", bytes=held | {"gathered": gathered} | training),
        Moment(name="update", bytes=held | {"gradients": grads.reduced, "AdamW's copies": grads.update}),
        Moment(name="validation", bytes=held | {"gathered": gathered, "activations": validating}),
    ]
    return sorted(moments, key=lambda moment: -moment.total)


def describe(moments: list[Moment], on_gpu: bool) -> list[str]:
    """Return lines that say the largest moment, what it consists of, and the others."""
    first, *others = moments
    consists = ", ".join(f"{what} {_gb(size)}" for what, size in first.bytes.items() if size)
    rest = ", ".join(f"{moment.name} {_gb(moment.total)}" for moment in others)
    where = "of a GPU, by torch" if on_gpu else "of a process"
    return [
        f"memory of a rank      {_gb(first.total)} GB {where}, in the {first.name}: {consists}",
        f"at other moments      {rest}",
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"


def _state(settings: PretrainSettings, model: BrainLM, world_size: int, element: int) -> dict[str, int]:
    """Return what is held from step to step."""
    N, stage = model.num_parameters, settings.engine.zero_stage
    if stage == 0:
        return {"weights": FLOAT32 * N, "moments": 2 * FLOAT32 * N}
    own = math.ceil(N / world_size)
    if stage < 3:
        return {"weights": element * N + FLOAT32 * own, "moments": 2 * FLOAT32 * own}
    whole = sum(p.numel() for p in model.parameters() if p.numel() < KEPT_WHOLE)
    return {
        "weights": (element + FLOAT32) * own + element * whole,
        "moments": 2 * FLOAT32 * own,
        "gradients held": element * own + element * min(N, MAX_BUCKET),
    }


def _gathered(settings: PretrainSettings, model: BrainLM, world_size: int, element: int) -> int:
    """Return what stage 3 has of other ranks' weights, and the bucket in the order of ranks as it is reduced."""
    if settings.engine.zero_stage < 3 or world_size == 1:
        return 0
    return element * (model.num_parameters + min(model.num_parameters, MAX_BUCKET))


class _Gradients:
    """Bytes of gradients, from the backward pass to the update."""

    def __init__(self, settings: PretrainSettings, model: BrainLM, world_size: int, element: int) -> None:
        N, stage = model.num_parameters, settings.engine.zero_stage
        own = math.ceil(N / world_size)
        self.whole = stage == 0  # they stay with their parameters
        self.element = FLOAT32 if self.whole else element
        self.bucket = 0 if stage == 3 else element * min(N, MAX_BUCKET)
        self.between = (FLOAT32 * N, 2 * element * N, element * own, 0)[stage]
        self.reduced = (FLOAT32 * N, element * own, element * own, 0)[stage]
        matrices = sum(p.numel() for p in param_groups(model, 0.1)[0]["params"])
        at_once = max(p.numel() for p in model.parameters()) if self.whole else matrices / world_size
        self.update = int(ADAMW_COPIES * FLOAT32 * at_once)


def _backward(passed: list[Part], grads: _Gradients, accumulates: bool, on_gpu: bool) -> dict[str, int]:
    """Go through the backward pass, and return activations and gradients where they are most together."""
    between = grads.between if accumulates else 0
    kept, done = sum(part.kept for part in passed), 0
    fullest = (0, 0)
    for part in reversed(passed):
        # Pages of a bucket that nothing was written to are not in memory on a CPU.
        filled = grads.bucket if on_gpu and not grads.whole else min(grads.element * done, grads.bucket)
        if accumulates and grads.whole:
            filled = 0
        fullest = max(fullest, (kept + part.beside, filled), key=sum)
        kept -= part.kept
        done += part.num_parameters
    fullest = max(fullest, (0, grads.bucket + (0 if grads.whole else grads.reduced)), key=sum)
    return {"gradients": between + fullest[1], "activations": fullest[0]}
