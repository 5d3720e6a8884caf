"""From settings to work: open the data, look at the checkpoints, refuse what may not be compared, list the units."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from brainlm.config import config_hash
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import ConfigError, DataError
from brainlm.input_contract import InputContract
from brainlm.store import Store
from eval.cohort import Cohort
from eval.external import external_class, is_external
from eval.models import CheckpointInfo, MethodSpec, describe_checkpoints
from eval.reference import AUTO
from eval.settings import EvalSettings
from eval.task import Task, Unit
from eval.tasks.clinical import Clinical
from eval.tasks.forecasting import Forecasting
from eval.tasks.networks import Networks
from eval.tasks.reconstruction import Reconstruction


def make_tasks(settings: EvalSettings) -> dict[str, Task]:
    """Make the tasks that the settings ask for, by their names.

    Raises
    ------
    ConfigError
        If one of the user's own cannot be imported, or two have the same name.
    """
    tasks = [make_task(name, settings) for name in settings.tasks]
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ConfigError(f"tasks: two have the same name, {', '.join(task.name for task in tasks)}")
    return by_name


def make_task(name: str, settings: EvalSettings) -> Task:
    if is_external(name):
        task: Task = external_class(name)()
        return task
    if name == "reconstruction":
        return Reconstruction(settings.reconstruction)
    if name == "forecasting":
        return Forecasting(settings.forecasting)
    if name == "networks":
        return Networks(settings.networks)
    assert name == "clinical", name
    return Clinical(settings.clinical)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything that is to be done, plain enough to be sent to workers.

    Parameters
    ----------
    settings : EvalSettings
    usable : tuple of bool
        Parcels that the data set and all checkpoints can use.
    window_len, patch_len, patch_parcels : int
    units : tuple of Unit
    skipped : mapping
        Task by name: why the data set does not allow it.
    warnings : tuple of str
    checkpoints : tuple of CheckpointInfo
    pretrained : tuple of str
        Folders of the checkpoints whose subjects may not be tested.
    """

    settings: EvalSettings
    usable: tuple[bool, ...]
    window_len: int
    patch_len: int
    patch_parcels: int = 1
    units: tuple[Unit, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    checkpoints: tuple[CheckpointInfo, ...] = ()
    pretrained: tuple[str, ...] = ()

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.settings.dataset)

    def cohort(self) -> Cohort:
        key = hashlib.sha256(f"subjects evaluated in {self.dataset.content_hash}".encode()).digest()
        return Cohort(
            dataset=self.dataset,
            split=self.settings.split,
            usable_P=np.array(self.usable, dtype=bool),
            window_len=self.window_len,
            patch_len=self.patch_len,
            subject_key=key,
            patch_parcels=self.patch_parcels,
            pretrained=self.pretrained,
        )

    def for_workers(self) -> Plan:
        """Return what a worker needs; local paths are absolute, because its working directory may be another."""
        clinical = self.settings.clinical
        settings = replace(
            self.settings,
            dataset=absolute(self.settings.dataset),
            out=absolute(self.settings.out),
            checkpoints=tuple(absolute(folder) for folder in self.settings.checkpoints),
            clinical=replace(clinical, finetune=absolute(clinical.finetune) if clinical.finetune else None),
        )
        pretrained = tuple(absolute(folder) for folder in self.pretrained)
        return replace(self, settings=settings, units=(), checkpoints=(), pretrained=pretrained)


def absolute(url: str) -> str:
    """Return a local path as an absolute one, and any other URL as it is."""
    store = Store(url)
    return store.path() if store.is_local else url


def unit_for_worker(unit: Unit) -> Unit:
    """Return a unit whose checkpoint is found from anywhere."""
    spec = unit.spec
    needs = tuple(unit_for_worker(needed) for needed in unit.needs)
    if spec.checkpoint:
        spec = replace(spec, checkpoint=absolute(spec.checkpoint))
    return replace(unit, spec=spec, needs=needs)


