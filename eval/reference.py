"""Which baseline every method is compared with: the one that is best on validation recordings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.make_scores import sums_by_condition
from eval.models import MethodSpec
from eval.task import Task, UnitOutput

AUTO = "auto"
NUM_VALIDATION = 200
"""Validation recordings that the choice looks at, at most; one window each."""


def choose_reference(task: Task, outputs: Sequence[tuple[MethodSpec, UnitOutput]]) -> str:
    """Return the baseline that a task's settings name, or the best one on validation.

    Best is the mean of the task's first metric over all conditions that every baseline has there.

    Returns
    -------
    str
        "" if there is none to choose.
    """
    if task.reference() != AUTO:
        return task.reference()
    values: dict[str, dict[object, float]] = {}
    for spec, output in outputs:
        if spec.kind == "baseline" and output.validation is not None:
            found = sums_by_condition(task, output.validation)
            values[spec.name] = {key: part.value() for key, part in found.items()}
    if not values:
        return ""
    shared = set.intersection(*(set(of_one) for of_one in values.values()))
    means = {name: float(np.mean([of_one[key] for key in shared])) for name, of_one in values.items()} if shared else {}
    return max(means, key=lambda name: means[name]) if means else ""
