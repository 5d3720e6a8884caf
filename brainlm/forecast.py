"""Forecasts: the patches after the end of a recording are hidden patches, and are rebuilt as such.

Only a model that was trained on masks that hide the end of the window (``future`` in `brainlm.masking`) can be expected
to forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.atlas import Atlas
from brainlm.censoring import refill_censored
from brainlm.errors import DataError
from brainlm.input_contract import InputContract
from brainlm.reading import ReadableModel, Statistics, as_recording, evaluating
from brainlm.recording import Recording
from brainlm.scaling import unscale
from brainlm.windows import Windows, cut_windows

ROUNDING = 1e-6  # of a timepoint: 0.3 s is one timepoint of 0.1 s + 0.1 s + 0.1 s


class Forecasts(ReadableModel, Protocol):
    """A model that rebuilds hidden patches."""

    def reconstruct(self, windows: Windows, mask_BL: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """What a model expects after the end of a recording.

    Parameters
    ----------
    bold : ndarray, shape (H, P), float32
        In the units of the recording; NaN for missing parcels.
    times_s : ndarray, shape (H,), float64
        Seconds from the first timepoint of the recording.
    missing : ndarray, shape (P,), bool
        True = the parcel carries no signal in the recording, or the model does not use it.
    """

    bold: NDArray[np.float32]
    times_s: NDArray[np.float64]
    missing: NDArray[np.bool_]


def forecast_recording(
    model: Forecasts,
    recording: Recording | NDArray[Any],
    horizon_s: float,
    *,
    tr_s: float | None = None,
    context_s: float | None = None,
    atlas: Atlas | None = None,
    contract: InputContract | None = None,
    statistics: Statistics = "contract",
    native_tr: bool = False,
) -> Forecast:
    """Forecast what follows a recording.

    The window that is fed ends with as many hidden patches as the horizon needs, and before them stands the end of the
    recording. Where that is shorter, the front of the window is padding. Centring and scaling take the whole recording,
    all of which is past.

    Parameters
    ----------
    model : BrainLM or PublishedModel
    recording : Recording, or ndarray of shape (T, P)
        Not centred or scaled. Not modified.
    horizon_s : float
        Seconds to forecast, rounded up to whole timepoints; at most the model's window less one patch.
    context_s : float, optional
        Seconds at the end of the recording that the model sees, rounded up to whole timepoints; None = as many as the
        window has room for.
    tr_s, atlas, contract, statistics, native_tr
        As for `brainlm.embedding.embed_recording`.

    Raises
    ------
    DataError
        If horizon and context do not fit into a window, or nothing in the context was kept.
    """
    found, own = as_recording(
        recording, model.contract, tr_s=tr_s, atlas=atlas, contract=contract, statistics=statistics
    )
    units = model.contract if own is None else own
    W, patch_len, T = model.contract.window_len, model.contract.patch_len, found.num_timepoints
    num_steps = _timepoints("horizon_s", horizon_s, found.tr_s)
    num_hidden = -(-num_steps // patch_len)
    room = W - num_hidden * patch_len
    if room < patch_len:
        raise DataError(
            f"a forecast of {horizon_s:g} s: windows of this model span {W} timepoints ({W * found.tr_s:g} s), and it "
            f"must see a patch of {patch_len} of them; forecast {(W - patch_len) * found.tr_s:g} s at most"
        )
    context = room if context_s is None else _timepoints("context_s", context_s, found.tr_s)
    if context > room:
        raise DataError(
            f"a context of {context_s:g} s before a forecast of {horizon_s:g} s: windows of this model have room for "
            f"{room * found.tr_s:g} s of context, give that or less"
        )
    if not found.keep_mask[max(T - context, 0) :].any():
        raise DataError(f"{found.recording_id}: no timepoint was kept in the last {context * found.tr_s:g} s")

    # Padding is censored timepoints before and after, which no statistic and no token takes part in.
    front = max(room - T, 0)
    longer = replace(
        found,
        bold=np.pad(found.bold, ((front, W - room), (0, 0))),
        keep_mask=np.pad(found.keep_mask, (front, W - room)),
    )
    start = front + T - room
    windows = cut_windows(longer, model.contract, own_contract=own, starts=[start], native_tr=native_tr)
    kept = windows.kept.clone()
    kept[:, : room - context] = False
    visible = np.ones((found.num_parcels, W // patch_len), dtype=bool)
    refill_censored(windows.values[0].numpy(), visible, kept[0].numpy())  # not from values before the context
    kept[:, room:] = True  # hidden, not censored
    windows = replace(windows, kept=kept, starts=())
    with evaluating(model) as device:
        windows = windows.to(device)
        num_rows = model.token_grid(windows).num_rows if hasattr(model, "token_grid") else found.num_parcels
        mask = torch.zeros(num_rows, W // patch_len, dtype=torch.bool, device=device)
        mask[:, -num_hidden:] = True
        predicted = model.reconstruct(windows, mask.view(1, -1))[0, :, room : room + num_steps].float().cpu().numpy()
    missing = np.isnan(predicted).any(axis=1)
    mean = np.where(missing, np.float32(0), found.bold[found.keep_mask]).mean(axis=0, dtype=np.float64)
    bold = np.where(missing, np.nan, unscale(predicted.T, units) + mean)
    return Forecast(
        bold=bold.astype(np.float32),
        times_s=np.arange(T, T + num_steps, dtype=np.float64) * found.tr_s,
        missing=missing,
    )


def _timepoints(name: str, seconds: float, tr_s: float) -> int:
    if not (math.isfinite(seconds) and seconds > 0):
        raise DataError(f"{name}: expected seconds above 0, found {seconds}")
    return max(math.ceil(seconds / tr_s - ROUNDING), 1)
