"""Folds of a cross-validation over people: what belongs together stays together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def in_order(groups: Iterable[str], seed: int) -> list[str]:
    """Return the groups (subjects, families) in the order of their hashes: random, and the same everywhere."""
    return sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).hexdigest())


def fold_of_group(groups: Iterable[str], num_folds: int, seed: int) -> dict[str, int]:
    """Deal the groups out to folds, as many to each, give or take one."""
    return {group: number % num_folds for number, group in enumerate(in_order(groups, seed))}
