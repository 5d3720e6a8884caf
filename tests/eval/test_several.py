"""The same checkpoint on several data sets: scores are those of each alone, and stand side by side."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from brainlm.atlas import Atlas
from brainlm.dataset import Dataset
from brainlm.store import Store
from brainlm.testing import synthetic_atlas, write_synthetic_dataset
from eval.compare import main as compare
from eval.report import main as report
from eval.results import Score, read_scores
from eval.run import main
from tests.eval.conftest import PATCH_LEN, WINDOW_LEN

Captured = pytest.CaptureFixture[str]


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return [
        f"checkpoints=[{checkpoint}]",
        f"out={out}",
        "tasks=[reconstruction, forecasting]",
        "ray.workers=0",
        "reconstruction={mask_ratios: [0.3], shrinkages: [0.1], own_weights: [], noises: []}",
        "forecasting={horizons: [10], baselines: [mean, persistence]}",
        "intervals={num_bootstrap: 50}",
        *more,
    ]


def write_other(folder: Path, atlas: Atlas) -> Dataset:
    return write_synthetic_dataset(
        str(folder / "dataset"),
        num_subjects={"train": 6, "val": 2, "test": 3},
        num_timepoints=90,
        window_len=WINDOW_LEN,
        patch_len=PATCH_LEN,
        atlas=atlas,
        seed=5,
    )


@pytest.fixture(scope="module")
def other(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_other(tmp_path_factory.mktemp("other"), dataset.contract.atlas)


@pytest.fixture(scope="module")
def both(dataset: Dataset, other: Dataset, training_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "results"
    assert main(arguments(training_run, out, f"datasets=[{dataset.store.url}, {other.store.url}]")) == 0
    return out


def folders(out: Path) -> dict[str, Path]:
    """Return the folder of each data set by its content hash."""
    return {entry["content_hash"]: out / entry["folder"] for entry in json.loads((out / "datasets.json").read_text())}


def test_scores_are_those_of_each_data_set_alone(
    both: Path, dataset: Dataset, other: Dataset, training_run: Path, tmp_path: Path
) -> None:
    together = read_scores(Store(both))
    assert {score.dataset_hash for score in together} == {dataset.content_hash, other.content_hash}
    assert main(arguments(training_run, tmp_path / "alone", f"dataset={other.store.url}", "report=false")) == 0
    alone = read_scores(Store(tmp_path / "alone"))
    assert [score for score in together if score.dataset_hash == other.content_hash] == alone
    assert (folders(both)[other.content_hash] / "report.html").exists()
    assert compare([str(tmp_path / "alone"), str(folders(both)[other.content_hash])]) == 0


class Tables(HTMLParser):
    """Reads titles, columns and cells of all tables, and where links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")
        if tag in ("tr", "caption"):
            self.rows.append([])
        if tag in ("th", "td", "caption"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "caption"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_page_has_a_column_for_each_data_set(both: Path, dataset: Dataset, other: Dataset) -> None:
    page = Tables()
    page.feed((both / "report.html").read_text())
    assert dataset.name == other.name  # told apart by their hashes
    names = [f"{d.name} {d.content_hash[:8]}" for d in (dataset, other)]
    assert ["Model", *names] in page.rows

    def shown(score: Score) -> str:
        assert score.ci_low is not None
        assert score.ci_high is not None
        numbers = f"{score.value:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
        return numbers.replace("-", "\N{MINUS SIGN}")

    start = next(i for i, row in enumerate(page.rows) if row[0].startswith("R², 10 timepoints ahead"))
    (row,) = [row for row in page.rows[start + 2 : start + 7] if row[0].startswith("persistence")]
    of_one = {
        s.dataset_hash: s
        for s in read_scores(Store(both))
        if (s.task, s.model, s.metric) == ("forecasting", "persistence", "r2")
    }
    assert row[1:] == [shown(of_one[d.content_hash]) for d in (dataset, other)]
    for link in page.links:
        if not link.startswith("#"):
            assert (both / link).is_file()


def test_a_second_run_computes_only_what_is_missing(
    both: Path, dataset: Dataset, other: Dataset, training_run: Path, capsys: Captured
) -> None:
    before = (both / "results.json").read_bytes()
    assert main(arguments(training_run, both, f"datasets=[{dataset.store.url}, {other.store.url}]")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "units of work" in line]
    assert len(lines) == 2
    assert all(line.split()[0] == line.split()[4] for line in lines)  # all of them were done before
    assert (both / "results.json").read_bytes() == before
    page = (both / "report.html").read_bytes()
    (both / "report.html").unlink()
    assert report([str(both)]) == 0
    assert (both / "report.html").read_bytes() == page


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    both: Path, dataset: Dataset, training_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    few = write_other(tmp_path, synthetic_atlas(4, 2, 0))
    out = tmp_path / "results"
    assert main(arguments(training_run, out, f"datasets=[{dataset.store.url}, {few.store.url}]")) == 1
    assert f"error: data set {few.store.url}: " in capsys.readouterr().err
    assert not out.exists()
    assert main(arguments(training_run, out, f"datasets=[{few.store.url}, {few.store.url}]")) == 1
    assert "datasets, several, each once" in capsys.readouterr().err
    assert main(arguments(training_run, both, f"dataset={dataset.store.url}")) == 1
    assert "holds the results of several data sets" in capsys.readouterr().err
    assert main(arguments(training_run, folders(both)[dataset.content_hash], f"datasets=[{dataset.store.url}]")) == 1
    assert "is the results folder of one data set" in capsys.readouterr().err
    assert compare([str(both), str(both)]) == 1
    assert "give the folder of one" in capsys.readouterr().err
