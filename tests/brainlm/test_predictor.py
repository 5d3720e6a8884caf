"""Predictors: heads, what a prediction is over, saving and loading, published encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainlm import Predictor, Recording
from brainlm.dataset import Dataset
from brainlm.errors import CheckpointError, ConfigError, DataError, StoreError
from brainlm.heads import Head, HeadConfig, moments
from brainlm.model import BrainLM
from brainlm.official_contract import Gain, published_contract
from brainlm.published import PublishedModel
from brainlm.reconstruction import STALE_DECODER
from brainlm.store import Store
from brainlm.targets import Target, TargetSettings
from brainlm.testing import small_model, write_synthetic_dataset
from brainlm.train_subjects import TrainSubjects
from brainlm.windows import cut_windows
from eval.table_rows import was_seen
from tests.brainlm.published_models import nystrom

AGE = Target.fit(TargetSettings(column="age"), [20.0, 40.0, 70.0])
SEX = Target.fit(TargetSettings(column="sex", kind="classification"), ["F", "M", "M"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(str(tmp_path_factory.mktemp("data")), num_timepoints=90, num_parcels=12)


def predictor_on(encoder: Any, **head: Any) -> Predictor:
    predictor = Predictor(encoder, HeadConfig(**head), [AGE, SEX])
    generator = torch.Generator().manual_seed(0)
    predictor.head.init_weights(generator)
    with torch.no_grad():  # far from the first answers
        predictor.head.out.weight.normal_(generator=generator)
    predictor.head.set_whitening(*moments(torch.randn(20, predictor.head.layer1.in_features, generator=generator)))
    return predictor.eval()


@pytest.fixture
def predictor(dataset: Dataset) -> Predictor:
    return predictor_on(small_model(dataset.contract), pooling="mean")


def test_the_first_answers_are_the_best_constant(dataset: Dataset) -> None:
    head = Head(HeadConfig(), 32, 3)
    head.init_weights(torch.Generator().manual_seed(0))
    assert float(head.eval()(torch.randn(50, 32)).detach().abs().max()) < 0.3
    predictor = Predictor(small_model(dataset.contract), HeadConfig(), [AGE, SEX]).eval()
    with torch.no_grad():
        for parameter in predictor.head.parameters():
            parameter.zero_()
    found = predictor.predict(dataset.split("test").as_recording(0))
    assert found.values["age"] == pytest.approx((20 + 40 + 70) / 3)
    assert found.probabilities["sex"] == pytest.approx({"F": 1 / 3, "M": 2 / 3})


def test_a_prediction_is_the_mean_over_windows_weighted_by_kept_timepoints(
    predictor: Predictor, dataset: Dataset
) -> None:
    bold = dataset.split("test").recording(0)  # 90 timepoints: windows of 40 from 2 and from 47
    keep_mask = np.ones(90, dtype=bool)
    keep_mask[50:70] = False
    recording = Recording(recording_id="x", subject="", bold=bold, tr_s=2.0, keep_mask=keep_mask)
    windows = cut_windows(recording, predictor.contract, starts=[2, 47])
    outputs = predictor.outputs(windows).detach().double()
    weights = torch.tensor([40.0, 20.0], dtype=torch.float64) / 60
    found = predictor.predict(recording)
    age = float((outputs[:, 0] * weights).sum())
    assert found.values["age"] == pytest.approx(age * AGE.scale * AGE.sd + AGE.offset, rel=1e-5)
    p = (torch.softmax(outputs[:, 1:] + torch.tensor(SEX.shares).log(), dim=1) * weights[:, None]).sum(dim=0)
    assert list(found.probabilities["sex"].values()) == pytest.approx(p.tolist(), rel=1e-5)
    assert (found.num_windows, found.num_kept, found.num_parcels) == (2, 60, 12)
    assert found.columns()["predicted_sex"] == max(
        found.probabilities["sex"], key=found.probabilities["sex"].__getitem__
    )


def test_a_prediction_does_not_depend_on_batches_or_mode(predictor: Predictor, dataset: Dataset) -> None:
    recording = dataset.split("test").as_recording(0)
    alone = predictor.train().predict(recording, batch_size=1)
    assert predictor.training
    assert alone.values["age"] == pytest.approx(predictor.eval().predict(recording).values["age"], rel=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "attentive"])
def test_poolings_read_what_they_say(pooling: str, dataset: Dataset) -> None:
    predictor = predictor_on(small_model(dataset.contract), pooling=pooling)
    recording = dataset.split("test").as_recording(0)
    embedding = predictor.encoder.embed(recording)
    features = predictor.features(cut_windows(recording, predictor.contract)).detach()
    expected = embedding.cls if pooling == "cls" else embedding.pooled
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-5)  # a query of 0 weighs all tokens alike
    if pooling == "attentive":
        assert predictor.head.query is not None
        with torch.no_grad():
            predictor.head.query.normal_(generator=torch.Generator().manual_seed(1)).mul_(5)
        moved = predictor.features(cut_windows(recording, predictor.contract)).detach()
        assert float((moved - features).abs().max()) > 0.01


def test_attentive_pooling_ignores_padding(dataset: Dataset) -> None:
    head = Head(HeadConfig(pooling="attentive"), 8, 1)
    assert head.query is not None
    with torch.no_grad():
        head.query.normal_()
    tokens = torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    spoiled = tokens.masked_fill(~valid[:, :, None], float("nan"))
    torch.testing.assert_close(head.pool(spoiled, valid)[1], head.pool(tokens[1:, :3], None)[0])


def test_missing_targets_add_nothing_to_loss_or_gradient(predictor: Predictor, dataset: Dataset) -> None:
    windows = cut_windows(dataset.split("test").as_recording(0), predictor.contract, starts=[0, 40])
    wanted = torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    known = torch.tensor([[True, True], [False, False]])
    loss = predictor(windows, wanted, known)
    first = predictor(windows[:1], wanted[:1], known[:1])
    torch.testing.assert_close(loss.sum, first.sum)
    assert int(loss.num_values) == 2
    nothing = predictor(windows, wanted, torch.zeros_like(known))
    nothing.sum.backward()
    assert float(nothing.sum.detach()) == 0
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in predictor.parameters())


def test_what_is_saved_predicts_the_same(predictor: Predictor, dataset: Dataset, tmp_path: Path) -> None:
    predictor.manifest = {"targets": [{"column": "age"}], "encoder_trained": True, "pretraining_subjects": 0}
    predictor.save_pretrained(str(tmp_path / "saved"))
    loaded = Predictor.from_pretrained(str(tmp_path / "saved"))
    recording = dataset.split("test").as_recording(0)
    assert loaded.predict(recording) == predictor.predict(recording)
    assert not loaded.training
    encoder = BrainLM.from_pretrained(str(tmp_path / "saved"))  # alone, for embeddings
    np.testing.assert_array_equal(encoder.embed(recording).cls, predictor.encoder.embed(recording).cls)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| age | regression | z-score | 3 |" in card
    assert "| sex | classification | 2 classes | 3 |" in card


def test_a_published_encoder_is_saved_and_loaded(tmp_path: Path) -> None:
    network = nystrom()
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"), num_timepoints=60, num_parcels=network.config.num_brain_voxels,
        window_len=network.config.num_timepoints_per_voxel, patch_len=network.config.timepoint_patching_size,
    )  # fmt: skip
    contract = published_contract(dataset.contract, network.config, Gain(), "synthetic")
    predictor = predictor_on(PublishedModel(network, contract).eval(), pooling="cls")
    recording = dataset.split("test").as_recording(0)
    predictor.save_pretrained(str(tmp_path / "saved"))
    loaded = Predictor.from_pretrained(str(tmp_path / "saved"))
    assert isinstance(loaded.encoder, PublishedModel)
    assert loaded.predict(recording) == predictor.predict(recording)
    with pytest.raises(ConfigError, match="published models give no single tokens"):
        Predictor(loaded.encoder, HeadConfig(pooling="attentive"), [AGE])


def test_damage_is_noticed(predictor: Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    predictor.save_pretrained(str(folder))
    data = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"head\.safetensors is damaged"):
        Predictor.from_pretrained(str(folder))
    (folder / "head.safetensors").write_bytes(data)
    tree = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(tree | {"encoder_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"another encoder than the one that head\.json names"):
        Predictor.from_pretrained(str(folder))
    (folder / "head.json").write_text(json.dumps(tree | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="expected format 1, found 9"):
        Predictor.from_pretrained(str(folder))
    (folder / "head.json").unlink()
    with pytest.raises(CheckpointError, match=r"predicts nothing until train/finetune\.py has given it a head"):
        Predictor.from_pretrained(str(folder))


def test_recordings_that_cannot_be_read_are_refused(predictor: Predictor, rng: np.random.Generator) -> None:
    other = Recording(recording_id="x", subject="", bold=rng.standard_normal((60, 5)).astype(np.float32), tr_s=2.0)
    with pytest.raises(DataError, match="x has 5 columns"):
        predictor.predict(other)
    loud = Recording(
        recording_id="y", subject="", bold=np.full((60, 12), 1e30) * rng.standard_normal((60, 12)), tr_s=2.0
    )
    with pytest.raises(DataError, match="y: the prediction is not finite"):
        predictor.predict(loud)


def test_short_recordings_are_refused(predictor: Predictor, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="has 39 timepoints, a window of the model 40: it is too short"):
        predictor.predict(rng.standard_normal((39, 12)).astype(np.float32), tr_s=2.0)


def test_whitening_is_that_of_the_covariance(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.standard_normal((500, 8)) @ np.diag(np.logspace(0, -3, 8)) + 5)
    head = Head(HeadConfig(), 8, 1)
    parts = [moments(x[:200]), moments(x[200:])]  # of two ranks
    head.set_whitening(*(a + b for a, b in zip(*parts, strict=True)))
    cov = np.cov(x.numpy().T, bias=True)
    values, vectors = np.linalg.eigh(cov + 0.1 * np.trace(cov) / 8 * np.eye(8))
    np.testing.assert_allclose(head.whitener.numpy(), vectors @ np.diag(values**-0.5) @ vectors.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.feature_mean.numpy(), x.mean(dim=0).numpy(), rtol=1e-6)


def test_a_decoder_that_was_left_behind_stays_so(dataset: Dataset, tmp_path: Path) -> None:
    encoder = small_model(dataset.contract)
    encoder.manifest = {STALE_DECODER: ["age"]}
    predictor = predictor_on(encoder)
    predictor.manifest = {"encoder_trained": False}
    predictor.save_pretrained(str(tmp_path / "saved"))
    recording = dataset.split("test").as_recording(0)
    with pytest.raises(ConfigError, match="fine-tuned to predict age"):
        BrainLM.from_pretrained(str(tmp_path / "saved")).forecast(recording, 20.0)


def test_a_head_alone_is_remembered_with_a_published_encoder(tmp_path: Path) -> None:
    network = nystrom()
    config = network.config
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"), num_timepoints=60, num_parcels=config.num_brain_voxels,
        window_len=config.num_timepoints_per_voxel, patch_len=config.timepoint_patching_size,
    )  # fmt: skip
    contract = published_contract(dataset.contract, config, Gain(), "synthetic")
    predictor = predictor_on(PublishedModel(network, contract).eval())
    predictor.train_subjects = TrainSubjects.of("", ["sub-7"])
    predictor.manifest = {"encoder_trained": True}
    predictor.save_pretrained(str(tmp_path / "saved"))
    loaded = Predictor.from_pretrained(str(tmp_path / "saved"))
    assert loaded.train_subjects is not None
    assert loaded.train_subjects.seen({"sub-7", "sub-8"}) == {"sub-7"}
    assert not loaded.knows_pretraining
    assert [was_seen(loaded, name) for name in ("7", "8")] == [True, None]
    with pytest.raises(ConfigError, match="fine-tuned to predict age, sex"):
        loaded.encoder.forecast(dataset.split("test").as_recording(0), 10.0)


def test_an_unfinished_folder_is_no_checkpoint(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store.write_bytes

    def full(self: Store, name: str, data: bytes) -> None:
        if name == "head.json":
            raise StoreError("disk full")
        write(self, name, data)

    monkeypatch.setattr(Store, "write_bytes", full)
    with pytest.raises(StoreError):
        predictor.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "config.json").exists()  # what a finished checkpoint is known by


def test_dropout_in_the_encoder_is_on_in_training_alone(dataset: Dataset) -> None:
    model = small_model(dataset.contract)
    windows = torch.randn(2, 12, 40)
    before = model.embed_windows(windows).cls
    for block in model.encoder:
        block.dropout = 0.4
    torch.testing.assert_close(model.embed_windows(windows).cls, before)
    model.train()
    assert float((model.embed_windows(windows).cls - before).detach().abs().max()) > 1e-3
    model.recompute_activations = True  # the same values are dropped when activations are computed again
    torch.manual_seed(0)
    model.embed_windows(windows).cls.sum().backward()
    recomputed = [p.grad.clone() for p in model.encoder.parameters() if p.grad is not None]
    model.recompute_activations = False
    model.zero_grad()
    torch.manual_seed(0)
    model.embed_windows(windows).cls.sum().backward()
    for a, p in zip(recomputed, model.encoder.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad)
