"""Which engine settings are tested together; any other combination is refused before anything starts.

The tests take their cases from here (`tests/train/test_combinations.py`), and docs/training.md shows the same table.
"""

from __future__ import annotations

from typing import NamedTuple

from brainlm.errors import ConfigError
from train.settings import EngineSettings


class Combination(NamedTuple):
    """Engine settings that decide how DeepSpeed and torch run a step."""

    precision: str
    zero_stage: int
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    compile: bool = False


TESTED = (
    *(Combination("fp32", stage) for stage in (0, 1, 2, 3)),
    *(Combination("bf16", stage) for stage in (1, 2, 3)),
    *(Combination("fp32", stage, activation_checkpointing=True) for stage in (0, 1, 2, 3)),
    *(Combination("bf16", stage, activation_checkpointing=True) for stage in (1, 2, 3)),
    *(Combination("fp32", stage, offload_optimizer=True) for stage in (1, 2, 3)),
    *(Combination("bf16", stage, offload_optimizer=True) for stage in (1, 2, 3)),
    *(Combination("bf16", stage, activation_checkpointing=True, offload_optimizer=True) for stage in (2, 3)),
    Combination("fp32", 1, compile=True),
    Combination("bf16", 1, compile=True),
)

WHY_NOT = {  # what is known of some that are not in the table
    Combination(
        "bf16", 0
    ): "at stage 0 DeepSpeed's first update in bf16 is not the one that was asked for; stage 1 costs "
    "nothing more on one rank",
}


def combination(engine: EngineSettings) -> Combination:
    """Return what these settings combine."""
    return Combination(*(getattr(engine, name) for name in Combination._fields))


def check_combination(engine: EngineSettings) -> None:
    """Raise `ConfigError` unless these settings were tested together."""
    if engine.precision == "auto":  # the entry resolves it, and asks then
        return
    found = combination(engine)
    if found in TESTED:
        return
    near = [other for other in TESTED if sum(a != b for a, b in zip(found, other, strict=True)) == 1]
    said = ", ".join(f"{name}={_text(value)}" for name, value in found._asdict().items())
    lines = [f"engine: this combination is not tested: {said}"]
    if found in WHY_NOT:
        lines[0] += f" ({WHY_NOT[found]})"
    if near:
        lines.append("Tested, with one setting changed:")
        for other in near:
            name = next(n for n in Combination._fields if getattr(other, n) != getattr(found, n))
            lines.append(f"  engine.{name}={_text(getattr(other, name))}")
    raise ConfigError("\n".join(lines))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
