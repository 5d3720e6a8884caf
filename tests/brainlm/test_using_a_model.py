"""Every block of docs/using_a_model.md runs, in order, and gives what the page says."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainlm.heads import HeadConfig
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM, ModelConfig
from brainlm.predictor import Predictor
from brainlm.targets import Target, TargetSettings
from brainlm.testing import synthetic_atlas, synthetic_system, write_synthetic_dataset
from eval.extract import main as extract

PAGE = Path(__file__).parents[2] / "docs/using_a_model.md"
P, T = 12, 100


def checkpoint(folder: str, **sizes: Any) -> None:
    contract = InputContract(
        atlas=synthetic_atlas(P),
        covered=np.ones(P, dtype=bool),
        median=np.zeros(P, dtype=np.float32),
        iqr=np.full(P, 13.0, dtype=np.float32),
        tr_s=2.0,
        window_len=40,
        patch_len=10,
    )
    config = ModelConfig(
        width=16, mlp_width=32, decoder_width=16, decoder_mlp_width=32, window_len=40, patch_len=10,
        parcel_embedding=False, **sizes,
    )  # fmt: skip
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def predictor(folder: str) -> None:
    """Give the checkpoint a head with random weights."""
    targets = (
        Target.fit(TargetSettings(column="age"), [20.0, 40.0, 70.0]),
        Target.fit(TargetSettings(column="sex", kind="classification"), ["F", "M", "M"]),
    )
    made = Predictor(BrainLM.from_pretrained("CHECKPOINT"), HeadConfig(pooling="mean"), targets)
    made.head.init_weights(torch.Generator().manual_seed(0))
    made.manifest = {"targets": [{"column": "age"}, {"column": "sex"}], "pretraining_subjects": 0}
    made.save_pretrained(folder)


def images() -> np.ndarray[Any, Any]:
    """Write an atlas of cubes and a run in which their voxels have the parcels' series; return these."""
    import nibabel

    atlas = synthetic_atlas(P)
    bold = 1000 + 10 * synthetic_system(atlas).simulate(T, np.random.default_rng(0)).astype(np.float32)
    labels = np.kron(atlas.labels.reshape(4, 3, 1), np.ones((2, 2, 2))).astype(np.int32)
    volumes = np.kron(bold.T.reshape(4, 3, 1, T), np.ones((2, 2, 2, 1))).astype(np.float32)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(labels, affine), "atlas.nii.gz")
    image = nibabel.Nifti1Image(volumes, affine)
    image.header.set_zooms((4.0, 4.0, 4.0, 2.0))
    nibabel.save(image, "sub-01_bold.nii.gz")
    return bold


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page has defined after its last block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        checkpoint("CHECKPOINT")
        checkpoint("GROUPED", patch_parcels=4)
        write_synthetic_dataset("DATASET", num_subjects={"train": 3, "test": 1}, num_parcels=8, seed=1)
        predictor("PREDICTOR")
        words = ["--checkpoint", "CHECKPOINT", "--data", "COHORT", "--out", "embeddings.parquet", "ray.workers=0"]
        write_synthetic_dataset("COHORT", num_subjects={"train": 3, "test": 1}, num_parcels=P)
        assert extract(words) == 0  # the page's first command, without Ray
        found: dict[str, Any] = {"truth": images(), "printed": io.StringIO()}
        text = PAGE.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: block.start()].count("\n") + 1
            with redirect_stdout(found["printed"]):
                exec(compile("\n" * line + block.group(1), str(PAGE), "exec"), found)  # errors name the page's line
    return found


def test_the_recording_is_what_was_written(names: dict[str, Any]) -> None:
    np.testing.assert_allclose(names["bold"], names["truth"], rtol=1e-5)
    assert len(names["embedding"]) == 3
    assert names["embedding"].num_kept.tolist() == [37, 40, 20]
    assert names["embedding"].mean_pooled.shape == (16,)


def test_the_table_of_a_cohort_is_read_as_the_page_says(names: dict[str, Any]) -> None:
    assert names["features"].shape == (4, 16)
    assert names["features"].dtype == np.float32
    assert names["about"]["weights_sha256"] == names["model"].weights_sha256


def test_predictions_are_in_the_units_of_the_columns(names: dict[str, Any]) -> None:
    found = names["found"]
    assert 20 < found.values["age"] < 70
    assert sum(found.probabilities["sex"].values()) == pytest.approx(1)
    assert (found.num_windows, found.num_kept, found.num_parcels) == (2, 80, P)


def test_hidden_values_and_whole_windows_are_as_the_page_says(names: dict[str, Any]) -> None:
    model, windows, mask = names["model"], names["windows"], names["mask"]
    seen = torch.arange(P) != 3
    assert windows.present.tolist() == [seen.tolist()] * 3
    wanted = model.hidden_values(mask) & seen[None, :, None]
    assert torch.equal(names["hidden"].isfinite(), wanted)
    assert torch.equal(names["whole"].isfinite(), seen[None, :, None].expand(3, P, 40))
    assert names["difference"].shape == ((P - 1) * (T - 3),)


def test_the_forecast_begins_where_the_recording_ends(names: dict[str, Any]) -> None:
    forecast = names["forecast"]
    assert forecast.bold.shape == (15, P)
    assert forecast.missing.tolist() == [i == 3 for i in range(P)]
    assert forecast.times_s[0] == T * 2.0
    seen = ~forecast.missing
    assert np.abs(forecast.bold[:, seen] - names["truth"].mean(axis=0)[seen]).max() < 100  # near 1000: its own units


def test_perturbations_come_nearer_to_their_target(names: dict[str, Any]) -> None:
    perturbed = names["perturbed"]
    assert perturbed.change.shape == (1, P, 40)
    assert float(perturbed.distance) < 0.5
    assert not perturbed.change[:, 3].any()
    assert names["response"].shape == (3, P, 10)
    assert bool(names["response"].isfinite().all(dim=2)[0, torch.arange(P) != 3].all())


def test_attention_batches_and_groups_are_as_the_page_says(names: dict[str, Any]) -> None:
    weights = names["last"].weights
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(weights.shape[:3]))
    assert names["batch"].values.shape == (3 + 2, P, 40)
    assert names["batch"].present.sum(dim=1).tolist() == [11, 11, 11, 8, 8]
    assert names["grouped"].num_rows == 3
    assert "is not known to a model with 4 parcels in a token" in names["printed"].getvalue()
