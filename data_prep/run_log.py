"""What a run did and when: ``log/``, the only place of a data set that holds times."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

from brainlm.config import to_tree
from brainlm.store import Store

FOLDER = "log"


class RunLog:
    """Write ``log/<what>-<start>.json`` when the work begins and when it is done; a killed run has no end in it."""

    def __init__(self, out: Store, what: str, settings: Any = None) -> None:
        started = datetime.now(UTC)
        self._out, self._name = out, f"{FOLDER}/{what}-{started:%Y%m%dT%H%M%S.%f}.json"
        self._tree: dict[str, Any] = {"what": what, "started": started.isoformat()}
        if settings is not None:
            self._tree["settings"] = to_tree(settings)
        self._counts: Counter[str] = Counter()
        out.write_json(self._name, self._tree)

    def count(self, what: str) -> None:
        self._counts[what] += 1

    def end(self, **found: Any) -> None:
        ended = datetime.now(UTC).isoformat()
        self._out.write_json(self._name, {**self._tree, "ended": ended, **dict(sorted(self._counts.items())), **found})
