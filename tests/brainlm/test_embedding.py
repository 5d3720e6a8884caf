"""Embeddings of recordings: the same however they are batched, given, ordered or scaled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainlm.atlas import Atlas
from brainlm.embedding import Embedding, embed_recording
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.model import BrainLM, ModelConfig
from brainlm.recording import Recording
from brainlm.scaling import robust_statistics
from brainlm.testing import synthetic_atlas
from brainlm.windows import Windows, cut_windows

P, W, PATCH, T = 7, 20, 5, 53


def contract_of(atlas: Atlas | None = None) -> InputContract:
    rng = np.random.default_rng(0)
    return InputContract(
        atlas=atlas or synthetic_atlas(P),
        covered=np.ones(P, dtype=bool),
        median=rng.normal(0, 0.5, P).astype(np.float32),
        iqr=rng.uniform(3, 8, P).astype(np.float32),
        tr_s=2.0,
        window_len=W,
        patch_len=PATCH,
    )


def model_of(contract: InputContract, **sizes: Any) -> BrainLM:
    small: dict[str, Any] = {
        "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 32, "decoder_width": 16, "decoder_mlp_width": 32,
        "window_len": W, "patch_len": PATCH, "parcel_embedding": False,
    }  # fmt: skip
    config = ModelConfig(**small | sizes)
    model = BrainLM(config, contract)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def recording_of(num_timepoints: int = T, **changes: Any) -> Recording:
    bold = np.random.default_rng(1).normal(100, 5, (num_timepoints, P)).astype(np.float32)
    given: dict[str, Any] = {"recording_id": "sub-1_task-rest", "subject": "1", "bold": bold, "tr_s": 2.0}
    return Recording(**given | changes)


def censored(num_timepoints: int = T, *ranges: tuple[int, int]) -> np.ndarray[Any, Any]:
    keep = np.ones(num_timepoints, dtype=bool)
    for start, stop in ranges:
        keep[start:stop] = False
    return keep


def permuted(contract: InputContract, order: np.ndarray[Any, Any]) -> InputContract:
    """The same parcels in another order, as a data set with an atlas of its own would have them."""
    atlas = contract.atlas
    other = Atlas(
        name="other",
        sha256="",
        labels=np.arange(P),
        parcel_names=tuple(f"region-{i}" for i in range(P)),
        coords_mm=atlas.coords_mm[order],
    )
    return replace(contract, atlas=other, median=contract.median[order], iqr=contract.iqr[order])


def test_rows_are_the_windows_side_by_side_and_the_last_is_padded() -> None:
    contract = contract_of()
    model, recording = model_of(contract), recording_of()
    found = model.embed(recording)
    series = (recording.bold.astype(np.float64) - recording.bold.mean(0, dtype=np.float64) - contract.median) / (
        contract.iqr
    )
    values = torch.zeros(3, P, W)
    kept = torch.zeros(3, W, dtype=torch.bool)
    for i, start in enumerate((0, 20, 40)):
        part = series[start : start + W]
        values[i, :, : len(part)] = torch.from_numpy(part.T.copy())
        values[i, :, len(part) :] = values[i, :, len(part) - 1 : len(part)]  # of the last patch, which is not whole
        kept[i, : len(part)] = True
    with torch.no_grad():
        expected = model.embed_windows(Windows.of(values, kept=kept))
    np.testing.assert_allclose(found.cls, expected.cls, atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)
    assert found.cls.dtype == found.pooled.dtype == np.float32
    assert found.starts_s.tolist() == [0, 40, 80]
    assert found.num_kept.tolist() == [20, 20, 13]
    assert not np.allclose(found.cls[0], found.cls[1], atol=1e-3)
    np.testing.assert_allclose(found.mean_cls, (20 * found.cls[0] + 20 * found.cls[1] + 13 * found.cls[2]) / 53, 1e-5)
    np.testing.assert_allclose(found.mean_pooled, np.array([20, 20, 13]) / 53 @ found.pooled, 1e-5)


@pytest.mark.parametrize("patch_parcels", [1, 3])
def test_the_batch_size_changes_nothing_and_calls_repeat_bit_by_bit(patch_parcels: int) -> None:
    model = model_of(contract_of(), patch_parcels=patch_parcels)
    coverage = np.ones(P, dtype=np.float32)
    coverage[2] = 0
    recording = recording_of(133, keep_mask=censored(133, (3, 6), (20, 31), (100, 101)), coverage=coverage)
    every = model.embed(recording, batch_size=8)
    assert len(every) == 7
    again = model.embed(recording, batch_size=8)
    assert np.array_equal(every.cls, again.cls)
    assert np.array_equal(every.pooled, again.pooled)
    for batch_size in (1, 3):
        other = model.embed(recording, batch_size=batch_size)
        np.testing.assert_allclose(other.cls, every.cls, atol=1e-5)
        np.testing.assert_allclose(other.pooled, every.pooled, atol=1e-5)
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, found 0"):
        model.embed(recording, batch_size=0)


def test_windows_without_a_kept_timepoint_are_left_out() -> None:
    recording = recording_of(85, keep_mask=censored(85, (20, 40), (80, 85)))
    found = model_of(contract_of()).embed(recording)
    assert found.starts_s.tolist() == [0, 80, 120]
    assert np.isfinite(found.cls).all()
    shorter = replace(recording, bold=recording.bold[:80], keep_mask=recording.keep_mask[:80])
    assert np.array_equal(found.cls, model_of(contract_of()).embed(shorter).cls)


def test_what_is_not_measured_has_no_influence_and_nothing_is_modified() -> None:
    model = model_of(contract_of())
    bold = recording_of().bold.copy()
    bold[:, 4] = 7  # constant: missing
    keep = censored(T, (8, 12), (30, 31))
    expected = model.embed(recording_of(bold=bold, keep_mask=keep))
    bold[~keep] = np.nan
    bold[15, 4] = np.inf
    before = bold.copy()
    recording = recording_of(bold=bold, keep_mask=keep)
    found = model.embed(recording)
    assert np.array_equal(found.pooled, expected.pooled)
    assert np.array_equal(found.cls, expected.cls)
    assert np.array_equal(recording.bold, before, equal_nan=True)
    assert np.array_equal(bold, before, equal_nan=True)
    assert found.num_kept.tolist() == [16, 19, 13]


def test_an_array_is_a_recording_with_its_tr() -> None:
    model, recording = model_of(contract_of()), recording_of()
    expected = model.embed(recording)
    for dtype in (np.float32, np.float64):
        array = recording.bold.astype(dtype)
        array.setflags(write=False)
        found = model.embed(array, tr_s=2.0)
        assert np.array_equal(found.cls, expected.cls)
    assert np.array_equal(model.embed(recording.bold, contract=contract_of()).cls, expected.cls)  # brings the TR
    assert np.array_equal(model.embed(recording.bold, tr_s=2.0, atlas=contract_of().atlas).cls, expected.cls)


@pytest.mark.parametrize(
    ("recording", "options", "message"),
    [
        (np.ones((T, P)), {}, "an array has no TR: give tr_s"),
        (np.ones((P, T)), {"tr_s": 2.0}, r"\(7, 53\), and synthetic has 7 parcels: time comes first, so give array.T"),
        (np.ones((T, 9)), {"tr_s": 2.0}, "array has 9 columns, synthetic has 7 parcels: say which atlas"),
        (np.ones(T), {"tr_s": 2.0}, r"found float64 of shape \(53,\)"),
        (np.full((T, P), "1"), {"tr_s": 2.0}, r"found <U1 of shape \(53, 7\)"),
        (np.ones((T, P)), {"tr_s": 2.0}, "array: no parcel carries signal"),
        (np.ones((T, P)), {"tr_s": 0.0}, "array: the repetition time must be above 0 s, found 0.0"),
        (torch.ones(T, P), {"tr_s": 2.0}, "expected a Recording or a numpy array .* found Tensor"),
        (recording_of(), {"tr_s": 3.0}, "has a TR of 2 s: leave tr_s=3 out"),
        (recording_of(tr_s=3.0), {}, "has a TR of 3 s, the contract has 2 s: resample it"),
        (recording_of(keep_mask=~censored()), {}, "sub-1_task-rest: no timepoint was kept"),
    ],
)
def test_what_cannot_be_read_is_refused(recording: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        model_of(contract_of()).embed(recording, **options)


def test_parcels_of_another_atlas_are_placed_by_their_coordinates() -> None:
    contract = contract_of()
    model, recording = model_of(contract), recording_of()
    expected = model.embed(recording)
    order = np.random.default_rng(0).permutation(P)
    own = permuted(contract, order)
    bold = recording.bold[:, order]
    found = model.embed(bold, contract=own)
    np.testing.assert_allclose(found.cls, expected.cls, atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)
    few = [0, 2, 5]
    part = own.atlas
    fewer = replace(
        own,
        atlas=replace(
            part, labels=np.arange(3), parcel_names=("a", "b", "c"), coords_mm=part.coords_mm[few]
        ),
        covered=own.covered[few],
        median=own.median[few],
        iqr=own.iqr[few],
    )  # fmt: skip
    gone = recording_of(coverage=np.isin(np.arange(P), order[few]).astype(np.float32))
    np.testing.assert_allclose(
        model.embed(bold[:, few], contract=fewer).pooled, model.embed(gone).pooled, atol=1e-5
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a learned code for each parcel of synthetic"):
        model_of(contract, parcel_embedding=True).embed(bold, contract=own)
    with pytest.raises(ConfigError, match=r"other parcels than the model .* and nothing says how they are scaled"):
        model.embed(bold, tr_s=2.0, atlas=own.atlas)
    with pytest.raises(ConfigError, match="atlas and contract do not have the same parcels"):
        model.embed(bold, atlas=contract.atlas, contract=own)


def test_the_statistics_of_a_contract_that_is_given_scale() -> None:
    contract = contract_of()
    model, recording = model_of(contract, parcel_embedding=True), recording_of()
    loud = replace(recording, bold=3 * recording.bold)
    own = replace(contract, median=3 * contract.median, iqr=3 * contract.iqr, window_len=10)
    expected = model.embed(recording)
    np.testing.assert_allclose(model.embed(loud, contract=own).cls, expected.cls, atol=1e-5)
    assert not np.allclose(model.embed(loud).cls, expected.cls, atol=1e-3)


def test_statistics_of_the_recording_alone_take_its_amplitude_out() -> None:
    contract = contract_of()
    model = model_of(contract)
    keep = censored(T, (8, 12))
    recording = recording_of(keep_mask=keep)
    kept = recording.bold[keep]
    median, iqr = robust_statistics(kept - kept.mean(axis=0, dtype=np.float64))
    expected = model.embed(recording, contract=replace(contract, median=median, iqr=iqr))
    found = model.embed(recording, statistics="recording")
    np.testing.assert_allclose(found.cls, expected.cls, atol=1e-5)
    gain = np.random.default_rng(0).uniform(0.2, 5, P)
    loud = replace(recording, bold=recording.bold * gain)
    np.testing.assert_allclose(model.embed(loud, statistics="recording").cls, expected.cls, atol=1e-4)
    order = np.random.default_rng(0).permutation(P)
    other = model.embed(
        replace(recording, bold=recording.bold[:, order]),
        atlas=permuted(contract, order).atlas,
        statistics="recording",
    )
    np.testing.assert_allclose(other.cls, expected.cls, atol=1e-5)
    with pytest.raises(ConfigError, match="statistics: expected one of contract, recording, found 'mine'"):
        model.embed(recording, statistics="mine")  # type: ignore[arg-type]


def test_another_tr_is_read_on_request_in_true_seconds() -> None:
    contract = contract_of()
    model, recording = model_of(contract), recording_of(tr_s=0.8)
    found = model.embed(recording, native_tr=True)
    fast = BrainLM(model.config, replace(contract, tr_s=0.8))
    fast.load_state_dict(model.state_dict())
    np.testing.assert_allclose(found.cls, fast.eval().embed(recording).cls, atol=1e-6)
    np.testing.assert_allclose(found.starts_s, [0, 16, 32])
    assert not np.allclose(found.cls, model.embed(replace(recording, tr_s=2.0)).cls, atol=1e-4)


class Noisy(nn.Module):
    """Another kind of model: its vector is the mean over present values, and dropout is on in training mode."""

    def __init__(self, contract: InputContract) -> None:
        super().__init__()
        self.contract = contract
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout(0.5)
        self.dropout = nn.Dropout(0.5)
        self.frozen.eval()

    def embed_windows(self, windows: Windows) -> Embedding:
        mean: Tensor = self.dropout(self.gain * (windows.values * windows.kept[:, None]).sum(dim=2))
        return Embedding(mean, mean + 1)


def test_any_model_with_a_contract_is_read_in_evaluation_mode_and_left_as_it_was() -> None:
    model = Noisy(contract_of())
    found = embed_recording(model, recording_of())
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    contract = contract_of()
    bold = recording_of().bold.astype(np.float64)
    series = (bold - bold.mean(0) - contract.median) / contract.iqr
    expected = [series[start : start + W].sum(0) for start in (0, 20, 40)]
    np.testing.assert_allclose(found.cls, expected, atol=1e-3)
    assert torch.is_grad_enabled()
    assert model.gain.grad is None


def test_parcels_are_the_means_over_their_tokens_and_missing_ones_are_nan() -> None:
    model = model_of(contract_of())
    coverage = np.ones(P, dtype=np.float32)
    coverage[2] = 0
    recording = recording_of(coverage=coverage, keep_mask=censored(T, (3, 7), (25, 40)))
    found, plain = model.embed(recording, per_parcel=True), model.embed(recording)
    np.testing.assert_array_equal(found.cls, plain.cls)
    np.testing.assert_array_equal(found.pooled, plain.pooled)
    assert plain.parcels is None
    assert plain.mean_parcels is None
    assert found.parcels is not None
    assert found.parcels.shape == (3, P, 16)
    assert found.num_parcels == P - 1
    np.testing.assert_array_equal(np.isnan(found.parcels).all(axis=(0, 2)), np.arange(P) == 2)
    # Window by window, by hand: the patches of a parcel that were measured.
    windows = cut_windows(recording, model.contract)
    with torch.no_grad():
        for i in range(3):
            encoded = model.encode_grid(*model.seen(windows[i : i + 1]))
            rows = encoded.ids_keep[0] // (W // PATCH)
            for parcel in set(range(P)) - {2}:
                expected = encoded.latent[0, 1:][rows == parcel].mean(dim=0)
                np.testing.assert_allclose(found.parcels[i, parcel], expected, rtol=0, atol=1e-5)
    assert found.mean_parcels is not None
    expected_mean = np.average(found.parcels, axis=0, weights=found.num_kept)
    np.testing.assert_allclose(found.mean_parcels, expected_mean, rtol=0, atol=1e-6)


def test_single_parcels_are_refused_where_they_share_tokens() -> None:
    model = model_of(contract_of(), patch_parcels=2)
    with pytest.raises(ConfigError, match="a token of this model holds 2 parcels"):
        model.embed(recording_of(), per_parcel=True)
