from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainlm.dataset import Dataset
from brainlm.state_space import LinearStateSpace
from brainlm.testing import synthetic_atlas, write_synthetic_dataset
from eval.baselines.autoregressive import Autoregressive, forecast, yule_walker
from eval.baselines.gaussian import Gaussian, conditional_weights, group_covariance
from eval.baselines.simple import Interpolation, Persistence
from eval.baselines.space_time import SpaceTimeGaussian
from eval.cohort import Cohort, WindowRef

REF = WindowRef("test", 0, "sub-test000_task-rest", 0)


def random_covariance(rng: np.random.Generator, size: int) -> np.ndarray:
    root = rng.standard_normal((size, size + 3))
    return root @ root.T / size


def test_conditional_mean_equals_the_one_from_the_joint_precision(rng: np.random.Generator) -> None:
    covariance = random_covariance(rng, 9)
    hidden, visible = np.array([0, 4, 8]), np.array([1, 2, 3, 5, 6, 7])
    precision = np.linalg.inv(covariance)
    expected = -np.linalg.inv(precision[np.ix_(hidden, hidden)]) @ precision[np.ix_(hidden, visible)]
    np.testing.assert_allclose(conditional_weights(covariance, visible, hidden), expected, atol=1e-9)


@pytest.mark.parametrize("own_weights", [(), (0.4,)])
def test_gaussian_fills_each_patch_from_what_is_visible_at_the_same_time(
    own_weights: tuple[float, ...], dataset: Dataset, rng: np.random.Generator
) -> None:
    P, K, patch_len = dataset.contract.atlas.num_parcels, 4, 10
    method = Gaussian(dataset.contract, (0.1,), own_weights)
    covariance = random_covariance(rng, P)
    method.set_covariance(covariance)
    windows = rng.standard_normal((1, P, K * patch_len)).astype(np.float32)
    mask = rng.random((1, P * K)) < 0.5
    present = np.ones((1, P), dtype=bool)
    present[0, 5] = False
    got = method.reconstruct(windows, mask, present, [REF])[0]
    zero = method.zero_z
    for k in range(K):
        hidden = np.flatnonzero(mask[0].reshape(P, K)[:, k] & present[0])
        visible = np.flatnonzero(~mask[0].reshape(P, K)[:, k] & present[0])
        x = windows[0, :, k * patch_len : (k + 1) * patch_len] - zero[:, None]
        S = covariance
        expected = S[np.ix_(hidden, visible)] @ np.linalg.inv(S[np.ix_(visible, visible)]) @ x[visible]
        np.testing.assert_allclose(
            got[hidden, k * patch_len : (k + 1) * patch_len], expected + zero[hidden, None], atol=1e-5
        )


def test_group_covariance_gives_loud_recordings_no_more_weight(tmp_path) -> None:  # type: ignore[no-untyped-def]
    atlas = synthetic_atlas(8, 2)
    quiet, loud = (
        write_synthetic_dataset(str(tmp_path / name), atlas=atlas, gain_sd=gain_sd, num_timepoints=80)
        for name, gain_sd in (("quiet", 0.0), ("loud", 2.0))
    )
    contract = quiet.contract  # the same units for both, so that only the weights of recordings differ
    a, b = (group_covariance(Cohort.of(d), contract) for d in (quiet, loud))
    np.testing.assert_allclose(a, b, atol=0.15)


def test_group_covariance_is_positive_semidefinite_when_parcels_are_missing_here_and_there(tmp_path) -> None:  # type: ignore[no-untyped-def]
    missing = {f"sub-train{i:03d}_task-rest": (i, i + 8) for i in range(12)}
    dataset = write_synthetic_dataset(str(tmp_path / "data"), missing=missing, num_timepoints=50)
    covariance = group_covariance(Cohort.of(dataset), dataset.contract)
    assert np.linalg.eigvalsh(covariance).min() > -1e-9


