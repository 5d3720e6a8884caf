"""What a table is made of: the checkpoint, the recordings in parts, and how the one is adapted to the other.

A part is a few recordings of one shard, or a few files: a worker opens that shard alone, so that nothing in it grows
with the cohort. Parts are found from the manifest; no shard is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from brainlm.config import config_hash
from brainlm.dataset import MANIFEST, Dataset, open_dataset
from brainlm.errors import ConfigError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from brainlm.windows import TR_TOLERANCE_S
from eval.extract_settings import ExtractSettings
from eval.models import best_predictor, newest_checkpoint, open_model
from eval.predict_settings import PredictSettings
from eval.series_files import find_files
from eval.table_settings import TableSettings

VERSION = 1  # of the numbers and columns: raise it when the same settings give others


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some recordings, in order: rows `first` to `stop` of a shard of a data set, or `files`."""

    name: str
    split: str = ""
    shard: dict[str, Any] | None = None
    first: int = 0
    stop: int = 0
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files) or self.stop - self.first

    def __repr__(self) -> str:
        return f"Part({self.name})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a worker is told besides its part. `key` identifies everything that decides the numbers."""

    settings: TableSettings
    folder: str
    weights_sha256: str
    dataset_url: str
    own_contract: InputContract | None
    adapted: tuple[str, ...]
    key: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TablePlan:
    """A job, its parts in the order of the rows, and what the table says of itself."""

    job: Job
    contract: InputContract
    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    facts: dict[str, Any]
    refused: tuple[dict[str, str], ...] = ()
    """Recordings that could not be made readable, as rows of the table of rejections."""

    @property
    def num_recordings(self) -> int:
        return sum(map(len, self.parts))


def make_table_plan(settings: TableSettings) -> TablePlan:
    """Open checkpoint and data, and check that the one can be fed the other.

    Raises
    ------
    ConfigError
        If parcels or TR are others and the settings do not say how to adapt; if there are no recordings.
    """
    folder = checkpoint_of(settings)
    model = open_for(settings, folder)
    contract: InputContract = model.contract
    if isinstance(settings, ExtractSettings) and settings.per_parcel:
        from brainlm.embedding import why_no_parcels

        if reason := why_no_parcels(model):
            raise ConfigError(f"per_parcel: {reason}")
    dataset = _dataset(settings)
    if dataset is not None:
        parts, notes = _of_shards(dataset, settings), check_dataset(dataset.contract, contract, settings)
        identity: Any = [dataset.content_hash, dataset.contract.dumps()]
        data: dict[str, Any] = {"dataset": dataset.name, "content_hash": dataset.content_hash}
    else:
        files = find_files([settings.data] if isinstance(settings.data, str) else settings.data)
        parts, notes = _of_files(files, settings.recordings_per_part), check_files(contract, settings)
        identity = [[file, *_stamp(file)] for file in files]
        data = {"num_files": len(files)}
    if not parts:
        raise ConfigError(f"data: no recordings in {', '.join(settings.splits)} of {settings.data}")
    subjects = getattr(model, "train_subjects", None)
    if subjects is None:
        notes += ("who the checkpoint was trained on is not known: seen_in_training is empty",)
    tree = [VERSION, settings.hashed(), model.weights_sha256, contract.dumps(), identity]
    key = config_hash({settings.KIND: tree})
    job = Job(
        settings=settings,
        folder=folder,
        weights_sha256=model.weights_sha256,
        dataset_url="" if dataset is None else dataset.store.url,
        own_contract=None if dataset is None else dataset.contract,
        adapted=notes,
        key=key,
    )
    facts = {
        "key": key,
        "version": VERSION,
        "checkpoint": settings.checkpoint,
        "weights_sha256": model.weights_sha256,
        "data": data,
        "settings": settings.hashed(),
        "statistics_from": _statistics_from(contract, dataset, settings),
        "adapted": list(notes),
        "window_len": contract.window_len,
        "tr_s": contract.tr_s,
        "parcel_names": list((contract if dataset is None else dataset.contract).atlas.parcel_names),
    }
    return TablePlan(job=job, contract=contract, parts=tuple(parts), notes=notes, facts=facts)


def checkpoint_of(settings: TableSettings) -> str:
    """Return the folder that `settings.checkpoint` stands for: of a training run, its newest or best checkpoint."""
    if isinstance(settings, PredictSettings):
        return best_predictor(settings.checkpoint)
    return newest_checkpoint(settings.checkpoint)


def open_for(settings: TableSettings, folder: str) -> Any:
    """Load the checkpoint as what the table needs: an encoder, or a predictor."""
    if isinstance(settings, PredictSettings):
        from brainlm.predictor import Predictor

        return Predictor.from_pretrained(folder)
    return open_model(folder)


