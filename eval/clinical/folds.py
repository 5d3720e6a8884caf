"""How people are divided: random folds, several times over, and one fold a site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.folds import fold_of_group
from eval.clinical.problem import IntArray
from eval.clinical.settings import FoldKind


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows that are learned from, and rows that are asked about: no group is in both.

    ``name`` is the number of a random fold, or the site that is tested.
    """

    kind: FoldKind
    repeat: int
    name: str
    train: IntArray
    test: IntArray

    @property
    def label(self) -> str:
        return f"random {self.repeat}.{self.name}" if self.kind == "random" else f"site {self.name}"


def random_folds(groups: Sequence[str], num_folds: int, repeats: int, seed: int) -> list[Fold]:
    """Deal groups (families, else subjects) out to folds, `repeats` times, each with another seed."""
    found = []
    num = min(num_folds, len(set(groups)))
    for repeat in range(repeats):
        fold_of = fold_of_group(groups, num, seed + repeat)
        number = np.array([fold_of[group] for group in groups], dtype=np.int64)
        for k in range(num):
            found.append(_fold("random", repeat, str(k), np.flatnonzero(number != k), np.flatnonzero(number == k)))
    return found


def site_folds(groups: NDArray[np.str_], sites: Sequence[str]) -> list[Fold]:
    """Test each site by what the others teach. Groups that are at the tested site too are not learned from.

    Returns
    -------
    list of Fold
        Empty where there are fewer than two sites; recordings without a site are learned from and never tested.
    """
    labels = np.array(sites)
    names = sorted(Counter(site for site in sites if site))
    if len(names) < 2:
        return []
    found = []
    for name in names:
        test = np.flatnonzero(labels == name)
        train = np.flatnonzero((labels != name) & ~np.isin(groups, groups[test]))
        if len(train):
            found.append(_fold("sites", 0, name, train, test))
    return found


def _fold(kind: FoldKind, repeat: int, name: str, train: IntArray, test: IntArray) -> Fold:
    return Fold(kind, repeat, name, train.astype(np.int64), test.astype(np.int64))
