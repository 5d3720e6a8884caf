"""What the README and the docs tell people to type exists and is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from brainlm.config import load_config
from cluster.pipeline import PipelineSettings
from data_prep.settings import PrepareSettings
from data_prep.simulated_cohort import SimulateConfig
from eval.extract_settings import ExtractSettings
from eval.predict_settings import PredictSettings
from eval.settings import EvalSettings
from eval.verdict import VerdictSettings
from train.finetune_settings import FinetuneSettings, check_finetune_settings
from train.settings import PretrainSettings, check_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS: dict[str, type] = {
    "data_prep": PrepareSettings,
    "train": PretrainSettings,
    "eval": EvalSettings,
    "cluster": PipelineSettings,
}


def configs() -> list[Path]:
    return [
        path.relative_to(ROOT) for folder in SETTINGS for path in sorted((ROOT / folder / "configs").glob("*.yaml"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/])(?:tests|data_prep|train|eval|cluster|benchmarks|brainlm|docs)/[\w/.-]+\.(?:py|yaml|md|png|svg)",
        page.read_text(),
    )
    assert named
    missing = [name for name in named if not (ROOT / name).is_file() and "<" not in name]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("path", configs(), ids=str)
def test_every_config_is_accepted_and_says_what_it_is_for(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert text.startswith("#"), "a config opens with purpose, source and command"
    assert str(path) in text, "the header names the command"
    folder = path.parts[0]
    cls = SETTINGS[folder]
    if path.name.endswith("_cohort.yaml"):
        cls = SimulateConfig
    elif path.name.endswith("_verdict.yaml"):
        cls = VerdictSettings
    elif path.name.startswith("finetune_"):
        cls = FinetuneSettings
    elif path.name.endswith("_predictions.yaml"):
        cls = PredictSettings
    elif path.name.endswith("_embeddings.yaml"):
        cls = ExtractSettings
    settings = load_config(cls, ROOT / path)
    if isinstance(settings, PretrainSettings):
        check_settings(settings, world_size=2)
    if isinstance(settings, FinetuneSettings):
        check_finetune_settings(settings, world_size=2)


def test_the_demo_runs_the_programs_with_their_own_demo_configs() -> None:
    stages = yaml.safe_load((ROOT / "cluster/configs/demo.yaml").read_text())["stages"]
    named = {word for stage in stages for word in stage["command"].split() if word.endswith(".yaml")}
    assert {Path(name).parts[0] for name in named} == {"data_prep", "train", "eval"}
    assert all((ROOT / name).is_file() for name in named)
