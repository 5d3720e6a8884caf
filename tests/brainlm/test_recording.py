"""What one run refuses, what it fills in, and which parcels it calls missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from brainlm.errors import DataError
from brainlm.recording import Recording


def recording(bold: np.ndarray, **changes: Any) -> Recording:
    fields: dict[str, Any] = {"recording_id": "sub-01_task-rest", "subject": "sub-01", "bold": bold, "tr_s": 2.0}
    return Recording(**(fields | changes))


def test_everything_is_kept_and_covered_unless_said_otherwise(rng: np.random.Generator) -> None:
    found = recording(rng.normal(size=(7, 3)))
    assert (found.num_timepoints, found.num_parcels) == (7, 3)
    assert found.keep_mask.tolist() == [True] * 7
    assert found.coverage.tolist() == [1.0] * 3
    assert found.bold.dtype == np.float32
    assert not found.missing_parcels().any()


def test_uncovered_constant_and_unreadable_parcels_are_missing(rng: np.random.Generator) -> None:
    bold = rng.normal(size=(9, 5))
    bold[:, 1] = 4.0  # constant
    bold[3, 2] = np.nan
    bold[5, 3] = np.inf
    found = recording(bold, coverage=np.array([0, 1, 1, 1, 0.01]))
    assert found.missing_parcels().tolist() == [True, True, True, True, False]


def test_only_kept_timepoints_decide_what_is_missing(rng: np.random.Generator) -> None:
    bold = rng.normal(size=(6, 3))
    bold[0, 0] = np.nan  # not kept: does not matter
    bold[1:, 1] = 2.0  # varies only where it is not kept
    keep_mask = np.array([False, True, True, True, True, True])
    assert recording(bold, keep_mask=keep_mask).missing_parcels().tolist() == [False, True, False]


def test_with_nothing_kept_everything_is_missing(rng: np.random.Generator) -> None:
    found = recording(rng.normal(size=(4, 2)), keep_mask=np.zeros(4, dtype=bool))
    assert found.missing_parcels().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bold": np.zeros(5)}, r"must have shape \(timepoints, parcels\), found \(5,\)"),
        ({"keep_mask": np.ones(4, dtype=bool)}, r"keep_mask is \(4,\)"),
        ({"coverage": np.ones(3)}, r"coverage is \(3,\)"),
        ({"tr_s": 0.0}, "above 0 s, found 0.0"),
        ({"tr_s": float("nan")}, "above 0 s, found nan"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_recording(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"sub-01_task-rest: .*{message}"):
        recording(**({"bold": np.zeros((5, 2))} | changes))


@pytest.mark.parametrize("name", ["", "sub.01", "a/b", "a\\b", "a b", "a\tb", "a\nb", "a\0b", "a\x1b"])
def test_an_id_that_cannot_be_a_webdataset_key_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="without dots, slashes or blanks"):
        recording(np.zeros((5, 2)), recording_id=name)
