"""A worker of Ray stays within the memory that is promised, at the longest recordings that are accepted."""

import pytest

from benchmarks.prepare_memory import measure


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", ["npy", "csv-quoted", "dtseries"])
def test_a_worker_stays_below_500_mb_at_the_longest_recording(case):
    assert measure(case)["peak_mb"] < 500
