"""Fine-tuning through its entry: what it learns, exports and reports, stopping early, resuming, controls, bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.errors import ConfigError
from brainlm.model import BrainLM
from brainlm.official import convert
from brainlm.official_13m import NystromBrainLM
from brainlm.official_config import NystromConfig
from brainlm.predictor import Predictor
from brainlm.published import PublishedModel
from brainlm.testing import small_model
from tests.brainlm.published_models import randomised
from tests.phenotypes import NUM_SUBJECTS, write_phenotype_dataset
from tests.train.conftest import metrics
from tests.train.forked import start
from train.finetune import main

STEPS = 200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_phenotype_dataset(str(tmp_path_factory.mktemp("finetune") / "dataset"))


@pytest.fixture(scope="module")
def checkpoint(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("pretrained") / "checkpoint")
    subjects = [entry.subject for entry in dataset.split("train").entries]
    save_checkpoint(folder, small_model(dataset.contract), {"step": 1}, subjects)
    return folder


Config = Callable[..., Path]


@pytest.fixture(scope="module")
def write_config(dataset: Dataset, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    def write(out: Path, **sections: Any) -> Path:
        tree: dict[str, Any] = {
            "run": {"out": str(out), "steps": STEPS, "seed": 1, "log_every": 10, "snapshot_every": 40},
            "data": {"dataset": dataset.store.url, "batch_size": 8, "windows_per_recording": 4},
            "init_from": checkpoint,
            "targets": [{"column": "age"}],
            "head": {"pooling": "mean", "dropout": 0.1},
            "encoder": {"dropout": 0.1},
            "optimizer": {"lr": 3e-3, "warmup_steps": 5},
            "engine": {"threads": 1, "precision": "fp32"},
            "validation": {"every": 20, "patience": None},
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
        if "forecast_patches" in sections:
            del tree["targets"]
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def run(config: Path, log: Path, *overrides: str, ranks: int = 1) -> tuple[list[int | None], str]:
    started = start(log, config, *overrides, ranks=ranks, entry="finetune")
    return started.finish(), started.said


@pytest.fixture(scope="module")
def finished(write_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Age, score and sex at once, from the subjects that the checkpoint never saw."""
    folder = tmp_path_factory.mktemp("runs")
    targets = [
        {"column": "age"}, {"column": "score", "transform": "log1p_minmax"},
        {"column": "sex", "kind": "classification", "class_weights": "balanced"},
    ]  # fmt: skip
    status, said = run(write_config(folder / "run", targets=targets), folder / "log")
    assert status == [0], said
    return folder / "run"


def scores(out: Path, split: str = "test") -> dict[tuple[str, str], dict[str, Any]]:
    tree = json.loads((out / "scores.json").read_text())
    return {(s["target"], s["metric"]): s for s in tree["scores"] if s["split"] == split}


def best(out: Path) -> Path:
    return Path(json.loads((out / "done.json").read_text())["checkpoint"])


def test_it_finds_what_the_series_show_in_people_it_has_not_seen(finished: Path) -> None:
    found = scores(finished)
    assert found["age", "r2"]["value"] > 0.5
    assert found["age", "r2"]["low"] < found["age", "r2"]["value"] < found["age", "r2"]["high"]
    assert found["score", "pearson_r"]["value"] > 0.8
    assert found["sex", "auc"]["value"] > 0.85
    assert 4 < found["age", "mae"]["num_recordings"] < 20
    years = Predictor.from_pretrained(str(best(finished))).targets[0].scale  # of one SD of the training subjects
    in_years = years**2 * found["age", "mse_transformed"]["value"]
    assert found["age", "mse"]["value"] == pytest.approx(in_years)
    assert 8 < years < 16


