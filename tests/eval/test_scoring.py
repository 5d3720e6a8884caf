from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from brainlm.dataset import Dataset
from brainlm.input_contract import InputContract
from brainlm.intervals import metric_value
from brainlm.testing import small_model
from eval.baselines.gaussian import Gaussian, random_mask
from eval.baselines.optimum import Optimum
from eval.baselines.simple import Interpolation, Mean
from eval.baselines.space_time import SpaceTimeGaussian
from eval.cohort import Cohort, Window
from eval.models import Method, Network
from eval.scoring import METRICS, Scored, expand_mask, predict_windows, r2, window_sums


def scored(truth: list[float], prediction: list[float], factor: float = 1.0, median: float = 0.0) -> Scored:
    return Scored(
        window=None,  # type: ignore[arg-type]
        mask=np.ones(1, dtype=bool),
        truth=np.array([truth]),
        prediction=np.array([prediction]),
        contract_factor=np.array([factor]),
        contract_median=np.array([median]),
    )


def metrics(item: Scored) -> dict[str, float]:
    sums = {name: np.asarray(value)[None] for name, value in window_sums(item).items()}
    return {name: metric_value(sums, metric) for name, metric in METRICS.items()}


def test_metrics_equal_hand_computed_numbers() -> None:
    got = metrics(scored([1.0, -2.0, 3.0, np.nan], [0.0, -1.0, 4.0, np.nan], factor=2.0, median=0.5))
    assert got["r2"] == pytest.approx(1 - 3 / 14)
    assert got["mse"] == pytest.approx(1.0)
    assert got["mae"] == pytest.approx(1.0)
    assert got["mse_contract_units"] == pytest.approx(4.0)
    assert got["mae_contract_units"] == pytest.approx(2.0)
    contract = np.array([1.5, -4.5, 5.5])
    assert got["r2_pooled_contract_units"] == pytest.approx(1 - 12 / ((contract - contract.mean()) ** 2).sum())
    assert got["pearson_r"] == pytest.approx(np.corrcoef([1, -2, 3], [0, -1, 4])[0, 1])


def test_a_constant_guess_scores_0_a_perfect_one_1_and_a_bad_one_is_not_clipped() -> None:
    truth = [1.0, -1.0, 2.0, -2.0]
    assert metrics(scored(truth, [0.0] * 4))["r2"] == 0
    assert metrics(scored(truth, [0.0] * 4))["pearson_r"] == 0
    assert metrics(scored(truth, truth))["r2"] == 1
    assert metrics(scored(truth, [-3 * v for v in truth]))["r2"] == pytest.approx(-15)


def test_a_mask_over_tokens_covers_its_patches() -> None:
    mask = np.array([True, False, False, True])  # parcel 0: patches 0, 1; parcel 1: patches 0, 1
    expected = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    assert (expand_mask(mask, 2, 4) == expected).all()


def draw_for(cohort: Cohort, ratio: float = 0.5) -> Callable[[Window], np.ndarray]:
    return lambda window: random_mask(cohort, window.scored_P, ratio, 0, window.ref)


def fitted(name: str, cohort: Cohort) -> Method:
    contract = cohort.dataset.contract
    method: Method = {
        "mean": lambda: Mean(contract),
        "interpolation": lambda: Interpolation(contract),
        "gaussian": lambda: Gaussian(contract, (0.1,)),
        "gaussian adapted": lambda: Gaussian(contract, (0.1,), (0.3,)),
        "gaussian space x time": lambda: SpaceTimeGaussian(contract, (0.1,), (0.3,)),
        "optimum": lambda: Optimum(cohort.dataset),
        "network": lambda: Network(small_model(cohort.dataset.contract)),
    }[name]()
    method.fit(cohort)
    return method


ALL_METHODS = ("mean", "interpolation", "gaussian", "gaussian adapted", "gaussian space x time", "optimum", "network")


