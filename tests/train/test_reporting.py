"""Metrics on disk: whole lines, none twice, none lost while the process lives."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from train.reporting import Reporter


class FullFor:
    """A file of which the first writes fail, one of them halfway, as on a full disk."""

    def __init__(self, path: Path, num_failing: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._left = num_failing

    def write(self, data: bytes) -> int:
        if self._left == 0:
            return self._file.write(data)
        self._left -= 1
        if self._left % 2 == 0:
            return self._file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self._file.close()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_that_found_no_space_are_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Reporter(tmp_path, 9, 0) as reporter:
        reporter._file.close()
        reporter._file = FullFor(reporter.path, 6)  # type: ignore[assignment]
        for step in range(1, 6):
            reporter.log(step, {"loss": 0.5})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert caplog.text.count("cannot be written") == 1  # said once


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "", '{"step": 4, "loss": 1.0}'])
def test_a_run_that_goes_on_takes_back_the_lines_after_its_snapshot(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)) + torn)
    with Reporter(tmp_path, 9, 2) as reporter:
        assert steps(path) == [1, 2]
        reporter.log(3, {"loss": 0.5})
    assert steps(path) == [1, 2, 3]
    with Reporter(tmp_path, 9, 0):
        assert steps(path) == []
