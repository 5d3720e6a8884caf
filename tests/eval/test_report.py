"""The report: right verdicts, every number, one self-contained file, no subject, and missing files are said."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainlm.errors import DataError
from brainlm.store import Store
from eval import figures
from eval.report import main, write_report
from eval.report_claims import compare, paired_difference
from eval.report_input import read_results
from eval.results import Score, write_scores

pytest.importorskip("nilearn")

BRAINLM = "BrainLM demo"
FLAG = "data: a whole-run high-pass filter lets the future leak into the past"
NUM_SUBJECTS = 8


def score(model: str, kind: str, task: str, metric: str, value: float, half: float | None, **condition: Any) -> Score:
    return Score(
        task=task,
        version=1,
        dataset="sim-cohort",
        dataset_hash="5f0c" * 16,
        split="test",
        model=model,
        model_kind=kind,  # type: ignore[arg-type]
        model_hash=f"{model} v1",
        metric=metric,
        value=value,
        ci_low=None if half is None else value - half,
        ci_high=None if half is None else value + half,
        num_subjects=1 if half is None else NUM_SUBJECTS,
        num_recordings=1 if half is None else NUM_SUBJECTS,
        condition=condition,
        statistics_from="checkpoint" if kind in ("brainlm", "untrained") else "cohort",
        notes=(FLAG, "one subject only: no interval") if half is None else (FLAG,),
    )


RECONSTRUCTION: Mapping[str, tuple[str, Mapping[float, float]]] = {
    BRAINLM: ("brainlm", {0.2: 0.668, 0.5: 0.655, 0.75: 0.630}),
    "untrained": ("untrained", {0.2: -0.021, 0.5: -0.019, 0.75: -0.022}),
    "mean": ("baseline", {0.2: -0.002, 0.5: -0.003, 0.75: -0.004}),
    "interpolation": ("baseline", {0.2: -0.62, 0.5: -0.89, 0.75: -1.32}),
    "gaussian": ("baseline", {0.2: 0.640, 0.5: 0.621, 0.75: 0.560}),
    "gaussian adapted": ("baseline", {0.2: 0.671, 0.5: 0.652, 0.75: 0.571}),
    "optimum": ("optimum", {0.2: 0.741, 0.5: 0.730, 0.75: 0.702}),
}
NETWORKS: Mapping[str, tuple[str, tuple[float, float, float]]] = {
    "untrained": ("untrained", (0.34, 0.31, 0.20)),
    "functional connectivity": ("baseline", (0.81, 0.80, 0.79)),
    "raw series": ("baseline", (0.52, 0.51, 0.50)),
    "coordinates (x, y, z)": ("control", (0.42, 0.36, 0.22)),
    "coordinates (|x|, y, z)": ("control", (0.47, 0.38, 0.24)),
    "majority class": ("control", (0.18, 0.18, 0.18)),
    f"{BRAINLM}, permuted series": ("control", (0.33, 0.30, 0.21)),
}


def believable_scores(shift: float = 0.0, half: float | None = 0.02) -> list[Score]:
    """Return scores of all three tasks; `shift` moves the model's reconstruction, `half` is half an interval."""
    found = []
    for model, (kind, values) in RECONSTRUCTION.items():
        for ratio, given in values.items():
            value = given + (shift if kind == "brainlm" else 0.0)
            for centring in ("recording", "visible"):
                if kind == "optimum" and centring == "visible":
                    continue
                leak_free = value - (0.03 if centring == "visible" else 0.0)
                where = {"mask": "random", "mask_ratio": ratio, "centring": centring}
                for metric, number in (
                    ("r2", leak_free),
                    ("r2_pooled_contract_units", leak_free + 0.011),
                    ("pearson_r", max(leak_free, 0.0) ** 0.5),
                    ("mse", 1 - leak_free),
                    ("mae", 0.8 * (1 - leak_free) ** 0.5),
                ):
                    found.append(score(model, kind, "reconstruction", metric, number, half, **where))
                if model != "gaussian":
                    less = leak_free - (RECONSTRUCTION["gaussian"][1][ratio] - 0.03 * (centring == "visible"))
                    difference = score(model, kind, "reconstruction", "r2_minus_reference", less, half, **where)
                    found.append(replace(difference, condition={**where, "reference": "gaussian"}))
    forecast = {BRAINLM: ("brainlm", 0.031), "untrained": ("untrained", -0.012), "mean": ("baseline", -0.004)}
    forecast |= {
        "persistence": ("baseline", -0.93),
        "autoregression": ("baseline", 0.052),
        "optimum": ("optimum", 0.118),
    }
    for model, (kind, value) in forecast.items():
        for horizon in (20, 40):
            for metric, number in (
                ("r2", value * 20 / horizon),
                ("pearson_r", max(value, 0) ** 0.5),
                ("mse", 1 - value),
            ):
                item = score(model, kind, "forecasting", metric, number, half and half / 4, horizon=horizon)
                note = ("knows the mean of the whole recording",) if kind == "optimum" else ()
                found.append(replace(item, notes=item.notes + note))
    attention = {
        (BRAINLM, part): ("brainlm", v)
        for part, v in {"encoder": (0.70, 0.68, 0.66), "decoder": (0.74, 0.73, 0.7)}.items()
    }
    features = attention | {(model, ""): given for model, given in NETWORKS.items()}
    for (model, part), (kind, accuracies) in features.items():
        for folds, value in zip(("random", "mirrored", "blocked"), accuracies):
            for level in ("recording", "group"):
                if level == "group" and model == "raw series":
                    continue
                where = {"level": level, "folds": folds} | ({"part": part} if part else {})
                for metric, number in (("accuracy", value), ("balanced_accuracy", value - 0.04)):
                    found.append(score(model, kind, "networks", metric, number, half, **where))
    return found


