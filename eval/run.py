"""Score checkpoints and baselines on a prepared data set.

    python eval/run.py --config eval/configs/all.yaml [section.key=value ...] [--dry-run]
    ray job submit --working-dir . -- python eval/run.py --config eval/configs/all.yaml ray.address=auto

Writes results.json, tables and a report to the results folder. Run it again and only what is missing or has changed is
computed. Exit code 0 only if everything was computed.
"""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime

from brainlm.checkpoint import train_subjects
from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.errors import BrainLMError, ConfigError
from brainlm.store import Store
from eval.artifacts import command_line, write_examples, write_forecast_curves, write_parcels, write_run
from eval.clinical.tables import write_clinical
from eval.fan_out import run_units
from eval.make_scores import make_scores
from eval.planning import Plan, make_plan, make_tasks
from eval.reference import choose_reference
from eval.results import Score, write_scores
from eval.settings import EvalSettings
from eval.several import LISTED, evaluate_several, make_plans
from eval.summary import summary
from eval.task import ScoreContext, Unit, is_done, read_output, together


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = load_config(EvalSettings, args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(settings), flush=True)  # also where the plan cannot be made yet
        if settings.datasets and not args.dry_run:
            return evaluate_several(settings, evaluate)
        if Store(settings.out).exists(LISTED) and not settings.datasets:
            raise ConfigError(f"out={settings.out} holds the results of several data sets: choose another for one")
        plans = make_plans(settings) if settings.datasets else [make_plan(settings)]
        if not args.dry_run:
            return evaluate(plans[0])
        for plan in plans:
            print_plan(plan)
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def evaluate(plan: Plan) -> int:
    """Compute what is missing, then write scores, tables and the report."""
    settings, store = plan.settings, Store(plan.settings.out)
    started, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    missing = [unit for unit in plan.units if not is_done(store, unit)]
    for warning in plan.warnings:
        print(f"note: {warning}", flush=True)
    for name, reason in plan.skipped:
        print(f"note: {name} is left out: {reason}", flush=True)
    print(f"{len(plan.units)} units of work, {len(plan.units) - len(missing)} done before", flush=True)
    reports = run_units(plan, missing, say=lambda line: print(line, flush=True))
    failed = [report for report in reports if report.error]
    computed = time.perf_counter()

    scores = write_results(plan, store, [unit for unit in plan.units if is_done(store, unit)])
    seconds = {report.unit.label: round(report.seconds, 2) for report in reports}
    seconds |= {"all units": round(computed - begin, 2), "scores": round(time.perf_counter() - computed, 2)}
    write_run(store, plan, seconds, command_line(), started)
    if settings.report:
        from eval.report import write_report  # drawing libraries are loaded here

        write_report(settings.out)

    print("\n" + summary(scores, settings.intervals.level))
    where = store.url_of("report.html") if settings.report else store.url_of("results.json")
    print(f"\nLook at {where}; every score is in {store.url_of('results.json')}.")
    for report in failed:
        print(f"\n{report.unit.label} failed:\n{report.error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(plan.units)} units failed; run the same command again for these", file=sys.stderr)
    return 1 if failed else 0


def write_results(plan: Plan, store: Store, done: list[Unit]) -> list[Score]:
    """Turn the tables of finished units into ``results.json`` and the tables that figures are drawn from."""
    settings = plan.settings
    context = ScoreContext(
        dataset=plan.dataset.name,
        dataset_hash=plan.dataset.content_hash,
        split=settings.split,
        num_bootstrap=settings.intervals.num_bootstrap,
        num_exchanges=settings.intervals.num_exchanges,
        seed=settings.intervals.seed,
        level=settings.intervals.level,
        notes=data_notes(plan),
        seen_left_out=seen_left_out(plan),
    )
    scores: list[Score] = []
    for name, task in make_tasks(settings).items():
        outputs = together([(unit.spec, read_output(store, unit)) for unit in done if unit.task == name])
        if not outputs:
            continue
        own = task.scores(outputs, context)
        if own is not None:
            scores += own
        else:
            reference = choose_reference(task, outputs)
            scores += make_scores(task, outputs, context, reference)
        if name == "reconstruction":
            write_parcels(store, outputs, plan.dataset.contract.atlas)
            write_examples(store, outputs, plan)
        elif name == "forecasting":
            write_forecast_curves(store, outputs, settings.intervals, reference)
        elif name == "clinical":
            write_clinical(store, outputs, settings.intervals)
    write_scores(store, scores)
    return scores


def seen_left_out(plan: Plan) -> bool:
    """Say whether tasks that choose their people know, and leave out, whom the checkpoints were trained on."""
    allowed = plan.settings.allow_seen_subjects and bool(plan.checkpoints)
    return not allowed and all(train_subjects(folder) is not None for folder in plan.pretrained)


def data_notes(plan: Plan) -> tuple[str, ...]:
    """Return what every score depends on: the filter, its known leaks, and baselines that saw what is scored."""
    contract = plan.dataset.contract
    ends = [
        f"{word} {cutoff_hz:g} Hz"
        for word, cutoff_hz in (("above", contract.high_pass_hz), ("below", contract.low_pass_hz))
        if cutoff_hz is not None
    ]
    kept = "filtered, kept " + " and ".join(ends) if ends else "no temporal filter"
    used = {"train": "fitted", "val": "tuned"}.get(plan.settings.split)
    seen = (f"data: baselines were {used} on the recordings that are scored here",) if used else ()
    return (f"data: {kept}", *(f"data: {flag}" for flag in contract.flags), *seen)


def print_plan(plan: Plan) -> None:
    """Say what would be done."""
    store = Store(plan.settings.out)
    cohort = plan.cohort()
    print(
        f"data set {plan.dataset.name}: {len(cohort.recordings())} {plan.settings.split} recordings, "
        f"{sum(plan.usable)} of {len(plan.usable)} parcels scored, "
        f"windows of {plan.window_len}, patches of {plan.patch_len}"
    )
    for info in plan.checkpoints:
        print(f"checkpoint {info.name}: {info.num_parameters:,} parameters, {info.folder}")
    for unit in plan.units:
        print(f"  {'done' if is_done(store, unit) else 'to do'}  {unit.label}")
    for name, reason in plan.skipped:
        print(f"  left out: {name}, {reason}")
    for warning in plan.warnings:
        print(f"  note: {warning}")


if __name__ == "__main__":
    sys.exit(main())
