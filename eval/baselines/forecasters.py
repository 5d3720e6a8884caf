"""The forecasting baselines by name: how each is made, which edition it is, and what it may spend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from brainlm.config import Section, config_hash, to_tree
from brainlm.errors import ConfigError
from brainlm.fitting import FitSettings
from brainlm.input_contract import InputContract
from eval.baselines.autoregressive import Autoregressive
from eval.baselines.simple import Mean, Persistence
from eval.external import external_class, external_spec, is_external
from eval.models import Method, MethodSpec

FAST = ("mean", "persistence", "autoregression", "ridge VAR", "DLinear")
TRAINED = ("DLinear", "LSTM", "Neural ODE", "Latent ODE")


@dataclass(frozen=True, kw_only=True)
class ForecasterSettings(Section):
    """What trained forecasters may choose from on validation, and how long they train."""

    orders: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 16, 24)
    """Of the autoregression."""
    var_components: tuple[int, ...] = (8, 32, 100)
    var_orders: tuple[int, ...] = (1, 2, 4)
    var_penalties: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Of the ridge-VAR, as fractions of the mean variance of its components."""
    lstm_hidden_sizes: tuple[int, ...] = (256,)
    fit: FitSettings = field(default_factory=FitSettings)
    """Of DLinear, LSTM, Neural ODE and Latent ODE alike."""

    def __post_init__(self) -> None:
        numbers = (self.orders, self.var_components, self.var_orders, self.lstm_hidden_sizes)
        if any(not of_one or min(of_one) < 1 for of_one in numbers):
            raise ConfigError(
                "forecasting.forecasters: orders, var_components, var_orders and lstm_hidden_sizes are lists of "
                "numbers of at least 1"
            )
        if not self.var_penalties or min(self.var_penalties) < 0:
            raise ConfigError("forecasting.forecasters.var_penalties: expected at least one, none below 0")

    def of(self, name: str) -> dict[str, Any]:
        """Return what a baseline's forecasts depend on."""
        prefixes = {"autoregression": ("orders",), "ridge VAR": ("var_",), "LSTM": ("fit", "lstm_")}
        chosen = prefixes.get(name, ("fit",) if name in TRAINED else ())
        return {key: value for key, value in to_tree(self).items() if key.startswith(chosen)} if chosen else {}

    def budget(self, name: str) -> str:
        """Say what a trained baseline may spend, "" for others."""
        if name not in TRAINED:
            return ""
        candidates = len(self.fit.lrs) * (len(self.lstm_hidden_sizes) if name == "LSTM" else 1)
        return (
            f"trained here: at most {self.fit.steps} steps of {self.fit.batch_size} windows for each of "
            f"{candidates} candidates, chosen on val"
        )


def _lstm(contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    from eval.baselines.lstm import LSTM

    return LSTM(contract, horizon, settings.fit, settings.lstm_hidden_sizes)


def _dlinear(contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    from eval.baselines.dlinear import DLinear

    return DLinear(contract, horizon, settings.fit)


def _neural_ode(contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    from eval.baselines.neural_ode import NeuralODE

    return NeuralODE(contract, horizon, settings.fit)


def _latent_ode(contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    from eval.baselines.latent_ode import LatentODE

    return LatentODE(contract, horizon, settings.fit)


def _ridge_var(contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    from eval.baselines.ridge_var import RidgeVAR

    return RidgeVAR(contract, horizon, settings.var_components, settings.var_orders, settings.var_penalties)


Maker = Callable[[InputContract, int, ForecasterSettings], Method]
MAKERS: dict[str, tuple[int, Maker]] = {
    "mean": (1, lambda contract, horizon, settings: Mean(contract)),
    "persistence": (1, lambda contract, horizon, settings: Persistence(contract)),
    "autoregression": (1, lambda contract, horizon, settings: Autoregressive(contract, settings.orders, horizon)),
    "ridge VAR": (1, _ridge_var),
    "DLinear": (1, _dlinear),
    "LSTM": (1, _lstm),
    "Neural ODE": (1, _neural_ode),
    "Latent ODE": (1, _latent_ode),
}
"""By name: the edition, raised when what a baseline computes changes, and how it is made."""


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names that nobody knows, or that are given twice."""
    unknown = [name for name in names if name not in MAKERS and not is_external(name)]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"forecasting.baselines: expected some of {', '.join(MAKERS)}, or package.module:Class, each once, found "
            f"{', '.join(unknown) or 'one twice'}"
        )


def forecaster_spec(name: str, settings: ForecasterSettings) -> MethodSpec:
    if is_external(name):
        return external_spec(name)
    budget = settings.budget(name)
    edition = f"{name} v{MAKERS[name][0]} {config_hash(settings.of(name))}"
    return MethodSpec(name=name, kind="baseline", model_hash=edition, notes=(budget,) if budget else ())


def make_forecaster(spec: MethodSpec, contract: InputContract, horizon: int, settings: ForecasterSettings) -> Method:
    """Make a baseline; one of your own is called with the contract and the horizon."""
    if spec.variant:
        method: Method = external_class(spec.variant)(contract, horizon)
        return method
    return MAKERS[spec.name][1](contract, horizon, settings)
