from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.testing import small_model, synthetic_atlas, write_synthetic_dataset
from eval.cohort import Cohort
from eval.features import attention, without_self
from eval.models import MethodSpec, Network
from eval.task import Runtime
from eval.tasks.networks import Networks, NetworksSettings, accuracy, balanced_accuracy

SETTINGS = NetworksSettings(num_masks=2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Sixty parcels of four networks that interleave in space."""
    atlas = synthetic_atlas(60, 4, seed=3)
    url = str(tmp_path_factory.mktemp("planted") / "data")
    return Cohort.of(
        write_synthetic_dataset(
            url, atlas=atlas, num_timepoints=100, window_len=100, missing={"sub-test001_task-rest": (2,)}
        )
    )


def score(cohort: Cohort, spec: MethodSpec, level: str, folds: str, part: str = "") -> float:
    table = Networks(SETTINGS).compute(spec, cohort, Runtime()).table
    rows = table[(table["level"] == level) & (table["folds"] == folds) & (table["part"] == part)]
    return float(rows["correct"].sum() / rows["n"].sum())


def spec(name: str) -> MethodSpec:
    return MethodSpec(name=name, kind="baseline", model_hash="x")


@pytest.mark.parametrize("folds", ["random", "mirrored", "blocked"])
def test_connectivity_finds_planted_networks_and_coordinates_do_not(folds: str, planted: Cohort) -> None:
    assert score(planted, spec("functional connectivity"), "group", folds) > 0.95
    assert score(planted, spec("functional connectivity"), "recording", folds) > 0.8
    assert score(planted, spec("raw series"), "recording", folds) > 0.8
    assert score(planted, spec("coordinates (x, y, z)"), "group", folds) < 0.5
    assert score(planted, spec("majority class"), "group", folds) < 0.5


def test_every_recording_has_the_same_folds_and_missing_parcels_are_left_out(planted: Cohort) -> None:
    table = Networks(SETTINGS).compute(spec("majority class"), planted, Runtime()).table
    rows = table[(table["level"] == "recording") & (table["folds"] == "random")]
    assert rows["n"].tolist() == [60, 59, 60, 60]
    group = table[(table["level"] == "group") & (table["folds"] == "random")]
    assert len(group) == 60
    assert group["parcel"].is_unique


def test_attention_rows_are_complete_and_self_entries_count_for_nothing(cohort: Cohort, dataset: Dataset) -> None:
    network = Network(small_model(dataset.contract))
    kwargs = {"layer": -1, "mask_ratio": 0.5, "num_masks": 6, "max_windows": 1, "seed": 0}
    index = 1  # two parcels are missing here
    one = attention(network, cohort, index, parts=("encoder", "decoder"), batch_size=1, **kwargs)  # type: ignore[arg-type]
    many = attention(network, cohort, index, parts=("encoder", "decoder"), batch_size=8, **kwargs)  # type: ignore[arg-type]
    for part, matrix in one.items():
        np.testing.assert_allclose(matrix, many[part], rtol=1e-5, atol=1e-7)
        missing = ~np.isfinite(matrix).all(axis=1)
        assert np.flatnonzero(missing).tolist() == [3, 7]
        here = matrix[~missing][:, ~missing]
        bare = without_self(here)
        other = here + 5 * np.eye(len(here))
        np.testing.assert_allclose(without_self(other), bare)


def test_permuted_series_change_attention_and_keep_positions(cohort: Cohort, dataset: Dataset) -> None:
    network = Network(small_model(dataset.contract))
    kwargs = {"layer": -1, "mask_ratio": 0.5, "num_masks": 2, "max_windows": 1, "seed": 0, "batch_size": 4}
    a = attention(network, cohort, 0, parts=("encoder",), **kwargs)["encoder"]  # type: ignore[arg-type]
    b = attention(network, cohort, 0, parts=("encoder",), permute_series=True, **kwargs)["encoder"]  # type: ignore[arg-type]
    c = attention(network, cohort, 0, parts=("encoder",), permute_series=True, **kwargs)["encoder"]  # type: ignore[arg-type]
    assert np.nanmax(np.abs(a - b)) > 1e-6
    np.testing.assert_array_equal(b, c)


def test_attention_of_a_checkpoint_is_scored_for_both_parts_and_levels(planted: Cohort, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "checkpoint"), small_model(planted.dataset.contract), {}, [])
    trained = MethodSpec(name="BrainLM", kind="brainlm", model_hash="x", checkpoint=str(tmp_path / "checkpoint"))
    table = Networks(SETTINGS).compute(trained, planted, Runtime()).table
    assert set(table["part"]) == {"encoder", "decoder"}
    assert set(table["level"]) == {"recording", "group"}
    assert [control.variant for control in Networks(SETTINGS).controls(trained)] == ["permuted series"]


def test_balanced_accuracy_gives_every_class_the_same_weight() -> None:
    sums = {"n": np.array(10.0), "correct": np.array(8.0)}
    sums |= {"n_0": np.array(8.0), "correct_0": np.array(8.0), "n_1": np.array(2.0), "correct_1": np.array(0.0)}
    sums |= {"n_2": np.array(0.0), "correct_2": np.array(0.0)}
    assert accuracy(sums) == 0.8
    assert balanced_accuracy(sums) == 0.5


def test_an_atlas_without_networks_is_left_out(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path / "data"), atlas=synthetic_atlas(10, 0))
    assert "fewer than two networks" in Networks(SETTINGS).why_not(Cohort.of(dataset))
