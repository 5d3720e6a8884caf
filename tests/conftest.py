"""Several test processes beside each other (``make test``): one thread for each, and long files first."""

from __future__ import annotations

import os

import pytest

IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
if IS_ONE_OF_SEVERAL:  # before anything imports numpy or torch, and for the programs that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files are handed out whole and in this order. A long one that comes last would have a process to itself.
FIRST = (
    "tests/data_prep/test_faults.py",
    "tests/brainlm/test_ray_session.py",
    "tests/end_to_end/test_line.py",
    "tests/train/test_resume.py",
    "tests/train/test_pretrain.py",
    "tests/brainlm/test_model.py",
    "tests/data_prep/test_prepare_workers.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_ONE_OF_SEVERAL:
        rank = {name: number for number, name in enumerate(FIRST)}
        items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(FIRST)))