def test_permuted_targets_give_chance(write_config: Config, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run", permute_targets=True, validation={"patience": 2})
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    assert scores(tmp_path / "run")["age", "r2"]["value"] < 0.3
    assert any("permuted" in note for note in json.loads((tmp_path / "run" / "scores.json").read_text())["notes"])
    assert "permuted" in (best(tmp_path / "run") / "README.md").read_text()


def test_the_exported_checkpoint_predicts_what_the_table_says(finished: Path, dataset: Dataset) -> None:
    predictor = Predictor.from_pretrained(str(best(finished)))
    table = pd.read_parquet(finished / "predictions.parquet").set_index("recording_id")
    assert set(table["split"]) == {"val", "test"}
    readers = [dataset.split("val"), dataset.split("test")]
    seen = 0
    for reader in readers:
        for index, entry in enumerate(reader.entries):
            if entry.recording_id in table.index:
                row, found = table.loc[entry.recording_id], predictor.predict(reader.as_recording(index))
                assert found.values["age"] == row["predicted_age"]
                assert found.values["sex"] == row["predicted_sex"]
                assert found.probabilities["sex"]["F"] == row["probability_sex_F"]
                seen += 1
    assert seen == len(table)
    predicted, truth = table["predicted_age"].to_numpy(), table["true_age"].to_numpy()
    assert 40 < predicted.mean() < 60
    assert np.corrcoef(predicted[np.isfinite(truth)], truth[np.isfinite(truth)])[0, 1] > 0.8


def test_pretraining_subjects_are_left_out_and_everybody_it_learned_from_is_remembered(finished: Path) -> None:
    split = pd.read_parquet(finished / "split.parquet")
    left_out = split[split["split"] == ""]
    assert len(left_out) == 8
    assert left_out["left_out"].str.contains("pretrained on").all()
    assert split.groupby("group")["split"].nunique().max() == 1
    assert set(split["split"]) == {"", "train", "val", "test"}
    predictor = Predictor.from_pretrained(str(best(finished)))
    assert predictor.train_subjects is not None
    table = pd.read_parquet(finished / "predictions.parquet")
    everybody = {f"sub-{split}{n:03d}" for split, count in NUM_SUBJECTS.items() for n in range(count)}
    assert predictor.train_subjects.seen(everybody) == everybody - set(table["subject"])
    assert json.loads((finished / "scores.json").read_text())["pretraining_subjects"] == 0


def test_a_trained_encoder_no_longer_reconstructs(finished: Path, dataset: Dataset) -> None:
    encoder = BrainLM.from_pretrained(str(best(finished)))
    recording = dataset.split("test").as_recording(0)
    assert np.isfinite(encoder.embed(recording).pooled).all()
    with pytest.raises(ConfigError, match="fine-tuned to predict age, score, sex"):
        encoder.forecast(recording, 20.0)


def test_a_run_goes_on_bit_by_bit_with_dropout(finished: Path, write_config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("done.json", "scores.json", "predictions.parquet"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "snapshots" / f"step-{STEPS}")
    tree = yaml.safe_load((out / "config.yaml").read_text())
    tree["run"]["out"] = str(out)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config"]["run"]["out"] = str(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    assert "resumed after step 160" in said
    last = Path("snapshots") / f"step-{STEPS}"
    for name in ("weights.safetensors", "exp_avg.safetensors"):
        assert (out / last / name).read_bytes() == (finished / last / name).read_bytes()


def test_training_ends_when_validation_no_longer_improves(write_config: Config, tmp_path: Path) -> None:
    options = {"validation": {"every": 5, "patience": 2}, "optimizer": {"lr": 1e-9}, "encoder": {"dropout": 0.0}}
    config = write_config(tmp_path / "run", targets=[{"column": "luck"}], head={"dropout": 0.0}, **options)
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    assert "validations without a better score" in said
    assert max(metrics(tmp_path / "run")) < STEPS
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done["step"] == max(metrics(tmp_path / "run"))
    (tmp_path / "run" / "done.json").unlink()  # killed between the last snapshot and the end
    status, said = run(config, tmp_path / "log2")
    assert status == [0], said
    assert json.loads((tmp_path / "run" / "done.json").read_text()) == done


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_are_exported_bit_by_bit(
    precision: str, write_config: Config, checkpoint: str, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "run", encoder={"trained": "none"}, run={"steps": 10}, engine={"precision": precision}
    )
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (checkpoint, best(tmp_path / "run")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Predictor.from_pretrained(str(best(tmp_path / "run"))).manifest["encoder_trained"] is False


def test_the_last_blocks_alone_can_be_trained(write_config: Config, checkpoint: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run", encoder={"trained": 1}, run={"steps": 10})
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (checkpoint, best(tmp_path / "run")))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"encoder", "encoder_norm"}


def test_two_ranks_learn_as_one_does(write_config: Config, tmp_path: Path) -> None:
    options = {"encoder": {"dropout": 0.0}, "head": {"dropout": 0.0}, "run": {"steps": 20, "log_every": 1}}
    logged = {}
    for ranks in (1, 2):
        config = write_config(tmp_path / f"run{ranks}", **options)
        status, said = run(config, tmp_path / f"log{ranks}", ranks=ranks)
        assert status == [0] * ranks, said
        logged[ranks] = metrics(tmp_path / f"run{ranks}")
    for step, row in logged[1].items():  # float32: other summation orders
        assert logged[2][step]["loss"] == pytest.approx(row["loss"], rel=1e-3)
    assert logged[2][20]["val_r2"] == pytest.approx(logged[1][20]["val_r2"], abs=1e-3)


def test_a_forecaster_is_fine_tuned_and_forecasts(write_config: Config, dataset: Dataset, tmp_path: Path) -> None:
    slow = write_phenotype_dataset(str(tmp_path / "slow"), num_timepoints=120, phi=0.97)
    config = write_config(
        tmp_path / "run", forecast_patches=1, encoder={"dropout": 0.0}, data={"dataset": slow.store.url}
    )
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    assert not (tmp_path / "run" / "scores.json").exists()
    logged = metrics(tmp_path / "run")
    assert logged[STEPS]["val_r2"] > 0.1
    model = BrainLM.from_pretrained(str(best(tmp_path / "run")))
    assert model.forecast(dataset.split("test").as_recording(0), 20.0).bold.shape == (10, 12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets=[{column: height}]"], "no column 'height'.*phenotypes there: subject, age, score, sex"),
        (["targets=[{column: empty}]"], "target empty: all training subjects lack a value"),
        (["targets=[{column: constant}]"], "target constant: constant, all .* have 3"),
        (["targets=[{column: comment}]"], "target comment: expected numbers, found text .*fine"),
        (["targets=[{column: comment, kind: classification}]"], "target comment: one class"),
        (["targets=[{column: luck, transform: log1p_minmax}]"], "log\\(1 \\+ x\\) needs values above -1"),
        (["targets=[]"], "give targets, or forecast_patches"),
        (["split.of=dataset"], "pretrained on 8 of the 68 subjects"),
        (["split.column=mine"], "pretrained on"),
        (["split.column=luck"], "expected train, val, test or nothing"),
        (["encoder.trained=7"], "this encoder has 1 blocks"),
        (["init_from=null"], "init_from: give the checkpoint"),
        (["forecast_patches=4", "targets=[]"], "expected 1 to 3 of the 4 patches"),
    ],
)
def test_bad_settings_end_before_anything_is_written(
    overrides: list[str], message: str, write_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert main(["--config", str(write_config(tmp_path / "run")), *overrides]) == 1
    assert re.search(message, caplog.text), caplog.text
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_published_checkpoint_is_fine_tuned(write_config: Config, dataset: Dataset, tmp_path: Path) -> None:
    config = NystromConfig(
        hidden_size=16, decoder_hidden_size=16, num_hidden_layers=2, decoder_num_hidden_layers=1,
        num_attention_heads=2, decoder_num_attention_heads=2, intermediate_size=32, decoder_intermediate_size=32,
        num_brain_voxels=12, timepoint_patching_size=10, num_timepoints_per_voxel=40, num_landmarks=8,
        segment_means_seq_len=8, conv_kernel_size=5, mask_ratio=0.5,
    )  # fmt: skip
    network = randomised(NystromBrainLM(config))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({**asdict(config), "model_type": "brainlm_mae"}))
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    convert(str(tmp_path / "source"), str(tmp_path / "published"), dataset.contract)
    options: dict[str, Any] = {"init_from": str(tmp_path / "published"), "run": {"steps": 10}}
    options |= {"encoder": {"trained": 1, "dropout": 0.2}, "head": {"pooling": "cls"}}
    status, said = run(write_config(tmp_path / "run", **options), tmp_path / "log")
    assert status == [1]
    assert "does not say whom it was pretrained on" in said
    options["split"] = {"allow_pretraining_subjects": True}
    status, said = run(write_config(tmp_path / "run", **options), tmp_path / "log")
    assert status == [0], said
    predictor = Predictor.from_pretrained(str(best(tmp_path / "run")))
    assert isinstance(predictor.encoder, PublishedModel)
    after = predictor.encoder.network.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, tensors[name])}
    assert changed
    assert all(name.startswith(("vit.encoder.layer.1.", "vit.layernorm.")) for name in changed)
    tree = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "whom the checkpoint was pretrained on is not known" in tree["notes"][0]
    assert "unknown number" in (best(tmp_path / "run") / "README.md").read_text()


def test_allowed_pretraining_subjects_are_shown_with_every_result(write_config: Config, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run", split={"of": "dataset", "allow_pretraining_subjects": True}, run={"steps": 10}
    )
    # the twins are in two splits of the data set
    status, said = run(config, tmp_path / "log")
    assert status == [1]
    assert "divides what belongs together" in said
    config = write_config(tmp_path / "run", split={"allow_pretraining_subjects": True}, run={"steps": 10})
    status, said = run(config, tmp_path / "log")
    assert status == [0], said
    tree = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert tree["pretraining_subjects"] == 8
    assert "pretrained on 8 of these subjects, or their families" in tree["notes"][0]
    assert "too high for new ones" in (best(tmp_path / "run") / "README.md").read_text()


def test_dry_run_says_what_would_be_learned_from_whom(
    write_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config(tmp_path / "run")), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "age (regression, zscore)" in said
    assert "test                  12 subjects, 12 recordings" in said
    assert not (tmp_path / "run").exists()
