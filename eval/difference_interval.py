"""The interval of a difference of two scores, from the sums that each was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from brainlm.intervals import FloatArray, bootstrap_counts, bootstrap_difference
from eval.results_folder import OWN, ScoreSums
from eval.settings import IntervalsSettings

INTERVALS = IntervalsSettings()
TRUTH_SUMS = ("n", "yy")  # number and squares of the values asked for: no model changes them
Pairing = Literal["paired", "unpaired", "none"]


@dataclass(frozen=True, kw_only=True)
class DifferenceInterval:
    """Ends (None = there is no interval), how it was made, and what must be said about it."""

    low: float | None = None
    high: float | None = None
    pairing: Pairing = "none"
    notes: tuple[str, ...] = ()

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def difference_interval(a: ScoreSums | str, b: ScoreSums | str, same_data: bool) -> DifferenceInterval:
    """Return the interval of B - A.

    Parameters
    ----------
    a, b : ScoreSums or str
        Or why there are none, as `ResultsFolder.sums_of` says.
    same_data : bool
        Units have the same names and are resampled together; otherwise each side is resampled by itself.
    """
    if isinstance(a, str) or isinstance(b, str):
        reasons = dict.fromkeys(f"{name}: {side}" for name, side in (("A", a), ("B", b)) if isinstance(side, str))
        return DifferenceInterval(notes=(f"no interval: {'; '.join(reasons)}",))
    num_a, num_b = len(a.frame), len(b.frame)
    if min(num_a, num_b) < 2:
        return DifferenceInterval(notes=("no interval: one unit, nothing to resample",))
    if same_data and set(a.frame.index) != set(b.frame.index):
        return DifferenceInterval(notes=(f"no interval: not the same units were scored ({num_a} in A, {num_b} in B)",))
    notes: tuple[str, ...]
    if same_data:
        theirs, ours = a.arrays(), b.arrays(a.frame.index)
        counts = bootstrap_counts(num_a, INTERVALS.num_bootstrap, INTERVALS.seed)
        notes = _asked_for(theirs, ours)
    else:  # a unit of A adds nothing to B and the other way round, and each folder has draws of its own
        theirs = {name: np.concatenate([values, np.zeros(num_b)]) for name, values in a.arrays().items()}
        ours = {name: np.concatenate([np.zeros(num_a), values]) for name, values in b.arrays().items()}
        drawn = (
            bootstrap_counts(num_a, INTERVALS.num_bootstrap, INTERVALS.seed),
            bootstrap_counts(num_b, INTERVALS.num_bootstrap, INTERVALS.seed + 1),
        )
        counts = np.concatenate(drawn, axis=1)
        notes = ("the interval is not paired: the data are not the same",)
    low, high = bootstrap_difference(ours, theirs, b.metric, counts, INTERVALS.level)
    if not np.isfinite([low, high]).all():
        return DifferenceInterval(notes=(*notes, "no interval: the metric is not defined in resampled data"))
    return DifferenceInterval(low=low, high=high, pairing="paired" if same_data else "unpaired", notes=notes)


def _asked_for(theirs: Mapping[str, FloatArray], ours: Mapping[str, FloatArray]) -> tuple[str, ...]:
    """Say so where the two were not asked for the same values."""
    for name in theirs:
        is_truth = name.removeprefix(OWN) in TRUTH_SUMS and name in ours
        if is_truth and not np.allclose(theirs[name], ours[name], rtol=1e-6, atol=0):
            return ("not the same values were asked for: masks, windows or parcels differ",)
    return ()
