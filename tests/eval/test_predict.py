"""Tables of predictions: from data sets, series files and images, as the predictor itself says, refusals listed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from brainlm.contract_distance import read_recordings
from brainlm.dataset import Dataset
from brainlm.heads import HeadConfig, moments
from brainlm.input_contract import InputContract
from brainlm.predictor import Predictor
from brainlm.targets import Target, TargetSettings
from brainlm.testing import small_model
from brainlm.train_subjects import TrainSubjects
from data_prep.atlas_image import load_atlas
from data_prep.settings import AtlasSettings
from eval.predict import main
from eval.table_parts import read_facts
from tests.eval.conftest import TRAINED_ON

P = 24
AGE = Target.fit(TargetSettings(column="age"), [20.0, 40.0, 70.0])
SEX = Target.fit(TargetSettings(column="site", kind="classification"), ["F", "M", "M"])  # a column that ids have, too


def make_predictor(contract: InputContract) -> Predictor:
    encoder = small_model(contract, seed=3)
    encoder.train_subjects = TrainSubjects.of("", [TRAINED_ON])
    predictor = Predictor(encoder, HeadConfig(pooling="mean"), [AGE, SEX])
    predictor.head.init_weights(torch.Generator().manual_seed(0))
    predictor.head.set_whitening(*moments(torch.randn(20, 32, generator=torch.Generator().manual_seed(1))))
    predictor.manifest = {"targets": [{"column": "age"}, {"column": "site"}], "pretraining_subjects": 0}
    return predictor.eval()


@pytest.fixture(scope="module")
def predictor(dataset: Dataset) -> Predictor:
    return make_predictor(dataset.contract)


@pytest.fixture(scope="module")
def folder(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fine-tuning run with an older predictor beside the best one."""
    run = tmp_path_factory.mktemp("run")
    for step in (50, 100):
        predictor.save_pretrained(str(run / "checkpoints" / f"best-step-{step}"))
    (run / "checkpoints" / "best-step-50" / "head.json").unlink()
    return str(run)


def arguments(checkpoint: str, data: list[str], out: Path, *more: str) -> list[str]:
    return ["--checkpoint", checkpoint, "--data", *data, "--out", str(out), "ray.workers=0", *more]


