"""What signals do: one asks to stop, its echo by the launcher changes nothing, a second Ctrl-C ends the process."""

from __future__ import annotations

import signal

import pytest

from train import interruption
from train.interruption import Interruption


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_repeating_a_signal_does_not_end_the_snapshot(first: signal.Signals) -> None:
    asked = Interruption()
    asked._handle(first, None)
    assert asked.requested
    asked._handle(signal.SIGTERM, None)  # the launcher answers a signal to the whole group by SIGTERM to every rank
    asked._handle(signal.SIGTERM, None)
    assert asked.requested


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    asked = Interruption()
    asked._handle(signal.SIGINT, None)
    asked._handle(signal.SIGINT, None)  # the same key press, heard twice
    now[0] += 5
    with pytest.raises(SystemExit) as ended:
        asked._handle(signal.SIGINT, None)
    assert ended.value.code == 128 + signal.SIGINT
