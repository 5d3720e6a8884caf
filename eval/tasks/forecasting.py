"""Forecasting the end of a window (paper, Table 3 and Fig. 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from brainlm.config import Section, to_tree
from brainlm.errors import ConfigError, DataError
from eval.baselines.forecasters import FAST, ForecasterSettings, check_names, forecaster_spec, make_forecaster
from eval.baselines.optimum import MEAN_UNKNOWN, Optimum, read_truth, why_no_optimum
from eval.cohort import BoolArray, Cohort, Window
from eval.models import Method, MethodSpec, load_network
from eval.reference import AUTO, NUM_VALIDATION
from eval.scoring import METRICS, SUMS, Centring, blocks, predict_windows, window_sums
from eval.task import Grouping, Runtime, Task, UnitOutput


@dataclass(frozen=True, kw_only=True)
class ForecastingSettings(Section):
    """How far ahead, and which baselines stand beside."""

    horizons: tuple[int, ...] = (20,)
    """Timepoints predicted at the end of each window; multiples of the patch length."""
    max_windows_per_recording: int = 1
    baselines: tuple[str, ...] = FAST
    """By name, or ``package.module:Class`` of your own; LSTM, Neural ODE and Latent ODE take longer to train."""
    forecasters: ForecasterSettings = field(default_factory=ForecasterSettings)
    reference: str = AUTO
    """Baseline that every method is compared with; ``auto`` = the one that is best on validation recordings."""

    def __post_init__(self) -> None:
        if not self.horizons or any(horizon < 1 for horizon in self.horizons):
            raise ConfigError(f"forecasting.horizons: expected at least one, each above 0, found {self.horizons}")
        if self.max_windows_per_recording < 1:
            raise ConfigError("forecasting.max_windows_per_recording must be at least 1")
        check_names(self.baselines)


class Forecasting(Task):
    """Observe the beginning of a window and predict its last timepoints.

    Nothing of the future is used: each parcel is centred on the mean of its observed part. Only `optimum` is given
    series centred on the whole recording, because the planted process has a known mean; `optimum, mean unknown` is
    given what all others are given. Censored timepoints are not scored.
    """

    name = "forecasting"
    version = 2

    def __init__(self, settings: ForecastingSettings) -> None:
        self.settings = settings

    def hashed_settings(self) -> dict[str, Any]:
        tree = to_tree(self.settings)
        for name in ("reference", "baselines", "forecasters"):  # these are part of each baseline's own hash
            del tree[name]
        return tree

    def why_not(self, cohort: Cohort) -> str:
        for horizon in self.settings.horizons:
            if horizon % cohort.patch_len or horizon >= cohort.window_len:
                raise ConfigError(
                    f"forecasting.horizons: {horizon} must be a multiple of the patch length {cohort.patch_len} and "
                    f"below the window length {cohort.window_len}"
                )
        return "" if cohort.recordings() else f"no {cohort.split} recording is {cohort.window_len} timepoints long"

    def reference(self) -> str:
        return self.settings.reference

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        specs = [forecaster_spec(name, self.settings.forecasters) for name in self.settings.baselines]
        if not why_no_optimum(cohort.dataset, read_truth(cohort.dataset)):
            notes = ("knows the mean of the whole recording",)
            specs.append(MethodSpec(name="optimum", kind="optimum", model_hash="optimum v1", notes=notes))
            specs.append(MethodSpec(name=MEAN_UNKNOWN, kind="optimum", model_hash=f"{MEAN_UNKNOWN} v1"))
        return specs

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        return []

    def method(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime, horizon: int) -> Method:
        contract = cohort.dataset.contract
        if spec.checkpoint:
            return load_network(spec, runtime.untrained_seed, runtime.device, cohort.dataset.contract)
        if spec.kind == "optimum":
            return Optimum(cohort.dataset, mean_known=spec.name != MEAN_UNKNOWN)
        return make_forecaster(spec, contract, horizon, self.settings.forecasters)

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        centring: Centring = "recording" if spec.name == "optimum" else "visible"
        tables: list[pd.DataFrame] = []
        validation: list[dict[str, Any]] = []
        for horizon in self.settings.horizons:
            method = self.method(spec, cohort, runtime, horizon)
            method.fit(cohort)
            for windows in blocks(cohort.windows(self.settings.max_windows_per_recording)):
                if rows := _rows(method, cohort, windows, horizon, centring, runtime.batch_size):
                    tables.append(pd.DataFrame(rows))
            if spec.kind == "baseline":
                held_out = replace(cohort, split="val")
                windows = held_out.windows(1, max_recordings=NUM_VALIDATION)
                validation += _rows(method, held_out, windows, horizon, centring, runtime.batch_size)
        if not tables:
            raise DataError(f"{cohort.dataset.name}: every hidden value of the {cohort.split} split is censored")
        return UnitOutput(
            table=pd.concat(tables, ignore_index=True), validation=pd.DataFrame(validation) if validation else None
        )

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        return [(table.drop(columns="step"), Grouping(conditions=("horizon",), metrics=METRICS))]


def _rows(
    method: Method, cohort: Cohort, windows: Iterable[Window], horizon: int, centring: Centring, batch_size: int
) -> list[dict[str, Any]]:
    """Forecast windows and return sums, one row a recording and step ahead, in a fixed order."""

    def draw(window: Window) -> BoolArray:
        return future_mask(cohort, window.scored_P, horizon)

    sums: dict[int, dict[int, dict[str, Any]]] = {}
    for _, item in predict_windows(method, cohort, windows, draw, (centring,), batch_size):
        ref = item.window.ref
        sums.setdefault(ref.index, {})[ref.start] = {
            name: part[-horizon:] for name, part in window_sums(item, axis=(0,)).items()
        }
    rows = []
    for index, parts in sorted(sums.items()):
        ordered = [parts[start] for start in sorted(parts)]
        total = {name: np.sum([part[name] for part in ordered], axis=0) for name in SUMS}
        for step in range(1, horizon + 1):
            if total["n"][step - 1] == 0:  # censored in every window of this recording
                continue
            rows.append(
                {
                    **cohort.identifiers(index),
                    "horizon": horizon,
                    "step": step,
                    "num_windows": len(ordered),
                    **{name: float(total[name][step - 1]) for name in SUMS},
                }
            )
    return rows


def future_mask(cohort: Cohort, scored_P: BoolArray, horizon: int) -> BoolArray:
    """Return the mask (L,) that hides the last `horizon` timepoints of every parcel, and missing parcels."""
    mask = np.zeros((cohort.num_parcels, cohort.num_patches), dtype=bool)
    mask[:, -(horizon // cohort.patch_len) :] = True
    mask[~scored_P] = True
    return mask.reshape(-1)
