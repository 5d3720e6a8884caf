"""The recordings of a part, one after another, and the rows that a worker makes of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from brainlm.device import find_device
from brainlm.errors import CheckpointError, DataError
from brainlm.recording import Recording
from brainlm.shards import SplitReader
from brainlm.store import Store
from eval.series_files import read_series_file, recording_id_of
from eval.table_parts import Rejected, part_file, write_part
from eval.table_plan import Job, Part, open_for


@dataclass(frozen=True)
class PartReport:
    """How a part went."""

    num_recordings: int
    num_rejected: int
    seconds: float


class Source(NamedTuple):
    """A recording, or why it could not be read."""

    recording_id: str
    where: str
    recording: Recording | None
    reason: str = ""


class Rows(Protocol):
    """Rows of a table, gathered for one part."""

    def add(self, model: Any, recording: Recording, job: Job, part: Part) -> None:
        """Append what the model says of a recording; DataError if it says nothing of it."""

    def table(self) -> pa.Table | None: ...


def fill_part(job: Job, part: Part, rows: Rows) -> PartReport:
    """Make the rows of one part and write its file, rows and rejections together."""
    import torch

    start = time.perf_counter()
    settings = job.settings
    torch.set_num_threads(settings.threads)
    model = load_model(job)
    rejected = []
    for source in read_part(job, part):
        recording, reason = source.recording, source.reason
        if recording is not None:
            try:
                # Recordings never share a batch: nothing depends on the neighbours.
                rows.add(model, recording, job, part)
            except DataError as error:
                reason = str(error)
        if reason:
            subject = recording.subject if recording is not None else ""
            rejected.append(Rejected(source.recording_id, subject, part.split, source.where, reason))
    write_part(Store(settings.folder), part_file(job, part), rows.table(), rejected)
    return PartReport(len(part), len(rejected), time.perf_counter() - start)


def read_part(job: Job, part: Part) -> Iterator[Source]:
    """Yield recordings one by one. Damaged shards and storage that is away end the work, unreadable files do not."""
    if part.shard is not None:
        reader = SplitReader(Store(job.dataset_url), [part.shard])
        for index in range(part.first, part.stop):
            recording = reader.as_recording(index)
            yield Source(recording.recording_id, f"{part.shard['name']}.tar", recording)
        return
    model = load_model(job)
    tr_s = model.contract.tr_s if job.settings.tr_s is None else job.settings.tr_s
    for url in part.files:
        try:
            recording = read_series_file(url, model.contract.atlas, tr_s)
        except DataError as error:
            yield Source(recording_id_of(url), url, None, str(error))
        else:
            yield Source(recording_id_of(url), url, recording)


def reading_options(job: Job) -> dict[str, Any]:
    """Return what `BrainLM.embed` and `Predictor.predict` are told besides the recording."""
    settings = job.settings
    options: dict[str, Any] = {"native_tr": settings.native_tr}
    if settings.scaled_by == "dataset":
        options["contract"] = job.own_contract
    elif settings.scaled_by == "recording":
        options["statistics"] = "recording"
        options["atlas"] = None if job.own_contract is None else job.own_contract.atlas
    return options


def was_seen(model: Any, subject: str) -> bool | None:
    """Say whether the model was trained on a subject; None where that is not known."""
    known = getattr(model, "train_subjects", None)
    if known is None or not subject:
        return None
    bare = subject.removeprefix("sub-")  # data sets name them either way
    if known.seen({subject, bare, f"sub-{bare}"}):
        return True
    return False if getattr(model, "knows_pretraining", True) else None


_loaded: dict[tuple[str, str, str, str], Any] = {}  # a worker reads many parts with one model


def load_model(job: Job) -> Any:
    """Load the checkpoint that the plan was made with."""
    device = find_device(job.settings.device)
    key = (type(job.settings).__name__, job.folder, job.weights_sha256, device)
    if key not in _loaded:
        model = open_for(job.settings, job.folder)
        if model.weights_sha256 != job.weights_sha256:
            raise CheckpointError(f"{job.folder} was replaced while recordings were read with it: run again")
        _loaded.clear()
        _loaded[key] = model.to(device)
    return _loaded[key]
