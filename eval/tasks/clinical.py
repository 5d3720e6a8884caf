"""Clinical variables from recordings, by cross-validation over people that no checkpoint has seen (paper, Table 2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainlm.checkpoint import train_subjects
from brainlm.config import config_hash, to_tree
from brainlm.embedding import why_no_parcels
from brainlm.errors import ConfigError, DataError
from brainlm.targets import Target, TargetSettings, label_of
from eval.clinical import features
from eval.clinical.finetuned import FineTuned
from eval.clinical.fold_work import KEPT, REMOVED, MakePredictor, confounds_of, work
from eval.clinical.folds import Fold, random_folds, site_folds
from eval.clinical.people import People, find_people
from eval.clinical.predictors import (
    CONNECTIVITY,
    COVARIANCES,
    END_TO_END,
    NEEDED,
    RAW_SERIES,
    Constant,
    baseline_predictor,
    confounds_predictor,
    readout_predictor,
)
from eval.clinical.problem import Predictor
from eval.clinical.scores import clinical_scores
from eval.clinical.settings import ClinicalSettings
from eval.cohort import Cohort
from eval.models import MethodSpec, load_network, open_model
from eval.results import ModelKind, Score
from eval.task import Features, Runtime, ScoreContext, Task, UnitOutput

CONFOUNDS, CONSTANT, PERMUTED = "confounds only", "constant", "permuted targets"
BETWEEN = " | "
FINE_TUNED = "fine-tuned"
OF_PARCELS = ("parcels", "attentive")
MIN_PEOPLE = 10


class Clinical(Task):
    """Predict columns of phenotypes for people that nothing was fitted on.

    Rows are recordings. People are divided by family, else subject; everything that is fitted (transform of the target,
    scale of features, removal of confounds, settings) is fitted within the training rows of a fold.
    """

    name = "clinical"
    version = 1

    def __init__(self, settings: ClinicalSettings) -> None:
        self.settings = settings

    def hashed_settings(self) -> dict[str, Any]:
        tree = to_tree(self.settings)
        for name in ("reference", "baselines", "repeats", "readouts", "finetune", "fold_kinds", "permuted_control"):
            del tree[name]
        return tree

    def hashed_data(self, cohort: Cohort) -> str:
        people = find_people(cohort, self.settings)
        columns = [target.column for target in self.settings.targets]
        columns += [name for name in (*self.settings.confounds, *self.settings.by, "site") if people.source.has(name)]
        values = {column: [f"{type(v).__name__} {label_of(v)}" for v in people.values(column)] for column in columns}
        return config_hash({"people": people.content_hash(), "values": values})

    def why_not(self, cohort: Cohort) -> str:
        settings = self.settings
        if not settings.targets:
            return "no target is given (clinical.targets: [{column: age}], for instance)"
        try:
            people = find_people(cohort, settings)
        except DataError as error:
            return str(error)
        for target in settings.targets:  # a mistake in a target is not passed over
            Target.fit(target, people.values(target.column))
        num = len(set(people.groups))
        if num < MIN_PEOPLE:
            whom = "that no checkpoint was pretrained on" if settings.of == "unseen" else f"in {cohort.split}"
            return f"{num} subjects or families {whom}, at least {MIN_PEOPLE} are needed"
        if not self._folds(people):
            return "there is one site, and clinical.fold_kinds names no other folds"
        names = [*settings.baselines, CONFOUNDS, CONSTANT]
        if settings.reference not in ("auto", *names):
            raise ConfigError(
                f"clinical.reference: expected auto or one of {'; '.join(names)}, found {settings.reference}"
            )
        return ""

    def baselines(self, cohort: Cohort) -> list[MethodSpec]:
        found = [MethodSpec(name=name, kind="baseline", model_hash=f"{name} v1") for name in self.settings.baselines]
        found += [MethodSpec(name=name, kind="control", model_hash=f"{name} v1") for name in (CONFOUNDS, CONSTANT)]
        if self.settings.permuted_control and "FC, linear" in self.settings.baselines:
            found.append(_permuted(MethodSpec(name="FC, linear", kind="control", model_hash="FC, linear v1")))
        return found

    def controls(self, spec: MethodSpec) -> list[MethodSpec]:
        if spec.kind != "brainlm" or not self.settings.permuted_control or "linear" not in self.settings.readouts:
            return []
        return [_permuted(spec)]

    def parts(self, spec: MethodSpec, cohort: Cohort) -> list[str]:
        readouts = self._readouts(spec)
        if self._reads_parcels and spec.checkpoint and why_no_parcels(open_model(spec.checkpoint)):
            readouts = [readout for readout in readouts if readout not in OF_PARCELS]
            if not readouts:
                raise ConfigError(
                    f"clinical.readouts: none of {', '.join(self.settings.readouts)} can be had of {spec.name} "
                    f"({why_no_parcels(open_model(spec.checkpoint))}): add linear, SVR or fine-tuned"
                )
        return list(self._pieces(readouts, find_people(cohort, self.settings)))

    def warnings(self, spec: MethodSpec, cohort: Cohort) -> list[str]:
        lacking = [readout for readout in self._readouts(spec) if readout in OF_PARCELS]
        reason = why_no_parcels(open_model(spec.checkpoint)) if spec.checkpoint and lacking else ""
        return [f"{spec.name} has no readout {' or '.join(lacking)}: {reason}"] if reason else []

    def left_out(self, cohort: Cohort) -> Mapping[str, int]:
        return find_people(cohort, self.settings).left_out

    def prepared(self, spec: MethodSpec) -> list[MethodSpec]:
        if spec.checkpoint:
            kind: ModelKind = "untrained" if spec.kind == "untrained" else "brainlm"
            what = "embeddings and those of parcels" if self._reads_parcels else "embeddings"
            return [replace(spec, name=f"{what} of {_bare(spec)}", kind=kind, variant="", part="", notes=())]
        name = NEEDED.get(_bare(spec))
        return [MethodSpec(name=name, kind="baseline", model_hash=f"{name} v1")] if name else []

    def prepare(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> Features:
        people = find_people(cohort, self.settings)
        if not spec.checkpoint:
            makers = {
                CONNECTIVITY: features.connectivity,
                COVARIANCES: features.covariances,
                RAW_SERIES: features.raw_series,
            }
            return makers[spec.name](people)
        network = load_network(spec, runtime.untrained_seed, runtime.device, cohort.dataset.contract)
        per_parcel = self._reads_parcels and not why_no_parcels(network.model)
        return features.embeddings(people, network.model, runtime.batch_size, per_parcel)

    def compute(self, spec: MethodSpec, cohort: Cohort, runtime: Runtime) -> UnitOutput:
        people = find_people(cohort, self.settings)
        readout, fold = self._pieces(self._readouts(spec), people)[spec.part]
        answers, fits = work(
            people,
            fold,
            self.settings,
            self._maker(spec, readout, people, fold, runtime),
            removals=self._removals(spec, readout),
            readout=readout,
            permuted=spec.variant == PERMUTED,
        )
        return UnitOutput(table=answers, validation=fits)

    def scores(self, outputs: Sequence[tuple[MethodSpec, UnitOutput]], context: ScoreContext) -> list[Score]:
        return clinical_scores(self.settings, self.version, outputs, context)

    @property
    def _reads_parcels(self) -> bool:
        return any(readout in OF_PARCELS for readout in self.settings.readouts)

    def _readouts(self, spec: MethodSpec) -> Sequence[str]:
        """Return the readouts of a network that are asked for; of a baseline "" alone."""
        if not spec.checkpoint:
            return [""]
        return ["linear"] if spec.variant == PERMUTED else self.settings.readouts

    def _pieces(self, readouts: Sequence[str], people: People) -> dict[str, tuple[str, Fold]]:
        """Name the pieces of work: readout and fold, and of fine-tuning the edition of its configuration."""
        found = {}
        for readout in readouts:
            edition = [self._finetune_edition()] if readout == FINE_TUNED else []
            for fold in self._folds(people):
                found[BETWEEN.join([*([readout] if readout else []), fold.label, *edition])] = readout, fold
        return found

    def _folds(self, people: People) -> list[Fold]:
        settings = self.settings
        found: list[Fold] = []
        if "random" in settings.fold_kinds:
            found += random_folds(list(people.groups), settings.folds, settings.repeats, settings.seed)
        if "sites" in settings.fold_kinds:
            found += site_folds(people.groups, people.sites())
        return found

    def _removals(self, spec: MethodSpec, readout: str) -> list[str]:
        cannot = readout in END_TO_END or _bare(spec) in (*END_TO_END, CONFOUNDS, CONSTANT)
        return [KEPT] if cannot or spec.variant == PERMUTED or not self.settings.remove_confounds else [KEPT, REMOVED]

    def _maker(self, spec: MethodSpec, readout: str, people: People, fold: Fold, runtime: Runtime) -> MakePredictor:
        """Return what makes the predictor of a target; most are the same for all, and made once."""
        if spec.name == CONFOUNDS:
            return lambda wanted: confounds_predictor(confounds_of(people, self.settings, wanted))
        if readout == FINE_TUNED:
            return lambda wanted: self._fine_tuned(spec, wanted, people, fold, runtime)
        predictor: Predictor
        if spec.name == CONSTANT:
            predictor = Constant()
        elif spec.checkpoint:
            (arrays,) = runtime.prepared.values()
            predictor = readout_predictor(readout, arrays, self.settings, runtime.device)
        else:
            predictor = baseline_predictor(_bare(spec), people, fold, runtime.prepared, self.settings, runtime.device)
        return lambda wanted: predictor

    def _finetune_edition(self) -> str:
        """Return a hash of the configuration that is fine-tuned with: another text, and those units are done again."""
        if self.settings.finetune is None:
            return ""
        try:
            return hashlib.sha256(Path(self.settings.finetune).read_bytes()).hexdigest()[:8]
        except OSError as error:
            raise ConfigError(
                f"clinical.finetune: {self.settings.finetune} cannot be read ({error.strerror})"
            ) from error

    def _fine_tuned(
        self, spec: MethodSpec, wanted: TargetSettings, people: People, fold: Fold, runtime: Runtime
    ) -> Predictor:
        """Return the network with a head, trained from end to end by train/finetune.py."""
        assert self.settings.finetune is not None
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{spec.name} {wanted.column} {fold.label}").strip("-")
        return FineTuned(
            people,
            checkpoint=spec.checkpoint,
            config=self.settings.finetune,
            folder=f"{runtime.out}/finetuned/{name}",
            untrained=spec.kind == "untrained",
            allow_seen=spec.checkpoint not in people.cohort.pretrained or train_subjects(spec.checkpoint) is None,
            threads=runtime.threads,
        )


def _permuted(spec: MethodSpec) -> MethodSpec:
    note = "control: targets were exchanged among people, so that there is nothing to be found"
    name = f"{spec.name}, {PERMUTED}"
    return replace(spec, name=name, kind="control", variant=PERMUTED, notes=(*spec.notes, note))


def _bare(spec: MethodSpec) -> str:
    return spec.name.removesuffix(f", {PERMUTED}")
