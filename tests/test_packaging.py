"""What is installed, what may be called what, and how the entry scripts answer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("train", "eval", "data_prep", "cluster")
IS_ENTRY = re.compile(r"^if __name__ == .__main__.:", re.MULTILINE)
# Where an unknown key goes, and the path that the error must give.
UNKNOWN = {
    "data_prep/simulate.py": ("data_prep/configs/demo_cohort.yaml", "cohort.no_such_key"),
    "data_prep/prepare.py": ("data_prep/configs/demo.yaml", "source.no_such_key"),
    "train/pretrain.py": ("train/configs/demo.yaml", "optimizer.no_such_key"),
    "train/finetune.py": ("train/configs/finetune_age.yaml", "head.no_such_key"),
    "eval/run.py": ("eval/configs/demo.yaml", "intervals.no_such_key"),
    "eval/extract.py": ("eval/configs/demo_embeddings.yaml", "ray.no_such_key"),
    "eval/predict.py": ("eval/configs/demo_predictions.yaml", "ray.no_such_key"),
    "eval/verdict.py": ("eval/configs/demo_verdict.yaml", "no_such_key"),
    "cluster/pipeline.py": ("cluster/configs/demo.yaml", "no_such_key"),
}


def modules(folder: str) -> list[str]:
    """Names that ``import`` finds first while a script of this folder runs."""
    found = [path.stem for path in (ROOT / folder).glob("*.py")]
    return found + [path.parent.name for path in (ROOT / folder).glob("*/*.py")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_hides_its_folder_or_another_module(folder: str) -> None:
    """`python train/pretrain.py` puts train/ first on the path, so its files win over every other module."""
    ours = set(modules(folder)) - {"__init__", "__main__"}
    assert ours
    installed = set(packages_distributions())
    assert {"torch", "ray"} <= installed
    assert ours.isdisjoint({*FOLDERS, "brainlm", "tests", "benchmarks"})
    assert sorted(ours & set(sys.stdlib_module_names)) == []
    assert sorted(ours & installed) == []


def test_a_wheel_carries_the_library_alone() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"] == {"wheel": {"packages": ["brainlm"]}}
    assert build["dev-mode-dirs"] == ["."]


def test_console_entries_point_into_the_library() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = [*project.get("scripts", {}).values(), *project.get("gui-scripts", {}).values()]
    assert all(target.startswith("brainlm.") for target in targets)
    assert "entry-points" not in project


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("entry", sorted(UNKNOWN))
def test_an_entry_explains_itself(entry: str, tmp_path: Path) -> None:
    done = run(str(ROOT / entry), "--help", cwd=tmp_path)  # from anywhere
    assert done.returncode == 0, done.stderr
    for word in ("--config", "--dry-run", "section.key=value", f"python {entry} --config"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", sorted(UNKNOWN))
def test_an_entry_refuses_an_unknown_key_with_its_full_path(entry: str) -> None:
    config, key = UNKNOWN[entry]
    done = run(entry, "--config", config, f"{key}=1")
    assert done.returncode == 1, done.stderr
    assert f"{key}: unknown key" in done.stderr
    assert config in done.stderr
    assert "Traceback" not in done.stderr


def test_every_script_with_a_config_is_checked_here() -> None:
    scripts = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).glob("*.py")
        if IS_ENTRY.search(path.read_text()) and re.search("parse_entry_args|run_entry", path.read_text())
    }
    assert scripts == set(UNKNOWN)
