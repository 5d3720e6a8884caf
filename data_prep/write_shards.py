"""Training shards: one task writes one tar and its index (`brainlm.shards`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.censoring import censored_ranges
from brainlm.dataset import SPLITS
from brainlm.scaling import centre
from brainlm.shards import FOLDER, ShardEntry, StoredDtype, encode_shard, shard_name, write_shard
from brainlm.store import Store
from data_prep.one_recording import load_staged
from data_prep.settings import ShardSettings
from data_prep.work import Tasks, Workers

ENTRY_COLUMNS = ["recording_id", "subject", "session", "task", "run", "site", "tr_s", "num_timepoints"]
ShardRows = dict[str, list[dict[str, Any]]]


def place_in_shards(
    table: pd.DataFrame, settings: ShardSettings, num_parcels: int, num_before: Mapping[str, int]
) -> pd.Series:
    """Return the name of each recording's shard; numbers of a split begin after those it has before."""
    nbytes = table["num_timepoints"].to_numpy() * num_parcels * np.dtype(settings.dtype).itemsize
    names = np.full(len(table), "", dtype=object)
    for split in SPLITS:
        number, count, size, name = num_before.get(split, 0) - 1, settings.recordings_per_shard, 0, ""
        mine = np.flatnonzero((table["split"] == split).to_numpy())
        for position in mine:
            if count == settings.recordings_per_shard or size + nbytes[position] > settings.max_mb * 1024**2:
                number, count, size = number + 1, 0, 0
                name = shard_name(split, number)
            names[position] = name
            count, size = count + 1, size + nbytes[position]
    return pd.Series(names, index=table.index, dtype="string")


def write_shards(
    out: Store, staging: Store, table: pd.DataFrame, num_parcels: int, dtype: StoredDtype, run: Workers
) -> ShardRows:
    """Write the shards of recordings with `ENTRY_COLUMNS`, ``shard`` and ``split``.

    Returns
    -------
    dict
        The rows of the shards for ``dataset.json``, by split.
    """
    parts: dict[Any, Any] = table.groupby("shard").indices  # positions: a part is copied when its task is handed out
    names = sorted(parts)

    def of_shard(number: int) -> tuple[Any, ...]:
        part = table[ENTRY_COLUMNS].iloc[parts[names[number]]]
        return out, staging, names[number], part, num_parcels, dtype

    by_split: ShardRows = {split: [] for split in SPLITS}
    for name, row in zip(names, run.run(_write_one, Tasks(len(names), of_shard), "shards")):
        by_split[table["split"].iloc[parts[name][0]]].append(row)
    return by_split


def remove_unknown_shards(out: Store, known: ShardRows | None) -> None:
    """Remove shards that a stopped run left: those that the manifest, if there is one, does not name."""
    if known is None:
        out.remove(FOLDER)
        return
    names = {f"{row['name']}.{ending}" for rows in known.values() for row in rows for ending in ("tar", "index.json")}
    for name in out.names(FOLDER):
        if name not in names:
            out.remove(f"{FOLDER}/{name}")


def _write_one(
    out: Store, staging: Store, name: str, table: pd.DataFrame, num_parcels: int, dtype: StoredDtype
) -> dict[str, Any]:
    def recording(row: dict[Hashable, Any]) -> tuple[ShardEntry, NDArray[np.float32]]:
        staged = load_staged(staging, row["recording_id"])
        entry = ShardEntry(
            **{str(name): value for name, value in row.items()},
            num_parcels=num_parcels,
            dtype=dtype,
            scale=1.0,
            offset=0,
            missing_parcels=tuple(np.flatnonzero(staged.missing).tolist()),
            censored=censored_ranges(staged.keep_mask),
        )
        return entry, centre(np.nan_to_num(staged.bold, copy=False, nan=0.0), staged.keep_mask)

    # One by one: of the longest recording there is no room for another copy.
    tar, entries = encode_shard(map(recording, table.to_dict("records")), dtype)
    return write_shard(out, name, tar, entries)
