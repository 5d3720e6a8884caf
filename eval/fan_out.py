"""Run units in this process or on Ray workers; each worker opens the data set itself."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brainlm.ray_session import fan_out, ray_session
from brainlm.store import Store
from eval.planning import Plan, make_tasks, unit_for_worker
from eval.task import Runtime, Unit, write_output


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
        runtime = Runtime(
            batch_size=settings.batch_size, device=settings.device, untrained_seed=settings.untrained_seed
        )
        output = make_tasks(settings)[unit.task].compute(unit.spec, plan.cohort(), runtime)
        write_output(Store(settings.out), unit, output)
    except Exception:
        return UnitReport(unit, time.perf_counter() - start, traceback.format_exc())
    return UnitReport(unit, time.perf_counter() - start)


def run_units(plan: Plan, units: Sequence[Unit], say: Callable[[str], None] = print) -> list[UnitReport]:
    """Compute units, a bounded number at a time, saying how it goes.

    Units that a lost worker leaves undone are tried again; what is finished stays finished.
    """
    reports: list[UnitReport] = []
    sent = plan.for_workers()

    def note(report: UnitReport) -> None:
        reports.append(report)
        state = "FAILED: " + report.error.strip().rsplit("\n", 1)[-1] if report.error else f"{report.seconds:.1f} s"
        say(f"[{len(reports)}/{len(units)}] {report.unit.label}: {state}")

    if not units:
        return reports
    workers = plan.settings.ray.workers
    if workers == 0:
        for unit in units:
            note(compute_unit(sent, unit))
        return reports
    with ray_session(plan.settings.ray.address, num_cpus=workers) as ray:
        tasks = [(sent, unit_for_worker(unit)) for unit in units]
        for _, report in fan_out(ray, compute_unit, tasks, max_in_flight=workers):
            note(report)
    return reports
