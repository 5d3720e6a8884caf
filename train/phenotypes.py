"""The recordings of a data set with the phenotypes of their subjects."""

from __future__ import annotations

import io

import pandas as pd

from brainlm.dataset import Dataset
from brainlm.members import Columns, Members


def read_members(dataset: Dataset) -> Members:
    """Read who is in a data set.

    Raises
    ------
    DataError
        As `brainlm.members.Members`.
    """
    return Members(dataset, _columns)


def _columns(parquet: bytes) -> Columns:
    table = pd.read_parquet(io.BytesIO(parquet))
    return {str(name): table[name].tolist() for name in table.columns}
