"""Who takes part in the clinical task: recordings in a fixed order, and what is known of them besides the targets."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.checkpoint import train_subjects
from brainlm.errors import DataError
from brainlm.members import ChosenRecordings, Columns, Member, Members
from brainlm.recording import Recording
from brainlm.targets import MAX_CLASSES, label_of, numbers
from eval.clinical.settings import ClinicalSettings
from eval.cohort import Cohort

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class People:
    """Recordings that take part, numbered from 0 in the order of the data set.

    Parameters
    ----------
    members : tuple of Member
    source : Members
        The data set that they are of.
    cohort : Cohort
        How the data set is cut, and the key of the hashes that stand for subjects.
    left_out : mapping of str to int
        How many recordings do not take part, by reason.
    """

    members: tuple[Member, ...]
    source: Members
    cohort: Cohort
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def groups(self) -> NDArray[np.str_]:
        """Family, else subject, of each row: what may not be divided, and what intervals resample."""
        return np.array([member.group for member in self.members], dtype=np.str_)

    @cached_property
    def recordings(self) -> ChosenRecordings:
        return ChosenRecordings(self.source, self.members)

    def recording(self, row: int) -> Recording:
        """Return a recording as a model is given it."""
        return self.recordings.as_recording(row)

    def standardised(self, row: int) -> NDArray[np.float32]:
        """Return a series (T, P) in units of each parcel's own standard deviation, about its own mean.

        Both are of kept timepoints; parcels without signal, or that a compared checkpoint cannot use, are 0. Nothing of
        other people is in it.
        """
        recording = self.recording(row)
        kept = recording.keep_mask
        mean_P = recording.bold[kept].mean(axis=0, dtype=np.float64)
        sd_P = recording.bold[kept].std(axis=0, dtype=np.float64)
        here = self.recordings.present(row) & self.cohort.usable_P & (sd_P > 0)
        scaled = (recording.bold - mean_P) / np.where(here, sd_P, 1.0)
        return np.where(here, scaled, 0.0).astype(np.float32)

    def kept(self, row: int) -> NDArray[np.bool_]:
        """Return which timepoints are kept, shape (T,)."""
        return self.recordings.kept(row, 0, self.members[row].num_timepoints)

    def values(self, column: str) -> list[Any]:
        """Return a column, None where missing."""
        return self.source.values(column, self.members)

    def sites(self) -> list[str]:
        """Return the site of each row, "" where unknown."""
        return [label_of(value) for value in self.values("site")] if self.source.has("site") else [""] * len(self)

    def confounds(self, columns: Sequence[str]) -> FloatArray:
        """Return confounds as columns of numbers, shape (rows, C), NaN where a number is missing.

        Text, and ``site``, become a column a value, where no more than half of it are numbers; a column in which
        numbers are missing brings another one, 1 where they are; columns that the data set lacks are left out.

        Raises
        ------
        DataError
            If there is text among numbers, or too many different texts for classes.
        """
        found: list[FloatArray] = []
        for column in columns:
            if not self.source.has(column):
                continue
            values = self.values(column)
            if column == "site" or not _are_numbers(values):
                labels = np.array([label_of(value) for value in values])
                names = sorted(set(labels) - {""})
                if column != "site" and len(names) > MAX_CLASSES:
                    raise DataError(
                        f"confound {column}: {len(names)} different texts among {len(self)} recordings, at most "
                        f"{MAX_CLASSES} are taken as classes: correct the column, or leave it out of clinical.confounds"
                    )
                found += [(labels == label).astype(np.float64) for label in names]
            else:
                x = numbers(column, values)
                missing = np.isnan(x)
                found += [x, missing.astype(np.float64)] if missing.any() else [x]
        return np.stack(found, axis=1) if found else np.zeros((len(self), 0))

    def identifiers(self, row: int) -> dict[str, str]:
        """Return what stands for a recording in tables: keyed hashes of ``group``, ``subject`` and ``recording``."""
        member = self.members[row]
        return {
            "group": self.cohort.hashed(f"group {member.group}"),
            "subject": self.cohort.hashed(member.subject),
            "recording": self.cohort.hashed(member.recording_id),
        }

    def content_hash(self) -> str:
        """Return a hash of who takes part."""
        names = "\n".join(f"{member.recording_id} {member.group}" for member in self.members)
        return hashlib.sha256(names.encode()).hexdigest()


def find_people(cohort: Cohort, settings: ClinicalSettings) -> People:
    """Find who may be tested: nobody that a compared checkpoint was pretrained on, nor their families.

    Where a checkpoint does not say whom it was pretrained on, or seen subjects are allowed, all are taken.

    Raises
    ------
    DataError
        If the data set has no tables.
    """
    source = Members(cohort.dataset, _columns)
    seen: set[str] = set()
    for folder in cohort.pretrained if settings.of == "unseen" else ():
        known = train_subjects(folder)
        seen |= source.groups_seen(known) if known is not None else set()
    members: list[Member] = []
    left_out: Counter[str] = Counter()
    for member in source.all:
        reason = ""
        if member.group in seen:
            reason = "of people that a checkpoint was pretrained on, or of their families"
        elif settings.of == "split" and member.split != cohort.split:
            reason = f"not in the split {cohort.split}"
        elif member.num_timepoints < cohort.window_len:
            reason = f"shorter than a window of {cohort.window_len} timepoints"
        elif not _can_be_read(source, member, cohort):
            reason = "with fewer than two kept timepoints, or two parcels with signal that all checkpoints can use"
        if reason:
            left_out[reason] += 1
        else:
            members.append(member)
    return People(tuple(members), source, cohort, left_out)


def _can_be_read(source: Members, member: Member, cohort: Cohort) -> bool:
    """Say whether there are two kept timepoints, and two parcels with signal that all checkpoints can use."""
    reader = source.readers[member.split]  # type: ignore[index]
    kept = reader.kept(member.index, 0, member.num_timepoints)
    return bool(kept.sum() > 1 and (reader.present(member.index) & cohort.usable_P).sum() > 1)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Say whether most of what is known of a column are numbers: text among them is then a mistake."""
    labels = [label for label in map(label_of, values) if label]
    return sum(_is_number(label) for label in labels) * 2 > len(labels) or not labels


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _columns(parquet: bytes) -> Columns:
    table = pd.read_parquet(io.BytesIO(parquet))
    return {str(name): table[name].tolist() for name in table.columns}
