"""Embed the recordings of one part, one after another, into rows of the table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from brainlm.errors import CheckpointError, DataError
from brainlm.recording import Recording
from brainlm.shards import SplitReader
from brainlm.store import Store
from eval.embedding_table import Rejected, Rows, part_file, write_part
from eval.extract_plan import Job, Part
from eval.models import open_model
from eval.series_files import read_series_file, recording_id_of


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


def embed_part(job: Job, part: Part) -> PartReport:
    """Embed one part and write its file, rows and rejections together."""
    import torch

    start = time.perf_counter()
    settings = job.settings
    torch.set_num_threads(settings.threads)
    model = load_model(job.folder, job.weights_sha256, settings.device)
    rows, rejected = Rows(settings.per_window, settings.per_parcel), []
    for source in read_part(job, part):
        recording, reason = source.recording, source.reason
        if recording is not None:
            try:
                # Recordings never share a batch, and its size is that of `embed`: nothing depends on the neighbours.
                found = model.embed(recording, **embed_options(job))
            except DataError as error:
                reason = str(error)
            else:
                rows.add(recording, found, split=part.split, seen=was_seen(model, recording.subject))
        if reason:
            subject = recording.subject if recording is not None else ""
            rejected.append(Rejected(source.recording_id, subject, part.split, source.where, reason))
    write_part(Store(settings.folder), part_file(job, part), rows, rejected)
    return PartReport(len(part), len(rejected), time.perf_counter() - start)


def read_part(job: Job, part: Part) -> Iterator[Source]:
    """Yield recordings one by one. Damaged shards and storage that is away end the work, unreadable files do not."""
    if part.shard is not None:
        reader = SplitReader(Store(job.dataset_url), [part.shard])
        for index in range(part.first, part.stop):
            recording = reader.as_recording(index)
            yield Source(recording.recording_id, f"{part.shard['name']}.tar", recording)
        return
    model = load_model(job.folder, job.weights_sha256, job.settings.device)
    tr_s = model.contract.tr_s if job.settings.tr_s is None else job.settings.tr_s
    for url in part.files:
        try:
            recording = read_series_file(url, model.contract.atlas, tr_s)
        except DataError as error:
            yield Source(recording_id_of(url), url, None, str(error))
        else:
            yield Source(recording_id_of(url), url, recording)


def embed_options(job: Job) -> dict[str, Any]:
    """Return what `BrainLM.embed` is told besides the recording."""
    settings = job.settings
    options: dict[str, Any] = {"native_tr": settings.native_tr}
    if settings.per_parcel:
        options["per_parcel"] = True
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
    return bool(known.seen({subject, bare, f"sub-{bare}"}))


@lru_cache(maxsize=1)  # a worker embeds many parts
def load_model(folder: str, weights_sha256: str, device: str) -> Any:
    """Load the checkpoint that the plan was made with."""
    model = open_model(folder)
    if model.weights_sha256 != weights_sha256:
        raise CheckpointError(f"{folder} was replaced while its embeddings were extracted: run again")
    return model.to(device)
