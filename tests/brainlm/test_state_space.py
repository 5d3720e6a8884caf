"""The exact predictors against a dense joint Gaussian, and the behaviour of the system itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from brainlm.errors import DataError
from brainlm.state_space import LinearStateSpace, load_truth

NUM_STATES, NUM_PARCELS, NUM_TIMEPOINTS = 3, 4, 9


def random_system(seed: int = 0, process_rank: int = NUM_STATES) -> LinearStateSpace:
    rng = np.random.default_rng(seed)
    transition = rng.standard_normal((NUM_STATES, NUM_STATES))
    transition *= 0.9 / np.abs(np.linalg.eigvals(transition)).max()
    root = rng.standard_normal((NUM_STATES, process_rank))
    return LinearStateSpace(
        transition=transition,
        process_cov=root @ root.T,
        loading=rng.standard_normal((NUM_PARCELS, NUM_STATES)),
        noise_var=rng.uniform(0.2, 2.0, NUM_PARCELS),
    )


def dense_signal(system: LinearStateSpace, num_timepoints: int) -> np.ndarray:
    """Covariance of the noise-free series, (T P, T P), written out from the definition of the process."""
    size = system.num_parcels
    cov = np.zeros((num_timepoints * size, num_timepoints * size))
    for late in range(num_timepoints):
        for early in range(late + 1):
            block = (
                system.loading
                @ np.linalg.matrix_power(system.transition, late - early)
                @ system.stationary_cov
                @ system.loading.T
            )
            rows, columns = slice(late * size, (late + 1) * size), slice(early * size, (early + 1) * size)
            cov[rows, columns], cov[columns, rows] = block, block.T
    return cov


def dense_mean(system: LinearStateSpace, inputs: np.ndarray, num_timepoints: int) -> np.ndarray:
    state, rows = np.zeros(system.num_states), []
    for t in range(num_timepoints):
        rows.append(system.loading @ state)
        state = system.transition @ state + inputs[t]
    return np.concatenate(rows)


def dense_conditional(
    system: LinearStateSpace, bold: np.ndarray, observed: np.ndarray, inputs: np.ndarray, total: int
) -> np.ndarray:
    """E[C s_t | observed] over ``total`` timepoints, by one dense solve."""
    seen = np.zeros((total, system.num_parcels), dtype=bool)
    seen[: len(bold)] = observed
    values = np.zeros((total, system.num_parcels))
    values[: len(bold)] = np.where(observed, bold, 0.0)
    flat, mean = seen.ravel(), dense_mean(system, inputs, total)
    signal = dense_signal(system, total)
    noise = np.diag(np.tile(system.noise_var, total))
    gain = np.linalg.solve((signal + noise)[np.ix_(flat, flat)], values.ravel()[flat] - mean[flat])
    return (mean + signal[:, flat] @ gain).reshape(total, system.num_parcels)


@pytest.mark.parametrize("process_rank", [NUM_STATES, 1], ids=["full rank", "singular process noise"])
@pytest.mark.parametrize("share_visible", [1.0, 0.5, 0.1])
def test_smoother_equals_the_dense_conditional_mean(process_rank: int, share_visible: float) -> None:
    rng = np.random.default_rng(1)
    system = random_system(2, process_rank)
    inputs = rng.standard_normal((NUM_TIMEPOINTS, NUM_STATES))
    bold = system.simulate(NUM_TIMEPOINTS, rng, inputs)
    observed = rng.random(bold.shape) < share_visible
    observed[3:5] = False  # a gap without any observation
    found = system.smooth(bold, observed, inputs)
    expected = dense_conditional(system, bold, observed, inputs, NUM_TIMEPOINTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("share_visible", [1.0, 0.5])
def test_log_likelihood_equals_that_of_the_dense_normal(share_visible: float) -> None:
    rng = np.random.default_rng(5)
    system = random_system(2)
    inputs = rng.standard_normal((NUM_TIMEPOINTS, NUM_STATES))
    bold = system.simulate(NUM_TIMEPOINTS, rng, inputs)
    observed = rng.random(bold.shape) < share_visible
    flat = observed.ravel()
    cov = dense_signal(system, NUM_TIMEPOINTS) + np.diag(np.tile(system.noise_var, NUM_TIMEPOINTS))
    mean = dense_mean(system, inputs, NUM_TIMEPOINTS)
    expected = multivariate_normal(mean[flat], cov[np.ix_(flat, flat)]).logpdf(bold.ravel()[flat])
    hidden = np.where(observed, bold, np.nan)
    assert system.log_likelihood(hidden, observed, inputs) == pytest.approx(expected, abs=1e-6)


def test_forecast_equals_the_dense_conditional_mean() -> None:
    rng = np.random.default_rng(3)
    system, horizon = random_system(4), 5
    inputs = rng.standard_normal((NUM_TIMEPOINTS + horizon, NUM_STATES))
    bold = system.simulate(NUM_TIMEPOINTS, rng, inputs[:NUM_TIMEPOINTS])
    observed = rng.random(bold.shape) < 0.6
    found = system.forecast(bold, horizon, inputs, observed)
    expected = dense_conditional(system, bold, observed, inputs, NUM_TIMEPOINTS + horizon)[NUM_TIMEPOINTS:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_forecast_equals_smoothing_of_a_hidden_future() -> None:
    rng = np.random.default_rng(5)
    system, horizon = random_system(6), 4
    bold = system.simulate(NUM_TIMEPOINTS + horizon, rng)
    observed = np.ones(bold.shape, dtype=bool)
    observed[NUM_TIMEPOINTS:] = False
    smoothed = system.smooth(bold, observed)[NUM_TIMEPOINTS:]
    np.testing.assert_allclose(system.forecast(bold[:NUM_TIMEPOINTS], horizon), smoothed, rtol=0, atol=1e-10)


def test_hidden_values_are_never_read() -> None:
    rng = np.random.default_rng(7)
    system = random_system(8)
    bold = system.simulate(NUM_TIMEPOINTS, rng)
    observed = rng.random(bold.shape) < 0.5
    hidden = np.where(observed, bold, np.nan)
    np.testing.assert_array_equal(system.smooth(bold, observed), system.smooth(hidden, observed))


def test_nothing_observed_gives_the_prior_mean() -> None:
    system = random_system(9)
    nothing = np.zeros((NUM_TIMEPOINTS, NUM_PARCELS), dtype=bool)
    np.testing.assert_array_equal(system.smooth(np.full(nothing.shape, np.nan), nothing), 0.0)


def test_not_a_number_where_observed_is_refused() -> None:
    bold = np.zeros((NUM_TIMEPOINTS, NUM_PARCELS))
    bold[2, 1] = np.nan
    with pytest.raises(DataError, match="mark those entries as not observed"):
        random_system().smooth(bold, np.ones(bold.shape, dtype=bool))


def test_stationary_covariance_solves_the_lyapunov_equation() -> None:
    system = random_system(10)
    cov = system.stationary_cov
    np.testing.assert_allclose(
        cov, system.transition @ cov @ system.transition.T + system.process_cov, rtol=1e-12, atol=1e-12
    )


def test_stationary_covariance_is_exact_near_the_unit_circle() -> None:
    root = 1 - 1e-9
    system = LinearStateSpace(
        transition=np.array([[root]]), process_cov=np.eye(1), loading=np.eye(1), noise_var=np.ones(1)
    )
    np.testing.assert_allclose(system.stationary_cov, [[1 / (1 - root**2)]], rtol=1e-8)


def test_simulated_series_has_the_stated_moments() -> None:
    system = random_system(11)
    bold = system.simulate(100_000, np.random.default_rng(12))
    scale = np.sqrt(np.outer(system.marginal_variance(), system.marginal_variance()))
    np.testing.assert_allclose(np.cov(bold.T) / scale, system.covariance() / scale, atol=0.05)
    lagged = bold[2:].T @ bold[:-2] / (len(bold) - 2)
    np.testing.assert_allclose(lagged / scale, system.covariance(lag=2) / scale, atol=0.05)
    np.testing.assert_allclose(np.diag(system.covariance()), system.marginal_variance(), rtol=1e-12)


def test_simulation_starts_in_the_stationary_distribution() -> None:
    system = random_system(13)
    first = np.stack([system.simulate(1, np.random.default_rng(seed))[0] for seed in range(4000)])
    np.testing.assert_allclose(first.var(axis=0) / system.marginal_variance(), 1.0, atol=0.12)


def test_inputs_act_one_timepoint_later() -> None:
    system = random_system(14)
    inputs = np.zeros((NUM_TIMEPOINTS, NUM_STATES))
    inputs[2] = [1.0, -0.5, 2.0]
    difference = system.simulate(NUM_TIMEPOINTS, np.random.default_rng(0), inputs) - system.simulate(
        NUM_TIMEPOINTS, np.random.default_rng(0)
    )
    np.testing.assert_allclose(difference[:3], 0.0, atol=1e-12)
    np.testing.assert_allclose(difference[3:], system.impulse_response(inputs[2], NUM_TIMEPOINTS - 3), atol=1e-12)


def test_predictor_response_is_the_change_of_the_forecast() -> None:
    rng = np.random.default_rng(15)
    system = random_system(16)
    bold = system.simulate(NUM_TIMEPOINTS, rng)
    raised = bold.copy()
    raised[-2:, [0, 3]] += 1.0
    found = system.predictor_response([0, 3], 4, num_observed=NUM_TIMEPOINTS, num_changed=2)
    np.testing.assert_allclose(found, system.forecast(raised, 4) - system.forecast(bold, 4), atol=1e-10)


@pytest.mark.parametrize("radius", [1.0, 1.2])
def test_unstable_system_is_refused(radius: float) -> None:
    with pytest.raises(DataError, match="unstable"):
        LinearStateSpace(
            transition=radius * np.eye(2), process_cov=np.eye(2), loading=np.ones((3, 2)), noise_var=np.ones(3)
        )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("noise_var", np.zeros(3), "above zero"),
        ("noise_var", np.ones(4), "expected transition"),
        ("process_cov", np.array([[1.0, 2.0], [2.0, 1.0]]), "semidefinite"),
        ("process_cov", np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        ("loading", np.full((3, 2), np.nan), "finite"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(field: str, value: np.ndarray, message: str) -> None:
    parts = {
        "transition": 0.5 * np.eye(2),
        "process_cov": np.eye(2),
        "loading": np.ones((3, 2)),
        "noise_var": np.ones(3),
    }
    with pytest.raises(DataError, match=message):
        LinearStateSpace(**{**parts, field: value})


def test_truth_of_a_folder_without_one_is_an_error_that_says_where(tmp_path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        load_truth(tmp_path)
    with pytest.raises(DataError, match="not the truth"):
        load_truth(b"PK not an archive")
