"""A study runs in order, repeats nothing that is done, and goes on from where it stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from brainlm.errors import ConfigError
from cluster.pipeline import PipelineSettings, Stage, main, run, stage_hash

# A stage: add its name to the log, read its config, leave its file, exit.
STAGE = """
import sys, pathlib
name, config, done, leave, status = sys.argv[1:]
with open("log.txt", "a") as log:
    log.write(name + " ")
what = pathlib.Path(config).read_text().strip()
if leave == "leave" and what != "broken: true":
    pathlib.Path(done).write_text(what)
sys.exit(3 if what == "broken: true" else int(status))
"""


class Study:
    """Three stages in a folder: simulate, prepare, pretrain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stage.py").write_text(STAGE)
        self.stages: dict[str, dict[str, str]] = {}
        for name in ("simulate", "prepare", "pretrain"):
            (folder / f"{name}.yaml").write_text(f"of: {name}\n")
            self.change(name)

    def change(self, name: str, leave: str = "leave", status: int = 0) -> None:
        command = f"python stage.py {name} {name}.yaml {name}.done {leave} {status}"
        self.stages[name] = {"name": name, "command": command, "done": f"{name}.done"}

    def config(self, name: str, text: str) -> None:
        (self.folder / f"{name}.yaml").write_text(text)

    def start(self, *words: str) -> int:
        """Run the study; `ran` then says which stages did."""
        (self.folder / "log.txt").write_text("")
        study = {"name": "study", "out": "out", "stages": list(self.stages.values())}
        (self.folder / "study.yaml").write_text(yaml.safe_dump(study))
        return main(["--config", "study.yaml", *words])

    @property
    def ran(self) -> list[str]:
        return (self.folder / "log.txt").read_text().split()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Study:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    return Study(tmp_path)


ALL = ["simulate", "prepare", "pretrain"]


def test_stages_run_in_order(study: Study) -> None:
    assert study.start() == 0
    assert study.ran == ALL
    assert all((study.folder / f"{name}.done").is_file() for name in ALL)


