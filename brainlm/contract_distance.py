"""How far recordings are from what a model was fed, in numbers and in plain sentences.

TR, filter, parcels and amplitude are compared with the input contract. Whether the amplitude is right for the *model*
is asked of the model: hidden values of the recordings are predicted with the input multiplied by a **gain**,
predictions are divided by it again, and the gain with the smallest relative error is searched on a logarithmic grid. A
model that is fed the scale of its training has its optimum near 1; weights whose scale was never published are given
one this way.

Dimension letters: `B` windows, `P` parcels, `W` timepoints, `L` tokens. Masks: True = hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainlm.dataset import Dataset, Split
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.masking import make_mask, mask_generator
from brainlm.ordering import even_starts
from brainlm.recording import Recording
from brainlm.scaling import centre, recording_mean, robust_statistics
from brainlm.windows import TR_TOLERANCE_S, cut_windows

COARSE = tuple(2.0**k for k in range(-7, 8))
NUM_REFINEMENTS = 4  # each halves the step, from a factor of 2 to one of 2^(1/16), about 4 %
SAME_AMPLITUDE = (0.8, 1.25)  # as in `InputContract.adaptable_differences`
SMALL_LOSS = 0.02  # of R2: a gain that brings no more is not worth a change


class Reconstructs(Protocol):
    """A model of ours, or a published one."""

    contract: InputContract

    def reconstruct(
        self, windows: Tensor, mask: Tensor, present_BP: Tensor | None = None, kept_BW: Tensor | None = None, /
    ) -> Tensor: ...

    def hidden_values(self, mask: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ContractDistance:
    """What was found; `summary` says it in sentences.

    Parameters
    ----------
    num_recordings, num_windows : int
        Looked at; windows are those whose hidden values were predicted.
    model_tr_s : float
    other_tr_s : tuple of float
        TRs of the recordings that are not the model's.
    differences : tuple of str
        Filter, units and the rest, where the recordings' own contract is known.
    contract_known : bool
        Whether it is.
    num_parcels, num_missing_parcels, most_missing_parcels : int
        Parcels that the model reads, the median number of them that a recording lacks, and the largest.
    amplitude_ratio : float
        Median over parcels of the recordings' IQR, after centring, over the contract's. The contract of a published
        model has its gain in it.
    gain : float
        The factor on the input with the smallest relative error; NaN if it was not searched.
    r2_at_1, r2_at_gain : float
        1 - relative error of predicted hidden values without a gain, and with it. Not clipped.
    r2_by_gain : tuple of (float, float)
        All that was tried, ascending.
    """

    num_recordings: int
    num_windows: int
    model_tr_s: float
    other_tr_s: tuple[float, ...]
    differences: tuple[str, ...]
    contract_known: bool
    num_parcels: int
    num_missing_parcels: int
    most_missing_parcels: int
    amplitude_ratio: float
    gain: float = math.nan
    r2_at_1: float = math.nan
    r2_at_gain: float = math.nan
    r2_by_gain: tuple[tuple[float, float], ...] = ()

    @property
    def gain_at_edge(self) -> bool:
        """The error was still falling where the search ended: there is no optimum to speak of."""
        return bool(self.r2_by_gain) and self.gain in (self.r2_by_gain[0][0], self.r2_by_gain[-1][0])

    @property
    def gain_matters(self) -> bool:
        return self.r2_at_gain - self.r2_at_1 > SMALL_LOSS

    def verdict(self) -> str:
        """One sentence: can the model be fed these recordings as they are?"""
        if not self.r2_by_gain:
            return "Whether the scale is right was not asked of the model."
        if self.r2_at_gain <= 0 or self.gain_at_edge:
            return (
                "At no gain does the model predict hidden values of these recordings better than their mean: these are "
                "not the recordings it was trained for, or not its weights."
            )
        if self.gain_matters:
            return (
                f"The scale does not fit: multiply the input by {self.gain:.3g} (divide the contract's IQR by it), and "
                f"R2 of hidden values goes from {self.r2_at_1:.3f} to {self.r2_at_gain:.3f}."
            )
        return f"The scale fits: R2 of hidden values is {self.r2_at_1:.3f}, and no other gain is clearly better."

    def summary(self) -> str:
        """All findings, a sentence each, with the verdict last."""
        if self.other_tr_s:
            listed = ", ".join(f"{tr_s:g} s" for tr_s in self.other_tr_s)
            tr = f"The model was fed a TR of {self.model_tr_s:g} s; some recordings have {listed}: resample them."
        else:
            tr = f"All recordings have the model's TR of {self.model_tr_s:g} s."
        if not self.contract_known:
            preparation = "How the recordings were filtered is not known here: compare it with the contract."
        elif self.differences:
            preparation = f"Prepared differently: {'; '.join(self.differences)}."
        else:
            preparation = "Filter, units and centring are those of the contract."
        parcels = (
            f"Of the {self.num_parcels} parcels that the model reads, a recording lacks {self.num_missing_parcels} "
            f"(median; at most {self.most_missing_parcels})."
        )
        low, high = SAME_AMPLITUDE
        word = "about" if low < self.amplitude_ratio < high else "not"
        amplitude = (
            f"Their amplitude is {self.amplitude_ratio:.3g} times that of the contract, {word} the same "
            "(median over parcels of the ratio of IQRs)."
        )
        head = f"{self.num_recordings} recordings against the input contract of the model:"
        return "\n".join([head, tr, preparation, parcels, amplitude, self.verdict()])


def measure_distance(
    model: Reconstructs,
    recordings: Iterable[Recording],
    *,
    contract: InputContract | None = None,
    search_gain: bool = True,
    num_windows: int = 8,
    mask_ratio: float = 0.5,
    seed: int = 0,
    batch_size: int = 4,
) -> ContractDistance:
    """Compare recordings with what a model was fed. Costs about 25 predictions of `num_windows` windows.

    Parameters
    ----------
    model : BrainLM or PublishedModel
    recordings : iterable of Recording
        In the model's parcels; all are held in memory for the amplitude, so give a sample of a large data set.
    contract : InputContract, optional
        Of the data set that they come from, where there is one: tells filter, units and centring.
    search_gain : bool
        False leaves the model alone, and compares contracts.
    num_windows : int
        Windows predicted, one a recording first, then more of each, evenly placed.
    mask_ratio : float
        Fraction of tokens hidden. A published model is asked as it was trained (`PublishedModel.draw_mask`).
    seed : int
        Of the masks, which depend on it and on the window alone.

    Raises
    ------
    DataError
        If there are no recordings, they do not have the model's parcels, or none is as long as a window.
    """
    if num_windows < 1 or batch_size < 1:
        raise ConfigError(f"num_windows={num_windows} and batch_size={batch_size} must be at least 1")
    own = model.contract
    found = list(recordings)
    if not found:
        raise DataError("no recordings to compare with the input contract")
    missing, centred = [], []
    for recording in found:
        if recording.num_parcels != own.atlas.num_parcels:
            raise DataError(
                f"{recording.recording_id} has {recording.num_parcels} parcels, the contract ({own.atlas.name}) has "
                f"{own.atlas.num_parcels}: parcellate it with that atlas"
            )
        absent = recording.missing_parcels()
        missing.append(int((absent & own.usable).sum()))
        series = centre(np.where(absent, np.float32(0), recording.bold), recording.keep_mask)
        centred.append(np.where(absent, np.float32(np.nan), series)[recording.keep_mask])
    curve: dict[float, float] = {}
    windows: list[_Task] = []
    if search_gain:
        windows = _windows(model, found, num_windows, mask_ratio, seed)
        curve = _search(lambda gain: _r2(model, windows, gain, batch_size))
    best = max(curve, key=lambda gain: (curve[gain], -abs(math.log(gain))), default=math.nan)
    differs = {round(r.tr_s, 4) for r in found if abs(r.tr_s - own.tr_s) > TR_TOLERANCE_S}
    return ContractDistance(
        num_recordings=len(found),
        num_windows=len(windows),
        model_tr_s=own.tr_s,
        other_tr_s=tuple(sorted(differs)),
        differences=() if contract is None else tuple(own.adaptable_differences(contract)),
        contract_known=contract is not None,
        num_parcels=int(own.usable.sum()),
        num_missing_parcels=int(np.median(missing)),
        most_missing_parcels=max(missing),
        amplitude_ratio=_amplitude_ratio(np.concatenate(centred), own),
        gain=best,
        r2_at_1=curve.get(1.0, math.nan),
        r2_at_gain=curve.get(best, math.nan),
        r2_by_gain=tuple(sorted(curve.items())),
    )


def read_recordings(dataset: Dataset, split: Split = "train", max_recordings: int = 16) -> Iterator[Recording]:
    """Yield recordings of a prepared data set, evenly spread over a split."""
    reader = dataset.split(split)
    count = min(max_recordings, len(reader))
    for index in np.linspace(0, len(reader) - 1, count).round().astype(int).tolist() if count else ():
        yield reader.as_recording(index)


def _amplitude_ratio(centred: NDArray[np.float32], contract: InputContract) -> float:
    """Return the median over usable parcels of the IQR of all recordings over that of the contract; NaN if none."""
    here = contract.usable & np.isfinite(centred).any(axis=0)
    if not here.any():
        return math.nan
    _, iqr = robust_statistics(centred[:, here])
    return float(np.median(iqr / contract.iqr[here]))


@dataclass(frozen=True, eq=False)
class _Task:
    """One window with its mask: ``values (P, W)`` contract units, ``present (P,)``, ``scored (W,)``; per parcel, what 0
    of the centred series is in contract units, and the recording's standard deviation."""

    values: Tensor
    mask: Tensor
    present: Tensor
    kept: Tensor
    zero: Tensor
    sd: Tensor


