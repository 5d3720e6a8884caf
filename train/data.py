"""What is trained on and validated on, from the settings: one data set, or a mix of several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from brainlm.dataset import Dataset, Split, open_dataset
from brainlm.errors import ConfigError
from brainlm.input_contract import InputContract
from brainlm.loader import WindowLoader
from brainlm.model import BrainLM, ModelConfig
from brainlm.shards import SplitReader
from brainlm.world import World
from train.held_out import HeldOut
from train.mix import Mix
from train.settings import PretrainSettings, micro_batches


def open_datasets(settings: PretrainSettings) -> list[Dataset]:
    """Open the data sets of `data.dataset`; the first one's contract becomes the model's.

    Raises
    ------
    ConfigError
        If two are the same.
    """
    datasets = [open_dataset(url) for url in settings.data.datasets]
    if len({dataset.content_hash for dataset in datasets}) < len(datasets):
        listed = ", ".join(f"{dataset.store.url} (content {dataset.content_hash[:12]})" for dataset in datasets)
        raise ConfigError(f"data.dataset: the same data set is given twice: {listed}. Give it once, and data.weights")
    return datasets


def names_of(datasets: Sequence[Dataset]) -> list[str]:
    """Return a name for each data set: its own, with a number where an earlier one has the same."""
    names = [dataset.name for dataset in datasets]
    return [name if name not in names[:i] else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def check_parcels(datasets: Sequence[Dataset], config: ModelConfig) -> None:
    """Raise `ConfigError` if the data sets have other atlases and the model has a learned code for each parcel."""
    first = datasets[0]
    for other in datasets[1:]:
        found = first.contract.atlas.differences(other.contract.atlas)
        if found and config.parcel_embedding:
            raise ConfigError(
                f"data.dataset: {other.name} has other parcels than {first.name} ({'; '.join(found)}). A model of "
                "several atlases has no learned code per parcel: set model.parcel_embedding=false"
            )


def build_mix(datasets: Sequence[Dataset], model: BrainLM, settings: PretrainSettings, world: World) -> Mix:
    """Return the batches of this rank. Each data set is scaled by its own statistics."""
    loaders = {}
    for number, (name, dataset) in enumerate(zip(names_of(datasets), datasets, strict=True)):
        loaders[name] = WindowLoader(
            filled_split(dataset, "train"),
            own_contract(dataset, model),
            settings.masks,
            batch_size=settings.data.batch_size,
            windows_per_recording=settings.data.windows_per_recording,
            seed=settings.run.seed + number * 2**32,  # no two data sets have the same masks
            rank=world.rank,
            world_size=world.size,
            micro_batches=micro_batches(settings, world.size),
            patch_parcels=model.config.patch_parcels,
            model_contract=model.contract,
        )
    return Mix(loaders, settings.data.weights)


def build_held_out(datasets: Sequence[Dataset], model: BrainLM, settings: PretrainSettings) -> dict[str, HeldOut]:
    """Return what is validated on, by the name of the data set."""
    return {
        name: HeldOut(
            filled_split(dataset, "val"),
            own_contract(dataset, model),
            settings.validation,
            model.config.patch_parcels,
            model.contract,
        )
        for name, dataset in zip(names_of(datasets), datasets, strict=True)
    }


def own_contract(dataset: Dataset, model: BrainLM) -> InputContract:
    return dataset.contract.with_windows(model.config.window_len, model.config.patch_len)


def filled_split(dataset: Dataset, split: Split) -> SplitReader:
    reader = dataset.split(split)
    if len(reader) == 0:
        raise ConfigError(f"{dataset.store.url}: the {split} split is empty; prepare with other split fractions")
    return reader


def train_subjects(datasets: Sequence[Dataset]) -> list[str]:
    """Return the ids of all subjects that are trained on."""
    return sorted({entry.subject for dataset in datasets for entry in dataset.split("train").entries})


def data_hash(datasets: Sequence[Dataset]) -> str:
    """Return what identifies the data: the content hash of the data set, or one of all of them, in their order."""
    hashes = [dataset.content_hash for dataset in datasets]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def describe_data(datasets: Sequence[Dataset], mix: Mix) -> dict[str, Any]:
    """Return what the manifest says of the data. No subject ids."""
    facts: dict[str, Any] = {
        "dataset": " + ".join(names_of(datasets)),
        "data_hash": data_hash(datasets),
    }
    if len(datasets) > 1:
        facts["mix"] = [
            {"dataset": name, "data_hash": d.content_hash, "share": float(share), "atlas": d.contract.atlas.name}
            for name, d, share in zip(names_of(datasets), datasets, mix.shares, strict=True)
        ]
    return facts
