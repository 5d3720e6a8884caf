"""The interval of a difference of two scores, from what each was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from brainlm.intervals import FloatArray, bootstrap_counts, percentile_interval
from eval.resampled import Resampled
from eval.settings import IntervalsSettings

INTERVALS = IntervalsSettings()
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


def difference_interval(a: Resampled | str, b: Resampled | str, same_data: bool) -> DifferenceInterval:
    """Return the interval of B - A.

    Parameters
    ----------
    a, b : Resampled or str
        Or why it is not known what the score was made of, as `ResultsFolder.made_of` says.
    same_data : bool
        Units have the same names and are resampled together; otherwise each side is resampled by itself.
    """
    if isinstance(a, str) or isinstance(b, str):
        reasons = dict.fromkeys(f"{name}: {side}" for name, side in (("A", a), ("B", b)) if isinstance(side, str))
        return DifferenceInterval(notes=(f"no interval: {'; '.join(reasons)}",))
    of_a, of_b = a.units, b.units
    num_a, num_b = len(of_a), len(of_b)
    if min(num_a, num_b) < 2:
        return DifferenceInterval(notes=("no interval: one unit, nothing to resample",))
    if same_data and set(of_a) != set(of_b):
        return DifferenceInterval(notes=(f"no interval: not the same units were scored ({num_a} in A, {num_b} in B)",))
    notes: tuple[str, ...]
    drawn = bootstrap_counts(num_a, INTERVALS.num_bootstrap, INTERVALS.seed)
    if same_data:
        of_b, drawn_of_b = of_a, drawn
        notes = _asked_for(a.asked_for(of_a), b.asked_for(of_a))
    else:  # each folder has draws of its own
        drawn_of_b = bootstrap_counts(num_b, INTERVALS.num_bootstrap, INTERVALS.seed + 1)
        notes = ("the interval is not paired: the data are not the same",)
    low, high = percentile_interval(b.replicates(of_b, drawn_of_b) - a.replicates(of_a, drawn), INTERVALS.level)
    if not np.isfinite([low, high]).all():
        return DifferenceInterval(notes=(*notes, "no interval: the metric is not defined in resampled data"))
    return DifferenceInterval(low=low, high=high, pairing="paired" if same_data else "unpaired", notes=notes)


def _asked_for(theirs: Mapping[str, FloatArray], ours: Mapping[str, FloatArray]) -> tuple[str, ...]:
    """Say so where the two were not asked for the same values."""
    for name in theirs.keys() & ours.keys():
        if not np.allclose(theirs[name], ours[name], rtol=1e-6, atol=0):
            return ("not the same values were asked for: masks, windows or parcels differ",)
    return ()
