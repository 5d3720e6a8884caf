"""Run a whole study, stage by stage, from one YAML file; a study that was stopped goes on where it was.

    python cluster/pipeline.py --config cluster/configs/demo.yaml

Every stage is a command that resumes by itself and leaves a file behind when its work is done. A stage is left out when
that file is there and neither its command, the config files it names, nor an earlier stage has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from brainlm.config import Section, load_config, parse_entry_args
from brainlm.errors import BrainLMError, ConfigError

logger = logging.getLogger("pipeline")
SAVE_S = 120.0  # how long the ranks behind a launcher may take to save
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Stage(Section):
    """One command of a study."""

    name: str
    command: str
    """As in a shell, without a shell; ``python`` and ``deepspeed`` are those of this environment."""
    done: str
    """File that the command leaves when its work is done; it decides success together with the exit status."""


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(Section):
    """A study."""

    name: str
    out: str
    """Folder where the pipeline remembers what is done."""
    stages: tuple[Stage, ...]
    look_at: str = ""
    """What a person opens at the end."""

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ConfigError("stages: name at least one stage, each name once")


def main(argv: list[str] | None = None) -> int:
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = load_config(PipelineSettings, args.config, args.overrides)
        if args.dry_run:
            for stage in settings.stages:
                print(f"{stage.name}: {stage.command}\n    leaves {stage.done}")
            return 0
        return run(settings)
    except BrainLMError as error:
        logger.error("pipeline: %s", error)
        return 1


def run(settings: PipelineSettings) -> int:
    """Run what is not done yet. Returns the exit status."""
    memory = Path(settings.out) / "pipeline.json"
    done: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
    upstream = ""
    started = time.perf_counter()
    num_run = 0
    for number, stage in enumerate(settings.stages, 1):
        title = f"{settings.name} {number}/{len(settings.stages)}: {stage.name}"
        upstream = stage_hash(stage, upstream)
        if done.get(stage.name) == upstream and Path(stage.done).is_file():
            logger.info("== %s is done", title)
            continue
        logger.info("== %s", title)
        stage_started = time.perf_counter()
        before = Path(stage.done).stat().st_mtime_ns if Path(stage.done).is_file() else None
        status = run_command(stage)
        elapsed_s = time.perf_counter() - stage_started
        if not Path(stage.done).is_file():
            logger.error(
                "== %s stopped or failed (exit status %d, no %s). Mend what it says above, if anything; the same "
                "command repeats nothing that is done",
                title,
                status,
                stage.done,
            )
            return status or 1
        if status != 0 and before == Path(stage.done).stat().st_mtime_ns:
            logger.error("== %s failed with exit status %d", title, status)
            return status
        logger.info("== %s took %.0f s", title, elapsed_s)
        num_run += 1
        done[stage.name] = upstream
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=1))
        os.replace(temporary, memory)
    if num_run:
        logger.info("== %s: all stages are done, in %.0f s", settings.name, time.perf_counter() - started)
    else:
        logger.info("== %s: all stages were done already; nothing was repeated", settings.name)
    if settings.look_at:
        logger.info("== look at %s", settings.look_at)
    return 0


def run_command(stage: Stage) -> int:
    """Run a stage and return its exit status. A signal to stop goes to all of its processes, and they are waited for.

    A launcher such as DeepSpeed's dies of a signal that it gets alone, and leaves its ranks behind; together, they save
    a snapshot and leave.
    """
    try:
        process = subprocess.Popen(shlex.split(stage.command), env=environment(), process_group=0)
    except OSError as error:
        raise ConfigError(f"stage {stage.name}: cannot run {stage.command!r}: {error}") from error

    told = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        status = process.wait()
        deadline = time.monotonic() + SAVE_S
        with contextlib.suppress(ProcessLookupError):  # raised when the group has no process left
            while told and time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.2)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stage_hash(stage: Stage, upstream: str) -> str:
    """Identify a stage by its command, the config files named in it, and all stages before it."""
    digest = hashlib.sha256(f"{upstream}\n{stage.command}\n{stage.done}".encode())
    for word in shlex.split(stage.command):
        if word.endswith((".yaml", ".yml")):
            path = Path(word)
            if not path.is_file():
                raise ConfigError(f"stage {stage.name}: the config file {word} is not there")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Return the environment of a stage: this Python first on the path, the repository importable."""
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH", "")) if p)
    env.setdefault("PYTHONUNBUFFERED", "1")
    if not Path("/dev/nvidiactl").exists():  # else DeepSpeed says, once per process, that it looked for a GPU
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


if __name__ == "__main__":
    sys.exit(main())
