"""Entries that are held packed say what a plain list says, in any order and after a journey."""

import pickle
import random
import tracemalloc

import pytest

from data_prep.packed_entries import PackedEntries, sorted_by_id
from data_prep.source_entry import SourceEntry


def entries_of(count):
    return [
        SourceEntry(
            recording_id=f"sub-{n:06d}",
            subject=f"{n // 2:06d}",
            file=f"/data/séries/{n}.npy",
            source=f"{n}.npy",
            tr_s=None if n % 3 == 0 else 0.1 * n,
            mean_fd_mm=float(n),
            site="" if n % 2 else "a",
            file_stamp=f"{n}:{n**3}",
        )
        for n in range(count)
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("data_prep.packed_entries.ENTRIES_PER_BLOCK", 7)
    monkeypatch.setattr("data_prep.packed_entries.ENTRIES_PER_RUN", 11)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 30])
def test_packed_entries_are_a_list_that_takes_less_room(small_blocks, count):
    plain = entries_of(count)
    packed = PackedEntries(iter(plain))
    assert len(packed) == count
    assert bool(packed) == (count > 0)
    assert list(packed) == plain == [packed[n] for n in range(count)]
    assert [packed[-n - 1] for n in range(count)] == plain[::-1]
    for part in (slice(None), slice(3, 20), slice(-9, None, 2), slice(None, None, -1), slice(50, 60)):
        assert list(packed[part]) == plain[part]
    for position in (count, -count - 1):
        with pytest.raises(IndexError):
            packed[position]
    assert list(pickle.loads(pickle.dumps(packed))) == plain


def test_two_readers_of_packed_entries_do_not_disturb_one_another(small_blocks):
    plain = entries_of(30)
    packed = PackedEntries(plain)
    pairs = [(entry, packed[29 - n]) for n, entry in enumerate(packed)]
    assert pairs == list(zip(plain, plain[::-1]))


def test_sorting_is_that_of_a_list_also_for_equal_ids(small_blocks):
    plain = entries_of(60)
    plain += [SourceEntry(recording_id="sub-000030", subject="x", file=f"{n}", source="") for n in range(3)]
    random.Random(0).shuffle(plain)
    assert list(sorted_by_id(plain)) == sorted(plain, key=lambda entry: entry.recording_id)
    assert list(sorted_by_id([])) == []


def test_packed_entries_need_far_less_memory_than_a_list():
    def peak(read):
        tracemalloc.start()
        try:
            read()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def lazily():
        return (entry for first in range(20) for entry in entries_of(1000))

    as_list = peak(lambda: sorted(lazily(), key=lambda entry: entry.recording_id))
    packed = PackedEntries(lazily())
    assert peak(lambda: sum(1 for _ in PackedEntries(packed))) < as_list / 4
