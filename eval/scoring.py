"""Score predictions of hidden values: the definitions of R2 and the rest, written once.

Every window is scored on its own in float64 and leaves sums behind (number of values, squared errors, squares about
the mean, ...). Sums add up over windows, recordings and subjects in a fixed order, so scores do not depend on batch
size, order or workers.

Primary units: each value is divided by the standard deviation of its recording and parcel. Contract units:
``(x - median) / IQR`` with the data set's statistics of the parcel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainlm.censoring import refill_censored
from brainlm.intervals import Metric
from brainlm.scaling import scale
from eval.cohort import BoolArray, Cohort, FloatArray, Window
from eval.models import Method

BLOCK = 16
"""Recordings whose windows are batched together: what is kept of each window is added up before the next block, so that
memory does not grow with the number of recordings."""
Centring = Literal["recording", "visible"]
PRIMARY = ("n", "sse", "sst", "sae", "y", "yy", "p", "pp", "yp")
CONTRACT = ("c_sse", "c_sae", "c_y", "c_yy")
SUMS = PRIMARY + CONTRACT


@dataclass(frozen=True, eq=False)
class Scored:
    """One window and what a method made of it.

    ``truth`` and ``prediction`` are (P, W) float64 in primary units, NaN where not scored (visible, missing or
    censored); ``mask`` is (L,).
    ``contract_factor`` (P,) turns an error in primary units into one in contract units; ``contract_median`` (P,) is the
    data set's median in contract units.
    """

    window: Window
    mask: BoolArray
    truth: FloatArray
    prediction: FloatArray
    contract_factor: FloatArray
    contract_median: FloatArray


def expand_mask(mask: BoolArray, num_parcels: int, window_len: int) -> BoolArray:
    """Turn a mask over tokens (..., L) into one over values (..., P, W)."""
    patches = mask.reshape(*mask.shape[:-1], num_parcels, -1)
    return np.repeat(patches, window_len // patches.shape[-1], axis=-1)


def blocks(windows: Iterable[Window]) -> Iterator[Iterable[Window]]:
    """Divide windows, which come recording by recording, into those of `BLOCK` recordings each."""
    for _, block in groupby(windows, key=lambda window: window.ref.index // BLOCK):
        yield block


def predict_windows(
    method: Method,
    cohort: Cohort,
    windows: Iterable[Window],
    draw_mask: Callable[[Window], BoolArray],
    centrings: Sequence[Centring],
    batch_size: int,
) -> Iterator[tuple[Centring, Scored]]:
    """Hide, predict, and put truth and prediction side by side.

    Windows are batched with others of as many visible tokens, so that no batch needs padding.

    Parameters
    ----------
    draw_mask : callable
        Gives the mask (L,) of a window; must depend on the window alone.
    centrings : sequence
        ``recording``: series as stored, centred on the whole recording (the paper's definition). ``visible``: each
        parcel is also centred on its visible kept values in this window, so that no statistic of hidden values is fed;
        a parcel without visible values keeps 0.
    """
    pending: dict[int, list[tuple[Window, BoolArray]]] = {}
    for window in windows:
        mask = draw_mask(window)
        group = pending.setdefault(int((~mask).sum()), [])
        group.append((window, mask))
        if len(group) == batch_size:
            yield from _predict_batch(method, cohort, group, centrings)
            group.clear()
    for group in pending.values():
        if group:
            yield from _predict_batch(method, cohort, group, centrings)


def _predict_batch(
    method: Method, cohort: Cohort, group: list[tuple[Window, BoolArray]], centrings: Sequence[Centring]
) -> Iterator[tuple[Centring, Scored]]:
    windows = [window for window, _ in group]
    masks = np.stack([mask for _, mask in group])
    bold = np.stack([window.bold_PW for window in windows])
    kept = np.stack([window.kept_W for window in windows])[:, None, :]
    present = np.stack([window.scored_P for window in windows])
    hidden = expand_mask(masks, cohort.num_parcels, cohort.window_len)
    visible = ~hidden & present[:, :, None]
    answered = hidden & present[:, :, None]
    scored = answered & kept
    measured = visible & kept
    offsets: dict[Centring, FloatArray] = {
        "recording": np.zeros((*present.shape, 1)),
        "visible": (np.where(measured, bold, 0.0).sum(-1, keepdims=True, dtype=np.float64))
        / np.maximum(measured.sum(-1, keepdims=True), 1),
    }
    for i, (window, mask) in enumerate(group):  # `bold` is a copy, from here on what is fed
        refill_censored(bold[i], ~mask.reshape(cohort.num_parcels, -1), window.kept_W)
    contract = method.contract
    reference = cohort.dataset.contract
    iqr = np.where(contract.usable, contract.iqr, 0).astype(np.float64)[:, None]
    reference_iqr = np.where(reference.usable, reference.iqr, 1.0).astype(np.float64)
    for centring in centrings:
        fed = np.where(visible, bold - offsets[centring], 0.0).astype(np.float32)
        windows_z = np.where(visible, _scaled(fed, contract), np.float32(0.0))
        predicted_z = method.reconstruct(windows_z, masks, present, [window.ref for window in windows])
        raw = predicted_z.astype(np.float64) * iqr + contract.median.astype(np.float64)[:, None] + offsets[centring]
        if not np.isfinite(raw[answered]).all():
            raise ValueError(f"{type(method).__name__} gave predictions that are not finite where values are hidden")
        for i, (window, mask) in enumerate(group):
            sd_P = np.where(window.sd_P > 0, window.sd_P, 1.0)
            truth = np.where(scored[i], window.bold_PW.astype(np.float64) / sd_P[:, None], np.nan)
            prediction = np.where(scored[i], raw[i] / sd_P[:, None], np.nan)
            yield (
                centring,
                Scored(
                    window=window,
                    mask=mask,
                    truth=truth,
                    prediction=prediction,
                    contract_factor=sd_P / reference_iqr,
                    contract_median=reference.median.astype(np.float64) / reference_iqr,
                ),
            )


def _scaled(bold_BPW: NDArray[np.float32], contract: object) -> NDArray[np.float32]:
    return scale(bold_BPW.swapaxes(1, 2), contract).swapaxes(1, 2)  # type: ignore[arg-type]


def window_sums(item: Scored, axis: tuple[int, ...] = (0, 1)) -> dict[str, NDArray[np.float64]]:
    """Return the sums that every metric is made of, over parcels (axis 0) and timepoints (axis 1), or one of them."""
    here = np.isfinite(item.truth)
    truth, prediction = np.where(here, item.truth, 0.0), np.where(here, item.prediction, 0.0)
    error = prediction - truth
    factor = item.contract_factor[:, None]
    contract_truth = np.where(here, truth * factor - item.contract_median[:, None], 0.0)
    terms = {
        "n": here.astype(np.float64),
        "sse": error**2,
        "sst": truth**2,  # the recording-and-parcel mean is 0: stored series are centred
        "sae": np.abs(error),
        "y": truth,
        "yy": truth**2,
        "p": prediction,
        "pp": prediction**2,
        "yp": truth * prediction,
        "c_sse": (error * factor) ** 2,
        "c_sae": np.abs(error * factor),
        "c_y": contract_truth,
        "c_yy": contract_truth**2,
    }
    return {name: term.sum(axis=axis) for name, term in terms.items()}


def r2(sums: Mapping[str, FloatArray]) -> FloatArray:
    """1 - sum SSE / sum SST in primary units, SST about the recording-and-parcel mean. Never clipped."""
    return 1 - sums["sse"] / sums["sst"]


def r2_pooled_contract_units(sums: Mapping[str, FloatArray]) -> FloatArray:
    """The paper's R2: contract units, SST about the mean of all scored values."""
    return 1 - sums["c_sse"] / (sums["c_yy"] - sums["c_y"] ** 2 / sums["n"])


def pearson_r(sums: Mapping[str, FloatArray]) -> FloatArray:
    """Correlation of prediction and truth over all scored values, primary units; 0 for a constant prediction."""
    n = sums["n"]
    covariance = sums["yp"] - sums["y"] * sums["p"] / n
    variance_y, variance_p = sums["yy"] - sums["y"] ** 2 / n, sums["pp"] - sums["p"] ** 2 / n
    product = np.clip(variance_y, 0, None) * np.clip(variance_p, 0, None)
    constant = variance_p <= 1e-12 * np.maximum(variance_y, 1e-300)
    return np.where(constant, 0.0, covariance / np.sqrt(np.where(product > 0, product, 1.0)))


def _mean_of(name: str) -> Metric:
    return lambda sums: sums[name] / sums["n"]


METRICS: dict[str, Metric] = {
    "r2": r2,
    "r2_pooled_contract_units": r2_pooled_contract_units,
    "pearson_r": pearson_r,
    "mse": _mean_of("sse"),
    "mae": _mean_of("sae"),
    "mse_contract_units": _mean_of("c_sse"),
    "mae_contract_units": _mean_of("c_sae"),
}
