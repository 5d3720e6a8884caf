"""Training shards: one task writes one tar and its index (`brainlm.shards`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainlm.dataset import SPLITS
from brainlm.scaling import centre
from brainlm.shards import ShardEntry, StoredDtype, encode_shard, shard_name, write_shard
from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.work import Workers


def place_in_shards(rows: Sequence[dict[str, Any]], recordings_per_shard: int) -> dict[str, list[dict[str, Any]]]:
    """Return the recordings of each shard by its name; their order is that of `rows`, which carry ``split``."""
    placed: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        mine = [row for row in rows if row["split"] == split]
        for number, start in enumerate(range(0, len(mine), recordings_per_shard)):
            placed[shard_name(split, number)] = mine[start : start + recordings_per_shard]
    return placed


def write_shards(
    out: Store,
    staging: Store,
    placed: dict[str, list[dict[str, Any]]],
    num_parcels: int,
    dtype: StoredDtype,
    run: Workers,
) -> dict[str, list[dict[str, Any]]]:
    """Write all shards; return their rows for ``dataset.json`` by split."""
    names = list(placed)
    written = run.run(_write_one, [(out, staging, name, placed[name], num_parcels, dtype) for name in names], "shards")
    by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for name, row in zip(names, written):
        by_split[placed[name][0]["split"]].append(row)
    return by_split


def _write_one(
    out: Store, staging: Store, name: str, rows: list[dict[str, Any]], num_parcels: int, dtype: StoredDtype
) -> dict[str, Any]:
    recordings: list[tuple[ShardEntry, NDArray[np.float32]]] = []
    for row in rows:
        bold, _ = load_staged(staging, row["recording_id"])
        entry = ShardEntry(
            **{key: row[key] for key in ("recording_id", "subject", "session", "task", "run", "site", "tr_s")},
            num_timepoints=row["num_timepoints"],
            num_parcels=num_parcels,
            dtype=dtype,
            scale=1.0,
            offset=0,
            missing_parcels=tuple(row["missing_parcels"]),
        )
        recordings.append((entry, centre(np.nan_to_num(bold, nan=0.0))))
    tar, entries = encode_shard(recordings, dtype)
    return write_shard(out, name, tar, entries)
