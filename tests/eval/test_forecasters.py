"""Trained forecasting baselines on a system whose best possible forecast is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from brainlm.dataset import Dataset
from brainlm.errors import ConfigError
from brainlm.fitting import FitSettings
from brainlm.testing import write_synthetic_dataset
from eval.baselines.dlinear import KERNEL, Maps
from eval.baselines.forecast_windows import ForecastWindows, standardise
from eval.baselines.forecasters import MAKERS, ForecasterSettings, forecaster_spec
from eval.baselines.optimum import MEAN_UNKNOWN
from eval.baselines.ridge_var import fit_var, lagged_covariances
from eval.cohort import Cohort
from eval.make_scores import sums_by_condition
from eval.models import MethodSpec
from eval.scoring import predict_windows, window_sums
from eval.task import Runtime
from eval.tasks.forecasting import Forecasting, ForecastingSettings, future_mask

HORIZON = 10
TRAINED = ("DLinear", "LSTM", "Neural ODE", "Latent ODE", "ridge VAR")
SETTINGS = ForecasterSettings(
    var_components=(3, 6),
    var_orders=(1, 2),
    lstm_hidden_sizes=(32,),
    fit=FitSettings(steps=60, batch_size=16, lrs=(1e-2,), check_every=20),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(
        str(tmp_path_factory.mktemp("forecasters") / "dataset"),
        num_subjects={"train": 40, "val": 12, "test": 24},
        num_timepoints=240,
        window_len=100,
        patch_len=10,
        with_truth=True,
    )


@pytest.fixture(scope="module")
def cohort(dataset: Dataset) -> Cohort:
    return Cohort.of(dataset)


@pytest.fixture(scope="module")
def found(cohort: Cohort) -> dict[str, float]:
    """R2 of every forecaster on the test split."""
    task = Forecasting(
        ForecastingSettings(
            horizons=(HORIZON,), max_windows_per_recording=2, baselines=tuple(MAKERS), forecasters=SETTINGS
        )
    )
    values = {}
    for spec in task.baselines(cohort):
        output = task.compute(spec, cohort, Runtime())
        (part,) = sums_by_condition(task, output.table).values()
        values[spec.name] = part.value()
    return values


@pytest.mark.parametrize("name", TRAINED)
def test_trained_forecasters_are_no_worse_than_the_mean(found: dict[str, float], name: str) -> None:
    """They begin as the mean, and what is worse on validation is not kept: other subjects leave a little room."""
    assert found[name] > found["mean"] - 0.01


def test_a_linear_one_that_sees_all_parcels_comes_near_the_optimum(found: dict[str, float]) -> None:
    """Not that of one who knows the mean of the process: forecasters know that of 90 timepoints."""
    assert found["optimum"] > found[MEAN_UNKNOWN] + 0.02
    assert found[MEAN_UNKNOWN] > max(value for name, value in found.items() if "optimum" not in name)
    assert found["ridge VAR"] > found["autoregression"] + 0.01
    assert found["ridge VAR"] > found[MEAN_UNKNOWN] - 0.02


@pytest.mark.parametrize("name", TRAINED)
def test_forecasts_depend_on_the_observed_part_alone_and_not_on_the_batch(cohort: Cohort, name: str) -> None:
    settings = replace(SETTINGS, fit=replace(SETTINGS.fit, steps=5, check_every=5))
    task = Forecasting(ForecastingSettings(horizons=(HORIZON,), baselines=(name,), forecasters=settings))
    method = task.method(forecaster_spec(name, settings), cohort, Runtime(), HORIZON)
    method.fit(cohort)
    together, alone = (
        {
            item.window.ref: item.prediction
            for _, item in predict_windows(
                method, cohort, cohort.windows(2, max_recordings=3),
                lambda window: future_mask(cohort, window.scored_P, HORIZON), ("visible",), batch_size,
            )
        }
        for batch_size in (6, 1)
    )  # fmt: skip
    assert len(together) == 6
    for ref, prediction in together.items():
        np.testing.assert_array_equal(prediction, alone[ref])
        assert np.isnan(prediction[:, :-HORIZON]).all()


def test_errors_that_are_minimised_are_those_that_are_scored(cohort: Cohort) -> None:
    """Of the mean: what `Pairs` say, and what the task says."""
    val = replace(cohort, split="val")
    windows = ForecastWindows(cohort, "val", HORIZON)
    pairs = list(windows.batches(5))
    mean = MAKERS["mean"][1](cohort.dataset.contract, HORIZON, SETTINGS)
    mean.fit(val)
    scored = predict_windows(
        mean, val, val.windows(1), lambda window: future_mask(val, window.scored_P, HORIZON), ("visible",), 4
    )
    sums = [window_sums(item) for _, item in scored]
    assert sum(p.squared_error(np.zeros_like(p.future)) for p in pairs) == pytest.approx(
        sum(float(s["sse"]) for s in sums), rel=1e-5
    )
    assert sum(int(p.counted.sum()) for p in pairs) == sum(int(s["n"]) for s in sums)


def test_windows_are_drawn_as_functions_of_the_step(cohort: Cohort) -> None:
    windows = ForecastWindows(cohort, "train", HORIZON)
    first, again, other = windows.draw(3, 4, 0), windows.draw(3, 4, 0), windows.draw(4, 4, 0)
    np.testing.assert_array_equal(first.past, again.past)
    assert not np.array_equal(first.past, other.past)
    assert first.past.shape == (4, 24, 90)
    assert first.past.mean(axis=2) == pytest.approx(0, abs=1e-5)
    assert first.past.std(axis=2) == pytest.approx(1, abs=1e-4)


def test_standardising_leaves_out_censored_timepoints(rng: np.random.Generator) -> None:
    past = rng.normal(5.0, 3.0, size=(2, 50))
    kept = rng.random(50) > 0.3
    past[:, ~kept] = 1e6
    standard, mean, sd = standardise(past, kept)
    np.testing.assert_allclose(standard[:, kept].mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(standard[:, kept].std(axis=1), 1)
    np.testing.assert_allclose(standard * sd + mean, past)


def test_a_vector_autoregression_is_recovered(rng: np.random.Generator) -> None:
    first, second = np.array([[0.5, 0.3], [-0.2, 0.4]]), np.array([[0.2, 0.0], [0.1, -0.3]])
    x = np.zeros((20_000, 2))
    for t in range(2, len(x)):
        x[t] = first @ x[t - 1] + second @ x[t - 2] + rng.normal(size=2)
    lagged = np.stack([x[2:].T @ x[2 - lag : len(x) - lag] / len(x) for lag in range(3)])
    fitted = fit_var(lagged, 2, 0.0)
    past = np.concatenate([x[1:-1], x[:-2]], axis=1)
    direct = np.linalg.lstsq(past, x[2:], rcond=None)[0].T
    np.testing.assert_allclose(np.concatenate(list(fitted), axis=1), direct, atol=2e-3)
    np.testing.assert_allclose(fitted, np.stack([first, second]), atol=0.03)


def test_lagged_covariances_are_those_of_the_series(cohort: Cohort) -> None:
    found = lagged_covariances(cohort, 2)
    expected = np.zeros_like(found[0])
    for index in cohort.recordings("train"):
        series = cohort.series(index, "train")
        y = np.where(series.scored_P, series.bold / np.where(series.sd_P > 0, series.sd_P, 1.0), 0.0)
        expected += y[2:].T @ y[:-2] / len(y)
    np.testing.assert_allclose(found[2], expected / len(cohort.recordings("train")))


def test_dlinear_is_two_linear_maps_of_trend_and_rest() -> None:
    torch.manual_seed(0)
    maps, past = Maps(30, 7), torch.randn(2, 5, 30)
    for part in (maps.trend, maps.rest):
        torch.nn.init.normal_(part.weight)
    side = KERNEL // 2
    padded = torch.cat([past[..., :1].expand(2, 5, side), past, past[..., -1:].expand(2, 5, side)], dim=2)
    trend = torch.stack([padded[..., t : t + KERNEL].mean(-1) for t in range(30)], dim=-1)
    expected = F.linear(trend, maps.trend.weight) + F.linear(past - trend, maps.rest.weight)
    torch.testing.assert_close(maps(past), expected, rtol=1e-4, atol=1e-5)


def test_budgets_are_stated_and_part_of_what_identifies_a_result() -> None:
    more = replace(SETTINGS, fit=replace(SETTINGS.fit, steps=61))
    ours, theirs = forecaster_spec("LSTM", SETTINGS), forecaster_spec("LSTM", more)
    assert ours.notes == ("trained here: at most 60 steps of 16 windows for each of 1 candidates, chosen on val",)
    assert ours.model_hash != theirs.model_hash
    assert forecaster_spec("autoregression", SETTINGS) == forecaster_spec("autoregression", more)


class Drift:
    """A baseline of one's own, as the docs show it."""

    name, version = "drift", 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oracle", "expected some of mean"),
        ("no.such:Thing", "cannot be imported"),
        ("tests.eval.test_forecasters:Cohort", "must have a `name`"),
    ],
)
def test_baselines_that_do_not_exist_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        forecaster_spec(name, SETTINGS) if ":" in name else ForecastingSettings(baselines=(name,))


def test_a_class_of_ones_own_is_described_by_name_version_and_path() -> None:
    spec = forecaster_spec("tests.eval.test_forecasters:Drift", SETTINGS)
    assert spec == MethodSpec(
        name="drift", kind="baseline", model_hash="drift v1", variant="tests.eval.test_forecasters:Drift"
    )