def check_dataset(own: InputContract, contract: InputContract, settings: TableSettings) -> tuple[str, ...]:
    """Return what is adapted when recordings of contract `own` are fed to a model of `contract`."""
    if settings.tr_s is not None:
        raise ConfigError("tr_s is for series files: the recordings of a data set have their own")
    notes: list[str] = []
    differences = contract.atlas.differences(own.atlas)
    if differences and settings.scaled_by == "checkpoint":
        raise ConfigError(
            f"the data set has other parcels than the checkpoint ({'; '.join(differences)}), whose statistics do not "
            "scale them. Set scaled_by=dataset (or recording) to place its parcels by their coordinates, or prepare it "
            "with contract=CHECKPOINT"
        )
    if differences:
        notes.append(f"parcels of {own.atlas.name} are placed by their coordinates: {'; '.join(differences)}")
    remedy = "prepare it with contract=CHECKPOINT"
    notes += _check_tr(own.tr_s, contract, settings, "the data set has a TR of", remedy)
    if settings.scaled_by == "dataset":
        notes.append("scaled by the statistics of the data set, not by those that the checkpoint was trained with")
    if not differences:
        found = contract.adaptable_differences(own)
        notes += [f"differs from the checkpoint's contract: {line}" for line in found if not line.startswith("TR ")]
    return (*notes, *_of_recording(settings))


def check_files(contract: InputContract, settings: TableSettings) -> tuple[str, ...]:
    """Return what is assumed of series files."""
    if settings.scaled_by == "dataset":
        raise ConfigError("scaled_by=dataset: series files have no statistics; prepare them with data_prep/prepare.py")
    notes = [f"series files are taken to be cleaned as the checkpoint wants them, in the parcels of {_name(contract)}"]
    if settings.tr_s is None:
        notes.append(f"tr_s was not given: taken to be that of the checkpoint, {contract.tr_s:g} s")
    else:
        remedy = "resample the series (data_prep/prepare.py contract=CHECKPOINT does)"
        notes += _check_tr(settings.tr_s, contract, settings, "tr_s is", remedy)
    return (*notes, *_of_recording(settings))


def _check_tr(tr_s: float, contract: InputContract, settings: TableSettings, said: str, remedy: str) -> list[str]:
    if abs(tr_s - contract.tr_s) <= TR_TOLERANCE_S:
        return []
    if not settings.native_tr:
        raise ConfigError(
            f"{said} {tr_s:g} s, that of the checkpoint is {contract.tr_s:g} s: {remedy}, or set native_tr=true, at a "
            "cost in accuracy"
        )
    return [f"TR {tr_s:g} s against {contract.tr_s:g} s of the checkpoint: tokens are in true seconds"]


def _of_recording(settings: TableSettings) -> tuple[str, ...]:
    own = "each recording is scaled by its own median and IQR: differences in amplitude between recordings are lost"
    return (own,) if settings.scaled_by == "recording" else ()


def _name(contract: InputContract) -> str:
    return f"{contract.atlas.name} ({contract.atlas.num_parcels} columns)"


def _statistics_from(contract: InputContract, dataset: Dataset | None, settings: TableSettings) -> str:
    if settings.scaled_by == "recording":
        return "recording"
    whose = dataset.contract if settings.scaled_by == "dataset" and dataset is not None else contract
    return f"{settings.scaled_by}: {whose.statistics_from}"


def _dataset(settings: TableSettings) -> Dataset | None:
    """Open the data set, None if series files were given."""
    given = (settings.data,) if isinstance(settings.data, str) else settings.data
    if len(given) > 1 or any(c in given[0] for c in "*?["):
        return None
    store = Store(given[0])
    if store.exists(MANIFEST) or not store.exists() or store.info()["type"] == "directory":
        return open_dataset(given[0])
    return None


def _of_shards(dataset: Dataset, settings: TableSettings) -> list[Part]:
    step = settings.recordings_per_part
    return [
        Part(
            name=f"{shard['name']}-{first:06d}-{min(first + step, shard['num_recordings']):06d}",
            split=split,
            shard=shard,
            first=first,
            stop=min(first + step, shard["num_recordings"]),
        )
        for split in settings.splits
        for shard in dataset.manifest["shards"].get(split, [])
        for first in range(0, shard["num_recordings"], step)
    ]


def _of_files(files: list[str], step: int) -> list[Part]:
    return [
        Part(name=f"files-{first:06d}-{min(first + step, len(files)):06d}", files=tuple(files[first : first + step]))
        for first in range(0, len(files), step)
    ]


def _stamp(url: str) -> tuple[Any, ...]:
    """Return what storage knows of the version of a file."""
    info = Store(url).info()
    return tuple(str(info.get(key)) for key in ("size", "ETag", "etag", "LastModified", "mtime", "updated"))
