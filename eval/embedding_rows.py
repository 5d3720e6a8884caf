"""Rows of a table of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainlm.embedding import RecordingEmbedding
from brainlm.recording import Recording
from eval.extract_settings import ExtractSettings
from eval.table_parts import IDS, TEXTS
from eval.table_plan import Job, Part
from eval.table_rows import PartReport, fill_part, reading_options, was_seen


def embed_part(job: Job, part: Part) -> PartReport:
    """Embed one part and write its file."""
    settings = job.settings
    assert isinstance(settings, ExtractSettings)
    return fill_part(job, part, EmbeddingRows(settings.per_window, settings.per_parcel))


class EmbeddingRows:
    """Rows of the table of embeddings, gathered for one part."""

    def __init__(self, per_window: bool, per_parcel: bool) -> None:
        self._per_window, self._per_parcel = per_window, per_parcel
        self._plain: list[dict[str, Any]] = []
        self._vectors: dict[str, list[NDArray[np.float32]]] = {"cls": [], "pooled": []}
        if per_parcel:
            self._vectors["parcels"] = []

    def add(self, model: Any, recording: Recording, job: Job, part: Part) -> None:
        """Append the rows of one recording."""
        options = reading_options(job) | ({"per_parcel": True} if "parcels" in self._vectors else {})
        found: RecordingEmbedding = model.embed(recording, **options)
        row = {name: getattr(recording, name) for name in IDS}
        row |= {"split": part.split, "tr_s": recording.tr_s, "num_parcels": found.num_parcels}
        row["seen_in_training"] = was_seen(model, recording.subject)
        if self._per_window:
            for start_s, num_kept in zip(found.starts_s.tolist(), found.num_kept.tolist()):
                self._plain.append({**row, "start_s": start_s, "num_kept": num_kept})
        else:
            self._plain.append({**row, "num_windows": len(found), "num_kept": int(found.num_kept.sum())})
        for name, rows in self._vectors.items():
            whole = getattr(found, name) if self._per_window else getattr(found, f"mean_{name}")[None]
            rows.extend(np.ascontiguousarray(whole.reshape(len(whole), -1)))

    def table(self) -> pa.Table | None:
        """Return the rows; None if there are none, because how long the vectors are is then not known."""
        if not self._plain:
            return None
        timing = [("start_s", pa.float64())] if self._per_window else [("num_windows", pa.int32())]
        kinds: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in TEXTS]
        kinds += [("tr_s", pa.float64()), *timing, ("num_kept", pa.int32()), ("num_parcels", pa.int32())]
        kinds += [("seen_in_training", pa.bool_())]
        columns = [pa.array([row[name] for row in self._plain], type=kind) for name, kind in kinds]
        for vectors in self._vectors.values():
            values = pa.array(np.concatenate(vectors), type=pa.float32())
            columns.append(pa.FixedSizeListArray.from_arrays(values, len(vectors[0])))
        return pa.table(columns, names=[name for name, _ in kinds] + list(self._vectors))
