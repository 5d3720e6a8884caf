"""P values of paired differences between two methods, and their correction for the number of comparisons.

The test is one of randomisation: were two methods alike, exchanging their results for any subject would change nothing
but chance (Fisher 1935; Good 2005, *Permutation, Parametric and Bootstrap Tests of Hypotheses*, ch. 3). It asks nothing
of the distribution, and fits any metric that is a function of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from brainlm.intervals import Metric

FloatArray = NDArray[np.float64]
_EXCHANGE = 0xE0
_CHUNK = 1000  # exchanges held in memory at a time
_TIE = 1e-9  # of a difference: rounding decides nothing


def paired_p_value(
    ours: Mapping[str, FloatArray], theirs: Mapping[str, FloatArray], metric: Metric, num_exchanges: int, seed: int
) -> float:
    """Return the two-sided p value of metric(ours) - metric(theirs).

    Parameters
    ----------
    ours, theirs : mapping
        One array of shape (units,) a name: sums of each subject or family, in the same order of units.
    num_exchanges : int
        Random exchanges; where all 2**units are fewer, these are counted instead and the p value is exact.
    seed : int

    Returns
    -------
    float
        In (0, 1]; NaN for fewer than two units. No smaller than 2 / 2**units, or 1 / (num_exchanges + 1).
    """
    names = list(ours)
    a = np.stack([np.asarray(ours[name], dtype=np.float64) for name in names], axis=1)
    b = np.stack([np.asarray(theirs[name], dtype=np.float64) for name in names], axis=1)
    num_units = len(a)
    if num_units < 2:
        return float("nan")

    def differences(exchanged: FloatArray) -> FloatArray:
        moved = exchanged @ (b - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = ((total + sign * moved) for total, sign in ((a.sum(0), 1), (b.sum(0), -1)))
            return metric(dict(zip(names, first.T))) - metric(dict(zip(names, second.T)))

    observed = abs(float(differences(np.zeros((1, num_units)))[0]))
    threshold = observed * (1 - _TIE)
    is_exact = num_units < 40 and 2**num_units <= num_exchanges
    count = 2**num_units if is_exact else num_exchanges
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_EXCHANGE, seed, num_units])))
    as_large = 0
    for begin in range(0, count, _CHUNK):
        size = min(_CHUNK, count - begin)
        if is_exact:
            numbers = np.arange(begin, begin + size)[:, None]
            exchanged = ((numbers >> np.arange(num_units)) & 1).astype(np.float64)
        else:
            exchanged = rng.integers(0, 2, (size, num_units)).astype(np.float64)
        found = np.abs(differences(exchanged))
        as_large += int((~(found < threshold)).sum())  # what is not finite counts against a difference
    return as_large / count if is_exact else (as_large + 1) / (count + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979): the chance of any false claim among them is bounded."""
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[position])
        corrected[position] = min(largest, 1.0)
    return corrected