def make_plan(settings: EvalSettings) -> Plan:
    """Work out what must be computed.

    Raises
    ------
    CheckpointError
        If a checkpoint is incomplete or was made for other parcels.
    DataError
        If a checkpoint was trained on subjects of the split, or the data set is not finished.
    """
    dataset = open_dataset(settings.dataset)
    entries = dataset.split(settings.split).entries
    if not entries:
        raise DataError(f"{settings.dataset}: the split {settings.split!r} has no recordings")
    subjects = [entry.subject for entry in entries]
    infos = describe_checkpoints(settings.checkpoints, subjects, settings.allow_seen_subjects)
    contract, usable, warnings = dataset.contract, dataset.contract.usable, []
    network_specs: list[MethodSpec] = []
    for info in infos:
        info.contract.check_fits(contract, ours=f"the checkpoint {info.folder}", theirs=f"the data set {dataset.name}")
        usable = usable & info.contract.usable
        differences = info.contract.adaptable_differences(contract)
        notes = info.notes + tuple(f"checkpoint against data set: {line}" for line in differences)
        if info.num_seen_subjects:
            notes += (f"trained on {info.num_seen_subjects} of the {len(set(subjects))} subjects scored here",)
        warnings += [f"{info.name}: {note}" for note in notes]
        input_hash = hashlib.sha256(info.contract.dumps().encode()).hexdigest()
        trained = MethodSpec(
            name=info.name,
            kind="brainlm",
            model_hash=info.weights_sha256,
            checkpoint=info.folder,
            input_hash=input_hash,
            notes=notes,
        )
        specs = [trained]
        if settings.include_untrained:
            identity = config_hash({"untrained": info.config, "seed": settings.untrained_seed})
            name = "untrained" if len(infos) == 1 else f"untrained ({info.name})"
            specs.append(replace(trained, name=name, kind="untrained", model_hash=identity))
        if "checkpoint" in settings.scaled_by:
            network_specs += specs
        if "dataset" in settings.scaled_by:
            network_specs += [scaled_by_dataset(spec, contract) for spec in specs]
    plan = Plan(
        settings=settings,
        usable=tuple(bool(v) for v in usable),
        window_len=infos[0].window_len if infos else contract.window_len,
        patch_len=infos[0].patch_len if infos else contract.patch_len,
        patch_parcels=infos[0].patch_parcels if infos else 1,
        checkpoints=tuple(infos),
        pretrained=() if settings.allow_seen_subjects else tuple(info.folder for info in infos),
    )
    cohort = plan.cohort()
    short = len(entries) - len(cohort.recordings())
    if short:
        warnings.append(
            f"{short} of {len(entries)} {settings.split} recordings are shorter than a window and not scored"
        )
    units, skipped = [], []
    for name, task in make_tasks(settings).items():
        reason = task.why_not(cohort)
        if reason:
            skipped.append((name, reason))
            continue
        refused = {info.folder: info.refusals[name] for info in infos if name in info.refusals}
        warnings += [
            f"{info.name} is not scored on {name}: {refused[info.folder]}" for info in infos if info.folder in refused
        ]
        networks = [spec for spec in network_specs if spec.checkpoint not in refused]
        specs = networks + [control for spec in networks for control in task.controls(spec)]
        specs += task.baselines(cohort)
        if task.reference() == AUTO and settings.split != "val" and not cohort.recordings("val"):
            raise ConfigError(
                f"{name}.reference=auto takes the baseline that is best on validation recordings, and the data set has "
                "none that is long enough: name a baseline"
            )
        if task.reference() not in ("", AUTO) and task.reference() not in [spec.name for spec in specs]:
            known = ", ".join(spec.name for spec in specs)
            raise ConfigError(f"{name}.reference: expected {AUTO} or one of {known}, found {task.reference()!r}")
        warnings += [f"{name}: {num} recordings are left out, {why}" for why, num in task.left_out(cohort).items()]
        warnings += [line for spec in specs for line in task.warnings(spec, cohort)]
        units += task_units(task, specs, plan, cohort)
    if not units:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
        raise DataError(f"{settings.dataset}: no task can be run ({reasons})")
    return replace(plan, units=tuple(units), skipped=tuple(skipped), warnings=tuple(warnings))


def scaled_by_dataset(spec: MethodSpec, contract: InputContract) -> MethodSpec:
    """Return the same network, fed what the data set's own median and IQR scale."""
    note = "fed series scaled by the statistics of the data set, not by those that it was trained with"
    statistics = hashlib.sha256(contract.median.tobytes() + contract.iqr.tobytes()).hexdigest()
    return replace(
        spec,
        name=f"{spec.name}, scaled by the data set",
        scaled_by="dataset",
        input_hash=f"{spec.input_hash} {statistics}",
        notes=(*spec.notes, note),
    )


def task_units(task: Task, specs: list[MethodSpec], plan: Plan, cohort: Cohort) -> list[Unit]:
    """List the units of a task, each with what must be done before."""
    data = task.hashed_data(cohort)
    units = []
    for spec in specs:
        needs = tuple(
            Unit(task=task.name, spec=needed, key=unit_key(task, needed, plan, data), is_preparation=True)
            for needed in task.prepared(spec)
        )
        for part in task.parts(spec, cohort):
            piece = replace(spec, part=part)
            units.append(Unit(task=task.name, spec=piece, key=unit_key(task, piece, plan, data), needs=needs))
    return units


def unit_key(task: Task, spec: MethodSpec, plan: Plan, data: str = "") -> str:
    """Return the hash of everything that a unit's numbers depend on, and of nothing else."""
    more = {name: value for name, value in (("part", spec.part), ("more data", data)) if value}
    return config_hash(
        {
            **more,
            "task": task.name,
            "version": task.version,
            "settings": task.hashed_settings(),
            "data": plan.dataset.content_hash,
            "split": plan.settings.split,
            "usable": list(plan.usable),
            "window": [plan.window_len, plan.patch_len, plan.patch_parcels],
            "method": [spec.name, spec.kind, spec.variant, spec.model_hash, spec.input_hash],
        }
    )
