"""Which windows a step may be left out for: those with the largest values, by recording."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from brainlm.loader import WindowBatch
from train.mix import Mix

MAX_LISTED = 8


def suspects(
    mix: Mix,
    batches: Sequence[WindowBatch],
    step: int,
    sum_over_ranks: Callable[[list[float]], list[float]],
) -> str:
    """Name the windows of a step that hold the largest values. All ranks take part, and all are told the same.

    Recording ids are for the log of whoever has the data, not for what is passed on.

    Parameters
    ----------
    batches : sequence of WindowBatch
        This rank's part of the step.
    """
    name, loader, rows = mix.rows_at(step)
    own = [float(window.abs().max()) for batch in batches for window in batch.windows]
    first = loader.rank * len(own)  # of this rank's windows in the global batch
    largest = sum_over_ranks([0.0] * first + own + [0.0] * (len(rows) - first - len(own)))
    order = sorted(range(len(rows)), key=lambda i: largest[i] if math.isfinite(largest[i]) else math.inf, reverse=True)
    named = []
    for i in order[:MAX_LISTED]:
        recording, start = rows[i].tolist()
        named.append(f"{loader.reader.entries[recording].recording_id} from timepoint {start} ({largest[i]:.3g})")
    more = f" and {len(rows) - MAX_LISTED} more" if len(rows) > MAX_LISTED else ""
    return f"Its windows of {name}, by their largest value in contract units: {', '.join(named)}{more}"
