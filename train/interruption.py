"""SIGTERM and SIGINT ask a run to stop at the end of a step; the loop saves a snapshot and every rank leaves."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class Interruption:
    """Remembers that a signal came. A second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = True
        logger.warning("%s: saving a snapshot after this step, then leaving", signal.Signals(number).name)
