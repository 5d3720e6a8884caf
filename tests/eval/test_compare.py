"""Two results folders beside one another: real evaluations, and every difference computed a second way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.intervals import bootstrap_counts
from brainlm.store import Store
from brainlm.testing import small_model, write_synthetic_dataset
from eval.compare import main
from eval.difference_interval import difference_interval
from eval.resampled import ScoreSums
from eval.run import main as evaluate
from tests.eval.conftest import PATCH_LEN, WINDOW_LEN

Captured = pytest.CaptureFixture[str]
Record = dict[str, Any]
RATIO = {"mask": "random", "mask_ratio": 0.3, "centring": "recording"}


def run(dataset: Dataset, checkpoint: Path, out: Path, *more: str) -> Path:
    words = [
        f"dataset={dataset.store.url}",
        f"checkpoints=[{checkpoint}]",
        f"out={out}",
        "report=false",
        "ray.workers=0",
        "reconstruction={mask_ratios: [0.3], shrinkages: [0.1], own_weights: [], noises: []}",
        "forecasting={horizons: [10], baselines: [mean, persistence, autoregression], forecasters: {orders: [1, 2]}}",
        "networks={num_masks: 1, neighbours: [1], fold_kinds: [random]}",
        "intervals={num_bootstrap: 50}",  # of the evaluation; a comparison has its own
        *more,
    ]
    assert evaluate(words) == 0
    return out


@pytest.fixture(scope="module")
def before(dataset: Dataset, training_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dataset, training_run, tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def after(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint of another name, without untrained network, with one more mask ratio."""
    folder = tmp_path_factory.mktemp("after")
    save_checkpoint(str(folder / "lr=1"), small_model(dataset.contract, seed=3), {"step": 7}, [])
    return run(
        dataset, folder / "lr=1", folder / "out", "include_untrained=false", "reconstruction.mask_ratios=[0.3, 0.5]"
    )


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def compared(a: Path | str, b: Path | str, tmp_path: Path, *more: str) -> Record:
    out = tmp_path / "comparison.json"
    assert main([str(a), str(b), "--out", str(out), *more]) == 0
    found: Record = json.loads(out.read_text())
    return found


def one(found: Record, task: str, metric: str, model: str, **condition: object) -> Record:
    """Return the only score of a comparison with these; `model` is that of A."""
    scores = [s for s in found["scores"] if condition.items() <= s["condition"].items()]
    (score,) = [s for s in scores if (s["task"], s["metric"], s["model_a"]) == (task, metric, model)]
    return dict(score)


def table(folder: Path, task: str, model: str) -> pd.DataFrame:
    units = json.loads((folder / "run.json").read_text())["units"]
    (file,) = [unit["file"] for unit in units if (unit["task"], unit["name"]) == (task, model)]
    return pd.read_parquet(folder / file)


def change_records(folder: Path, change: Callable[[Record], Record]) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps([change(record) for record in json.loads(path.read_text())]))