def test_space_time_gaussian_equals_the_conditional_mean_of_the_whole_covariance(
    dataset: Dataset, rng: np.random.Generator
) -> None:
    P, W, patch_len = dataset.contract.atlas.num_parcels, 40, 10
    method = SpaceTimeGaussian(dataset.contract, (0.1,), (0.2,))
    method.set_covariance(random_covariance(rng, P))
    lags = np.abs(np.subtract.outer(np.arange(W), np.arange(W)))
    method.in_time = 0.8**lags
    method.set_noise(0.2)
    windows = rng.standard_normal((1, P, W)).astype(np.float32)
    mask = rng.random((1, P * W // patch_len)) < 0.5
    present = np.ones((1, P), dtype=bool)
    present[0, 5] = False
    got = method.reconstruct(windows, mask, present, [REF])[0] - method.zero_z[:, None]

    assert method.noise_P is not None
    np.testing.assert_allclose(np.diag(method.process_cov) + method.noise_P, np.diag(method.covariance), rtol=0.02)
    whole = np.kron(method.process_cov, method.in_time) + np.kron(np.diag(method.noise_P), np.eye(W))
    hidden_PW = np.repeat(mask.reshape(P, -1), patch_len, axis=1)
    hidden = np.flatnonzero(hidden_PW & present[0][:, None])
    visible = np.flatnonzero(~hidden_PW & present[0][:, None])
    x = (windows[0] - method.zero_z[:, None]).ravel()
    expected = conditional_weights(whole, visible, hidden) @ x[visible]
    np.testing.assert_allclose(got.ravel()[hidden], expected, atol=5e-3)
    np.testing.assert_allclose(got.ravel()[visible], x[visible], atol=1e-5)


def test_space_time_gaussian_finds_the_planted_correlation_in_time_and_uses_it(tmp_path: Path) -> None:
    """Latent networks are AR(1) with 0.95, under much private white noise: their past and future help."""
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"), num_subjects={"train": 12, "val": 4, "test": 4}, num_timepoints=200,
        censored={"sub-train001_task-rest": ((20, 60),)}, phi=0.95, noise=2.0,
    )  # fmt: skip
    cohort = Cohort.of(dataset)

    def error(method: Gaussian) -> float:
        method.fit(cohort)
        return method._tuning_error(cohort)

    space_time = SpaceTimeGaussian(dataset.contract, (0.01, 0.1), (0.1, 0.3, 0.6, 0.8))
    assert error(space_time) < 0.95 * error(Gaussian(dataset.contract, (0.01, 0.1)))
    np.testing.assert_allclose(space_time.in_time[0, :6], 0.95 ** np.arange(6), atol=0.08)  # centring takes a little


def test_an_adapted_covariance_helps_a_subject_unlike_the_group(rng: np.random.Generator, dataset: Dataset) -> None:
    """Series from another covariance than the group's are filled better once the window's own is mixed in."""
    P, W = dataset.contract.atlas.num_parcels, 400
    group, own = np.eye(P) + 0.2, random_covariance(rng, P)
    series = (np.linalg.cholesky(own) @ rng.standard_normal((P, W))).astype(np.float32)
    mask = rng.random((1, P * (W // 10))) < 0.3
    hidden = np.repeat(mask.reshape(P, -1), 10, axis=1)
    errors = []
    for weight in (0.0, 0.7):
        method = Gaussian(dataset.contract, (0.1,))
        method.set_covariance(group)
        method.own_weight = weight
        windows = (series + method.zero_z[:, None]).astype(np.float32)[None]
        got = method.reconstruct(windows, mask, np.ones((1, P), dtype=bool), [REF])[0] - method.zero_z[:, None]
        errors.append(((got - series)[hidden] ** 2).mean())
    assert errors[1] < 0.8 * errors[0]


def test_interpolation_joins_visible_values_and_holds_the_edges(dataset: Dataset) -> None:
    P = dataset.contract.atlas.num_parcels
    method = Interpolation(dataset.contract)
    line = np.tile(np.arange(8.0, dtype=np.float32), (1, P, 1))
    mask = np.zeros((P, 4), dtype=bool)
    mask[0, 1] = mask[1, 0] = mask[2, 3] = True
    mask[3] = True
    got = method.reconstruct(line, mask.reshape(1, -1), np.ones((1, P), dtype=bool), [REF])[0]
    np.testing.assert_allclose(got[0], np.arange(8))
    np.testing.assert_allclose(got[1, :2], 2)
    np.testing.assert_allclose(got[2, 6:], 5)
    np.testing.assert_allclose(got[3], method.zero_z[3])


def test_persistence_repeats_the_last_visible_value(dataset: Dataset) -> None:
    P = dataset.contract.atlas.num_parcels
    method = Persistence(dataset.contract)
    line = np.tile(np.arange(8.0, dtype=np.float32), (1, P, 1))
    mask = np.zeros((P, 4), dtype=bool)
    mask[:, 2:] = True
    mask[3] = True
    got = method.reconstruct(line, mask.reshape(1, -1), np.ones((1, P), dtype=bool), [REF])[0]
    np.testing.assert_allclose(got[0, 4:], 3)
    np.testing.assert_allclose(got[3], method.zero_z[3])


def test_yule_walker_recovers_an_ar2_process() -> None:
    phi = np.array([0.5, 0.3])
    rho = [1.0, phi[0] / (1 - phi[1])]
    rho.append(phi[0] * rho[1] + phi[1])
    got = yule_walker(np.array([[2 * v for v in rho], [0.0, 0.0, 0.0]]), 2)
    np.testing.assert_allclose(got, [phi, [0, 0]], atol=1e-6)


def test_an_ar1_forecast_decays_as_a_power_of_its_coefficient() -> None:
    past = np.array([[3.0, 1.0, 2.0]])
    np.testing.assert_allclose(forecast(past, np.array([[0.8]]), 5)[0], 2 * 0.8 ** np.arange(1, 6))


def test_the_forecast_continues_in_the_order_of_time() -> None:
    past = np.array([[1.0, 2.0]])
    coefficients = np.array([[0.0, 1.0]])  # copies the value before the last: the series has period 2
    np.testing.assert_allclose(forecast(past, coefficients, 4)[0], [1, 2, 1, 2])


def test_autoregression_learns_the_planted_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dataset = write_synthetic_dataset(
        str(tmp_path / "data"),
        num_timepoints=600,
        window_len=100,
        num_subjects={"train": 8, "val": 3, "test": 1},
        noise=1e-3,
    )
    method = Autoregressive(dataset.contract, (1,), 10)
    method.fit(Cohort.of(dataset))
    np.testing.assert_allclose(method.coefficients, 0.9, atol=0.03)


def test_the_optimum_forecast_equals_the_systems_own(dataset: Dataset, rng: np.random.Generator) -> None:
    from eval.baselines.optimum import Optimum

    method = Optimum(dataset)
    ref = WindowRef("test", 0, "sub-test000_task-rest", 0)
    system: LinearStateSpace = method.truth.system(ref.recording_id)[0]
    P, W = dataset.contract.atlas.num_parcels, 40
    bold = system.simulate(W, rng)
    iqr = dataset.contract.iqr
    windows = ((bold / iqr + method.zero_z).T[None]).astype(np.float32)
    mask = np.zeros((P, 4), dtype=bool)
    mask[:, 3:] = True
    got = method.reconstruct(windows, mask.reshape(1, -1), np.ones((1, P), dtype=bool), [ref])[0]
    expected = system.forecast(bold[:30], 10)
    np.testing.assert_allclose(((got.T - method.zero_z) * iqr)[30:], expected, atol=1e-4)