def write_folder(folder: Path, scores: list[Score], rng: np.random.Generator) -> str:
    """Write a complete results folder beside a small training run."""
    store = Store(folder / "results")
    write_scores(store, scores)
    run = folder / "demo"
    (run / "checkpoints" / "step-3000").mkdir(parents=True)
    lines = []
    for step in range(10, 3001, 10):
        row = {
            "step": step,
            "loss": 0.4 + 0.6 * np.exp(-step / 400) + 0.03 * rng.standard_normal(),
            "lr": 1e-3 * min(step / 200, 1) * (1 - step / 3300),
            "grad_norm": 0.5 + 0.2 * abs(rng.standard_normal()),
            "windows_per_s": 210 + 5 * rng.standard_normal(),
        }
        lines.append(json.dumps(row | ({"val_r2": 0.6 * (1 - np.exp(-step / 500))} if step % 250 == 0 else {})))
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3010, "lo')  # killed while writing
    store.write_json(
        "run.json",
        {
            "config": {"dataset": "runs/demo/data", "out": "runs/demo/results", "intervals": {"level": 0.95}},
            "dataset": {
                "name": "sim-cohort",
                "content_hash": "5f0c" * 16,
                "counts": {"train": {"recordings": 24, "subjects": 24}, "test": {"recordings": 8, "subjects": 8}},
                "atlas": {"name": "A100", "sha256": "ab" * 32, "num_parcels": 100},
                "tr_s": 2.0,
                "high_pass_hz": 0.008,
                "low_pass_hz": None,
                "units": "arbitrary (parcel-mean BOLD)",
                "flags": [FLAG.removeprefix("data: ")],
                "warnings": ["sub-0007_ses-1_task-rest_bold: 12 volumes above 0.5 mm", "<b>odd</b> & ends"],
            },
            "checkpoints": [
                {
                    "name": BRAINLM,
                    "path": str(run / "checkpoints" / "step-3000"),
                    "weights_sha256": "c0de" * 16,
                    "num_parameters": 131072,
                    "config": {"width": 64, "depth": 1},
                    "manifest": {
                        "git_commit": "609fadb",
                        "data_hash": "5f0c5f0c",
                        "step": 3000,
                        "versions": {"torch": "2.13"},
                    },
                }
            ],
            "skipped_tasks": {},
            "warnings": [],
            "versions": {"brainlm": "0.1.0", "torch": "2.13.0"},
            "git": {"commit": "609fadb", "dirty": True},
            "started": "2025-01-01T10:00:00+00:00",
            "seconds": {"reconstruction: gaussian": 12.3, "all units": 61.0},
            "command": ["python", "eval/run.py", "--config", "eval/configs/demo.yaml"],
        },
    )
    n, num_parcels, window_len, patch_len = 2, 24, 200, 20
    truth = np.cumsum(rng.standard_normal((n, num_parcels, window_len)), axis=2) / 8
    truth -= truth.mean(-1, keepdims=True)
    mask = rng.random((n, num_parcels * window_len // patch_len)) < 0.5
    hidden = np.repeat(mask.reshape(n, num_parcels, -1), patch_len, axis=2)
    arrays = {
        f"prediction_{model}": np.where(hidden, truth + noise * rng.standard_normal(truth.shape), np.nan)
        for model, noise in ((BRAINLM, 0.15), ("gaussian adapted", 0.25), ("gaussian", 0.3), ("optimum", 0.1))
    }
    arrays |= {"truth_z": truth, "mask": mask, "parcels": np.arange(6)}
    arrays["names"] = np.array([f"V1 <{i}>" for i in range(num_parcels)])
    buffer = io.BytesIO()
    np.savez(buffer, tr_s=2.0, mask_ratio=0.5, **arrays)
    store.write_bytes("examples.npz", buffer.getvalue())
    half = rng.uniform((8, -95, -40), (62, 60, 70), size=(50, 3))
    coords = np.concatenate([half, half * (-1, 1, 1)])
    frames = []
    for model, level in ((BRAINLM, 0.6), ("gaussian adapted", 0.57), ("mean", 0.0)):
        for ratio in (0.5, 0.75):
            frame = pd.DataFrame(coords, columns=["x_mm", "y_mm", "z_mm"])
            frame["parcel"], frame["model"], frame["mask_ratio"] = [f"p{i}" for i in range(100)], model, ratio
            frame["network"] = [f"network-{i % 5}" for i in range(100)]
            frame["r2"] = level + 0.1 * rng.standard_normal(100) + 0.1 * (coords[:, 1] > 0)
            frames.append(frame)
    write_table(store, "parcels.parquet", pd.concat(frames))
    curves = []
    for model, level in (
        (BRAINLM, 0.35),
        ("autoregression", 0.5),
        ("mean", 0.0),
        ("optimum", 0.6),
        ("untrained", -0.02),
        ("persistence", -9),
    ):
        value = level * np.exp(-np.arange(20) / (2.5 if level > -1 else 9))
        curves.append(
            pd.DataFrame(
                {
                    "model": model,
                    "horizon": 20,
                    "step": np.arange(1, 21),
                    "r2": value,
                    "ci_low": value - 0.03,
                    "ci_high": value + 0.03,
                }
            )
        )
    write_table(store, "forecast_curves.parquet", pd.concat(curves))
    return store.url


def write_table(store: Store, name: str, frame: pd.DataFrame) -> None:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    store.write_bytes(name, buffer.getvalue())


def plain(page: str) -> str:
    """Return the words of a page."""
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A rendered report of a complete results folder: (folder, page)."""
    folder = tmp_path_factory.mktemp("report")
    url = write_folder(folder, believable_scores(), np.random.default_rng(0))
    write_report(url)
    return Path(url), (Path(url) / "report.html").read_text()


def test_page_fetches_nothing(complete: tuple[Path, str]) -> None:
    _, page = complete
    assert "http" not in page
    assert not re.search(r"@import|<script|<link|\burl\((?!#)", page)
    assert all(target.startswith(("#", "data:")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_page_holds_every_number_of_the_records(complete: tuple[Path, str]) -> None:
    folder, page = complete
    text = plain(page)
    for item in read_results(str(folder)).scores:
        assert figures.minus(item.value) in text
    for number in ("0.630 [0.610, 0.650]", "\N{MINUS SIGN}1.320", "0.343", "0.588", "0.086"):
        assert number in text


def test_figures_are_saved_and_every_id_is_used_once(complete: tuple[Path, str]) -> None:
    folder, page = complete
    saved = {path.name for path in (folder / "figures").iterdir()}
    names = ("training", "reconstruction", "example-1", "example-2", "brain-r2", "brain-difference", "brain-networks")
    assert saved == {f"{name}.{ending}" for name in (*names, "forecast", "networks") for ending in ("svg", "png")}
    assert page.count("<svg") == len(saved) / 2
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_figures_follow_the_pages_colours(complete: tuple[Path, str]) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", complete[1], flags=re.DOTALL))
    assert not any(colour in drawn for colour in figures.THEME)
    assert all(f"--{name}:" in complete[1] for name in figures.THEME.values())
    assert all(f"--{name}: {colour}" in complete[1] for colour, name in figures.THEME.items())


def test_no_subject_is_named(complete: tuple[Path, str]) -> None:
    assert "sub-" not in complete[1]
    assert "(recording): 12 volumes above 0.5 mm" in complete[1]


def test_text_from_files_is_escaped(complete: tuple[Path, str]) -> None:
    assert "&lt;b&gt;odd&lt;/b&gt; &amp; ends" in complete[1]
    assert "<b>odd" not in complete[1]
    assert "V1 &lt;0&gt;" in complete[1]


def test_summary_says_what_the_reader_must_know(complete: tuple[Path, str]) -> None:
    text = plain(complete[1])
    assert "The data are simulated" in text
    assert "8 subjects are few" in text
    assert "whole-run high-pass filter lets the future leak" in text
    assert "Exact optimum (Kalman): 0.702 [0.682, 0.722], of which BrainLM demo reaches 90 %" in text
    assert "high-pass 0.008 Hz" in text
    assert "Position alone reaches 0.240" in text
    assert "Below the axis at every step: persistence." in text


@pytest.mark.parametrize(
    ("shift", "half", "word", "sentence"),
    [
        (0.0, 0.02, "ahead", "BrainLM demo is ahead: the intervals do not overlap"),
        (-0.2, 0.02, "behind", "BrainLM demo is behind: the intervals do not overlap"),
        (-0.9, 0.02, "behind", "That is worse than guessing the mean."),
        (-0.05, 0.02, "open", "No clear difference: the intervals overlap"),
        (0.0, None, "open", "without intervals nothing follows"),
    ],
)
def test_verdict_is_what_the_intervals_say(
    tmp_path: Path, shift: float, half: float | None, word: str, sentence: str
) -> None:
    store = Store(tmp_path)
    write_scores(store, [s for s in believable_scores(shift, half) if s.task == "reconstruction"])
    write_report(store.url)
    page = (tmp_path / "report.html").read_text()
    verdict = re.search(r'Reconstruction</span><span class="verdict (\w+)"', page)
    assert verdict is not None
    assert verdict[1] == word
    assert sentence in plain(page)


def test_a_paired_difference_decides_even_where_intervals_overlap() -> None:
    where = {"mask_ratio": 0.75, "centring": "recording"}
    ours = score(BRAINLM, "brainlm", "reconstruction", "r2", 0.61, 0.05, **where)
    theirs = score("gaussian", "baseline", "reconstruction", "r2", 0.58, 0.05, **where)
    paired = score(
        BRAINLM, "brainlm", "reconstruction", "r2_minus_reference", 0.03, 0.01, reference="gaussian", **where
    )
    assert compare(ours, theirs).word == "no clear difference"
    assert compare(ours, theirs, paired).word == "ahead"
    assert "although the two intervals overlap" in compare(ours, theirs, paired).reason
    assert compare(ours, theirs, replace(paired, ci_low=-0.01)).word == "no clear difference"
    assert compare(theirs, ours, replace(paired, value=-0.03, ci_low=-0.04, ci_high=-0.02)).word == "behind"


def test_a_paired_difference_counts_only_for_the_baseline_it_was_taken_from(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), believable_scores())
    results = read_results(str(tmp_path))
    at = {"mask": "random", "mask_ratio": 0.75, "centring": "recording"}
    by_model = {s.model: s for s in results.find("reconstruction", "r2", **at)}
    found = paired_difference(results, by_model[BRAINLM], by_model["gaussian"])
    assert found is not None
    assert found.value == pytest.approx(0.07)
    assert paired_difference(results, by_model[BRAINLM], by_model["gaussian adapted"]) is None


def test_a_score_above_the_optimum_is_called_impossible(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), believable_scores(shift=0.2))
    write_report(str(tmp_path))
    assert "scores above the exact optimum in reconstruction" in plain((tmp_path / "report.html").read_text())


def test_missing_files_are_said_and_nothing_else_is_lost(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), [s for s in believable_scores() if s.task == "reconstruction"])
    write_report(str(tmp_path))
    text = plain((tmp_path / "report.html").read_text())
    for sentence in (
        "No metrics.jsonl was found beside the checkpoint",
        "No sample windows were kept",
        "there is no brain picture",
        "This task was not run: results.json holds no record of it.",
        "run.json is not there",
        "0.630 [0.610, 0.650]",
    ):
        assert sentence in text


def test_a_task_that_was_left_out_gives_its_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_scores(store, [s for s in believable_scores() if s.task == "forecasting"])
    store.write_json("run.json", {"skipped_tasks": {"networks": "the atlas names fewer than two networks"}})
    write_report(store.url)
    text = plain((tmp_path / "report.html").read_text())
    assert "This task was not run: the atlas names fewer than two networks." in text


def test_baselines_alone_make_a_report_without_claims(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), [s for s in believable_scores() if s.model_kind == "baseline"])
    write_report(str(tmp_path))
    text = plain((tmp_path / "report.html").read_text())
    assert "nothing to claim about a model" in text
    assert "simulated data" not in text


def test_scores_of_an_older_version_are_kept_apart(tmp_path: Path) -> None:
    scores = [s for s in believable_scores() if s.task == "forecasting"]
    old = replace(scores[0], value=0.777)
    write_scores(Store(tmp_path), [old, *(replace(s, version=2) for s in scores)])
    write_report(str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "1 record of another data set, split or task version" in plain(page)
    assert page.count("0.777") == 1


def test_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), [s for s in believable_scores() if s.task == "networks"])
    pages = set()
    for _ in range(2):
        write_report(str(tmp_path))
        pages.add((tmp_path / "report.html").read_text())
    assert len(pages) == 1


def test_a_folder_without_results_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"eval/run\.py"):
        write_report(str(tmp_path))
    assert main([str(tmp_path)]) == 1
    assert "eval/run.py" in capsys.readouterr().err


def test_entry_prints_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(Store(tmp_path), [s for s in believable_scores() if s.task == "forecasting"])
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/report.html"
