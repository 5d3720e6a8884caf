"""A seeded generator, small atlases and contracts."""

from __future__ import annotations

import numpy as np
import pytest

from brainlm.input_contract import InputContract
from brainlm.testing import synthetic_atlas


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def contract(rng: np.random.Generator) -> InputContract:
    """Six parcels with statistics of their own, all usable; windows of 20 in patches of 5."""
    return InputContract(
        atlas=synthetic_atlas(6),
        covered=np.ones(6, dtype=bool),
        median=rng.normal(0, 3, 6).astype(np.float32),
        iqr=rng.uniform(0.5, 9.0, 6).astype(np.float32),
        tr_s=2.0,
        window_len=20,
        patch_len=5,
    )
