"""Fill a table with what a checkpoint says of each recording: resumable, spread by Ray, refusals listed."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.device import find_device, gpus_of_each
from brainlm.errors import BrainLMError, ConfigError
from brainlm.provenance import git_commit, versions
from brainlm.ray_session import fan_out, ray_session
from brainlm.store import Store
from eval.table_parts import join_parts, parts_done, parts_folder, read_facts, rejected_name
from eval.table_plan import Job, Part, TablePlan, make_table_plan
from eval.table_rows import PartReport
from eval.table_settings import TableSettings

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=", re.ASCII)
FLAGS = {
    "checkpoint": "checkpoint folder, training-run folder, or owner/name on the Hugging Face hub",
    "data": "URL of a prepared data set, or files (see above)",
    "out": "the table to write: any URL that ends with .parquet",
}
SAY_EVERY_S = 10.0
FillPart = Callable[[Job, Part], PartReport]
SettingsT = TypeVar("SettingsT", bound=TableSettings)
Before = Callable[[SettingsT, bool], tuple[SettingsT, list[dict[str, str]]] | None]


def run_entry(
    doc: str,
    argv: list[str] | None,
    cls: type[SettingsT],
    fill_part: FillPart,
    done_word: str,
    before: Before[SettingsT] | None = None,
) -> int:
    """Do what an entry does; return its exit status.

    Parameters
    ----------
    before : callable, optional
        Makes the data readable; gets the settings, and whether nothing is to be done. Returns settings, and rows of the
        table of rejections; None if there is no more to do.
    """
    args = parse_entry_args(doc, argv, FLAGS)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = load_config(cls, args.config, [*flag_overrides(vars(args)), *args.overrides])
        if args.dry_run:
            print(to_yaml(settings), flush=True)  # also where the plan cannot be made yet
        refused: list[dict[str, str]] = []
        if before is not None:
            found = before(settings, args.dry_run)
            if found is None:
                return 0
            settings, refused = found
        plan = replace(make_table_plan(settings), refused=tuple(refused))
        for note in plan.notes:
            print(f"note: {note}", flush=True)
        if args.dry_run:
            print_plan(plan)
            return 0
        return fill(plan, fill_part, done_word)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def flag_overrides(found: dict[str, object]) -> list[str]:
    """Return ``--checkpoint``, ``--data`` and ``--out`` as overrides, and those that stood behind a flag's values."""
    flags, more = [], []
    for name in FLAGS:
        words = found[name]
        if not isinstance(words, list):
            continue
        values = [word for word in words if not OVERRIDE.match(word)]
        more += [word for word in words if OVERRIDE.match(word)]
        if len(values) != 1 and (name != "data" or not values):
            raise ConfigError(f"--{name}: expected one value, found {' '.join(values) or 'none'}")
        flags.append(f"{name}={json.dumps(values[0] if len(values) == 1 else values)}")
    return flags + more


def fill(plan: TablePlan, fill_part: FillPart, done_word: str) -> int:
    """Make the rows that are missing, then join the parts to one table."""
    job = plan.job
    settings, store = job.settings, Store(job.settings.folder)
    if is_done(plan, store):
        print(f"{settings.out} is there, of the same checkpoint, recordings and settings: nothing to do")
        return 0
    done = parts_done(store, job)
    missing = [part for part in plan.parts if part.name not in done]
    num_missing = sum(map(len, missing))
    print(f"{plan.num_recordings} recordings, {plan.num_recordings - num_missing} done before", flush=True)
    fill_parts(plan, missing, fill_part, say=lambda line: print(line, flush=True))
    provenance = {"commit": git_commit(), "versions": versions("torch", "numpy", "pyarrow")}
    num_rows, rejected = join_parts(store, plan, provenance)
    where = store.url_of(rejected_name(job))
    for one in rejected[:3]:
        print(f"rejected: {one.recording_id}: {one.reason}")
    if not num_rows:
        print(f"error: none of {plan.num_recordings} recordings could be {done_word}: see {where}", file=sys.stderr)
        return 1
    store.remove(parts_folder(job))
    num_done = plan.num_recordings + len(plan.refused) - len(rejected)
    print(f"{num_done} recordings {done_word}, {len(rejected)} rejected (listed in {where})")
    print(f"{num_rows} rows in {settings.out}")
    return 0


def is_done(plan: TablePlan, store: Store) -> bool:
    """Tell whether the table is there.

    Raises
    ------
    ConfigError
        If another one is: numbers of two models must not take one another's place unnoticed.
    """
    name = plan.job.settings.file_name
    if not store.exists(name):
        return False
    facts = read_facts(store, name)
    if facts.get("key") == plan.job.key:
        return True
    differ = [word for word in ("weights_sha256", "data", "settings") if facts.get(word) != plan.facts[word]]
    raise ConfigError(
        f"out: {plan.job.settings.out} is there and holds something else (other {', '.join(differ) or 'contents'}): "
        "remove it, or give another out"
    )


def fill_parts(plan: TablePlan, parts: Sequence[Part], fill_part: FillPart, say: Callable[[str], None] = print) -> None:
    """Make the rows of parts, a bounded number at a time, saying how it goes."""
    total, begin = sum(map(len, parts)), time.perf_counter()
    num_done = num_rejected = 0
    last_said = begin

    def note(report: PartReport) -> None:
        nonlocal num_done, num_rejected, last_said
        num_done, num_rejected = num_done + report.num_recordings, num_rejected + report.num_rejected
        now = time.perf_counter()
        if now - last_said >= SAY_EVERY_S or num_done == total:
            last_said, per_s = now, num_done / (now - begin)
            left_s = (total - num_done) / per_s
            say(f"[{num_done}/{total}] {per_s:.2g} recordings/s, {num_rejected} rejected, {left_s:.0f} s left")

    workers = plan.job.settings.ray.workers
    if not parts or workers == 0:
        find_device(plan.job.settings.device)  # an error here, rather than one for each part
        for part in parts:
            note(fill_part(plan.job, part))
        return
    with ray_session(plan.job.settings.ray.address, num_cpus=workers) as ray:
        tasks = [(plan.job, part) for part in parts]
        num_gpus = gpus_of_each(ray, plan.job.settings.device, workers)
        for _, report in fan_out(ray, fill_part, tasks, max_in_flight=workers, num_gpus=num_gpus):
            note(report)


def print_plan(plan: TablePlan) -> None:
    """Say what would be done."""
    job, store = plan.job, Store(plan.job.settings.folder)
    done = parts_done(store, job)
    there = store.exists(job.settings.file_name) and is_done(plan, store)
    num_done = plan.num_recordings if there else sum(len(part) for part in plan.parts if part.name in done)
    print(f"checkpoint {job.folder}, weights {job.weights_sha256[:12]}; scaled by {plan.facts['statistics_from']}")
    print(f"{plan.num_recordings} recordings in {len(plan.parts)} parts, {num_done} done before")
