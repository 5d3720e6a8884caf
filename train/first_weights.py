"""The weights that a training run begins with: fresh ones, or those of a checkpoint (`init_from`)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from brainlm.dataset import Dataset
from brainlm.errors import CheckpointError, ConfigError
from brainlm.model import BrainLM
from brainlm.reconstruction import STALE_DECODER
from brainlm.train_subjects import TrainSubjects
from brainlm.windows import TR_TOLERANCE_S
from train.settings import ModelChoice, PretrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FirstWeights:
    """A model with the data set's contract, and where its weights come from."""

    model: BrainLM
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest; empty for fresh weights."""
    earlier: TrainSubjects | None = None
    """Who the weights were trained on before."""


def first_weights(settings: PretrainSettings, dataset: Dataset) -> FirstWeights:
    """Build the model of pretraining, the same on every rank.

    Raises
    ------
    CheckpointError
        As `adopt`.
    """
    if settings.init_from is None:
        config = settings.model.resolved
        torch.manual_seed(settings.run.seed)
        return FirstWeights(BrainLM(config, dataset.contract.with_windows(config.window_len, config.patch_len)))
    return adopt(load_source(settings), settings.init_from, dataset)


def adopt(source: BrainLM, name: str, dataset: Dataset) -> FirstWeights:
    """Return a model with the weights of another one and the contract of a data set.

    Parameters
    ----------
    name : str
        Where `source` was loaded from.

    Raises
    ------
    CheckpointError
        If the weights are tied to another atlas by a learned code per parcel, or it is not known who they were trained
        on.
    """
    config = source.config
    contract = dataset.contract.with_windows(config.window_len, config.patch_len)
    if config.parcel_embedding:
        theirs = f"data set {dataset.name}, which holds other parcels than the learned codes of its weights,"
        source.contract.check_fits(contract, ours=name, theirs=theirs)
    if source.train_subjects is None:
        raise CheckpointError(
            f"{name} does not say whom it was trained on (no train_subjects.json): what is trained "
            "from it could not either, and scores on its own subjects would go unnoticed"
        )
    if other := source.contract.atlas.differences(contract.atlas):
        differs = [f"other parcels ({'; '.join(other)})"]
        if abs(source.contract.tr_s - contract.tr_s) > TR_TOLERANCE_S:
            differs.append(f"TR {source.contract.tr_s:g} s against {contract.tr_s:g} s")
    else:
        differs = source.contract.adaptable_differences(contract)
    for line in differs:
        logger.warning("the data set differs from what %s was trained on: %s", name, line)
    model = BrainLM(config, contract)
    model.load_state_dict(source.state_dict())
    if STALE_DECODER in source.manifest:
        model.manifest = {STALE_DECODER: source.manifest[STALE_DECODER]}
    facts = {"init_from": {"checkpoint": name, "weights_sha256": source.weights_sha256, "differs": differs}}
    return FirstWeights(model, facts, source.train_subjects)


def load_source(settings: PretrainSettings) -> BrainLM:
    """Load the checkpoint of `init_from`; its sizes are those of the run."""
    assert settings.init_from is not None
    if settings.model != ModelChoice():
        raise ConfigError("the sizes are those of init_from: leave the section model out")
    return load_for_rebuilding(settings.init_from)


def load_for_rebuilding(name: str) -> BrainLM:
    """Load a checkpoint that is to be trained on as a masked autoencoder.

    Raises
    ------
    CheckpointError
        If its encoder was fine-tuned since and its decoder was not.
    """
    source = BrainLM.from_pretrained(name)
    if STALE_DECODER in source.manifest:
        raise CheckpointError(
            f"{name}: its encoder was fine-tuned to predict {', '.join(source.manifest[STALE_DECODER])}, its decoder "
            "was not: begin from the checkpoint that fine-tuning began from"
        )
    return source
