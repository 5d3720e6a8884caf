"""Run units in this process or on Ray workers; each worker opens the data set itself."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brainlm.device import find_device, gpus_of_each
from brainlm.ray_session import fan_out, ray_session
from brainlm.store import Store
from eval.planning import Plan, make_tasks, unit_for_worker
from eval.task import Runtime, StoredFeatures, Unit, is_done, write_features, write_output

MANY, EVERY_S = 60, 2.0
"""Of more units than that, one is named in so many seconds."""


@dataclass(frozen=True)
class UnitReport:
    """How a unit went. `error` is "" if it is done."""

    unit: Unit
    seconds: float
    error: str = ""


def compute_unit(plan: Plan, unit: Unit) -> UnitReport:
    """Compute one unit and write its files. An error is reported, so that the other units go on."""
    import torch

    start = time.perf_counter()
    try:
        settings = plan.settings
        torch.set_num_threads(settings.threads)
        store, task = Store(settings.out), make_tasks(settings)[unit.task]
        runtime = Runtime(
            batch_size=settings.batch_size,
            device=find_device(settings.device),
            untrained_seed=settings.untrained_seed,
            threads=settings.threads,
            out=settings.out,
            prepared={needed.spec.name: StoredFeatures(store, needed) for needed in unit.needs},
        )
        if unit.is_preparation:
            write_features(store, unit, task.prepare(unit.spec, plan.cohort(), runtime))
        else:
            write_output(store, unit, task.compute(unit.spec, plan.cohort(), runtime))
    except Exception:
        return UnitReport(unit, time.perf_counter() - start, traceback.format_exc())
    return UnitReport(unit, time.perf_counter() - start)


def run_units(plan: Plan, units: Sequence[Unit], say: Callable[[str], None] = print) -> list[UnitReport]:
    """Compute units, a bounded number at a time, saying how it goes; first what they need and is not there yet.

    Units that a lost worker leaves undone are tried again; what is finished stays finished. A unit that needs what
    could not be computed is not tried.
    """
    reports: list[UnitReport] = []
    if not units:
        return reports
    sent, store, workers = plan.for_workers(), Store(plan.settings.out), plan.settings.ray.workers
    first = {needed.stem: needed for unit in units for needed in unit.needs}
    before = [unit for unit in first.values() if not is_done(store, unit)]
    total = len(before) + len(units)
    progress = _Progress(total, say)

    def note(report: UnitReport) -> None:
        reports.append(report)
        progress.note(report)

    def ready() -> list[Unit]:
        lost = {report.unit.stem: report.unit.label for report in reports if report.error}
        found = []
        for unit in units:
            missing = [lost[needed.stem] for needed in unit.needs if needed.stem in lost]
            if missing:
                note(UnitReport(unit, 0.0, f"not tried: it needs {', '.join(missing)}, which failed"))
            else:
                found.append(unit)
        return found

    if workers == 0:
        find_device(plan.settings.device)  # an error here, rather than one for each unit
        for unit in before:
            note(compute_unit(sent, unit_for_worker(unit)))
        for unit in ready():
            note(compute_unit(sent, unit_for_worker(unit)))
        return reports
    with ray_session(plan.settings.ray.address, num_cpus=workers) as ray:
        num_gpus = gpus_of_each(ray, plan.settings.device, workers)
        for wave in (lambda: before, ready):
            tasks = [(sent, unit_for_worker(unit)) for unit in wave()]
            for _, report in fan_out(ray, compute_unit, tasks, max_in_flight=workers, num_gpus=num_gpus):
                note(report)
    return reports


class _Progress:
    """Says how each unit went; of many short ones not every one."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say, self.done, self.said = total, say, 0, 0.0

    def note(self, report: UnitReport) -> None:
        self.done += 1
        now = time.monotonic()
        if not report.error and self.total > MANY and self.done < self.total and now - self.said < EVERY_S:
            return
        self.said = now
        state = "FAILED: " + report.error.strip().rsplit("\n", 1)[-1] if report.error else f"{report.seconds:.1f} s"
        self.say(f"[{self.done}/{self.total}] {report.unit.label}: {state}")
