"""The commands of docs/finetuning.md, with the settings of its blocks, on a small data set."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

from brainlm.checkpoint import save_checkpoint
from brainlm.model import BrainLM
from brainlm.predictor import Predictor
from brainlm.reconstruction import STALE_DECODER
from brainlm.testing import small_model
from eval.references import main as references
from tests.phenotypes import write_phenotype_dataset
from tests.train.forked import start

PAGE = (Path(__file__).parents[2] / "docs/finetuning.md").read_text()
COLUMNS = {"neuroticism": "luck", "pcl5": "score", "diagnosis": "sex"}
SMALL = ["run.steps=6", "data.batch_size=4", "validation.every=3", "engine.precision=fp32", "engine.threads=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's paths exist."""
    home = tmp_path_factory.mktemp("home")
    dataset = write_phenotype_dataset(str(home / "runs/study/dataset"))
    path = home / "runs/study/dataset/subjects.parquet"
    table = pd.read_parquet(path)
    for name, source in COLUMNS.items():
        table[name] = table[source]
    table.to_parquet(path)
    subjects = [entry.subject for entry in dataset.split("train").entries]
    save_checkpoint(
        str(home / "runs/mine/checkpoints/step-20000"), small_model(dataset.contract), {"step": 1}, subjects
    )
    return home


def configs(home: Path) -> list[Path]:
    """Write the page's configurations with absolute paths."""
    found = []
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)):
        path = home / f"{number}.yaml"
        path.write_text(text.replace("runs/", f"{home}/runs/"))
        assert yaml.safe_load(path.read_text())["init_from"].startswith(str(home))
        found.append(path)
    return found


def commands(entry: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith(f"python {entry} ")]
    assert lines
    return [words[2:] for words in lines]


def test_every_command_does_what_the_page_says(home: Path) -> None:
    config, forecast = configs(home)
    done = []
    for words in commands("train/finetune.py"):
        assert words[:2] == ["--config", "my.yaml"]
        more = [word.replace("runs/", f"{home}/runs/") for word in words[2:]]
        log = home / "log"
        run = start(log, config, *SMALL, *more, entry="finetune")
        assert run.finish() == [0], run.said
        done.append(run.said)
    assert "neuroticism (regression, minmax)" in done[0]
    for name in ("finetune", "frozen-untrained", "permuted"):
        assert (home / "runs/study" / name / "scores.json").is_file()
    (words,) = [words for words in commands("eval/references.py") if "--out" in words]
    assert (
        references(
            [word.replace("runs/", f"{home}/runs/").replace("references.json", f"{home}/r.json") for word in words]
        )
        == 0
    )
    (best,) = (home / "runs/study/finetune/checkpoints").iterdir()
    predictor = Predictor.from_pretrained(str(best))
    assert [target.column for target in predictor.targets] == ["age", "neuroticism", "pcl5", "diagnosis"]

    run = start(home / "log", forecast, *SMALL, entry="finetune")
    assert run.finish() == [0], run.said
    (best,) = (home / "runs/study/forecaster/checkpoints").iterdir()
    assert STALE_DECODER not in BrainLM.from_pretrained(str(best)).manifest
