"""The baseline of one's own of docs/evaluating.md, run as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from brainlm.dataset import Dataset
from brainlm.store import Store
from eval.baselines.forecasters import MAKERS
from eval.results import read_scores
from eval.tasks.reconstruction import BASELINES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/evaluating.md").read_text()


def blocks() -> dict[str, str]:
    """Return the page's modules by file name."""
    found = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return dict(found)


def run(folder: Path, dataset: Dataset, *words: str) -> dict[str, dict[str, float]]:
    """Write the page's modules, evaluate on a Ray worker, and return R2 by task and model."""
    for name, code in blocks().items():
        (folder / name).write_text(code)
    ended = subprocess.run(
        [
            sys.executable, str(ROOT / "eval/run.py"), "--config", str(ROOT / "eval/configs/all.yaml"),
            f"dataset={dataset.store.url}", f"out={folder / 'results'}", "ray.workers=1", *words,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, dict[str, float]] = {}
    for score in read_scores(Store(folder / "results")):
        if score.metric == "r2":
            found.setdefault(score.task, {})[score.model] = score.value
    return found


def option(name: str, block: str) -> str:
    """Return the value that the page gives an option for a module's name."""
    (value,) = re.findall(rf"{re.escape(name)}='([^']*{block}:[^']*)'", PAGE)
    return f"{name}={value}"


def test_a_baseline_of_ones_own(dataset: Dataset, tmp_path: Path) -> None:
    assert len(blocks()["my_baselines.py"].splitlines()) <= 30
    baselines = option("forecasting.baselines", "my_baselines")
    found = run(
        tmp_path,
        dataset,
        "checkpoints=[]",
        "tasks=[forecasting]",
        baselines,
        "forecasting.horizons=[10]",
        "report=false",
    )
    r2 = found["forecasting"]
    assert r2["damped persistence"] > max(r2["mean"], r2["persistence"])


def test_a_task_of_ones_own(dataset: Dataset, training_run: Path, tmp_path: Path) -> None:
    assert len(blocks()["my_tasks.py"].splitlines()) <= 40
    small = "reconstruction={mask_ratios: [0.5], baselines: [mean]}"
    found = run(tmp_path, dataset, f"checkpoints=[{training_run}]", option("tasks", "my_tasks"), small)
    assert set(found) == {"reconstruction", "backcasting"}
    assert set(found["backcasting"]) == {"BrainLM pretrain", "untrained", "mean"}
    assert abs(found["backcasting"]["mean"]) < 1e-6
    page = (tmp_path / "results/report.html").read_text()
    assert "first patch" in page
    differences = [s for s in read_scores(Store(tmp_path / "results")) if s.metric == "r2_minus_reference"]
    assert {s.condition["reference"] for s in differences if s.task == "backcasting"} == {"mean"}


def test_the_page_lists_every_baseline() -> None:
    for name in (*BASELINES, *MAKERS):
        assert f"`{name}`" in PAGE
