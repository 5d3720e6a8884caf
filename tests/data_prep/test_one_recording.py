"""The hash of a series, which data sets hold: it may never change; and the memory that one recording takes."""

import hashlib
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from brainlm.store import Store
from data_prep import one_recording
from data_prep.atlas_image import load_atlas
from data_prep.one_recording import Recipe, prepare_recording, series_sha256
from data_prep.settings import AtlasSettings, CheckSettings, CleanSettings
from data_prep.source_entry import SourceEntry

from .conftest import SHAPE

NUM_PARCELS = 424


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


@pytest.fixture
def recipe(toy):
    labels = np.zeros(SHAPE)
    labels.reshape(-1)[200 : 200 + NUM_PARCELS] = np.arange(1, NUM_PARCELS + 1)
    toy.write_atlas(labels=labels)
    atlas = load_atlas(AtlasSettings(name="toy", image=str(toy.folder / "atlas.nii.gz"), space="MNI152NLin6Asym"))
    return Recipe(
        atlas=atlas, clean=CleanSettings(detrend=True, high_pass_hz=0.01), checks=CheckSettings(),
        orientation="timepoints_by_parcels", target_tr_s=1.0, window_len=40, staging=Store(str(toy.folder / "staging")),
    )  # fmt: skip


def entry_of(toy, series):
    np.save(toy.folder / f"{len(series)}.npy", series)
    file = str(toy.folder / f"{len(series)}.npy")
    return SourceEntry(recording_id=f"S{len(series)}", subject="1", file=file, source="x", tr_s=0.8, tr_from="a test")


def test_memory_of_a_recording_is_a_few_times_its_series(toy, rng, recipe):
    """Series have at most 40 MiB (`MAX_VALUES`), programs take 180 to 280 MB; a worker is to have 500 MB."""
    for num_timepoints in (500, 10_000):  # the first call loads modules
        entry = entry_of(toy, rng.normal(1000, 1, (num_timepoints, NUM_PARCELS)).astype(np.float32))
        tracemalloc.start()
        assert prepare_recording(recipe, entry)["status"] == "prepared"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.7 * 10_000 * NUM_PARCELS * 4


@pytest.mark.parametrize(
    ("target_tr_s", "said"),
    [(0.8, "too long: 1001 timepoints of 424 parcels;"), (0.4, "2001 timepoints .* after resampling from 0.8 to 0.4")],
)
def test_more_than_a_worker_can_hold_is_refused(toy, rng, recipe, monkeypatch, target_tr_s, said):
    monkeypatch.setattr(one_recording, "MAX_TIMEPOINTS", 1000 if target_tr_s == 0.8 else 2000)
    entry = entry_of(toy, rng.normal(1000, 1, (1001, NUM_PARCELS)).astype(np.float32))
    row = prepare_recording(replace(recipe, target_tr_s=target_tr_s), entry)
    assert row["stage"] == "length"
    assert re.search(said, row["reason"])
