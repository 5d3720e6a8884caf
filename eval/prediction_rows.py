"""Rows of a table of predictions."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from brainlm.predictor import Prediction, Predictor
from brainlm.recording import Recording
from brainlm.targets import Target
from eval.table_parts import IDS, TEXTS
from eval.table_plan import Job, Part
from eval.table_rows import PartReport, fill_part, reading_options, was_seen


def predict_part(job: Job, part: Part) -> PartReport:
    """Predict from the recordings of one part and write its file."""
    return fill_part(job, part, PredictionRows())


class PredictionRows:
    """Rows of the table of predictions, gathered for one part."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._targets: tuple[Target, ...] = ()

    def add(self, model: Predictor, recording: Recording, job: Job, part: Part) -> None:
        """Append the row of one recording."""
        self._targets = model.targets
        found: Prediction = model.predict(recording, **reading_options(job))
        row = {name: getattr(recording, name) for name in IDS}
        row |= {
            "split": part.split, "tr_s": recording.tr_s, "num_windows": found.num_windows, "num_kept": found.num_kept,
            "num_parcels": found.num_parcels, "seen_in_training": was_seen(model, recording.subject),
            "adapted": "; ".join(job.adapted), **found.columns(),
        }  # fmt: skip
        self._rows.append(row)

    def table(self) -> pa.Table | None:
        """Return the rows; None if there are none."""
        if not self._rows:
            return None
        kinds: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in TEXTS]
        kinds += [("tr_s", pa.float64()), ("num_windows", pa.int32()), ("num_kept", pa.int32())]
        kinds += [("num_parcels", pa.int32()), ("seen_in_training", pa.bool_()), ("adapted", pa.string())]
        for target in self._targets:
            kinds.append((f"predicted_{target.column}", pa.string() if target.classes else pa.float64()))
            kinds += [(f"probability_{target.column}_{label}", pa.float64()) for label in target.classes]
        columns = [pa.array([row[name] for row in self._rows], type=kind) for name, kind in kinds]
        return pa.table(columns, names=[name for name, _ in kinds])
