"""Write the embeddings of every recording of a cohort to one parquet table.

    python eval/extract.py --checkpoint C --data URL --out embeddings.parquet [section.key=value ...] [--dry-run]
    python eval/extract.py --checkpoint C --data series/*.csv --out embeddings.parquet tr_s=2.0
    python eval/extract.py --config eval/configs/demo_embeddings.yaml

Data are a prepared data set, or series files in the checkpoint's parcels. Run it again after a stop and only what is
missing is computed. Recordings without an embedding are listed, with reasons, in ``<out>.rejected.parquet``. Exit code
0 if every recording was embedded or listed, and at least one was embedded.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence

from brainlm.config import load_config, parse_entry_args, to_yaml
from brainlm.errors import BrainLMError, ConfigError
from brainlm.provenance import git_commit, versions
from brainlm.ray_session import fan_out, ray_session
from brainlm.store import Store
from eval.embedding_rows import PartReport, embed_part
from eval.embedding_table import join_parts, parts_done, parts_folder, read_facts, rejected_name
from eval.extract_plan import ExtractPlan, Part, make_extract_plan
from eval.extract_settings import ExtractSettings

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=", re.ASCII)
FLAGS = {
    "checkpoint": "checkpoint folder, training-run folder, or owner/name on the Hugging Face hub",
    "data": "URL of a prepared data set, or series files (.npy, .csv, .tsv)",
    "out": "the table to write: any URL that ends with .parquet",
}
SAY_EVERY_S = 10.0


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv, FLAGS)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        settings = load_config(ExtractSettings, args.config, [*flag_overrides(vars(args)), *args.overrides])
        if args.dry_run:
            print(to_yaml(settings), flush=True)  # also where the plan cannot be made yet
        plan = make_extract_plan(settings)
        for note in plan.notes:
            print(f"note: {note}", flush=True)
        if args.dry_run:
            print_plan(plan)
            return 0
        return extract(plan)
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


def extract(plan: ExtractPlan) -> int:
    """Embed what is missing, then join the parts to one table."""
    job = plan.job
    settings, store = job.settings, Store(job.settings.folder)
    if is_done(plan, store):
        print(f"{settings.out} is there, of the same checkpoint, recordings and settings: nothing to do")
        return 0
    done = parts_done(store, job)
    missing = [part for part in plan.parts if part.name not in done]
    num_missing = sum(map(len, missing))
    print(f"{plan.num_recordings} recordings, {plan.num_recordings - num_missing} done before", flush=True)
    embed_parts(plan, missing, say=lambda line: print(line, flush=True))
    provenance = {"commit": git_commit(), "versions": versions("torch", "numpy", "pyarrow")}
    num_rows, rejected = join_parts(store, plan, provenance)
    where = store.url_of(rejected_name(job))
    for one in rejected[:3]:
        print(f"rejected: {one.recording_id}: {one.reason}")
    if not num_rows:
        print(f"error: none of {plan.num_recordings} recordings could be embedded: see {where}", file=sys.stderr)
        return 1
    store.remove(parts_folder(job))
    num_embedded = plan.num_recordings - len(rejected)
    print(f"{num_embedded} recordings embedded, {len(rejected)} rejected (listed in {where})")
    print(f"{num_rows} rows in {settings.out}")
    return 0


def is_done(plan: ExtractPlan, store: Store) -> bool:
    """Tell whether the table is there.

    Raises
    ------
    ConfigError
        If another one is: embeddings of two models must not take one another's place unnoticed.
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


def embed_parts(plan: ExtractPlan, parts: Sequence[Part], say: Callable[[str], None] = print) -> None:
    """Embed parts, a bounded number at a time, saying how it goes."""
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
        for part in parts:
            note(embed_part(plan.job, part))
        return
    with ray_session(plan.job.settings.ray.address, num_cpus=workers) as ray:
        tasks = [(plan.job, part) for part in parts]
        for _, report in fan_out(ray, embed_part, tasks, max_in_flight=workers):
            note(report)


def print_plan(plan: ExtractPlan) -> None:
    """Say what would be done."""
    job, store = plan.job, Store(plan.job.settings.folder)
    done = parts_done(store, job)
    there = store.exists(job.settings.file_name) and is_done(plan, store)
    num_done = plan.num_recordings if there else sum(len(part) for part in plan.parts if part.name in done)
    print(f"checkpoint {job.folder}, weights {job.weights_sha256[:12]}; scaled by {plan.facts['statistics_from']}")
    print(f"{plan.num_recordings} recordings in {len(plan.parts)} parts, {num_done} done before")


if __name__ == "__main__":
    sys.exit(main())
