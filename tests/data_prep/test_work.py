"""What preparation shows of its progress, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from brainlm.store import Store
from data_prep.settings import RaySettings
from data_prep.work import workers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def negatives(num: int) -> list[int]:
    with workers(RaySettings(address="off"), Store("memory://progress")) as here:
        return here.run(lambda number: -number, [(number,) for number in range(num)], "recordings")


@pytest.mark.parametrize(("num", "shown"), [(0, []), (3, [1, 2, 3]), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])])
def test_without_a_terminal_there_are_at_most_ten_plain_lines(num, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert negatives(num) == [-number for number in range(num)]
    assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().out.splitlines() == [f"recordings: {done} of {num}" for done in shown]


def test_a_terminal_has_a_bar_that_ends_full(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert negatives(25) == [-number for number in range(25)]
    last = sys.stderr.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("recordings: 100%")
    assert "25/25" in last
    assert capsys.readouterr().out == ""