@pytest.mark.parametrize("name", ALL_METHODS)
def test_hidden_values_cannot_influence_a_prediction(name: str, cohort: Cohort, rng: np.random.Generator) -> None:
    method, draw = fitted(name, cohort), draw_for(cohort)
    windows = list(cohort.windows(1))
    changed = []
    for window in windows:
        hidden = expand_mask(draw(window), cohort.num_parcels, cohort.window_len)
        noise = 100 * rng.standard_normal(window.bold_PW.shape).astype(np.float32)
        changed.append(replace(window, bold_PW=np.where(hidden, noise, window.bold_PW)))
    before = list(predict_windows(method, cohort, windows, draw, ("recording", "visible"), 2))
    after = list(predict_windows(method, cohort, changed, draw, ("recording", "visible"), 2))
    for (_, a), (_, b) in zip(before, after):
        assert not np.array_equal(a.truth, b.truth, equal_nan=True)
        assert np.array_equal(a.prediction, b.prediction, equal_nan=True)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_predictions_do_not_depend_on_batch_size_or_order(name: str, cohort: Cohort) -> None:
    method, draw = fitted(name, cohort), draw_for(cohort)
    windows = list(cohort.windows(2))
    results = []
    for order, batch_size in ((windows, 1), (windows[::-1], 8)):
        found = predict_windows(method, cohort, order, draw, ("recording", "visible"), batch_size)
        results.append({(c, item.window.ref): item.prediction for c, item in found})
    assert results[0].keys() == results[1].keys()
    for key, prediction in results[0].items():
        np.testing.assert_allclose(prediction, results[1][key], rtol=1e-5, atol=1e-5)


def test_only_hidden_values_of_present_parcels_are_scored(cohort: Cohort) -> None:
    method, draw = fitted("mean", cohort), draw_for(cohort)
    for _, item in predict_windows(method, cohort, cohort.windows(1), draw, ("recording",), 4):
        hidden = expand_mask(item.mask, cohort.num_parcels, cohort.window_len)
        expected = hidden & item.window.scored_P[:, None]
        assert (np.isfinite(item.truth) == expected).all()
        assert (np.isfinite(item.prediction) == expected).all()
    missing = [item.window.scored_P for item in _windows_of(cohort, "sub-test001_task-rest")]
    assert not missing[0][[3, 7]].any()
    assert missing[0].sum() == cohort.num_parcels - 2


def _windows_of(cohort: Cohort, recording_id: str) -> list[Scored]:
    method, draw = fitted("mean", cohort), draw_for(cohort)
    found = predict_windows(method, cohort, cohort.windows(1), draw, ("recording",), 4)
    return [item for _, item in found if item.window.ref.recording_id == recording_id]


def test_visible_centring_ignores_a_shift_of_the_whole_recording(cohort: Cohort) -> None:
    method, draw = fitted("gaussian", cohort), draw_for(cohort)
    windows = list(cohort.windows(1))[:1]
    moved = [replace(w, bold_PW=w.bold_PW + np.float32(3.0)) for w in windows]
    errors = []
    for some in (windows, moved):
        ((_, item),) = predict_windows(method, cohort, some, draw, ("visible",), 1)
        has_visible = ~expand_mask(item.mask, cohort.num_parcels, cohort.window_len).all(axis=1)
        errors.append((item.prediction - item.truth)[has_visible])
    np.testing.assert_allclose(errors[0], errors[1], atol=1e-4)


def test_a_network_is_fed_in_the_units_of_its_own_contract(dataset: Dataset) -> None:
    """A contract with doubled IQRs must give the series in half the size, and be read back at full size."""
    cohort = Cohort.of(dataset)
    seen = []

    class Echo:
        def __init__(self, contract: InputContract) -> None:
            self._contract = contract

        @property
        def contract(self) -> InputContract:
            return self._contract

        def fit(self, cohort: Cohort) -> None: ...

        def reconstruct(self, windows_z, mask, present, refs):  # type: ignore[no-untyped-def]
            seen.append(windows_z.copy())
            return np.ones(windows_z.shape)

    contract = dataset.contract
    zero = np.zeros_like(contract.median)
    ours, theirs = replace(contract, median=zero), replace(contract, median=zero, iqr=2 * contract.iqr)
    draw = draw_for(cohort)
    windows = list(cohort.windows(1))[:1]
    predictions = []
    for used in (ours, theirs):
        ((_, item),) = predict_windows(Echo(used), cohort, windows, draw, ("recording",), 1)
        predictions.append(item.prediction)
    np.testing.assert_allclose(seen[0], 2 * seen[1], rtol=1e-6)
    np.testing.assert_allclose(2 * predictions[0], predictions[1], rtol=1e-6)


def test_the_optimum_is_the_best_reconstruction_and_the_gaussian_comes_close(cohort: Cohort) -> None:
    got = {}
    for name in ("mean", "interpolation", "gaussian", "optimum"):
        method = fitted(name, cohort)
        found = predict_windows(method, cohort, cohort.windows(2), draw_for(cohort), ("recording",), 4)
        sums = [window_sums(item) for _, item in found]
        got[name] = float(r2({k: np.sum([s[k] for s in sums]) for k in ("sse", "sst")}))
    assert got["mean"] == pytest.approx(0, abs=1e-6)
    assert got["optimum"] > got["gaussian"] > 0.2
    assert got["interpolation"] < got["gaussian"]
