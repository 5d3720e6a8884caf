"""A process that was killed while it loaded DeepSpeed's operator does not stop later ones."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.train.conftest import environment
from train.compile_operators import OPERATOR, clear_lock

ROOT = Path(__file__).resolve().parents[2]


def test_a_lock_file_that_was_left_is_removed_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 100, time.time() - 100))
    with caplog.at_level(logging.WARNING):
        clear_lock(lock, 60.0)
    assert not lock.exists()
    assert f"removing {lock}" in caplog.text


def test_one_that_is_in_use_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    remove = threading.Timer(0.5, lock.unlink)
    remove.start()
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        clear_lock(lock, 60.0)
    remove.join()
    assert time.monotonic() - begin > 0.4
    assert "waiting" in caplog.text
    assert "removing" not in caplog.text


def test_the_operator_loads_beside_a_lock_file_that_was_left(tmp_path: Path) -> None:
    built = Path(_get_build_directory(OPERATOR, False))
    folder = tmp_path / OPERATOR
    shutil.copytree(built, folder)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 100, time.time() - 100))
    ended = subprocess.run(
        [sys.executable, "-m", "train.compile_operators"],
        cwd=ROOT,
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert not lock.exists()