def test_a_finished_study_is_not_repeated(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    assert study.start() == 0
    caplog.clear()
    assert study.start() == 0
    assert study.ran == []
    assert "nothing was repeated" in caplog.text


def test_a_person_is_told_what_to_look_at(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    assert study.start("look_at=out/report.html") == 0
    assert "look at out/report.html" in caplog.text
    caplog.clear()
    study.change("pretrain", leave="nothing", status=1)
    (study.folder / "pretrain.done").unlink()
    assert study.start("look_at=out/report.html") == 1
    assert "look at" not in caplog.text


def test_a_dry_run_shows_the_commands_and_runs_nothing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.start("--dry-run") == 0
    assert study.ran == []
    assert not (study.folder / "out").exists()
    shown = capsys.readouterr().out
    for stage in study.stages.values():
        assert f"{stage['name']}: {stage['command']}\n    leaves {stage['done']}\n" in shown


@pytest.mark.parametrize(("changed", "again"), [("simulate", ALL), ("prepare", ALL[1:]), ("pretrain", ALL[2:])])
def test_a_changed_config_repeats_its_stage_and_all_later_ones(study: Study, changed: str, again: list[str]) -> None:
    assert study.start() == 0
    study.config(changed, "of: something else\n")
    assert study.start() == 0
    assert study.ran == again
    assert study.start() == 0
    assert study.ran == []


def test_a_changed_command_repeats_its_stage(study: Study) -> None:
    assert study.start() == 0
    study.stages["pretrain"]["command"] = study.stages["pretrain"]["command"].replace(" 0", " 00")
    assert study.start() == 0
    assert study.ran == ["pretrain"]


def test_a_removed_file_repeats_its_stage(study: Study) -> None:
    assert study.start() == 0
    (study.folder / "prepare.done").unlink()
    assert study.start() == 0
    assert study.ran == ["prepare"]


def test_a_stage_that_fails_stops_the_study_and_a_rerun_goes_on_from_it(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    study.change("prepare", leave="nothing", status=7)
    assert study.start() == 7
    assert study.ran == ["simulate", "prepare"]
    assert "study 2/3: prepare stopped or failed (exit status 7, no prepare.done)" in caplog.text
    study.change("prepare")
    assert study.start() == 0
    assert study.ran == ["prepare", "pretrain"]


def test_a_stage_that_breaks_after_its_file_was_there_fails(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    assert study.start() == 0
    study.config("prepare", "broken: true\n")  # the file of the earlier run stays
    assert study.start() == 3
    assert study.ran == ["prepare"]
    assert "prepare failed with exit status 3" in caplog.text
    study.config("prepare", "of: repaired\n")
    assert study.start() == 0
    assert study.ran == ["prepare", "pretrain"]


def test_a_stage_that_exits_with_0_and_leaves_no_file_fails(study: Study) -> None:
    study.change("prepare", leave="nothing", status=0)
    assert study.start() == 1
    assert study.ran == ["simulate", "prepare"]


@pytest.mark.parametrize("earlier", [False, True], ids=["first run", "over an earlier file"])
def test_a_stage_that_fails_after_leaving_a_fresh_file_is_done(study: Study, earlier: bool) -> None:
    """The file is written when all work is done, and says so better than the exit status.

    The collective library of a CPU run (gloo) sometimes aborts while the processes of a finished training run exit.
    """
    if earlier:
        assert study.start() == 0
    study.change("pretrain", status=134)
    assert study.start() == 0
    assert study.ran[-1] == "pretrain"
    assert study.start() == 0
    assert study.ran == []


def test_a_command_that_is_not_there_is_refused(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    study.stages["prepare"]["command"] = "no-such-program prepare.yaml"
    assert study.start() == 1
    assert "stage prepare: cannot run 'no-such-program prepare.yaml'" in caplog.text


def test_a_config_that_is_not_there_is_refused_before_the_stage_runs(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    (study.folder / "prepare.yaml").unlink()
    assert study.start() == 1
    assert study.ran == ["simulate"]
    assert "stage prepare: the config file prepare.yaml is not there" in caplog.text


@pytest.mark.parametrize("names", [[], ["prepare", "prepare"]])
def test_stages_need_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="name at least one stage, each name once"):
        PipelineSettings(name="x", out="x", stages=tuple(Stage(name=n, command="true", done="x") for n in names))


def test_stages_run_with_this_python_and_find_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who.py").write_text(
        "import json, sys, cluster.pipeline as p\njson.dump([sys.executable, p.__file__], open('who.json', 'w'))\n"
    )
    study = PipelineSettings(name="x", out=".", stages=(Stage(name="who", command="python who.py", done="who.json"),))
    assert run(study) == 0
    executable, module = json.loads((tmp_path / "who.json").read_text())
    assert Path(executable).parent == Path(sys.executable).parent
    assert Path(module) == Path(__file__).parents[2] / "cluster" / "pipeline.py"


def test_the_hash_of_a_stage_sees_all_that_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("x: 1")
    stage: Callable[..., Stage] = lambda **changes: Stage(  # noqa: E731
        **({"name": "a", "command": "python a.py --config a.yaml", "done": "a.json"} | changes)
    )
    base = stage_hash(stage(), "")
    assert stage_hash(stage(name="renamed"), "") == base
    others = [stage_hash(stage(done="b.json"), ""), stage_hash(stage(), "upstream")]
    (tmp_path / "a.yaml").write_text("x: 2")
    others.append(stage_hash(stage(), ""))
    assert len({base, *others}) == 4


LAUNCHER = """
import pathlib, subprocess, sys
# Like the launcher of DeepSpeed: it dies of a signal at once, whatever the worker that it started does.
worker = '''
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("working")
time.sleep(60)
'''
subprocess.run([sys.executable, "-c", worker, sys.argv[1]])
"""


def test_a_signal_reaches_the_workers_behind_a_launcher(tmp_path: Path) -> None:
    state = tmp_path / "state.txt"
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = f"{sys.executable} {tmp_path}/launcher.py {state}"
    tree = {
        "name": "s",
        "out": str(tmp_path),
        "stages": [{"name": "a", "command": command, "done": str(tmp_path / "never")}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree))
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(root / "cluster" / "pipeline.py"), "--config", str(tmp_path / "study.yaml")],
        env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (state.is_file() and state.read_text() == "working"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    while state.read_text() != "saved":
        assert time.monotonic() < deadline, "the worker was never told"
        time.sleep(0.05)
