"""A small data set whose subjects have phenotypes, some of which show in their series."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from brainlm.dataset import SPLITS, Dataset
from brainlm.testing import write_synthetic_dataset

NUM_SUBJECTS = {"train": 8, "val": 30, "test": 30}
MISSING_AGE = "sub-val003"
TWINS = ("sub-val000", "sub-test000")


def write_phenotype_dataset(url: str, num_timepoints: int = 60, phi: float = 0.5) -> Dataset:
    """Write a data set of subjects who differ in how strongly their series fluctuate.

    ``age`` is that strength (mean 50, SD 12), ``score`` grows with it and is skewed, ``sex`` tells the stronger half;
    ``luck`` is noise, ``constant`` and ``empty`` are, ``comment`` is text. One age is missing; two subjects are a
    family.
    """
    dataset = write_synthetic_dataset(
        url, num_subjects=NUM_SUBJECTS, num_timepoints=num_timepoints, window_len=40, patch_len=10, num_parcels=12,
        gain_sd=0.5, phi=phi,
    )  # fmt: skip
    rng = np.random.default_rng(7)
    entries, strength = [], []
    for split in SPLITS:
        reader = dataset.split(split)
        for index, entry in enumerate(reader.entries):
            entries.append((split, entry))
            strength.append(float(np.log(reader.recording(index).std())))
    z = (np.array(strength) - np.mean(strength)) / np.std(strength)
    subjects = pd.DataFrame(
        {
            "subject": [entry.subject for _, entry in entries],
            "age": np.where([entry.subject == MISSING_AGE for _, entry in entries], np.nan, 50 + 12 * z),
            "score": np.exp(z) * 10,
            "sex": np.where(z > 0, "F", "M"),
            "luck": rng.standard_normal(len(z)),
            "constant": 3.0,
            "empty": np.full(len(z), np.nan),
            "comment": "fine",
            "mine": ["train" if i % 3 else "val" if i % 2 else "test" for i in range(len(z))],
        }
    )
    recordings = pd.DataFrame(
        {
            "recording_id": [entry.recording_id for _, entry in entries],
            "subject": subjects["subject"],
            "task": "rest",
            "site": ["a" if i % 2 else "b" for i in range(len(z))],
            "family": ["fam-1" if entry.subject in TWINS else "" for _, entry in entries],
            "series_sha256": [str(i) for i in range(len(z))],
            "split": [split for split, _ in entries],
        }
    )
    for name, table in (("subjects", subjects), ("recordings", recordings)):
        buffer = io.BytesIO()
        table.to_parquet(buffer)
        dataset.store.write_bytes(f"{name}.parquet", buffer.getvalue())
    return dataset
