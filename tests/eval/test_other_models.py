"""Models whose tokens are not single parcels, and published ones, scored like any other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from brainlm.checkpoint import save_checkpoint
from brainlm.contract_distance import read_recordings
from brainlm.dataset import Dataset
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM
from brainlm.official import main as convert_main
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig
from brainlm.published import PublishedModel
from brainlm.store import Store
from brainlm.testing import small_model, synthetic_atlas, write_synthetic_dataset
from eval.cohort import Cohort, WindowRef
from eval.extract import main as extract
from eval.masks import random_mask
from eval.models import Network
from eval.results import read_scores
from eval.run import main

FORECASTING = "forecasting={{horizons: [{}], baselines: [mean, autoregression], forecasters: {{orders: [1]}}}}"
FIXTURES = Path(__file__).parents[3] / "shared/fixtures/official"


def grouped_model(dataset: Dataset, patch_parcels: int = 4) -> BrainLM:
    model = BrainLM(replace(small_model(dataset.contract).config, patch_parcels=patch_parcels), dataset.contract)
    return model.eval()


def run(dataset: Dataset, checkpoint: Path | str, out: Path, *more: str) -> int:
    return main(
        [
            f"dataset={dataset.store.url}",
            f"checkpoints=[{checkpoint}]",
            f"out={out}",
            "ray.workers=0",
            "reconstruction={mask_ratios: [0.5], shrinkages: [0.1], own_weights: []}",
            FORECASTING.format(10),
            "networks={num_masks: 1, neighbours: [1], permuted_control: false}",
            "intervals={num_bootstrap: 20}",
            *more,
        ]
    )


def test_parcels_that_share_a_token_are_hidden_together(dataset: Dataset) -> None:
    model = grouped_model(dataset)
    assert model.groups is not None
    cohort = replace(Cohort.of(dataset), patch_parcels=4)
    scored = np.ones(cohort.num_parcels, dtype=bool)
    scored[model.groups[0, :2]] = False
    mask = random_mask(cohort, scored, 0.5, 0, WindowRef("test", 0, "sub-test000_task-rest", 0))
    mask_PK = mask.reshape(cohort.num_parcels, -1)
    assert mask_PK[~scored].all()
    for group in model.groups:
        members = [p for p in group.tolist() if p >= 0 and scored[p]]
        assert (mask_PK[members] == mask_PK[members[0]]).all()
    assert 0.3 < mask_PK[scored].mean() < 0.7
    # what the network is asked is the same thing in its own tokens
    tokens = Network(model)._tokens(mask[None], scored[None])
    answered = model.hidden_values(torch.from_numpy(tokens))[0].numpy()
    assert np.array_equal(answered[scored], np.repeat(mask_PK, cohort.patch_len, axis=1)[scored])


def test_a_grouped_model_is_scored_except_on_networks(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(str(tmp_path / "grouped"), grouped_model(dataset), {"step": 1}, [])
    assert run(dataset, tmp_path / "grouped", tmp_path / "out") == 0
    assert "not scored on networks: a token holds 4 parcels" in capsys.readouterr().out
    scores = read_scores(Store(tmp_path / "out"))
    assert {s.task for s in scores if s.model == "BrainLM grouped"} == {"reconstruction", "forecasting"}
    assert "gaussian" in {s.model for s in scores}
    assert "4 parcels" in (tmp_path / "out" / "report.html").read_text()


def test_models_with_other_tokens_are_scored_apart(
    dataset: Dataset, training_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(str(tmp_path / "grouped"), grouped_model(dataset), {}, [])
    assert run(dataset, f"{training_run}, {tmp_path / 'grouped'}", tmp_path / "out") == 1
    assert "parcels of a token" in capsys.readouterr().err


def published_folder(dataset: Dataset, folder: Path) -> Path:
    """A small model of the published 13M family with random weights, converted with the data set's contract."""
    contract = dataset.contract
    config = NystromConfig(
        hidden_size=16, decoder_hidden_size=16, num_hidden_layers=1, decoder_num_hidden_layers=1,
        num_attention_heads=2, decoder_num_attention_heads=2, intermediate_size=32, decoder_intermediate_size=32,
        num_brain_voxels=contract.atlas.num_parcels, timepoint_patching_size=contract.patch_len,
        num_timepoints_per_voxel=contract.window_len, num_landmarks=8, segment_means_seq_len=8, conv_kernel_size=5,
        mask_ratio=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    network = NystromBrainLM(config)
    source = folder / "published"
    source.mkdir(parents=True)
    tree = {**asdict(config), "model_type": "brainlm_mae"}
    (source / "config.json").write_text(json.dumps(tree))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, source / "model.safetensors")
    assert convert_main([str(source), str(folder / "converted"), "--contract", dataset.store.url]) == 0
    return folder / "converted"


def test_a_published_model_of_single_parcels_is_scored_with_its_reservations(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published_folder(dataset, tmp_path)
    capsys.readouterr()
    assert run(dataset, folder, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "not scored on networks: published models are not asked for attention" in printed
    scores = [s for s in read_scores(Store(tmp_path / "out")) if s.model == "BrainLM converted"]
    assert {s.task for s in scores} == {"reconstruction", "forecasting"}
    assert all(np.isfinite(s.value) for s in scores)
    flags = InputContract.from_json(json.loads((folder / "input_contract.json").read_text())).flags
    assert len(flags) >= 2  # the scale, and who was trained on
    assert all(set(flags) <= set(s.notes) for s in scores)
    assert "untrained" in {s.model for s in read_scores(Store(tmp_path / "out"))}


def test_a_published_model_embeds_a_cohort(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = published_folder(dataset, tmp_path / "published"), tmp_path / "table.parquet"
    words = ["--checkpoint", str(folder), "--data", dataset.store.url, "--out", str(out), "ray.workers=0"]
    assert extract([*words, "per_parcel=true"]) == 1
    assert "published models are not asked for single parcels" in capsys.readouterr().err
    assert extract(words) == 0
    assert "seen_in_training is empty" in capsys.readouterr().out
    table = pd.read_parquet(out)
    assert table["seen_in_training"].isna().all()
    model = PublishedModel.from_pretrained(str(folder))
    test = table[table["split"] == "test"]
    for vector, recording in zip(test["pooled"], read_recordings(dataset, "test"), strict=True):
        np.testing.assert_array_equal(vector, model.embed(recording).mean_pooled)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the published models' fixtures are not there")
def test_a_published_model_of_image_patches_is_scored_on_forecasting_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"),
        atlas=synthetic_atlas(424, 3),
        num_subjects={"train": 2, "val": 1, "test": 2},
        num_timepoints=200,
        window_len=200,
        patch_len=20,
    )
    source = str(FIXTURES / "vitmae_p16_auto0.75")
    assert convert_main([source, str(tmp_path / "converted"), "--contract", dataset.store.url]) == 0
    more = (
        "tasks=[reconstruction, forecasting]",
        FORECASTING.format(20),
        "report=false",
    )
    assert run(dataset, tmp_path / "converted", tmp_path / "out", *more) == 0
    assert "not scored on reconstruction" in capsys.readouterr().out
    scores = [s for s in read_scores(Store(tmp_path / "out")) if s.model == "BrainLM converted"]
    assert {s.task for s in scores} == {"forecasting"}
