"""Reconstruction of hidden tokens (paper, Table 1 and Fig. 3), hidden at random or in other ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from brainlm.config import Section, to_tree
from brainlm.errors import ConfigError, DataError
from brainlm.masking import MaskKind
from eval.baselines.gaussian import Gaussian
from eval.baselines.optimum import Optimum, read_truth, why_no_optimum
from eval.baselines.simple import Interpolation, Mean
from eval.baselines.space_time import SpaceTimeGaussian
from eval.cohort import BoolArray, Cohort, FloatArray, Window
from eval.external import external_class, external_spec, is_external
from eval.masks import draw_mask
from eval.models import Method, MethodSpec, load_network
from eval.reference import AUTO, NUM_VALIDATION
from eval.scoring import METRICS, SUMS, Centring, Scored, blocks, predict_windows, window_sums
from eval.task import Grouping, Runtime, Task, UnitOutput

IN_PARCELS = ("n", "sse", "sst")
"""Sums that are also kept parcel by parcel."""
BASELINES = ("mean", "interpolation", "gaussian", "gaussian space x time", "gaussian adapted")


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings(Section):
    """What is hidden, which baselines stand beside, and what the Gaussian ones may choose from."""

    mask_kinds: tuple[MaskKind, ...] = ("random",)
    """``random`` tokens, whole ``parcels``, ``time_blocks`` of all parcels, the ``future``: the last patches."""
    mask_ratios: tuple[float, ...] = (0.2, 0.5, 0.75)
    centrings: tuple[Centring, ...] = ("recording", "visible")
    """``recording``: series as stored (the paper). ``visible``: also centred on visible values alone (no leak)."""
    max_windows_per_recording: int = 1
    seed: int = 0
    baselines: tuple[str, ...] = BASELINES
    """By name, or ``package.module:Class`` of your own."""
    shrinkages: tuple[float, ...] = (0.001, 0.01, 0.03, 0.1, 0.3)
    own_weights: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7)
    """Of the baseline ``gaussian adapted``; empty leaves that baseline out."""
    noises: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6)
    """Shares of private noise of the baseline ``gaussian space x time``; empty leaves that baseline out."""
    num_tuning_windows: int = 8
    num_examples: int = 3
    """Windows whose predictions are kept for figures, at the middle mask ratio."""
    reference: str = AUTO
    """Baseline that every method is compared with; ``auto`` = the one that is best on validation recordings."""

    def __post_init__(self) -> None:
        if not self.mask_ratios or any(not 0 < ratio < 1 for ratio in self.mask_ratios):
            raise ConfigError(
                f"reconstruction.mask_ratios: expected fractions between 0 and 1, found {self.mask_ratios}"
            )
        unknown = [name for name in self.baselines if name not in BASELINES and not is_external(name)]
        if unknown or len(set(self.baselines)) < len(self.baselines):
            raise ConfigError(
                f"reconstruction.baselines: expected some of {', '.join(BASELINES)}, or package.module:Class, each "
                f"once, found {', '.join(unknown) or 'one twice'}"
            )
        if not self.mask_kinds or len(set(self.mask_kinds)) < len(self.mask_kinds):
            raise ConfigError("reconstruction.mask_kinds: name at least one, each once")
        if not self.centrings or not self.shrinkages:
            raise ConfigError("reconstruction: centrings and shrinkages must not be empty")
        if any(not 0 < weight < 1 for weight in self.shrinkages + self.own_weights + self.noises):
            raise ConfigError("reconstruction: shrinkages, own_weights and noises must lie between 0 and 1")
        if self.max_windows_per_recording < 1 or self.num_tuning_windows < 1 or self.num_examples < 0:
            raise ConfigError("reconstruction: numbers of windows must be at least 1")


class Reconstruction(Task):
    """Hide tokens, rebuild them, score hidden values only.

    Every method sees the same masks. Parcels that are missing or do not vary are not scored, nor are censored
    timepoints.
    """

    name = "reconstruction"
    version = 2

    def __init__(self, settings: ReconstructionSettings) -> None:
        self.settings = settings

    def hashed_settings(self) -> dict[str, Any]:
        tree = to_tree(self.settings)
        for name in ("reference", "baselines"):
            del tree[name]
        return tree

    def why_not(self, cohort: Cohort) -> str:
        return "" if cohort.recordings() else f"no {cohort.split} recording is {cohort.window_len} timepoints long"

    def reference(self) -> str:
        return self.settings.reference

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        needs = {"gaussian space x time": self.settings.noises, "gaussian adapted": self.settings.own_weights}
        names = [name for name in self.settings.baselines if needs.get(name, True)]
        specs = [
            external_spec(name)
            if is_external(name)
            else MethodSpec(name=name, kind="baseline", model_hash=f"{name} v1")
            for name in names
        ]
        if not why_no_optimum(cohort.dataset, read_truth(cohort.dataset)):
            specs.append(MethodSpec(name="optimum", kind="optimum", model_hash="optimum v1"))
        return specs

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        return []

    def method(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> Method:
        settings, contract = self.settings, cohort.dataset.contract
        if spec.checkpoint:
            return load_network(spec, runtime.untrained_seed, runtime.device, cohort.dataset.contract)
        if spec.variant:
            method: Method = external_class(spec.variant)(contract)
            return method
        if spec.name == "optimum":
            return Optimum(cohort.dataset)
        if spec.name == "gaussian space x time":
            return SpaceTimeGaussian(contract, settings.shrinkages, settings.noises, settings.num_tuning_windows)
        if spec.name.startswith("gaussian"):
            own_weights = settings.own_weights if spec.name == "gaussian adapted" else ()
            return Gaussian(contract, settings.shrinkages, own_weights, settings.num_tuning_windows)
        return Mean(contract) if spec.name == "mean" else Interpolation(contract)

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        settings = self.settings
        method = self.method(spec, cohort, runtime)
        method.fit(cohort)
        # The planted process has a known mean; what is left after other centring is no longer that process.
        centrings = tuple(c for c in settings.centrings if spec.kind != "optimum" or c == "recording")
        tables: list[pd.DataFrame] = []
        by_parcel: dict[float, dict[str, FloatArray]] = {}
        examples: list[Scored] = []
        shown = sorted(settings.mask_ratios)[len(settings.mask_ratios) // 2]
        example_refs = [w.ref for w in self._example_windows(cohort)]
        for kind, ratio in product(settings.mask_kinds, settings.mask_ratios):
            for windows in blocks(cohort.windows(settings.max_windows_per_recording)):
                parcel_parts: dict[tuple[int, int], dict[str, FloatArray]] = {}
                here = []
                for centring, item in self._predict(method, cohort, windows, kind, ratio, centrings, runtime):
                    ref = item.window.ref
                    here.append((ref.index, ref.start, centring, window_sums(item)))
                    if centring == "recording" and kind == settings.mask_kinds[0]:
                        per_parcel = window_sums(item, axis=(1,))
                        parcel_parts[ref.index, ref.start] = {name: per_parcel[name] for name in IN_PARCELS}
                        if ratio == shown and ref in example_refs:
                            examples.append(item)
                if rows := _rows(cohort, kind, ratio, here):
                    tables.append(pd.DataFrame(rows))
                total = by_parcel.get(ratio)
                for key in sorted(parcel_parts):  # in the order of the split, whatever the batches were
                    part = parcel_parts[key]
                    total = part if total is None else {name: total[name] + part[name] for name in IN_PARCELS}
                if total is not None:
                    by_parcel[ratio] = total
        if not tables:
            raise DataError(f"{cohort.dataset.name}: every hidden value of the {cohort.split} split is censored")
        parcels = pd.concat(
            [
                pd.DataFrame({"parcel": np.arange(cohort.num_parcels), "mask_ratio": ratio, **parts})
                for ratio, parts in by_parcel.items()
            ],
            ignore_index=True,
        )
        examples.sort(key=lambda item: example_refs.index(item.window.ref))
        validation = self._validation(method, replace(cohort, split="val"), runtime) if spec.kind == "baseline" else []
        return UnitOutput(
            table=pd.concat(tables, ignore_index=True),
            validation=pd.DataFrame(validation) if validation else None,
            parcels=parcels,
            examples=_example_arrays(examples, shown),
        )

    def _predict(
        self,
        method: Method,
        cohort: Cohort,
        windows: Iterable[Window],
        kind: MaskKind,
        ratio: float,
        centrings: Sequence[Centring],
        runtime: Runtime,
    ) -> Iterator[tuple[Centring, Scored]]:
        def draw(window: Window) -> BoolArray:
            return draw_mask(cohort, window.scored_P, kind, ratio, self.settings.seed, window.ref)

        return predict_windows(method, cohort, windows, draw, centrings, runtime.batch_size)

    def _validation(self, method: Method, cohort: Cohort, runtime: Runtime) -> list[dict[str, Any]]:
        """Score a baseline on validation recordings, among which the reference is chosen."""
        rows: list[dict[str, Any]] = []
        for kind, ratio in product(self.settings.mask_kinds, self.settings.mask_ratios):
            windows = cohort.windows(1, max_recordings=NUM_VALIDATION)
            centrings = self.settings.centrings[:1]
            found = self._predict(method, cohort, windows, kind, ratio, centrings, runtime)
            parts = [(item.window.ref.index, item.window.ref.start, c, window_sums(item)) for c, item in found]
            rows += _rows(cohort, kind, ratio, parts)
        return rows

    def _example_windows(self, cohort: Cohort) -> list[Window]:
        wanted = self.settings.num_examples
        return list(cohort.windows(1, max_recordings=wanted)) if wanted else []

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        return [(table, Grouping(conditions=("mask", "mask_ratio", "centring"), metrics=METRICS))]


def _rows(
    cohort: Cohort,
    kind: MaskKind,
    mask_ratio: float,
    windows: Iterable[tuple[int, int, Centring, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Add up windows (recording, start, centring, sums) to one row a recording and centring, in a fixed order."""
    parts: dict[tuple[int, Centring], dict[int, dict[str, Any]]] = {}
    for index, start, centring, sums in windows:
        parts.setdefault((index, centring), {})[start] = sums
    rows = []
    for (index, centring), of_recording in sorted(parts.items()):
        ordered = [of_recording[start] for start in sorted(of_recording)]
        if not any(part["n"] > 0 for part in ordered):  # all that was hidden is censored
            continue
        rows.append(
            {
                **cohort.identifiers(index),
                "mask": kind,
                "mask_ratio": mask_ratio,
                "centring": centring,
                "num_windows": len(ordered),
                **{name: float(sum(part[name] for part in ordered)) for name in SUMS},
            }
        )
    return rows


def _example_arrays(items: list[Scored], mask_ratio: float) -> dict[str, Any]:
    if not items:
        return {}
    truth = [item.window.bold_PW / np.where(item.window.sd_P > 0, item.window.sd_P, 1.0)[:, None] for item in items]
    scored = np.stack([item.window.scored_P for item in items])
    return {
        "kept": np.stack([item.window.kept_W for item in items]),
        "truth_z": np.where(scored[:, :, None], np.stack(truth), np.nan).astype(np.float32),
        "mask": np.stack([item.mask for item in items]),
        "prediction": np.stack([item.prediction for item in items]).astype(np.float32),
        "mask_ratio": np.array(mask_ratio),
    }