def test_rows_are_what_the_predictor_says(folder: str, predictor: Predictor, dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "predictions.parquet"
    assert main(arguments(folder, [dataset.store.url], out, "splits=[train, test]", "recordings_per_part=4")) == 0
    table = pd.read_parquet(out).set_index("recording_id")
    assert len(table) == 21
    for split in ("train", "test"):
        for recording in read_recordings(dataset, split, 99):  # type: ignore[arg-type]
            row, found = table.loc[recording.recording_id], predictor.predict(recording)
            assert row["predicted_age"] == found.values["age"]
            assert row["predicted_site"] == found.values["site"]
            assert row["probability_site_F"] == found.probabilities["site"]["F"]
            assert (row["num_windows"], row["num_kept"], row["split"]) == (2, 80, split)
            assert row["seen_in_training"] == (recording.subject == TRAINED_ON)
    facts = read_facts(dataset.store.__class__(str(tmp_path)), out.name)
    assert facts["weights_sha256"] == Predictor.from_pretrained(f"{folder}/checkpoints/best-step-100").weights_sha256
    assert pd.read_parquet(tmp_path / "predictions.rejected.parquet").empty


def test_workers_change_nothing(folder: str, dataset: Dataset, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        out = tmp_path / f"{workers}.parquet"
        assert main([*arguments(folder, [dataset.store.url], out)[:-1], f"ray.workers={workers}"]) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]


def test_series_files_are_read_as_they_are_and_what_does_not_fit_is_listed(
    folder: str, predictor: Predictor, dataset: Dataset, tmp_path: Path, rng: np.random.Generator
) -> None:
    recording = next(read_recordings(dataset, "test"))
    np.save(tmp_path / "sub-7_bold.npy", recording.bold)
    np.save(tmp_path / "sub-8_bold.npy", rng.standard_normal((60, 5)))
    np.save(tmp_path / "sub-9_bold.npy", recording.bold[:30])
    out = tmp_path / "predictions.parquet"
    assert main(arguments(folder, [f"{tmp_path}/*.npy"], out, "tr_s=2.0")) == 0
    (row,) = pd.read_parquet(out).to_dict("records")
    assert row["predicted_age"] == predictor.predict(recording.bold, tr_s=2.0).values["age"]
    assert row["subject"] == "7"
    assert "cleaned as the checkpoint wants" in row["adapted"]
    other, short = pd.read_parquet(tmp_path / "predictions.rejected.parquet").to_dict("records")
    assert "5 columns" in other["reason"]
    assert short["reason"] == "sub-9_bold has 30 timepoints, a window of the model 40: it is too short"


def write_images(folder: Path, contract: InputContract, num_timepoints: int) -> tuple[np.ndarray[Any, Any], Path]:
    """Write an atlas of cubes, a run in which their voxels have the parcels' series, and one that is too short."""
    import nibabel

    rng = np.random.default_rng(0)
    bold = (1000 + 10 * rng.standard_normal((num_timepoints, P))).astype(np.float32)
    labels = np.kron(contract.atlas.labels.reshape(4, 3, 2), np.ones((2, 2, 2))).astype(np.int32)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "atlas.nii.gz")
    for name, length in (("sub-07_task-rest", num_timepoints), ("sub-08_task-rest", 25)):
        volumes = np.kron(bold[:length].T.reshape(4, 3, 2, length), np.ones((2, 2, 2, 1))).astype(np.float32)
        image = nibabel.Nifti1Image(volumes, affine)
        image.header.set_zooms((4.0, 4.0, 4.0, 2.0))
        nibabel.save(image, folder / f"{name}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    return bold, folder / "atlas.nii.gz"


def test_images_go_through_the_checkpoints_contract(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    bold, image = write_images(tmp_path / "scans", dataset.contract, 90)
    atlas = load_atlas(AtlasSettings(name="cubes", image=str(image))).atlas
    contract = replace(dataset.contract, atlas=atlas)
    predictor = make_predictor(contract)
    predictor.save_pretrained(str(tmp_path / "predictor"))
    out = tmp_path / "predictions.parquet"
    images = sorted(str(path) for path in (tmp_path / "scans").glob("*bold.nii.gz"))
    more = (f"prepare.atlas={{name: cubes, image: {image}}}", "prepare.checks={min_fit: 0, max_outside_brain: 1}")
    assert main(arguments(str(tmp_path / "predictor"), images, out, *more)) == 0
    before = out.read_bytes()
    assert main(arguments(str(tmp_path / "predictor"), images, out, *more)) == 0  # nothing to do
    out.unlink()
    assert main(arguments(str(tmp_path / "predictor"), images, out, *more)) == 0  # from what was prepared
    assert out.read_bytes() == before
    (row,) = pd.read_parquet(out).to_dict("records")
    assert (row["subject"], row["num_kept"]) == ("07", 80)
    assert row["predicted_age"] == pytest.approx(predictor.predict(bold, tr_s=2.0).values["age"], rel=1e-4)
    (rejected,) = pd.read_parquet(tmp_path / "predictions.rejected.parquet").to_dict("records")
    assert "sub-08" in rejected["recording_id"]
    assert "25" in rejected["reason"]


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (["a.nii.gz", "b.npy"], (), "images and other files in one call"),
        (["b.npy"], ("prepare.name=x",), "prepare: these settings are for images"),
        (["a.nii.gz"], ("scaled_by=recording",), "leave native_tr and scaled_by out"),
        (["nowhere.nii.gz"], ("prepare.atlas.name=x",), "the images could not be prepared"),
    ],
)
def test_bad_input_is_said(
    data: list[str], more: tuple[str, ...], message: str, folder: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(arguments(folder, data, tmp_path / "out.parquet", *more)) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_head_is_refused(
    training_run: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = str(training_run / "checkpoints" / "step-10")
    assert main(arguments(pretrained, [dataset.store.url], tmp_path / "out.parquet")) == 1
    assert "until train/finetune.py has given it a head" in capsys.readouterr().err
    assert main(arguments(str(training_run), [dataset.store.url], tmp_path / "out.parquet")) == 1
    assert "no checkpoints/best-step-N of a fine-tuning run" in capsys.readouterr().err


def test_dry_run_prepares_nothing(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(folder, ["a.nii.gz"], tmp_path / "out.parquet"), "--dry-run"]) == 0
    assert "images are prepared first, for synthetic at a TR of 2 s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
