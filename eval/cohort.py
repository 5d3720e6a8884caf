"""The recordings that are scored, as every task and every method sees them.

Censored timepoints (``keep_mask`` False) hold interpolated values, which are no measurements. Windows are taken where
they would be without censoring, so that all data sets are cut alike. Only kept values enter means, standard deviations,
fits and scores; a window whose hidden values are all censored adds nothing, and a recording of such windows has no row
in the tables. What a method is fed at a visible censored timepoint is interpolated anew between visible kept values
(`brainlm.censoring.refill_censored`): the stored value may come from hidden ones.
"""

from __future__ import annotations

import hashlib
import hmac
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainlm.dataset import Dataset, Split
from brainlm.errors import DataError
from brainlm.ordering import even_starts
from brainlm.shards import ShardEntry, SplitReader

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class WindowRef:
    """Which piece of which recording a window is. `index` is the recording's position in its split."""

    split: Split
    index: int
    recording_id: str
    start: int


@dataclass(frozen=True, eq=False)
class Window:
    """One window in the units of the series.

    ``bold_PW`` is centred on the recording's own mean, ``sd_P`` is the standard deviation over the whole recording, and
    ``scored_P`` says which parcels are fed and scored; all three come from the recording, not from the window.
    ``kept_W`` is False at censored timepoints, which are fed but not scored.
    """

    ref: WindowRef
    bold_PW: NDArray[np.float32]
    sd_P: FloatArray
    scored_P: BoolArray
    kept_W: BoolArray


class Series(NamedTuple):
    """A recording: centred series (T, P), standard deviation over kept timepoints (P,), which parcels are scored (P,),
    and which timepoints are kept (T,)."""

    bold: NDArray[np.float32]
    sd_P: FloatArray
    scored_P: BoolArray
    kept_T: BoolArray

    @property
    def measured(self) -> NDArray[np.float32]:
        """Rows of ``bold`` that are kept."""
        return self.bold if self.kept_T.all() else self.bold[self.kept_T]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """A data set, cut into windows.

    Parameters
    ----------
    dataset : Dataset
    split : str
        The split that is scored; methods are fitted on ``train`` and tuned on ``val``.
    usable_P : ndarray, shape (P,), bool
        Parcels that the data set and every compared checkpoint can use: all methods are scored on the same values.
    window_len, patch_len : int
    subject_key : bytes
        Key of the hashes that stand for subjects in results.
    patch_parcels : int
        Parcels that share a token in the compared models: random masks hide such groups together, for all methods.
    pretrained : tuple of str
        Folders of the compared checkpoints whose subjects may not be tested.
    """

    dataset: Dataset
    split: Split
    usable_P: BoolArray
    window_len: int
    patch_len: int
    subject_key: bytes = b""
    patch_parcels: int = 1
    pretrained: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset, split: Split = "test") -> Cohort:
        """Return a data set cut as its own contract says."""
        contract = dataset.contract
        return cls(
            dataset=dataset,
            split=split,
            usable_P=contract.usable,
            window_len=contract.window_len,
            patch_len=contract.patch_len,
        )

    @property
    def num_parcels(self) -> int:
        return self.dataset.contract.atlas.num_parcels

    @property
    def num_patches(self) -> int:
        return self.window_len // self.patch_len

    @cached_property
    def _readers(self) -> dict[Split, SplitReader]:
        return {}

    def reader(self, split: Split) -> SplitReader:
        if split not in self._readers:
            self._readers[split] = self.dataset.split(split)
        return self._readers[split]

    def recordings(self, split: Split | None = None) -> list[int]:
        """Return positions of the recordings that are long enough for a window."""
        entries = self.reader(split or self.split).entries
        return [i for i, entry in enumerate(entries) if entry.num_timepoints >= self.window_len]

    def entry(self, index: int, split: Split | None = None) -> ShardEntry:
        return self.reader(split or self.split).entries[index]

    def series(self, index: int, split: Split | None = None) -> Series:
        """Return a recording of a split."""
        reader = self.reader(split or self.split)
        bold = reader.recording(index)
        kept_T = reader.kept(index, 0, len(bold))
        if not kept_T.any():
            raise DataError(f"{reader.entries[index].recording_id}: all timepoints are censored")
        sd_P = (bold if kept_T.all() else bold[kept_T]).std(axis=0, dtype=np.float64)
        scored_P = reader.present(index) & self.usable_P & (sd_P > 0)
        return Series(bold, sd_P, scored_P, kept_T)

    def kept(self, ref: WindowRef) -> BoolArray:
        """Return which timepoints of a window are kept, shape (W,)."""
        return self.reader(ref.split).kept(ref.index, ref.start, self.window_len)

    def windows(
        self, max_windows: int, split: Split | None = None, max_recordings: int | None = None
    ) -> Iterator[Window]:
        """Yield the windows of a split, recording by recording, their starts evenly spread."""
        split = split or self.split
        for index in self.recordings(split)[:max_recordings]:
            bold, sd_P, scored_P, kept_T = self.series(index, split)
            if scored_P.sum() < 2:
                raise DataError(f"{self.entry(index, split).recording_id}: fewer than 2 parcels carry signal")
            for start in even_starts(len(bold), self.window_len, max_windows):
                ref = WindowRef(split, index, self.entry(index, split).recording_id, start)
                rows = slice(start, start + self.window_len)
                yield Window(ref, np.ascontiguousarray(bold[rows].T), sd_P, scored_P, kept_T[rows])

    @cached_property
    def _families(self) -> dict[str, str]:
        """Family by recording id, where the data set knows families."""
        store = self.dataset.store
        if not store.exists("recordings.parquet"):
            return {}
        import pandas as pd

        table = pd.read_parquet(io.BytesIO(store.read_bytes("recordings.parquet")))
        if "family" not in table.columns:
            return {}
        families = table["family"].fillna("").astype(str)
        return {str(i): family for i, family in zip(table["recording_id"], families) if family}

    def identifiers(self, index: int) -> dict[str, str]:
        """Return what stands for a recording in tables: keyed hashes of ``group`` (family, else subject), ``subject``
        and ``recording``. Groups are what intervals resample."""
        entry = self.entry(index)
        family = self._families.get(entry.recording_id, "")
        return {
            "group": self.hashed(f"family {family}" if family else entry.subject),
            "subject": self.hashed(entry.subject),
            "recording": self.hashed(entry.recording_id),
        }

    def hashed(self, identity: str) -> str:
        """Return the keyed hash that stands for a subject or recording in tables that may be passed on."""
        return hmac.new(self.subject_key, identity.encode(), hashlib.sha256).hexdigest()[:24]
