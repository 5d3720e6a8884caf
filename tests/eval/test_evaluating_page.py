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


def test_a_baseline_of_ones_own(dataset: Dataset, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_baselines.py").write_text(code)
    choice = re.search(r"forecasting\.baselines='(.*)'$", PAGE, re.MULTILINE)
    assert choice is not None
    words = [
        f"dataset={dataset.store.url}", "checkpoints=[]", f"out={tmp_path / 'results'}", "tasks=[forecasting]",
        f"forecasting.baselines={choice[1]}", "forecasting.horizons=[10]", "report=false", "ray.workers=1",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, str(ROOT / "eval/run.py"), "--config", str(ROOT / "eval/configs/all.yaml"), *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    r2 = {score.model: score.value for score in read_scores(Store(tmp_path / "results")) if score.metric == "r2"}
    assert r2["damped persistence"] > max(r2["mean"], r2["persistence"])


def test_the_page_lists_every_baseline() -> None:
    for name in (*BASELINES, *MAKERS):
        assert f"`{name}`" in PAGE
