"""Functional networks from parcel features by nearest neighbours (paper, Table 4 and Sec. 4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from brainlm.config import Section, to_tree
from brainlm.errors import ConfigError
from eval.cohort import BoolArray, Cohort, FloatArray
from eval.features import attention, functional_connectivity, recording_windows, standardised, without_self
from eval.models import MethodSpec, Network, load_network
from eval.neighbours import FOLD_KINDS, FoldKind, IntArray, classify, majority, make_folds
from eval.results import ModelKind
from eval.task import Grouping, Runtime, Task, UnitOutput

PERMUTED = "permuted series"


@dataclass(frozen=True, kw_only=True)
class NetworksSettings(Section):
    """How parcels are divided, and how attention is averaged."""

    folds: int = 5
    """A fifth of the parcels is tested at a time: 80/20 as in the paper."""
    fold_kinds: tuple[FoldKind, ...] = FOLD_KINDS
    num_blocks: int = 10
    """Clusters of neighbouring parcels, for spatially blocked folds."""
    neighbours: tuple[int, ...] = (1, 3, 5, 7, 11, 15)
    """Candidates for k; chosen on the training parcels of each fold."""
    parts: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    layer: int = -1
    mask_ratio: float = 0.75
    """That of training; attention is averaged over masks."""
    num_masks: int = 4
    max_windows_per_recording: int = 1
    permuted_control: bool = True
    """Also give the trained network series permuted across parcels, coordinates kept."""
    seed: int = 0
    reference: str = "functional connectivity"
    """Baseline that every method is compared with, fixed in advance."""

    def __post_init__(self) -> None:
        if self.folds < 2 or self.num_blocks < self.folds:
            raise ConfigError("networks: folds must be at least 2 and num_blocks at least as many")
        if self.reference == "auto":
            raise ConfigError("networks.reference: name a baseline; parcels have no validation split to choose one on")
        if not self.neighbours or min(self.neighbours) < 1 or not self.fold_kinds or not self.parts:
            raise ConfigError("networks: neighbours (above 0), fold_kinds and parts must not be empty")
        if not 0 < self.mask_ratio < 1 or self.num_masks < 1 or self.max_windows_per_recording < 1:
            raise ConfigError("networks: mask_ratio lies between 0 and 1; num_masks and windows are at least 1")


@dataclass(frozen=True, eq=False)
class LabelledParcels:
    """Parcels that take part: columns ``index``, ``labels`` into ``names``, and a fold number each, by kind of fold."""

    index: IntArray
    labels: IntArray
    names: tuple[str, ...]
    folds: Mapping[FoldKind, IntArray]


class Networks(Task):
    """Tell a parcel's network from its features, parcel by parcel.

    Folds are the same for every recording and method. Level ``recording`` classifies within each recording (the paper;
    intervals over subjects), level ``group`` after averaging features over recordings (intervals over parcels).
    """

    name = "networks"
    version = 1

    def __init__(self, settings: NetworksSettings) -> None:
        self.settings = settings

    def hashed_settings(self) -> dict[str, Any]:
        tree = to_tree(self.settings)
        for name in ("reference", "permuted_control"):
            del tree[name]
        return tree

    def why_not(self, cohort: Cohort) -> str:
        if not cohort.recordings():
            return f"no {cohort.split} recording is {cohort.window_len} timepoints long"
        if len(_named(cohort)[1]) < 2:
            return "the atlas names fewer than two networks"
        return ""

    def reference(self) -> str:
        return self.settings.reference

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        kinds: list[tuple[str, ModelKind]] = [
            ("functional connectivity", "baseline"),
            ("raw series", "baseline"),
            ("coordinates (x, y, z)", "control"),
            ("coordinates (|x|, y, z)", "control"),
            ("majority class", "control"),
        ]
        return [MethodSpec(name=name, kind=kind, model_hash=f"{name} v1") for name, kind in kinds]

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        if spec.kind != "brainlm" or not self.settings.permuted_control:
            return []
        note = "control: the trained network on series permuted across parcels, coordinates kept"
        name = f"{spec.name}, {PERMUTED}"
        return [replace(spec, name=name, kind="control", variant=PERMUTED, notes=(*spec.notes, note))]

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        parcels = self.labelled(cohort)
        network = (
            load_network(spec, runtime.untrained_seed, runtime.device, cohort.dataset.contract)
            if spec.checkpoint
            else None
        )
        rows: list[dict[str, Any]] = []
        group: dict[str, tuple[FloatArray, FloatArray]] = {}
        subjects = set()
        for index in cohort.recordings():
            subjects.add(cohort.entry(index).subject)
            scored_P = cohort.series(index).scored_P
            ids = {**cohort.identifiers(index), "parcel": ""}
            for part, features in self._features(spec, network, cohort, index, runtime).items():
                here = scored_P & np.isfinite(features).any(axis=1)
                for kind, predicted, use in self._predict(spec, cohort, parcels, features, here):
                    rows.append(
                        {**ids, "level": "recording", "folds": kind, "part": part}
                        | class_sums(parcels.labels[use], predicted, len(parcels.names))
                    )
                if spec.name != "raw series":  # series cannot be averaged over people
                    total, counts = group.setdefault(part, (np.zeros(features.shape), np.zeros(features.shape)))
                    both = np.outer(here, scored_P)
                    total[both] += features[both]
                    counts += both
        num_recordings = len(cohort.recordings())
        for part, (total, counts) in group.items():
            here = cohort.usable_P & (counts.max(axis=1) > 0)
            mean = total / np.where(counts > 0, counts, np.nan)
            mean = np.where(np.isfinite(mean), mean, 0.0)
            mean[~here] = np.nan
            for kind, predicted, use in self._predict(spec, cohort, parcels, mean, here):
                for parcel, label, guess in zip(parcels.index[use], parcels.labels[use], predicted):
                    rows.append(
                        {
                            "group": "",
                            "subject": "",
                            "recording": "",
                            "parcel": str(parcel),
                            "level": "group",
                            "folds": kind,
                        }
                        | {"part": part}
                        | class_sums(np.array([label]), np.array([guess]), len(parcels.names))
                    )
        frame = pd.DataFrame(rows)
        frame["num_subjects"], frame["num_recordings"] = len(subjects), num_recordings
        return UnitOutput(table=frame)

    def labelled(self, cohort: Cohort) -> LabelledParcels:
        """Return the parcels with a network, and the folds they are in."""
        index, names, labels = _named(cohort)
        coords_mm = cohort.dataset.contract.atlas.coords_mm[index]
        settings = self.settings
        folds = {
            kind: make_folds(kind, coords_mm, settings.folds, settings.num_blocks, settings.seed)
            for kind in settings.fold_kinds
        }
        return LabelledParcels(index, labels, names, folds)

    def _features(
        self, spec: MethodSpec, network: Network | None, cohort: Cohort, index: int, runtime: Runtime
    ) -> dict[str, FloatArray]:
        settings = self.settings
        if network is not None:
            return attention(
                network,
                cohort,
                index,
                parts=settings.parts,
                layer=settings.layer,
                mask_ratio=settings.mask_ratio,
                num_masks=settings.num_masks,
                max_windows=settings.max_windows_per_recording,
                seed=settings.seed,
                batch_size=runtime.batch_size,
                permute_series=spec.variant == PERMUTED,
            )
        cut = recording_windows(cohort, index, settings.max_windows_per_recording)
        series = cut.measured if cut.kept.sum() > 1 else np.zeros((cohort.num_parcels, 2), np.float32)  # tells nothing
        if spec.name == "functional connectivity":
            return {"": functional_connectivity(series)}
        if spec.name == "raw series":
            return {"": series.astype(np.float64)}
        return {"": np.zeros((cohort.num_parcels, cohort.num_parcels))}  # controls know no signal

    def _predict(
        self, spec: MethodSpec, cohort: Cohort, parcels: LabelledParcels, features: FloatArray, here: BoolArray
    ) -> list[tuple[FoldKind, IntArray, IntArray]]:
        """Classify the labelled parcels that are `here`; also return their positions among the labelled ones."""
        use = np.flatnonzero(here[parcels.index])
        index, labels = parcels.index[use], parcels.labels[use]
        out = []
        distance: FloatArray = np.zeros((len(use), len(use)))
        if spec.name.startswith("coordinates"):
            coords = cohort.dataset.contract.atlas.coords_mm[index].astype(np.float64)
            if "|x|" in spec.name:
                coords[:, 0] = np.abs(coords[:, 0])
            distance = np.sqrt(((coords[:, None] - coords[None]) ** 2).sum(-1))
        elif spec.name != "majority class":
            if spec.name != "raw series":
                features = without_self(features[np.ix_(here, here)])
                rows = features[np.searchsorted(np.flatnonzero(here), index)]
            else:
                rows = features[index]
            unit = standardised(rows)
            distance = 1 - unit @ unit.T
        for kind, folds in parcels.folds.items():
            if spec.name == "majority class":
                predicted = majority(labels, folds[use])
            else:
                predicted = classify(distance, labels, folds[use], len(parcels.names), self.settings.neighbours)
            out.append((kind, predicted, use))
        return out

    def groupings(self, table: pd.DataFrame) -> list[tuple[pd.DataFrame, Grouping]]:
        conditions = ("level", "folds", "part")
        by_subject = table[table["level"] == "recording"].drop(columns=["parcel", "num_subjects", "num_recordings"])
        by_parcel = table[table["level"] == "group"]
        return [
            (by_subject, Grouping(conditions=conditions, metrics=METRICS, not_in_reference=("part",))),
            (by_parcel, Grouping(conditions=conditions, unit="parcel", metrics=METRICS, not_in_reference=("part",))),
        ]


def _named(cohort: Cohort) -> tuple[IntArray, tuple[str, ...], IntArray]:
    """Return columns with a network of at least two parcels, the networks' names, and the labels of those columns."""
    networks = cohort.dataset.contract.atlas.networks
    if networks is None:
        return np.zeros(0, np.int64), (), np.zeros(0, np.int64)
    usable = [i for i in np.flatnonzero(cohort.usable_P) if networks[i]]
    counts = pd.Series([networks[i] for i in usable], dtype=object).value_counts()
    names = tuple(sorted(str(name) for name, count in counts.items() if count >= 2))
    index = np.array([i for i in usable if networks[i] in names], dtype=np.int64)
    return index, names, np.array([names.index(networks[i]) for i in index], dtype=np.int64)


def class_sums(labels: IntArray, predicted: IntArray, num_classes: int) -> dict[str, float]:
    """Return numbers of parcels and of correct ones, in all and by class."""
    correct = labels == predicted
    sums: dict[str, float] = {"n": float(len(labels)), "correct": float(correct.sum())}
    for c in range(num_classes):
        sums[f"n_{c}"] = float((labels == c).sum())
        sums[f"correct_{c}"] = float((correct & (labels == c)).sum())
    return sums


def accuracy(sums: Mapping[str, FloatArray]) -> FloatArray:
    return sums["correct"] / sums["n"]


def balanced_accuracy(sums: Mapping[str, FloatArray]) -> FloatArray:
    """Return the mean over classes of the fraction correct; classes without a parcel are left out."""
    counts = np.stack([sums[name] for name in sums if name.startswith("n_")])
    correct = np.stack([sums[name] for name in sums if name.startswith("correct_")])
    recall = correct / np.where(counts > 0, counts, 1.0)
    out: FloatArray = recall.sum(axis=0) / np.maximum((counts > 0).sum(axis=0), 1)
    return out


METRICS = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy}
