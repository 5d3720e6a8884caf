"""The corrected resampled t test of Nadeau and Bengio (2003, Machine Learning 52, Sec. 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def resampled_t_p_value(
    differences: NDArray[np.float64], share_tested: float, weights: NDArray[np.float64] | None = None
) -> float:
    """Return the two-sided p value of a mean difference over folds.

    Training rows of folds overlap, so that the differences vary less than they would over new people; the variance of
    their mean is taken as (1 / J + test / train) times theirs.

    Parameters
    ----------
    differences : ndarray, shape (J,), float64
        Of two methods in each fold of each repeat; NaN where not defined, which is left out.
    share_tested : float
        Tested rows over training rows.
    weights : ndarray, shape (J,), float64, optional
        Of folds that are not equally large: their weighted mean is what is tested.

    Returns
    -------
    float
        NaN for fewer than two folds; 1 where the methods never differ.
    """
    from scipy.stats import t

    defined = np.isfinite(differences)
    known = differences[defined]
    if weights is not None and weights[defined].sum() > 0:
        known = known * weights[defined] / weights[defined].mean()
    if len(known) < 2:
        return float("nan")
    if not known.any():
        return 1.0
    variance = float(known.var(ddof=1)) * (1 / len(known) + share_tested)
    if known.std() <= 1e-12 * np.abs(known).max():  # the same difference everywhere: nothing is known of how it varies
        return float("nan")
    p = 2 * float(t.sf(abs(float(known.mean())) / np.sqrt(variance), df=len(known) - 1))
    return max(p, float(np.finfo(np.float64).tiny))
