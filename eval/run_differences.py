"""What differs between the evaluations behind two results folders: settings, data, code, packages, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.model_pairs import ModelPair
from eval.results_folder import ResultsFolder

PLACES = ("out", "run.out", "run.storage")  # differ between any two runs
PARTS = ("config", "dataset", "git", "versions")
NOT_SHOWN = {"dataset.warnings"}  # may name subjects
ABSENT = "not recorded"


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """One dotted key of ``run.json``; checkpoints go by their name in B."""

    key: str
    a: Any
    b: Any


def run_differences(a: ResultsFolder, b: ResultsFolder, pairs: Sequence[ModelPair]) -> list[RunDifference]:
    """Return every entry that is not the same in both folders' ``run.json``; nothing where one has none.

    Of the checkpoints that are compared: hash of the weights, architecture, and how they were trained.
    """
    if not a.run or not b.run:
        return []
    ours, theirs = ({part: folder.run.get(part) for part in PARTS} for folder in (b, a))
    models_a, models_b = ({info["name"]: info for info in folder.run.get("checkpoints", [])} for folder in (a, b))
    for pair in pairs:
        if pair.a in models_a and pair.b in models_b:
            theirs[pair.b], ours[pair.b] = _described(models_a[pair.a]), _described(models_b[pair.b])
    flat_a, flat_b = flatten(theirs), flatten(ours)
    found = []
    for key in dict.fromkeys((*flat_a, *flat_b)):
        here = RunDifference(key=key, a=flat_a.get(key, ABSENT), b=flat_b.get(key, ABSENT))
        if here.a != here.b and key not in NOT_SHOWN and not key.endswith(tuple(f"config.{name}" for name in PLACES)):
            found.append(here)
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _described(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.items() if name not in ("name", "path")}
