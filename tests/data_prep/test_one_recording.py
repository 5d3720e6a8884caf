"""The hash of a series, which data sets hold: it may never change."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from data_prep.one_recording import series_sha256


@pytest.mark.parametrize("change", ["none", "columns_first", "every_second", "big_endian", "empty"])
def test_hash_is_that_of_shape_and_little_endian_bytes(rng, change):
    bold = rng.normal(size=(30, 8)).astype(np.float32)
    bold[:, 3] = np.nan
    changed = {
        "none": bold, "columns_first": np.asfortranarray(bold), "every_second": bold[::2, 1::2],
        "big_endian": bold.astype(">f4"), "empty": bold[:0],
    }[change]  # fmt: skip
    values = b"".join(np.float32(value).astype("<f4").tobytes() for value in changed.ravel())
    assert series_sha256(changed) == hashlib.sha256(str(changed.shape).encode() + values).hexdigest()


def test_series_is_not_copied_for_its_hash():
    bold = np.ones((1000, 424), dtype=np.float32)
    tracemalloc.start()
    series_sha256(bold)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < bold.nbytes / 10