def test_two_identical_runs_do_not_differ_at_all(
    before: Path, dataset: Dataset, training_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    found = compared(before, run(dataset, training_run, tmp_path / "again"), tmp_path)
    assert {s["task"] for s in found["scores"]} == {"reconstruction", "forecasting", "networks"}
    assert len(found["scores"]) == len(json.loads((before / "results.json").read_text()))
    for score in found["scores"]:
        assert (score["difference"], score["ci_low"], score["ci_high"]) == (0, 0, 0), score
        assert score["interval"] == "paired"
        assert not score["excludes_zero"]
    assert found["differences"] == found["unmatched"] == []
    assert "Nothing that the folders record differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "metric", "model", "condition", "rows", "unit", "sums"),
    [
        ("reconstruction", "r2", "BrainLM pretrain", RATIO, {"mask_ratio": 0.3, "centring": "recording"}, "group",
         ("sse", "sst")),
        ("forecasting", "mse", "BrainLM pretrain", {"horizon": 10}, {}, "group", ("sse", "n")),
        ("networks", "accuracy", "BrainLM pretrain, permuted series", {"level": "group", "part": "encoder"},
         {"level": "group", "part": "encoder"}, "parcel", ("correct", "n")),
    ],
)  # fmt: skip
def test_another_checkpoint_gives_the_difference_of_values_and_its_paired_interval(
    task: str,
    metric: str,
    model: str,
    condition: Record,
    rows: Record,
    unit: str,
    sums: tuple[str, str],
    before: Path,
    after: Path,
    tmp_path: Path,
) -> None:
    found = one(compared(before, after, tmp_path), task, metric, model, **condition)
    assert found["model_b"] == model.replace("pretrain", "lr=1")
    assert found["difference"] == found["value_b"] - found["value_a"] != 0
    parts = []
    for folder, name in ((before, model), (after, found["model_b"])):
        frame = table(folder, task, name)
        for column, value in rows.items():
            frame = frame[frame[column] == value]
        parts.append(frame)
    units = list(dict.fromkeys(parts[0][unit]))
    counts = bootstrap_counts(len(units), 2000, 0).astype(int)

    def value(frame: pd.DataFrame, drawn: list[str]) -> float:
        top, below = (sum(frame.loc[frame[unit] == name, column].sum() for name in drawn) for column in sums)
        return float(1 - top / below if metric == "r2" else top / below)

    a, b = (value(part, units) for part in parts)
    assert (found["value_a"], found["value_b"]) == pytest.approx((a, b))
    by_unit = [part.groupby(unit)[list(sums)].sum().loc[units].to_numpy() for part in parts]
    ratios = []
    for row in counts:  # units repeated as often as they were drawn, the same ones on both sides
        drawn = np.repeat(np.arange(len(units)), row)
        ratio = [per_unit[drawn].sum(axis=0) for per_unit in by_unit]
        ratios.append(ratio[1][0] / ratio[1][1] - ratio[0][0] / ratio[0][1])
    low, high = np.quantile(ratios, [0.025, 0.975]) * (-1 if metric == "r2" else 1)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((min(low, high), max(low, high)))
    assert found["excludes_zero"] == (min(low, high) > 0 or max(low, high) < 0)


def test_a_difference_from_the_reference_changes_as_the_score_does_while_the_reference_stands(
    before: Path, after: Path, tmp_path: Path
) -> None:
    found = compared(before, after, tmp_path, "--task", "reconstruction")
    plain = one(found, "reconstruction", "r2", "BrainLM pretrain", **RATIO)
    minus = one(found, "reconstruction", "r2_minus_reference", "BrainLM pretrain", **RATIO)
    for key in ("difference", "ci_low", "ci_high"):
        assert minus[key] == pytest.approx(plain[key])


def test_what_differs_is_said_and_records_of_one_folder_are_counted(
    before: Path, after: Path, tmp_path: Path, capsys: Captured
) -> None:
    found = compared(before, after, tmp_path)
    printed = capsys.readouterr().out
    differences = {d["key"]: (d["a"], d["b"]) for d in found["differences"]}
    assert differences["config.reconstruction.mask_ratios"] == ([0.3], [0.3, 0.5])
    assert differences["config.include_untrained"] == (True, False)
    assert differences["BrainLM lr=1.manifest.step"] == (10, 7)
    hashes = [
        json.loads((folder / "run.json").read_text())["checkpoints"][0]["weights_sha256"] for folder in (before, after)
    ]
    assert differences["BrainLM lr=1.weights_sha256"] == tuple(hashes)
    assert not any(key.endswith(".out") or key.startswith(("git.", "versions.")) for key in differences)
    assert "compared: BrainLM pretrain (A) with BrainLM lr=1 (B), the only checkpoint" in printed
    untrained = [r for r in json.loads((before / "results.json").read_text()) if r["model"] == "untrained"]
    for task in ("reconstruction", "forecasting", "networks"):
        count = sum(r["task"] == task for r in untrained)
        assert {"folder": "A", "task": task, "model": "untrained", "num_scores": count} in found["unmatched"]
        assert f"A alone has {count} scores of untrained on {task}" in printed
    more = [left for left in found["unmatched"] if left["folder"] == "B"]  # the second mask ratio
    assert {(left["task"], left["model"]) for left in more} >= {("reconstruction", "BrainLM lr=1")}
    in_b = len(json.loads((after / "results.json").read_text()))
    assert len(found["scores"]) + sum(left["num_scores"] for left in more) == in_b


