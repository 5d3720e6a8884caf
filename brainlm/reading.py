"""What a trained model is asked about: a recording, or an array with its TR and parcels, and whose statistics scale it.

`embed_recording` and `forecast_recording` begin here. They take any model with an input contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainlm.atlas import Atlas
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.recording import Recording
from brainlm.scaling import centre, robust_statistics

Statistics = Literal["contract", "recording"]
ARRAY = "array"  # recording id of an array


class ReadableModel(Protocol):
    """A model of ours, or a published one."""

    @property
    def contract(self) -> InputContract: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...


def as_recording(
    recording: Recording | NDArray[Any],
    model_contract: InputContract,
    *,
    tr_s: float | None = None,
    atlas: Atlas | None = None,
    contract: InputContract | None = None,
    statistics: Statistics = "contract",
) -> tuple[Recording, InputContract | None]:
    """Return a recording, and the contract that it is scaled by; None = the model's.

    Parameters
    ----------
    recording : Recording, or ndarray of shape (T, P)
        Not modified. Of an array every timepoint counts as kept.
    model_contract : InputContract
        Of the model that is to read it.
    tr_s : float, optional
        Seconds between the timepoints of an array; None = that of `contract`.
    atlas : Atlas, optional
        Parcels of the columns; None = those of `contract`, or of the model.
    contract : InputContract, optional
        Of the data set that the recording is from: its statistics scale.
    statistics : {"contract", "recording"}
        ``recording`` scales by the median and IQR of this recording alone, which are not those that the model was
        trained with: differences in amplitude between recordings are lost.

    Raises
    ------
    DataError
        If an array has no TR or the wrong shape, or the number of columns does not fit.
    ConfigError
        If the arguments contradict each other, or nothing says how parcels of another atlas are scaled.
    """
    if statistics not in get_args(Statistics):
        raise ConfigError(f"statistics: expected one of {', '.join(get_args(Statistics))}, found {statistics!r}")
    if atlas is not None and contract is not None and (found := atlas.differences(contract.atlas)):
        raise ConfigError(f"atlas and contract do not have the same parcels ({'; '.join(found)}): give one of them")
    parcels = contract.atlas if contract is not None else model_contract.atlas if atlas is None else atlas
    if isinstance(recording, np.ndarray):
        recording = _of_array(recording, parcels, tr_s if tr_s is not None or contract is None else contract.tr_s)
    elif not isinstance(recording, Recording):
        raise DataError(
            f"expected a Recording or a numpy array (timepoints, parcels), found {type(recording).__name__}"
        )
    elif tr_s is not None and tr_s != recording.tr_s:
        raise DataError(f"{recording.recording_id} has a TR of {recording.tr_s:g} s: leave tr_s={tr_s:g} out")
    name = recording.recording_id
    if recording.num_parcels != parcels.num_parcels:
        raise DataError(
            f"{name} has {recording.num_parcels} columns, {parcels.name} has {parcels.num_parcels} parcels: say which "
            "atlas the columns are of (atlas=, or contract= of its data set)"
        )
    if not recording.keep_mask.any():
        raise DataError(f"{name}: no timepoint was kept")
    missing = recording.missing_parcels()
    if missing.all():
        raise DataError(f"{name}: no parcel carries signal, all are uncovered, constant or not finite")
    if statistics == "recording":
        return recording, _of_recording_alone(recording, missing, parcels, contract or model_contract)
    if contract is None and (found := model_contract.atlas.differences(parcels)):
        raise ConfigError(
            f"{name} has other parcels than the model ({'; '.join(found)}), and nothing says how they are scaled: give "
            "contract=, the input contract of its data set, or statistics='recording' to scale by this recording alone"
        )
    return recording, contract


def _of_array(array: NDArray[Any], parcels: Atlas, tr_s: float | None) -> Recording:
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            f"expected an array of numbers (timepoints, parcels), found {array.dtype} of shape {array.shape}"
        )
    if array.shape[1] != parcels.num_parcels == array.shape[0]:
        raise DataError(
            f"an array of shape {array.shape}, and {parcels.name} has {parcels.num_parcels} parcels: time comes first, "
            "so give array.T"
        )
    if tr_s is None:
        raise DataError("an array has no TR: give tr_s, the seconds between its timepoints")
    return Recording(recording_id=ARRAY, subject="", bold=array, tr_s=tr_s)


def _of_recording_alone(
    recording: Recording, missing: NDArray[np.bool_], parcels: Atlas, contract: InputContract
) -> InputContract:
    """Return the contract with other parcels, and the median and IQR of one recording."""
    bold = np.where(missing, np.float32(0), recording.bold)
    median, iqr = robust_statistics(centre(bold, recording.keep_mask)[recording.keep_mask])
    return replace(
        contract,
        atlas=parcels,
        covered=~missing,
        median=median,
        iqr=iqr,
        statistics_from="one recording alone",
        num_statistics_recordings=1,
    )


@contextmanager
def evaluating(model: ReadableModel) -> Iterator[torch.device]:
    """Turn dropout and gradients off, and put back what was; gives the device that the weights are on."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield device
    finally:
        for module in training:
            module.training = True
