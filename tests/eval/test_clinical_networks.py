"""Networks of the clinical task, on features of which it is known what they say of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from brainlm.errors import ConfigError, DataError
from brainlm.fitting import FitSettings
from brainlm.targets import Target, TargetSettings
from eval.clinical.attentive import AttentiveProbe
from eval.clinical.gcn import GCN, GraphNetwork, propagation
from eval.clinical.lstm import ClinicalLSTM, Series
from eval.clinical.mlp import MLPOnComponents
from eval.clinical.network_fit import NetworkPredictor, divide
from eval.clinical.people import find_people
from eval.clinical.problem import Problem, constant_answer, loss
from eval.clinical.settings import ClinicalSettings
from eval.cohort import Cohort
from tests.phenotypes import write_phenotype_dataset

P, W, D = 12, 30, 8
TRAIN, ROWS = 160, 240
CARRIER = 7
"""The one parcel whose embedding says something."""


def problem_of(values: Any, kind: str = "regression", **more: Any) -> Problem:
    target = Target.fit(TargetSettings(column="truth", kind=kind), list(values[:TRAIN]))  # type: ignore[arg-type]
    y = target.encode(list(values))[0].astype(np.float64)
    groups = np.array([f"s{row // 2}" for row in range(TRAIN)])  # two recordings of each subject
    return Problem(
        target=target, train=np.arange(TRAIN), y=y[:TRAIN], groups=groups, test=np.arange(TRAIN, ROWS), **more
    )


def loss_of_test_rows(problem: Problem, values: Any, answers: Any) -> float:
    """Return the loss on the test rows in units of that of the training rows' best constant on the same rows."""
    y = problem.target.encode(list(values[TRAIN:]))[0].astype(np.float64)
    return loss(problem.target, y, answers) / loss(problem.target, y, constant_answer(problem, len(y)))


@dataclass
class FakePeople:
    """Recordings from memory."""

    series: list[np.ndarray]
    kept_T: list[np.ndarray]

    @property
    def cohort(self) -> Any:
        return SimpleNamespace(window_len=W)

    def standardised(self, row: int) -> np.ndarray:
        return self.series[row]

    def kept(self, row: int) -> np.ndarray:
        return self.kept_T[row]


