"""Who trains and who tests: groups of recordings go to splits by hash, so that new subjects move nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainlm.dataset import SPLITS
from brainlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SplitItem:
    """What the split of one recording depends on. ``group`` is "" where the recording's own is unknown."""

    recording_id: str
    subject: str
    group: str
    series_sha256: str


def find_duplicates(items: Sequence[SplitItem]) -> list[list[str]]:
    """Return the ids of recordings that hold the same series, one sorted list a series."""
    by_series: dict[str, list[str]] = {}
    for item in items:
        by_series.setdefault(item.series_sha256, []).append(item.recording_id)
    return sorted(sorted(ids) for ids in by_series.values() if len(ids) > 1)


def unit_hash(seed: int, group: str) -> float:
    """Return a number in [0, 1) that depends on seed and group alone."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def assign_splits(items: Sequence[SplitItem], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return the split of each recording.

    Recordings of one subject, of one group, and with one and the same series are kept together; the smallest name
    among those joined decides. Adding subjects moves nobody, unless a new one joins two groups.

    Parameters
    ----------
    items : sequence of SplitItem
    fractions : mapping
        Expected share of groups in train, val and test.

    Raises
    ------
    DataError
        If a split with a share above 0 stays empty.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for item in items:
        for node in (f"group:{item.group}" if item.group else "", f"series:{item.series_sha256}"):
            if node:
                parent[root(node)] = root(f"subject:{item.subject}")
    names: dict[str, str] = {}
    for item in items:
        name = f"group:{item.group}" if item.group else f"subject:{item.subject}"
        names[root(f"subject:{item.subject}")] = min(name, names.get(root(f"subject:{item.subject}"), name))
    split_of = {}
    for item in items:
        place = unit_hash(seed, names[root(f"subject:{item.subject}")])
        if place < fractions["test"]:
            split_of[item.recording_id] = "test"
        else:
            split_of[item.recording_id] = "val" if place < fractions["test"] + fractions["val"] else "train"
    counts = {split: sum(found == split for found in split_of.values()) for split in SPLITS}
    empty = [split for split in SPLITS if fractions[split] > 0 and counts[split] == 0]
    if empty:
        raise DataError(
            f"no recordings in {' and '.join(empty)}: {len(names)} groups by hash gave "
            f"{', '.join(f'{split} {count}' for split, count in counts.items())}. Add subjects, take another "
            "splits.seed, or set the split's fraction to 0"
        )
    return split_of
