"""Several data sets in one run: shares, other atlases and TRs, ranks, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import ConfigError
from brainlm.loader import MaskSettings, WindowLoader
from brainlm.model import BrainLM
from brainlm.testing import write_synthetic_dataset
from brainlm.world import World
from tests.train.conftest import metrics, run, stopped_after, weights
from train.data import build_held_out, build_mix, open_datasets
from train.mix import Mix
from train.settings import DataSettings, ModelChoice, PretrainSettings, RunSettings, ValidationSettings

ONE_RANK = World(0, 0, 1)


@pytest.fixture(scope="module")
def other_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of other parcels, at another TR, with subjects of its own."""
    url = str(tmp_path_factory.mktemp("mix") / "other")
    write_synthetic_dataset(
        url, num_subjects={"train": 6, "val": 2}, num_timepoints=60, num_parcels=18, tr_s=1.0, seed=9
    )  # fmt: skip
    return url


def settings(urls: tuple[str, ...], weights: tuple[float, ...] | None = None, **sizes: object) -> PretrainSettings:
    small = {"width": 16, "decoder_width": 16, "window_len": 40, "patch_len": 10, "parcel_embedding": False}
    return PretrainSettings(
        run=RunSettings(out="unused", steps=12),
        data=DataSettings(dataset=urls, weights=weights, batch_size=4, windows_per_recording=2),
        model=ModelChoice(**{**small, **sizes}),  # type: ignore[arg-type]
        validation=ValidationSettings(max_recordings=2),
    )


def model_of(dataset: Dataset, chosen: PretrainSettings) -> BrainLM:
    torch.manual_seed(0)
    return BrainLM(chosen.model.resolved, dataset.contract)


def test_every_stretch_of_steps_has_its_shares(dataset_url: str, other_url: str) -> None:
    loaders = {
        name: WindowLoader(
            open_dataset(url).split("train"), open_dataset(url).contract, MaskSettings(), batch_size=2,
            windows_per_recording=1, seed=0,
        )
        for name, url in (("a", dataset_url), ("b", other_url))
    }  # fmt: skip
    for given, shares in (((3.0, 1.0), (0.75, 0.25)), (None, (4 / 7, 3 / 7))):
        mix = Mix(loaders, given)
        np.testing.assert_allclose(mix.shares, shares)
        turns = [mix.turn(step) for step in range(400)]
        for number, share in enumerate(shares):
            had = np.cumsum([chosen == number for chosen, _ in turns])
            assert np.abs(had - share * np.arange(1, 401)).max() <= 1
            own = [own_step for chosen, own_step in turns if chosen == number]
            assert own == list(range(len(own)))  # its own order goes on where it was
    fresh = Mix(loaders, None)
    assert fresh.turn(123) == turns[123]  # whoever resumes there finds the same
    assert fresh.steps_per_epoch == 4 + 3


def test_windows_bring_what_the_model_must_know(dataset_url: str, other_url: str) -> None:
    chosen = settings((dataset_url, other_url), (1.0, 1.0))
    datasets = open_datasets(chosen)
    model = model_of(datasets[0], chosen)
    mix = build_mix(datasets, model, chosen, ONE_RANK)
    (own,), (other,) = mix.batches_at(0), mix.batches_at(1)
    assert (own.coords_mm, own.tr_s, own.windows.shape) == (None, None, (4, 24, 40))
    assert other.windows.shape == (4, 18, 40)
    np.testing.assert_array_equal(other.tr_s, [1.0] * 4)
    np.testing.assert_array_equal(other.coords_mm, datasets[1].contract.atlas.coords_mm)
    alone = model_of(datasets[1], chosen)  # the same weights, for the other parcels: no weight is a parcel's
    alone.load_state_dict(model.state_dict())
    theirs = alone(other.windows, other.mask, other.present, other.ids_decoded, other.kept)
    ours = model(other.as_windows(), other.mask, ids_decoded=other.ids_decoded)
    torch.testing.assert_close(ours.sum, theirs.sum)
    assert int(ours.num_values) == other.num_scored_values
    held_out = build_held_out(datasets, model, chosen)
    assert [part.windows[0].batch.values.shape[1] for part in held_out.values()] == [24, 18]


def test_parcels_that_the_model_lacks_are_not_scored(dataset_url: str) -> None:
    dataset = open_dataset(dataset_url)
    iqr = dataset.contract.iqr.copy()
    iqr[7] = 0  # constant in the data set whose contract the model has
    chosen = settings((dataset_url,))
    torch.manual_seed(0)
    model = BrainLM(chosen.model.resolved, replace(dataset.contract, iqr=iqr))
    (batch,) = build_mix([dataset], model, chosen, ONE_RANK).batches_at(0)
    loss = model(batch.as_windows(), batch.mask, ids_decoded=batch.ids_decoded)
    assert not batch.present[:, 7].any()
    assert int(loss.num_values) == batch.num_scored_values > 0
    held_out = build_held_out([dataset], model, chosen)["synthetic"]
    assert not held_out.windows[0].batch.present[:, 7].any()


def test_what_cannot_be_mixed_is_refused(
    dataset_url: str, other_url: str, write_config: Callable[[Path], Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "out")
    both = f"data.dataset=[{dataset_url}, {other_url}]"
    for overrides, message in (
        ((both,), "set model.parcel_embedding=false"),
        ((both, "--dry-run"), "set model.parcel_embedding=false"),
        ((f"data.dataset=[{dataset_url}, {dataset_url}]",), "the same data set is given twice"),
        ((both, "data.weights=[1]"), "expected one for each of 2 data sets, found 1"),
        ((both, "data.weights=[1, 0]"), "expected numbers above 0"),
        (("data.dataset=[]",), "at least one data set"),
    ):
        found = run(config, *overrides)
        assert found.returncode == 1
        assert message in found.stderr, found.stderr
    with pytest.raises(ConfigError, match="found 3"):
        DataSettings(dataset=("a", "b"), weights=(1, 1, 1))


def test_two_atlases_train_together_on_any_number_of_ranks_and_resume(
    dataset_url: str, other_url: str, write_config: Callable[[Path], Path], tmp_path: Path
) -> None:
    mixed = (f"data.dataset=[{dataset_url}, {other_url}]", "data.weights=[2, 1]", "model.parcel_embedding=false")
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    result = run(write_config(one), *mixed)
    assert result.returncode == 0, result.stderr
    assert "14 recordings to train on" in result.stderr
    rows = metrics(one)
    names = ("synthetic", "synthetic 2")
    assert rows[12]["val_r2"] == pytest.approx(sum(rows[12][f"val_r2/{name}"] for name in names) / 2)
    manifest = json.loads((one / "manifest.json").read_text())
    assert [part["share"] for part in manifest["mix"]] == pytest.approx([2 / 3, 1 / 3])

    loaded = BrainLM.from_pretrained(str(one / "checkpoints/step-12"))
    assert loaded.contract.atlas.num_parcels == 24
    assert loaded.train_subjects is not None
    subjects = {e.subject for url in (dataset_url, other_url) for e in open_dataset(url).split("train").entries}
    assert loaded.train_subjects.seen(subjects) == subjects

    stopped_after(one, 8, again)
    assert run(write_config(again), *mixed).returncode == 0
    for name, value in weights(one).items():
        assert torch.equal(value, weights(again)[name]), name

    result = run(write_config(two), *mixed, "engine.zero_stage=3", ranks=2)
    assert result.returncode == 0, result.stderr
    for step, row in metrics(two).items():
        assert row["loss"] == pytest.approx(rows[step]["loss"], rel=1e-4)
