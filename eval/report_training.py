"""The section on training: the curves of every checkpoint that was scored, from its metrics.jsonl."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import numpy as np

from brainlm.errors import StoreError
from brainlm.store import Store
from eval import figures, figures_charts
from eval.report_input import Results, counted
from eval.report_page import Artist, Section

log = logging.getLogger(__name__)


def training_section(results: Results, artist: Artist) -> Section:
    section = Section(title="Training", anchor="training")
    if not results.models:
        section.absent.append("No checkpoint was scored, so there are no training curves.")
        return section
    runs: dict[str, list[dict[str, Any]]] = {}
    for info in results.run.get("checkpoints") or []:
        rows = training_log(str(info.get("path") or info.get("folder") or ""))
        if rows:
            name = str(info.get("name", "checkpoint"))
            runs[name] = rows
            rates = [row["windows_per_s"] for row in rows if figures.is_number(row.get("windows_per_s"))]
            last = max((row["step"] for row in rows if figures.is_number(row.get("step"))), default=None)
            facts = [f"{name}: {counted(int(last), 'optimizer step')} logged" if last is not None else name]
            if rates:
                facts.append(f"median speed {float(np.median(rates)):.3g} windows/s")
            section.paragraphs.append(", ".join(facts) + ".")
    if not runs:
        section.absent.append("No metrics.jsonl was found beside the checkpoint, so there are no training curves.")
        return section
    colours = {run: figures.SERIES[i % len(figures.SERIES)] for i, run in enumerate(runs)}
    figure = figures_charts.draw_training(runs, colours)
    if figure is None:
        section.absent.append(
            "metrics.jsonl holds none of loss, val_r2, lr and grad_norm, so there are no training curves."
        )
        return section
    section.drawings.append(
        artist.show(
            figure,
            "training",
            "Training curves",
            "Training curves. Pale: as logged; strong: running median. Loss is over hidden values in contract units; "
            "validation R² is in units of recording-and-parcel standard deviations, on subjects of the val split.",
        )
    )
    return section


def training_log(checkpoint: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of the training run that a checkpoint belongs to, [] if there are none.

    A half-written last line, as a killed job leaves it, is passed over.
    """
    match = re.fullmatch(r"(.+)/checkpoints/[^/]+/?", checkpoint)
    if not match:
        return []
    try:
        store = Store(match[1])
        text = store.read_bytes("metrics.jsonl").decode(errors="replace") if store.exists("metrics.jsonl") else ""
    except StoreError as error:
        log.warning("training curves are left out: %s", error)
        return []
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
