"""Censored timepoints: interpolated values influence no fit, no prediction and no score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainlm.censoring import Ranges
from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.errors import DataError
from brainlm.fitting import FitSettings
from brainlm.testing import small_model, write_synthetic_dataset
from eval.baselines.autoregressive import Autoregressive
from eval.baselines.forecasters import ForecasterSettings
from eval.baselines.gaussian import Gaussian, group_covariance, random_mask
from eval.baselines.optimum import Optimum
from eval.baselines.simple import Interpolation, Mean, Persistence
from eval.baselines.space_time import SpaceTimeGaussian
from eval.cohort import Cohort, Window
from eval.features import functional_connectivity, recording_windows
from eval.models import Method, MethodSpec, Network
from eval.scoring import expand_mask, predict_windows, r2, window_sums
from eval.task import Runtime, Task
from eval.tasks.forecasting import Forecasting, ForecastingSettings, future_mask
from eval.tasks.networks import Networks, NetworksSettings
from eval.tasks.reconstruction import Reconstruction, ReconstructionSettings

RANGES: Ranges = ((0, 4), (23, 31), (48, 52), (59, 60))  # 60 timepoints, windows of 40: the middle one is 10 to 50
WHOLE = {"sub-train000_task-rest", "sub-test002_task-rest"}
SPLITS = {"train": 8, "val": 3, "test": 4}
CENSORED = {
    recording_id: RANGES
    for split, count in SPLITS.items()
    for number in range(count)
    if (recording_id := f"sub-{split}{number:03d}_task-rest") not in WHOLE
}
TASKS: dict[str, Callable[[], Task]] = {
    "reconstruction": lambda: Reconstruction(
        ReconstructionSettings(mask_ratios=(0.5,), shrinkages=(0.01, 0.3), own_weights=(0.1, 0.5))
    ),
    "forecasting": lambda: Forecasting(
        ForecastingSettings(
            horizons=(10, 20),
            baselines=("mean", "persistence", "autoregression", "ridge VAR", "DLinear", "LSTM"),
            forecasters=ForecasterSettings(
                orders=(1, 2, 5), lstm_hidden_sizes=(8,), fit=FitSettings(steps=4, check_every=2)
            ),
        )
    ),
    "networks": lambda: Networks(NetworksSettings(num_masks=2)),
}


def write(
    folder: Path, censored: Mapping[str, Ranges] = CENSORED, fill: float | None = None, **changes: object
) -> Dataset:
    settings: dict[str, object] = {"num_timepoints": 60, "with_truth": True, "missing": {"sub-test001_task-rest": (3,)}}
    return write_synthetic_dataset(
        str(folder),
        num_subjects=SPLITS,
        censored=censored,
        censored_fill=fill,
        **(settings | changes),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Cohort]:
    """The same data set, with interpolated values and with nonsense at censored timepoints."""
    folder = tmp_path_factory.mktemp("twins")
    return Cohort.of(write(folder / "interpolated")), Cohort.of(write(folder / "nonsense", fill=1e4))


@pytest.fixture(scope="module")
def network(twins: tuple[Cohort, Cohort], tmp_path_factory: pytest.TempPathFactory) -> MethodSpec:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    save_checkpoint(folder, small_model(twins[0].dataset.contract), {"step": 1}, [])
    return MethodSpec(name="network", kind="brainlm", model_hash="x", checkpoint=folder)


def test_statistics_of_recordings_are_over_kept_timepoints(twins: tuple[Cohort, Cohort]) -> None:
    for index in twins[0].recordings():
        one, other = (cohort.series(index) for cohort in twins)
        np.testing.assert_array_equal(one.sd_P, other.sd_P)
        np.testing.assert_allclose(one.sd_P, one.bold[one.kept_T].astype(np.float64).std(axis=0))
        assert (~one.kept_T).sum() == (0 if one.kept_T.all() else 17)
    assert [twins[0].series(i).kept_T.all() for i in range(4)] == [False, False, True, False]


@pytest.mark.parametrize("task", list(TASKS))
def test_what_is_stored_at_censored_timepoints_changes_no_score(
    task: str, twins: tuple[Cohort, Cohort], network: MethodSpec
) -> None:
    it = TASKS[task]()
    for spec in [*it.baselines(twins[0]), network]:
        one, other = (it.compute(spec, cohort, Runtime(batch_size=3)) for cohort in twins)
        pd.testing.assert_frame_equal(one.table, other.table)
        if one.validation is not None and other.validation is not None:
            pd.testing.assert_frame_equal(one.validation, other.validation)
        if one.parcels is not None:
            pd.testing.assert_frame_equal(one.parcels, other.parcels)
        assert len(one.table) > 0


@pytest.mark.parametrize("task", ["reconstruction", "forecasting"])
def test_censoring_really_takes_values_out_of_the_scores(
    task: str, twins: tuple[Cohort, Cohort], tmp_path: Path
) -> None:
    it = TASKS[task]()
    spec = MethodSpec(name="mean", kind="baseline", model_hash="x")
    whole = it.compute(spec, Cohort.of(write(tmp_path, {})), Runtime()).table
    some = it.compute(spec, twins[0], Runtime()).table
    if task == "reconstruction":
        assert len(some) == len(whole)
        ratio = (some["n"] / whole["n"]).to_numpy()
        np.testing.assert_allclose(ratio[some["recording"] == some["recording"].iloc[4]], 1.0)  # without censoring
        assert ratio.min() < 0.85
    else:  # the last 20 of timepoints 10 to 50: 30 and 48 to 50 are censored
        keys = ["recording", "horizon", "step"]
        lost = whole.merge(some, on=keys, how="left", indicator=True).query("_merge == 'left_only'")
        assert set(lost.loc[lost["horizon"] == 20, "step"]) == {1, 19, 20}
        assert set(lost.loc[lost["horizon"] == 10, "step"]) == {9, 10}
        assert lost["recording"].nunique() == 3


def draw_for(cohort: Cohort, forecast: bool) -> Callable[[Window], np.ndarray]:
    if forecast:
        return lambda window: future_mask(cohort, window.scored_P, 20)
    return lambda window: random_mask(cohort, window.scored_P, 0.5, 0, window.ref)


def fitted(name: str, cohort: Cohort) -> Method:
    contract = cohort.dataset.contract
    method: Method = {
        "mean": lambda: Mean(contract),
        "interpolation": lambda: Interpolation(contract),
        "persistence": lambda: Persistence(contract),
        "autoregression": lambda: Autoregressive(contract, (1, 3), 20),
        "gaussian": lambda: Gaussian(contract, (0.1,)),
        "gaussian adapted": lambda: Gaussian(contract, (0.1,), (0.3,)),
        "gaussian space x time": lambda: SpaceTimeGaussian(contract, (0.1,), (0.3,)),
        "optimum": lambda: Optimum(cohort.dataset),
        "network": lambda: Network(small_model(contract)),
    }[name]()
    method.fit(cohort)
    return method


@pytest.mark.parametrize(
    ("name", "forecast"),
    [
        (n, False)
        for n in (
            "mean",
            "interpolation",
            "gaussian",
            "gaussian adapted",
            "gaussian space x time",
            "optimum",
            "network",
        )
    ]
    + [(n, True) for n in ("mean", "persistence", "autoregression", "optimum", "network")],
)
def test_only_measured_hidden_values_are_scored_and_all_are_answered(
    name: str, forecast: bool, twins: tuple[Cohort, Cohort]
) -> None:
    cohort = twins[0]
    method, draw = fitted(name, cohort), draw_for(cohort, forecast)
    for _, item in predict_windows(method, cohort, cohort.windows(1), draw, ("recording", "visible"), 4):
        hidden = expand_mask(item.mask, cohort.num_parcels, cohort.window_len)
        expected = hidden & item.window.scored_P[:, None] & item.window.kept_W
        assert (np.isfinite(item.truth) == expected).all()
        assert (np.isfinite(item.prediction) == expected).all()
        assert (window_sums(item)["n"] == expected.sum()).all()


def test_hidden_neighbours_of_a_visible_censored_value_do_not_show_through_it(twins: tuple[Cohort, Cohort]) -> None:
    """The preparation interpolated across the border of what is observed: the future must not be in there."""
    cohort = twins[0]
    seen = []

    class Watcher(Mean):
        def reconstruct(self, windows_z, mask, present, refs):  # type: ignore[no-untyped-def]
            seen.append(windows_z.copy())
            return super().reconstruct(windows_z, mask, present, refs)

    def draw(window: Window) -> np.ndarray:  # hides timepoints 30 on; 23 to 31 are censored
        return future_mask(cohort, window.scored_P, 20)

    window = next(cohort.windows(1))
    assert window.kept_W[:21].tolist() == [True] * 13 + [False] * 8
    list(predict_windows(Watcher(cohort.dataset.contract), cohort, [window], draw, ("recording",), 1))
    (fed,) = seen[0]
    for p in np.flatnonzero(window.scored_P):
        np.testing.assert_allclose(fed[p, 13:20], fed[p, 12], rtol=1e-6)  # the last measurement, held
        stored = window.bold_PW[p, 13:20]
        assert np.ptp(stored) > 0  # was on its way to a value of the future


def test_interpolation_and_persistence_are_those_of_the_measurements(twins: tuple[Cohort, Cohort]) -> None:
    cohort = twins[0]
    for name, forecast in (("interpolation", False), ("persistence", True)):
        found = predict_windows(
            fitted(name, cohort), cohort, cohort.windows(1), draw_for(cohort, forecast), ("recording",), 4
        )
        for _, item in found:
            shown = ~expand_mask(item.mask, cohort.num_parcels, cohort.window_len) & item.window.kept_W
            for p in np.flatnonzero(item.window.scored_P & shown.any(axis=1)):
                known, series = np.flatnonzero(shown[p]), item.window.bold_PW[p] / item.window.sd_P[p]
                scored = np.flatnonzero(np.isfinite(item.truth[p]))
                expected = np.interp(scored, known, series[known])
                if forecast:
                    expected = np.full(len(scored), series[known[-1]])
                np.testing.assert_allclose(item.prediction[p, scored], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gaussian adapted", "optimum"])
def test_what_is_fed_at_censored_timepoints_is_no_measurement_to_those_who_would_take_it_for_one(
    name: str, twins: tuple[Cohort, Cohort], rng: np.random.Generator
) -> None:
    cohort = twins[0]
    method, draw = fitted(name, cohort), draw_for(cohort, False)
    for window in cohort.windows(1):
        mask, kept = draw(window)[None], window.kept_W
        visible = ~expand_mask(mask[0], cohort.num_parcels, cohort.window_len) & window.scored_P[:, None]
        fed = np.where(visible, window.bold_PW, 0.0).astype(np.float32)
        other = np.where(visible & ~kept, rng.standard_normal(fed.shape), fed).astype(np.float32)
        one, two = (method.reconstruct(x[None], mask, window.scored_P[None], [window.ref])[0] for x in (fed, other))
        hidden = ~visible & window.scored_P[:, None] & kept
        np.testing.assert_allclose(one[hidden], two[hidden], rtol=1e-6, atol=1e-9)


def test_group_covariance_is_that_of_the_kept_rows(twins: tuple[Cohort, Cohort]) -> None:
    cohort = twins[1]
    iqr = cohort.dataset.contract.iqr
    parts = []
    for index in cohort.recordings("train"):
        x = cohort.reader("train").recording(index)[cohort.reader("train").kept(index, 0, 60)] / iqr
        x = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean())
        parts.append(x.T @ x / len(x))
    np.testing.assert_allclose(group_covariance(cohort, cohort.dataset.contract), np.mean(parts, axis=0), rtol=1e-5)


def test_autoregression_is_not_drawn_to_zero_by_gaps(tmp_path: Path) -> None:
    """Interpolated values are smoother than the process, zeros rougher: pairs of kept values are neither."""
    kept = np.random.default_rng(0).random(600) < 0.7
    gaps = np.flatnonzero(~kept)
    ranges = tuple((int(t), int(t) + 1) for t in gaps if t + 1 not in gaps and t - 1 not in gaps)
    assert len(ranges) > 60
    dataset = write_synthetic_dataset(
        str(tmp_path), num_timepoints=600, window_len=100, num_subjects={"train": 8, "val": 3, "test": 1}, noise=1e-3,
        phi=0.6, censored={f"sub-train{i:03d}_task-rest": ranges for i in range(8)}, censored_fill=7.0,
    )  # fmt: skip
    method = Autoregressive(dataset.contract, (1,), 10)
    method.fit(Cohort.of(dataset))
    assert method.coefficients.mean() == pytest.approx(0.6, abs=0.02)
    np.testing.assert_allclose(method.coefficients, 0.6, atol=0.05)


def test_connectivity_is_that_of_the_kept_timepoints(twins: tuple[Cohort, Cohort]) -> None:
    cut = recording_windows(twins[1], 0, 1)
    found = functional_connectivity(cut.measured)
    series = twins[1].reader("test").recording(0)[10:50]
    kept = twins[1].reader("test").kept(0, 10, 40)
    np.testing.assert_allclose(found, np.corrcoef(series[kept].T.astype(np.float64)), atol=1e-9)


def test_the_optimum_stays_the_best_with_censoring(twins: tuple[Cohort, Cohort]) -> None:
    cohort, got = twins[1], {}
    for name in ("mean", "interpolation", "gaussian", "optimum"):
        found = predict_windows(
            fitted(name, cohort), cohort, cohort.windows(1), draw_for(cohort, False), ("recording",), 4
        )
        sums = [window_sums(item) for _, item in found]
        got[name] = float(r2({k: np.sum([s[k] for s in sums]) for k in ("sse", "sst")}))
    assert got["optimum"] > got["gaussian"] > 0.2
    assert got["mean"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("task", ["reconstruction", "forecasting"])
def test_a_recording_whose_hidden_values_are_all_censored_has_no_row(task: str, tmp_path: Path) -> None:
    cohort = Cohort.of(write(tmp_path, {"sub-test000_task-rest": ((5, 60),)}))
    for spec in TASKS[task]().baselines(cohort):
        table = TASKS[task]().compute(spec, cohort, Runtime()).table
        assert cohort.identifiers(0)["recording"] not in set(table["recording"])
        assert table["recording"].nunique() == 3
        assert (table["n"] > 0).all()


@pytest.mark.parametrize("task", ["reconstruction", "forecasting"])
def test_a_split_without_any_measured_hidden_value_is_refused(task: str, tmp_path: Path) -> None:
    cohort = Cohort.of(write(tmp_path, {f"sub-test{i:03d}_task-rest": ((5, 60),) for i in range(4)}))
    with pytest.raises(DataError, match="every hidden value of the test split is censored"):
        TASKS[task]().compute(MethodSpec(name="mean", kind="baseline", model_hash="x"), cohort, Runtime())


def test_networks_of_a_recording_without_a_measured_window_are_a_guess_and_no_error(tmp_path: Path) -> None:
    cohort = Cohort.of(write(tmp_path, {"sub-test000_task-rest": ((5, 60),)}))
    for name in ("functional connectivity", "raw series"):
        table = TASKS["networks"]().compute(MethodSpec(name=name, kind="baseline", model_hash="x"), cohort, Runtime())
        assert (table.table.query("level == 'recording'").groupby("recording")["n"].max() > 0).all()


def test_a_recording_that_is_censored_throughout_is_refused(tmp_path: Path) -> None:
    cohort = Cohort.of(write(tmp_path))
    entry = cohort.reader("test").entries[0]
    object.__setattr__(entry, "censored", ((0, 60),))
    with pytest.raises(DataError, match="sub-test000_task-rest: all timepoints are censored"):
        cohort.series(0)