def test_the_table_shows_the_first_metric_or_the_one_asked_for_and_marks_what_changed(
    before: Path, after: Path, tmp_path: Path, capsys: Captured
) -> None:
    found = compared(before, after, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert {"reconstruction: r2", "forecasting: r2", "networks: accuracy"} <= set(lines)
    assert "  the same in every digit: mean (2), interpolation (2), gaussian (2), optimum (1)" in lines
    first = [s for s in found["scores"] if s["metric"] in ("r2", "accuracy")]
    assert sum(line.endswith("]  *") for line in lines) == sum(s["excludes_zero"] for s in first) > 0
    assert main([str(before), str(after), "--metric", "pearson_r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"forecasting: pearson_r", "networks has no metric pearson_r"} <= set(lines)
    assert main([str(before), str(after), "--metric", "beauty"]) == 1
    assert "--metric: expected one of r2, " in capsys.readouterr().err


def test_models_are_paired_as_asked(before: Path, after: Path, tmp_path: Path, capsys: Captured) -> None:
    asked = ("--model", "gaussian=mean", "--model", "BrainLM pretrain=BrainLM lr=1")
    found = compared(before, after, tmp_path, *asked)
    assert one(found, "reconstruction", "r2", "gaussian", **RATIO)["model_b"] == "mean"
    assert {"a": "BrainLM pretrain, permuted series", "b": "BrainLM lr=1, permuted series", "why": "as asked"} in found[
        "models"
    ]
    assert main([str(before), str(after), "--model", "BrainLM nobody=mean"]) == 1
    assert "expected NAME_IN_A=NAME_IN_B, found 'BrainLM nobody=mean'" in capsys.readouterr().err
    assert main([str(before), str(after), "--model", "mean=mean", "--model", "mean=gaussian"]) == 1
    assert "a model of A was given twice" in capsys.readouterr().err


def test_other_data_are_refused_or_compared_without_pairing(
    before: Path, dataset: Dataset, training_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = write_synthetic_dataset(
        str(tmp_path / "other"), num_subjects={"train": 16, "val": 4, "test": 7}, num_timepoints=90,
        window_len=WINDOW_LEN, patch_len=PATCH_LEN, seed=5, atlas=dataset.contract.atlas,
    )  # fmt: skip
    out = run(other, training_run, tmp_path / "out", "tasks=[forecasting]")
    assert main([str(before), str(out)]) == 1
    message = capsys.readouterr().err
    assert other.content_hash[:12] in message
    assert "--other-data" in message
    found = compared(before, out, tmp_path, "--other-data")
    assert "the interval is not paired: the data are not the same" in capsys.readouterr().out
    keys = [d["key"] for d in found["differences"]]
    assert "dataset.content_hash" in keys
    assert "dataset.num_recordings.test" in keys
    score = one(found, "forecasting", "r2", "mean")
    assert score["interval"] == "unpaired"
    rng, sums = np.random.default_rng(1), []
    for folder in (before, out):
        per_unit = table(folder, "forecasting", "mean").groupby("group")[["sse", "sst"]].sum().to_numpy()
        drawn = per_unit[rng.integers(len(per_unit), size=(20000, len(per_unit)))].sum(axis=1)
        sums.append(1 - drawn[:, 0] / drawn[:, 1])
    expected = np.quantile(sums[1] - sums[0], [0.025, 0.975])
    assert [score["ci_low"], score["ci_high"]] == pytest.approx(list(expected), abs=0.1 * np.ptp(expected))


def test_another_split_is_refused(
    before: Path, dataset: Dataset, training_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    val = run(dataset, training_run, tmp_path / "val", "split=val", "tasks=[forecasting]")
    assert main([str(before), str(val)]) == 1
    assert "split: expected the same data in both folders, found test in A and val in B" in capsys.readouterr().err


def test_another_version_of_a_task_is_refused_and_other_tasks_are_not(
    before: Path, copy: Callable[[Path], Path], capsys: Captured
) -> None:
    newer = copy(before)
    change_records(newer, lambda r: {**r, "version": r["version"] + 1} if r["task"] == "networks" else r)
    assert main([str(before), str(newer)]) == 1
    message = capsys.readouterr().err
    assert "networks: expected one version of the task, found 1 in A and 2 in B" in message
    assert str(newer) in message
    assert main([str(before), str(newer), "--task", "forecasting"]) == 0
    assert main([str(before), str(newer), "--task", "divination"]) == 1
    assert "--task: expected one of forecasting, networks, reconstruction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "holds no results.json: run python eval/run.py"),
        ("results.json", "[{", "is not valid JSON"),
        ("results.json", "[]", "holds no score"),
        ("results.json", "[{}]", "record 0: unknown or missing"),
        ("run.json", "{", "is not valid JSON"),
        ("run.json", '{"units": [1]}', "is not what eval/run.py writes"),
    ],
)
def test_missing_and_damaged_files_are_named(
    name: str, content: str | None, message: str, before: Path, copy: Callable[[Path], Path], capsys: Captured
) -> None:
    other = copy(before)
    (other / name).unlink() if content is None else (other / name).write_text(content)
    assert main([str(before), str(other)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert str(other) in said


def test_a_damaged_table_is_named(before: Path, copy: Callable[[Path], Path], capsys: Captured) -> None:
    other = copy(before)
    damaged = next((other / "subjects").glob("networks--majority-class--*"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert main([str(before), str(other)]) == 1
    assert f"{damaged.name} is damaged; remove it and run eval/run.py again" in capsys.readouterr().err


def test_without_sums_values_are_compared_and_the_reason_is_given(
    before: Path, copy: Callable[[Path], Path], tmp_path: Path, capsys: Captured
) -> None:
    other = copy(before)
    next((other / "subjects").glob("forecasting--mean--*")).unlink()
    change_records(other, lambda r: {**r, "value": 0.123, "ci_low": 0, "ci_high": 1} if r["metric"] == "mse" else r)
    found = compared(before, other, tmp_path)
    gone, changed = one(found, "forecasting", "r2", "mean"), one(found, "forecasting", "mse", "persistence")
    for score, reason in ((gone, "no table of mean in"), (changed, "results.json says 0.123")):
        assert (score["ci_low"], score["ci_high"], score["interval"]) == (None, None, "none")
        assert any(note.startswith("no interval: B: ") and reason in note for note in score["notes"])
    assert changed["difference"] == pytest.approx(0.123 - changed["value_a"])
    (other / "run.json").unlink()
    capsys.readouterr()
    found = compared(before, other, tmp_path)
    assert {score["interval"] for score in found["scores"]} == {"none"}
    assert f"What differs between the runs is not known: {other / 'run.json'} not there." in capsys.readouterr().out


def test_units_that_do_not_fit_give_no_interval() -> None:
    def sums(*units: str, n: float = 1.0) -> ScoreSums:
        frame = pd.DataFrame({"n": n, "right": [float(len(unit)) for unit in units]}, index=list(units))
        return ScoreSums(frame=frame, metric=lambda s: s["right"] / s["n"])

    found = difference_interval(sums("a", "bb", "ccc"), sums("a", "bb"), same_data=True)
    assert (found.low, found.pairing, found.excludes_zero) == (None, "none", False)
    assert found.notes == ("no interval: not the same units were scored (3 in A, 2 in B)",)
    assert difference_interval(sums("a"), sums("a"), True).notes == ("no interval: one unit, nothing to resample",)
    again = difference_interval(sums("a", "bb", "ccc"), sums("ccc", "a", "bb"), same_data=True)  # in another order
    assert (again.low, again.high, again.notes) == (0, 0, ())
    halved = difference_interval(sums("a", "bb"), sums("a", "bb", n=2.0), same_data=True)
    assert halved.excludes_zero
    assert halved.notes == ("not the same values were asked for: masks, windows or parcels differ",)


def test_folders_on_object_storage_are_compared(before: Path, capsys: Captured) -> None:
    store = Store("memory://results/before")
    for path in before.rglob("*"):
        if path.is_file():
            store.write_bytes(str(path.relative_to(before)), path.read_bytes())
    assert main([str(before), store.url, "--out", "memory://results/comparison.json"]) == 0
    found = Store("memory://results").read_json("comparison.json")
    assert found["b"]["results"] == store.url
    assert {score["difference"] for score in found["scores"]} == {0}
