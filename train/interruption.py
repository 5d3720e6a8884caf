"""SIGTERM, SIGINT and the end of the launcher ask a run to stop: it saves a snapshot after a step, and all leave."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from train.launcher import Launcher

logger = logging.getLogger(__name__)

STARTED_S = time.monotonic()  # imports of this program take seconds, not hours
SAME_REQUEST_S = 2.0  # a second SIGINT sooner than this is the first one, heard twice


class Interruption:
    """Remembers that a signal came. A second SIGINT (Ctrl-C again) ends the process at once.

    A second SIGTERM does not: the DeepSpeed launcher answers a signal that the whole process group has received by
    sending SIGTERM to every rank once more, which must not end the snapshot that the first one asked for. Who cannot
    wait has SIGKILL.

    Parameters
    ----------
    launcher : Launcher, optional
        As it was when this process began; None takes it as it is now.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.requested = False
        self._launcher = launcher or Launcher()
        self._first_sigint_s: float | None = None

    def request(self, why: str) -> None:
        """Ask for a snapshot and the end, once."""
        if not self.requested:
            logger.warning("%s: saving a snapshot after this step, then leaving", why)
        self.requested = True

    def look_for_launcher(self) -> None:
        """Ask for the end if the launcher has ended before its ranks."""
        if not self.requested and self._launcher.is_gone():
            self.request("the launcher is gone")

    def hours_since_start(self) -> float:
        """Return how long this process has been running, its start included."""
        return (time.monotonic() - STARTED_S) / 3600

    def install(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_sigint_s is not None and now - self._first_sigint_s > SAME_REQUEST_S:
                raise SystemExit(128 + number)
            self._first_sigint_s = now if self._first_sigint_s is None else self._first_sigint_s
        self.request(signal.Signals(number).name)
