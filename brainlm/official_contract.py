"""The input contract of a published model: a data set's parcels and statistics, in the units that the weights are fed.

The published weights came without one. Their atlas and window are known; the scale of their input is not: it was
``signal / 5.6430855`` of a normalisation that was never documented, without the median and IQR. So statistics are those
of the user's own data set, times a **gain**: contract units are ``gain * (x - median) / IQR``, and what is in contract
units is what the model is fed. A gain is given, or found where the model reconstructs best
(`brainlm.input_contract.distance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from brainlm import input_contract
from brainlm.dataset import MANIFEST as DATASET_MANIFEST
from brainlm.dataset import open_dataset
from brainlm.errors import CheckpointError, ConfigError
from brainlm.input_contract import InputContract
from brainlm.official_config import NystromConfig, VitMaeConfig
from brainlm.official_vitmae import NUM_PARCELS, WINDOW_LEN
from brainlm.store import Store

PATCH_LEN = 20  # timepoints by which masks are drawn for models whose own patches do not divide a window
UNITS = "gain x robust units; the published scale is not documented (signal / 5.6430855 of an unknown normalisation)"
SEEN = "pretrained on UK Biobank recordings that were not listed: who is in UK Biobank may have been seen"

GainSource = Literal["not estimated", "given", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The factor on robust units, and where it comes from; `note` is shown with every score."""

    value: float = 1.0
    source: GainSource = "not estimated"
    note: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"gain: expected a finite number above 0, found {self.value}")

    def flag(self) -> str:
        how = f"{self.source}; {self.note}" if self.note else self.source
        return f"input scale of the published weights is not documented: gain {self.value:.4g} ({how})"


def num_published_parcels(config: NystromConfig | VitMaeConfig) -> int:
    return config.num_brain_voxels if isinstance(config, NystromConfig) else NUM_PARCELS


def published_contract(
    contract: InputContract, config: NystromConfig | VitMaeConfig, gain: Gain, where: str
) -> InputContract:
    """Return the contract of a published model for data like those that `contract` describes.

    Parameters
    ----------
    contract : InputContract
        Of the user's data set; `where` it is, for errors.
    config : NystromConfig or VitMaeConfig
        Published configuration.

    Raises
    ------
    CheckpointError
        If the atlas does not have as many parcels as the model. That they are the same parcels in the same order cannot
        be checked: the published files do not name them.
    """
    num_parcels = num_published_parcels(config)
    if contract.atlas.num_parcels != num_parcels:
        raise CheckpointError(
            f"{where} has the {contract.atlas.num_parcels} parcels of {contract.atlas.name}, the published model has "
            f"{num_parcels} (A424, in its own order): prepare the recordings with that atlas"
        )
    if isinstance(config, NystromConfig):
        window_len, patch_len = config.num_timepoints_per_voxel, config.timepoint_patching_size
    else:
        window_len = WINDOW_LEN
        patch_len = contract.patch_len if window_len % contract.patch_len == 0 else PATCH_LEN
    factor = np.float32(gain.value)
    return replace(
        contract.with_windows(window_len, patch_len),
        iqr=(contract.iqr / factor).astype(np.float32),
        units=f"{contract.units}; model input: {UNITS}",
        statistics_from=f"{contract.statistics_from} (IQR divided by the gain {gain.value:.4g})",
        flags=(*contract.flags, gain.flag(), SEEN),
    )


def read_contract(url: str) -> InputContract:
    """Read the contract of a data set or checkpoint, or an ``input_contract.json`` itself."""
    store = Store(url)
    if store.exists(DATASET_MANIFEST):
        return open_dataset(url).contract
    if url.rstrip("/").endswith(".json"):
        folder, _, name = url.rstrip("/").rpartition("/")
        store = Store(folder or ".")
    else:
        name = input_contract.FILE_NAME
    if not store.exists(name):
        raise CheckpointError(f"{url}: expected a prepared data set or an {input_contract.FILE_NAME}, found neither")
    tree: Mapping[str, Any] = store.read_json(name)
    return InputContract.from_json(dict(tree), store.url_of(name))