@dataclass
class FakeCoordinates:
    """Principal coordinates from memory."""

    values: np.ndarray

    def of(self, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
        centre = self.values[problem.train].mean(axis=0)
        return self.values[problem.train] - centre, self.values[problem.test] - centre


def autocorrelated(truth: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Return series of unit variance (T, P) whose lag-1 autocorrelation says the truth; lengths differ."""
    out = []
    for row, value in enumerate(truth):
        phi = 0.45 * np.tanh(value) + 0.45
        x = rng.normal(size=(W + 4 + row % 50, P))
        for t in range(1, len(x)):
            x[t] = phi * x[t - 1] + np.sqrt(1 - phi**2) * x[t]
        out.append(x.astype(np.float32))
    return out


def connectivity(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return Fisher z (rows, pairs): the first four parcels are the more correlated, the larger the truth."""
    first, second = np.triu_indices(P, 1)
    common = rng.normal(0.2, 0.2, size=len(first))
    z = common + 0.2 * rng.normal(size=(len(truth), len(first)))
    z[:, (first < 4) & (second < 4)] += 0.3 * truth[:, None]
    return z.astype(np.float32)


def parcel_embeddings(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return embeddings (rows, P, D): parcels differ, and one of them says the truth in one direction."""
    x = 3 * rng.normal(size=(P, D)) + rng.normal(size=(len(truth), P, D))
    x[:, CARRIER] += 1.5 * truth[:, None] * np.sign(rng.normal(size=D))
    x[rng.random((len(truth), P)) < 0.05] = np.nan
    x[:, 2] = np.nan
    return x.astype(np.float32)


def coordinates(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return coordinates whose second one says the truth."""
    z = rng.normal(size=(len(truth), 6)) * np.array([3.0, 2.5, 2.0, 1.0, 0.5, 0.2])
    z[:, 1] = 2.5 * truth
    return z


SETTINGS = FitSettings(steps=150, batch_size=16, lrs=(1e-2,), check_every=15, patience=10)
MAKERS: dict[str, tuple[Callable[..., Any], Callable[[Any], NetworkPredictor]]] = {
    "MLP": (coordinates, lambda z: MLPOnComponents(FakeCoordinates(z), SETTINGS, (3, 200))),
    "LSTM": (
        autocorrelated,
        lambda x: ClinicalLSTM(FakePeople(x, [np.ones(len(one), dtype=bool) for one in x]), SETTINGS, (24,)),  # type: ignore[arg-type]
    ),
    "GCN": (connectivity, lambda z: GCN(z, P, SETTINGS, density=0.2)),
    "attentive": (parcel_embeddings, lambda x: AttentiveProbe(x, SETTINGS)),
}


@pytest.fixture
def truth(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=ROWS)


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_planted_effect_is_found_and_chance_is_not(name: str, truth: np.ndarray, rng: np.random.Generator) -> None:
    features, make = MAKERS[name]
    predictor = make(features(truth, rng))
    problem = problem_of(truth)
    found = predictor.answer(problem)
    assert found.values.shape == (ROWS - TRAIN, 1)
    assert found.validation_loss < 0.7
    assert loss_of_test_rows(problem, truth, found.values) < 0.7

    permuted = replace(problem, y=rng.permutation(problem.y))
    chance = predictor.answer(permuted)
    assert 0.75 < chance.validation_loss <= 1
    assert np.square(chance.values).mean() < 0.25
    assert 0.9 < loss_of_test_rows(problem, truth, chance.values) < 1.2


def test_test_rows_say_nothing_to_training(name: str, truth: np.ndarray, rng: np.random.Generator) -> None:
    """With other features of theirs, all is learned as before; answers for them are others."""
    features, make = MAKERS[name]
    x = features(truth, rng)
    other = [100 * one if i >= TRAIN else one for i, one in enumerate(x)]
    first, again, changed = (
        make(values).answer(problem_of(truth)) for values in (x, x, other if name == "LSTM" else np.stack(other))
    )
    assert (first.chosen, first.validation_loss) == (changed.chosen, changed.validation_loss)
    assert not np.allclose(first.values, changed.values)
    np.testing.assert_array_equal(first.values, again.values)
    assert (first.chosen, first.validation_loss) == (again.chosen, again.validation_loss)


def test_probabilities_of_classes(name: str, truth: np.ndarray, rng: np.random.Generator) -> None:
    labels = np.array(["low", "middle", "high"])[np.digitize(truth, [-0.6, 0.4])]
    features, make = MAKERS[name]
    problem = problem_of(labels, "classification")
    found = make(features(truth, rng)).answer(problem)
    assert found.values.shape == (ROWS - TRAIN, 3)
    np.testing.assert_allclose(found.values.sum(axis=1), 1, atol=1e-6)
    assert found.validation_loss < 0.9
    assert loss_of_test_rows(problem, labels, found.values) < 0.9


def test_a_network_that_learns_nothing_answers_the_constant(name: str, truth: np.ndarray) -> None:
    """One step whose learning rate is far too large makes it worse, and step 0 is kept."""
    rng = np.random.default_rng(1)
    features, make = MAKERS[name]
    predictor = make(features(truth, rng))
    predictor.settings = FitSettings(steps=1, batch_size=4, lrs=(1e3,), warmup_ratio=0.0)
    found = predictor.answer(problem_of(rng.permutation(truth)))
    assert found.validation_loss == 1
    assert found.chosen.endswith("step 0")
    np.testing.assert_array_equal(found.values, 0)


def test_one_group_cannot_be_divided(name: str, truth: np.ndarray, rng: np.random.Generator) -> None:
    features, make = MAKERS[name]
    problem = replace(problem_of(truth), groups=np.array(["one"] * TRAIN))
    with pytest.raises(DataError, match="are of 1 group"):
        make(features(truth, rng)).answer(problem)


@pytest.mark.parametrize("name", ["LSTM", "GCN"])
def test_confounds_that_cannot_be_removed_are_refused(name: str, truth: np.ndarray, rng: np.random.Generator) -> None:
    features, make = MAKERS[name]
    with pytest.raises(ConfigError, match="confounds cannot be removed"):
        make(features(truth, rng)).answer(problem_of(truth, nuisance=np.zeros((ROWS, 1))))


def test_weights_are_validated_on_groups_that_they_are_not_fitted_on(truth: np.ndarray) -> None:
    problem = problem_of(truth)
    division = divide(problem)
    groups = problem.groups
    assert not {*groups[division.problem.train]} & {*groups[division.validate]}
    assert sorted([*division.problem.train, *division.validate]) == list(range(TRAIN))
    np.testing.assert_array_equal(division.y_validate, problem.y[division.validate])
    np.testing.assert_array_equal(division.problem.test, [*division.validate, *problem.test])


def test_the_mlp_learns_what_is_not_linear(rng: np.random.Generator) -> None:
    z = rng.normal(size=(ROWS, 4)) * np.array([2.0, 2.0, 0.5, 0.5])
    values = np.sign(z[:, 0] * z[:, 1]) + 0.1 * rng.normal(size=ROWS)
    problem = problem_of(values)
    answer = MLPOnComponents(FakeCoordinates(z), replace(SETTINGS, steps=300)).answer(problem)
    weights = np.linalg.lstsq(z[:TRAIN], problem.y, rcond=None)[0]
    assert loss_of_test_rows(problem, values, (z[TRAIN:] @ weights)[:, None]) > 0.9
    assert loss_of_test_rows(problem, values, answer.values) < 0.6
    assert answer.chosen.startswith("4 components")  # as many as there are


def test_attention_finds_the_parcel(truth: np.ndarray, rng: np.random.Generator) -> None:
    x = parcel_embeddings(truth, rng)
    learned = AttentiveProbe(x, replace(SETTINGS, steps=400, lrs=(3e-2,))).learn(problem_of(truth))
    (differences, here), _ = learned.inputs.views(np.arange(TRAIN, ROWS))
    with torch.no_grad():
        weights = learned.module.attention(differences, here).numpy()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert (weights[np.isnan(x[TRAIN:]).any(axis=2)] == 0).all()
    seen = ~np.isnan(x[TRAIN:, CARRIER]).any(axis=1)
    assert weights[seen].mean(axis=0).argmax() == CARRIER
    assert weights[seen, CARRIER].mean() > 3 / (P - 1)  # three times what it began with


def test_confounds_are_removed_from_embeddings(truth: np.ndarray, rng: np.random.Generator) -> None:
    """By the regression of each dimension of each parcel, fitted on the training rows."""
    confound = np.stack([truth, np.arange(ROWS) % 3 == 0, np.zeros(ROWS)], axis=1)
    x = parcel_embeddings(truth, rng)
    problem = problem_of(truth, nuisance=confound)
    inputs: Any = AttentiveProbe(x, SETTINGS).read(problem)
    (differences, here), _ = inputs.views(np.arange(ROWS))
    design = np.column_stack([np.ones(ROWS), confound[:, :2]])
    residual = np.zeros_like(x)
    for p in set(range(P)) - {2}:
        rows = np.flatnonzero(~np.isnan(x[:TRAIN, p]).any(axis=1))
        residual[:, p] = x[:, p] - design @ np.linalg.lstsq(design[rows], x[rows, p], rcond=None)[0]
    np.testing.assert_allclose(differences, np.where(here[:, :, None], residual, 0), atol=1e-4)
    assert here.numpy().sum() == (~np.isnan(x).any(axis=2)).sum()
    flat = residual[:TRAIN][here[:TRAIN].numpy()]
    np.testing.assert_allclose(inputs.cov_DD, np.cov(flat.T, bias=True), atol=1e-4)

    module = AttentiveProbe(x, SETTINGS).build("one query", inputs, 1)
    keys = (differences / module.sd_D + module.parcels_PD)[:TRAIN][here[:TRAIN]]
    torch.testing.assert_close(keys.mean(dim=0), torch.zeros(D), atol=1e-4, rtol=0)
    torch.testing.assert_close(keys.std(dim=0, correction=0), torch.ones(D), atol=1e-4, rtol=0)
    shrunk = inputs.cov_DD + 0.1 * np.trace(inputs.cov_DD) / D * np.eye(D)
    whitener = module.whitener_DD.double().numpy()
    np.testing.assert_allclose(whitener @ shrunk @ whitener, np.eye(D), atol=1e-4)

    # a target that features know of through a confound alone
    assert AttentiveProbe(x, SETTINGS).answer(replace(problem, nuisance=None)).validation_loss < 0.7
    assert AttentiveProbe(x, SETTINGS).answer(problem).validation_loss > 0.85


def test_censored_timepoints_have_no_influence(truth: np.ndarray, rng: np.random.Generator) -> None:
    x = autocorrelated(truth, rng)
    kept = [rng.random(len(one)) > 0.2 for one in x]
    spoiled = [np.where(k[:, None], one, np.float32(1e4)) for one, k in zip(x, kept)]
    settings = replace(SETTINGS, steps=30)
    first, second = (
        ClinicalLSTM(FakePeople(series, kept), settings, (8,)).answer(problem_of(truth))  # type: ignore[arg-type]
        for series in (x, spoiled)
    )
    np.testing.assert_array_equal(first.values, second.values)
    assert first.validation_loss == second.validation_loss


def test_windows_of_the_lstm(rng: np.random.Generator) -> None:
    """They lie evenly over a recording; those without a kept timepoint are left out, unless all are."""
    x = [rng.normal(size=(length, P)).astype(np.float32) for length in (W, 2 * W + 5, 40 * W, 2 * W)]
    kept = [np.ones(len(one), dtype=bool) for one in x]
    kept[1][:W] = False
    kept[1][W + 3 :] = True
    kept[3][:W] = False
    series = Series(FakePeople(x, kept), "cpu")  # type: ignore[arg-type]
    (windows, kept_BW), owner = series.views(np.arange(4))
    assert owner.tolist() == [0, 1, 1, 2, 2, 2, 2, 3]
    np.testing.assert_array_equal(windows[0], x[0])
    np.testing.assert_array_equal(windows[-1], x[3][W:])
    assert kept_BW.sum(dim=1).tolist()[-1] == W
    one, again, other = (series.drawn(np.array([2]), np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    assert one.shape == (1, W, P)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_the_lstm_reads_the_people_of_a_data_set(tmp_path: Path) -> None:
    people = find_people(Cohort.of(write_phenotype_dataset(str(tmp_path / "dataset"))), ClinicalSettings())
    values = list(np.arange(len(people)) % 7)
    target = Target.fit(TargetSettings(column="truth"), values[:50])
    problem = Problem(
        target=target, train=np.arange(50), y=target.encode(values[:50])[0].astype(np.float64),
        groups=people.groups[:50], test=np.arange(50, len(people)),
    )  # fmt: skip
    answer = ClinicalLSTM(people, replace(SETTINGS, steps=3), (8,)).answer(problem)
    assert answer.values.shape == (len(people) - 50, 1)
    assert answer.validation_loss <= 1


def test_propagation_is_that_of_the_paper(rng: np.random.Generator) -> None:
    """Against eq. 2, written out for one graph, with a parcel that is missing."""
    z = connectivity(rng.normal(size=20), rng)
    first, second = np.triu_indices(P, 1)
    z[:, (first == 5) | (second == 5)] = 0
    inputs: Any = GCN(z, P, SETTINGS, density=0.3).read(problem_of_rows(20))
    (features, passed, here), _ = inputs.views(np.array([17]))
    upper = z[17] >= np.sort(z[17])[::-1][round(0.3 * 55) - 1]
    assert upper.sum() == round(0.3 * 55)
    A = np.zeros((P, P))
    A[first, second] = upper
    A = A + A.T + np.eye(P)
    half = np.diag(A.sum(axis=1) ** -0.5)
    np.testing.assert_allclose(passed[0], half @ A @ half, atol=1e-6)
    assert here[0].tolist() == [p != 5 for p in range(P)]

    r = np.tanh(z.astype(np.float64))
    centred = np.where(z != 0, r - r[:16].mean(axis=0), 0)
    rms = np.sqrt(np.square(centred[:16])[:, (first != 5) & (second != 5)].mean())
    np.testing.assert_allclose(features[0][first, second], centred[17] / rms, atol=1e-5)

    torch.manual_seed(0)
    network = GraphNetwork(P, 2).eval()
    torch.nn.init.normal_(network.output.weight)
    torch.nn.init.normal_(network.layer1.bias)
    weights = {key: value.detach().double().numpy() for key, value in network.state_dict().items()}
    H = features[0].double().numpy()
    for layer in ("layer1", "layer2"):
        H = np.maximum(half @ A @ half @ H @ weights[f"{layer}.linear.weight"].T + weights[f"{layer}.bias"], 0)
    expected = H[np.arange(P) != 5].mean(axis=0) @ weights["output.weight"].T
    np.testing.assert_allclose(network(features, passed, here)[0].detach(), expected, rtol=1e-4)


def problem_of_rows(num: int) -> Problem:
    problem = problem_of(np.random.default_rng(0).normal(size=ROWS))
    return replace(problem, train=np.arange(num - 4), test=np.arange(num - 4, num))


def test_correlations_at_or_below_0_join_nobody() -> None:
    z = np.full((1, P * (P - 1) // 2), -0.1, dtype=np.float32)
    z[0, 0] = 0.2
    inputs: Any = GCN(z, P, SETTINGS, density=1.0).read(replace(problem_of_rows(5), train=np.array([0])))
    (_, passed, _), _ = inputs.views(np.array([0]))
    expected = propagation(torch.zeros(1, P, P, dtype=torch.bool))
    np.testing.assert_array_equal(expected[0], np.eye(P))
    expected[0, :2, :2] = 0.5
    np.testing.assert_allclose(passed, expected)


@pytest.mark.parametrize(("parcels", "density", "said"), [(P + 1, 0.1, "not those of 13"), (P, 0.0, "above 0")])
def test_a_graph_that_cannot_be_is_refused(parcels: int, density: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GCN(np.zeros((2, P * (P - 1) // 2), dtype=np.float32), parcels, SETTINGS, density)