def _windows(
    model: Reconstructs, recordings: Sequence[Recording], num_windows: int, mask_ratio: float, seed: int
) -> list[_Task]:
    contract, device = model.contract, _device(model)
    W = contract.window_len
    long = [recording for recording in recordings if recording.num_timepoints >= W]
    if not long:
        raise DataError(f"no recording has the {W} timepoints of a window: the gain cannot be searched")
    long = long[:num_windows]
    per_recording = [num_windows // len(long) + (i < num_windows % len(long)) for i in range(len(long))]
    iqr = np.where(contract.usable, contract.iqr, 1).astype(np.float32)
    zero = torch.from_numpy(recording_mean(contract))
    tasks = []
    for recording, count in zip(long, per_recording):
        starts = even_starts(recording.num_timepoints, W, count)
        cut = cut_windows(recording, contract, starts=starts, native_tr=True)
        present = cut.present[0]
        sd = np.where(present.numpy(), recording.bold, 0)[recording.keep_mask].std(axis=0, dtype=np.float64) / iqr
        for i, start in enumerate(starts):
            generator = mask_generator(seed, recording.recording_id, start)
            mask = _draw(model, mask_ratio, generator, present)
            hidden = model.hidden_values(mask[None].to(device)).cpu()
            values = cut[i : i + 1].as_seen(hidden, zero).values[0]
            tasks.append(_Task(values, mask, present, cut.kept[i], zero, torch.from_numpy(sd).clamp(min=1e-12)))
    return tasks


def _draw(model: Any, mask_ratio: float, generator: torch.Generator, present: Tensor) -> Tensor:
    """Draw a mask over the tokens of the model."""
    if hasattr(model, "draw_mask"):
        drawn: Tensor = model.draw_mask(generator, present)
        return drawn
    contract: InputContract = model.contract
    rows = getattr(model, "num_rows", contract.atlas.num_parcels)
    here = present if rows == len(present) else None  # of groups, no row is known to be missing
    return make_mask("random", rows, contract.window_len // contract.patch_len, mask_ratio, generator, here)


def _device(model: Any) -> torch.device:
    parameters = model.parameters() if hasattr(model, "parameters") else ()
    return next((p.device for p in parameters), torch.device("cpu"))


@torch.no_grad()
def _r2(model: Reconstructs, tasks: Sequence[_Task], gain: float, batch_size: int) -> float:
    """Return 1 - squared error over the variance, each value in standard deviations of its recording and parcel."""
    device = _device(model)
    error = total = 0.0
    for first in range(0, len(tasks), batch_size):
        part = tasks[first : first + batch_size]
        values, mask, present = (torch.stack([getattr(task, name) for task in part]) for name in _FED)
        kept, zero, sd = (torch.stack([getattr(task, name) for task in part]) for name in ("kept", "zero", "sd"))
        fed = [x.to(device) for x in (values * gain, mask, present, kept)]
        predicted = model.reconstruct(*fed).cpu().double()
        scored = torch.isfinite(predicted) & kept[:, None, :] & present[:, :, None]
        if not bool(scored.any()):
            continue
        truth = ((values - zero[:, :, None]).double() / sd[:, :, None]).masked_fill(~scored, 0.0)
        guess = ((predicted / gain - zero[:, :, None]) / sd[:, :, None]).masked_fill(~scored, 0.0)
        error += float((guess - truth).square().sum())
        total += float(truth.square().sum())
    if total == 0:
        raise DataError("no hidden value could be predicted: all are censored, or their parcels are missing")
    return 1 - error / total


_FED = ("values", "mask", "present")


def _search(r2_at: Any) -> dict[float, float]:
    """Return R2 by gain: a coarse grid, then ever smaller steps around the best."""
    curve = {gain: float(r2_at(gain)) for gain in COARSE}
    step = 2.0
    for _ in range(NUM_REFINEMENTS):
        step = math.sqrt(step)
        best = max(curve, key=lambda gain: curve[gain])
        for gain in (best / step, best * step):
            if COARSE[0] <= gain <= COARSE[-1]:
                curve[gain] = float(r2_at(gain))
    return curve
