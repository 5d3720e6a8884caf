from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset
from brainlm.model import BrainLM
from brainlm.store import Store
from brainlm.testing import small_model, synthetic_atlas, write_synthetic_dataset
from eval.baselines.simple import Mean
from eval.cohort import WindowRef
from eval.models import Predictions, newest_checkpoint
from eval.results import Score, read_scores
from eval.run import main
from eval.scoring import expand_mask
from eval.tasks.reconstruction import Reconstruction, ReconstructionSettings

TRAINED_ON = "sub-train000"  # by the checkpoints of the fixture
STEM = "reconstruction--gaussian--[0-9a-f]+"
Captured = pytest.CaptureFixture[str]


def arguments(dataset: Dataset, training_run: Path, out: Path, *more: str) -> list[str]:
    return [
        f"dataset={dataset.store.url}",
        f"checkpoints=[{training_run}]",
        f"out={out}",
        "report=false",
        "ray.workers=0",
        "reconstruction={mask_ratios: [0.3, 0.75], shrinkages: [0.1], own_weights: [0.3]}",
        "forecasting={horizons: [10], baselines: [mean, persistence, autoregression], forecasters: {orders: [1, 2]}}",
        "networks={num_masks: 2, neighbours: [1, 5]}",
        "intervals={num_bootstrap: 200}",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(dataset: Dataset, training_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert main(arguments(dataset, training_run, out)) == 0
    return out


def values(out: Path) -> dict[tuple[object, ...], float]:
    return {(s.task, s.model, s.metric, tuple(sorted(s.condition.items()))): s.value for s in read_scores(Store(out))}


def test_every_score_has_interval_counts_and_provenance(finished: Path, dataset: Dataset) -> None:
    scores = read_scores(Store(finished))
    assert {s.task for s in scores} == {"reconstruction", "forecasting", "networks"}
    assert {s.model_kind for s in scores} == {"brainlm", "untrained", "baseline", "control", "optimum"}
    for s in scores:
        assert s.ci_low is not None
        assert s.num_subjects == s.num_recordings == 5
        assert s.dataset_hash == dataset.content_hash
        assert s.statistics_from == (
            "checkpoint" if s.model_kind in ("brainlm", "untrained") or "permuted series" in s.model else "cohort"
        )
    assert all(s.ci_low <= s.value <= s.ci_high for s in scores if s.metric == "r2" and s.model != "mean")  # type: ignore[operator]


def test_methods_rank_as_they_must_on_data_with_known_truth(finished: Path) -> None:
    found = values(finished)

    def r2(model: str) -> float:
        condition = (("centring", "recording"), ("mask", "random"), ("mask_ratio", 0.3))
        return found["reconstruction", model, "r2", condition]

    assert r2("optimum") > r2("gaussian") > 0 > r2("untrained")
    assert r2("mean") == pytest.approx(0, abs=1e-6)


def test_differences_from_the_reference_are_given_and_paired(finished: Path) -> None:
    by_model: dict[str, Score] = {}
    for s in read_scores(Store(finished)):
        if s.metric == "r2_minus_reference" and s.condition.get("horizon") == 10:
            by_model[s.model] = s
    assert by_model["mean"].condition["reference"] == "autoregression"
    assert "autoregression" not in by_model
    found = values(finished)
    key = ("r2", (("horizon", 10),))
    expected = found["forecasting", "mean", *key] - found["forecasting", "autoregression", *key]
    assert by_model["mean"].value == pytest.approx(expected)
    for s in by_model.values():  # 5 subjects: no p value below 2 / 2**5
        assert s.p_value is not None
        assert s.p_corrected is not None
        assert 2 / 2**5 <= s.p_value <= s.p_corrected <= 1


def test_the_reference_is_what_is_best_on_validation(finished: Path) -> None:
    task = Reconstruction(ReconstructionSettings(mask_ratios=(0.3, 0.75)))
    mean_r2 = {}
    for unit in json.loads((finished / "run.json").read_text())["units"]:
        if unit["task"] == "reconstruction" and unit["kind"] == "baseline":
            table = pd.read_parquet(finished / unit["file"].replace(".parquet", ".validation.parquet"))
            assert table["recording"].nunique() == 4
            by_ratio = table.groupby("mask_ratio")[["sse", "sst"]].sum()
            mean_r2[unit["name"]] = (1 - by_ratio["sse"] / by_ratio["sst"]).mean()
    best = max(mean_r2, key=lambda name: mean_r2[name])
    references = {
        s.condition["reference"]
        for s in read_scores(Store(finished))
        if s.task == task.name and s.metric == "r2_minus_reference"
    }
    assert len(mean_r2) == 5
    assert references == {best}


def test_each_step_ahead_is_compared_with_the_reference(finished: Path) -> None:
    curves = pd.read_parquet(finished / "forecast_curves.parquet").set_index(["model", "step"]).sort_index()
    assert set(curves["reference"]) == {"autoregression"}
    assert curves.loc["autoregression", "p_value"].isna().all()
    others = curves.drop("autoregression")
    assert (others["p_value"] >= 2 / 2**5).all()
    assert (others["p_corrected"] >= others["p_value"]).all()
    for model, step in others.index:
        difference = curves.loc[(model, step), "r2"] - curves.loc[("autoregression", step), "r2"]
        assert curves.loc[(model, step), "difference"] == pytest.approx(difference)


def test_other_kinds_of_masks_and_a_baseline_of_ones_own(
    dataset: Dataset, training_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "tasks=[reconstruction]",
        "reconstruction={mask_ratios: [0.5], mask_kinds: [random, parcels, time_blocks, future], "
        "centrings: [recording], baselines: [mean, gaussian, 'tests.eval.test_run:GlobalMean']}",
    ]
    assert main(arguments(dataset, training_run, tmp_path, *more)) == 0
    found = {(s.model, s.condition["mask"]): s.value for s in read_scores(Store(tmp_path)) if s.metric == "r2"}
    kinds = ("random", "parcels", "time_blocks", "future")
    assert set(found) == {
        (model, kind)
        for model in ("BrainLM pretrain", "untrained", "mean", "gaussian", "global mean", "optimum")
        for kind in kinds
    }
    assert found["gaussian", "parcels"] > 0.2  # other parcels tell
    for kind in ("time_blocks", "future"):  # nothing is visible at the same time
        assert found["gaussian", kind] == pytest.approx(0, abs=0.02)
        assert found["optimum", kind] > found["gaussian", kind]
    assert found["global mean", "future"] == pytest.approx(found["mean", "future"])
    assert "50% of time blocks hidden" in capsys.readouterr().out


class GlobalMean(Mean):
    """A baseline of one's own: what is hidden is as far from its mean as the visible parcels are on average."""

    name, version = "global mean", 1

    def reconstruct(
        self, windows_z: NDArray[np.float32], mask: NDArray[np.bool_], present: NDArray[np.bool_], refs: list[WindowRef]
    ) -> Predictions:
        visible = ~expand_mask(mask, *windows_z.shape[1:]) & present[:, :, None]
        distance = np.where(visible, windows_z - self.zero_z[:, None], 0.0).sum(1) / np.maximum(visible.sum(1), 1)
        out: Predictions = distance[:, None, :] + self.zero_z[:, None]
        return out


def test_a_second_run_computes_nothing_and_gives_the_same_scores(
    finished: Path, dataset: Dataset, training_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_bytes()
    assert main(arguments(dataset, training_run, finished)) == 0
    assert "23 units of work, 23 done before" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_a_changed_setting_computes_its_own_task_again_and_no_other(
    finished: Path, dataset: Dataset, training_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(dataset, training_run, finished), "forecasting.horizons=[20]", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    to_do = [line for line in lines if line.startswith("  to do")]
    assert len(to_do) == 7
    assert all("forecasting" in line for line in to_do)
    assert main([*arguments(dataset, training_run, finished), "intervals.level=0.9", "--dry-run"]) == 0
    assert "to do" not in capsys.readouterr().out


def test_scores_do_not_depend_on_batch_size_or_workers(
    finished: Path, dataset: Dataset, training_run: Path, tmp_path: Path
) -> None:
    assert main(arguments(dataset, training_run, tmp_path, "batch_size=1", "ray.workers=2")) == 0
    expected, got = values(finished), values(tmp_path)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_no_file_names_a_subject(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file():
            assert b"sub-test" not in path.read_bytes(), path
    frame = pd.read_parquet(next((finished / "subjects").glob("reconstruction--mean--*[0-9a-f].parquet")))
    assert not frame["recording"].str.contains("sub-").any()


def test_tables_for_figures_hold_what_they_promise(finished: Path, dataset: Dataset) -> None:
    with np.load(finished / "examples.npz") as examples:
        n, P, W = examples["truth_z"].shape
        assert (n, P, W) == (3, 24, 40)
        assert examples["mask"].shape == (3, P * 4)
        prediction = examples["prediction_BrainLM pretrain"]
        assert set(examples["models"]) >= {"BrainLM pretrain", "untrained", "gaussian", "optimum"}
        hidden = np.repeat(examples["mask"].reshape(n, P, 4), 10, axis=2) & np.isfinite(examples["truth_z"])
        assert (np.isfinite(prediction) == hidden).all()
        assert len(examples["parcels"]) == 6
    parcels = pd.read_parquet(finished / "parcels.parquet")
    assert set(parcels["mask_ratio"]) == {0.3, 0.75}
    assert {"parcel", "x_mm", "y_mm", "z_mm", "network", "model", "r2"} <= set(parcels.columns)
    curves = pd.read_parquet(finished / "forecast_curves.parquet")
    optimum = curves[curves["model"] == "optimum"].sort_values("step")
    assert optimum["step"].tolist() == list(range(1, 11))
    run = json.loads((finished / "run.json").read_text())
    assert run["dataset"]["content_hash"] == dataset.content_hash
    assert run["checkpoints"][0]["manifest"] == {"step": 10}
    assert run["config"]["intervals"]["num_bootstrap"] == 200


def test_the_newest_complete_checkpoint_of_a_run_is_taken(training_run: Path) -> None:
    assert newest_checkpoint(str(training_run)).endswith("checkpoints/step-10")
    direct = str(training_run / "checkpoints" / "step-5")
    assert newest_checkpoint(direct) == direct


def test_a_folder_without_checkpoint_is_refused(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dataset, tmp_path, tmp_path / "out")) == 1
    assert "no complete checkpoint" in capsys.readouterr().err


def test_subjects_that_the_checkpoint_has_seen_are_refused_or_marked(
    dataset: Dataset, training_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = arguments(dataset, training_run, tmp_path, "split=train", "tasks=[forecasting]")
    assert main(seen) == 1
    assert "was trained on 1 of the 16 subjects" in capsys.readouterr().err
    assert TRAINED_ON not in capsys.readouterr().err
    assert main([*seen, "allow_seen_subjects=true"]) == 0
    notes = {s.model: s.notes for s in read_scores(Store(tmp_path))}
    assert any("trained on 1 of the 16 subjects" in note for note in notes["BrainLM pretrain"])


def test_data_of_another_atlas_are_refused_with_the_differences(
    training_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_synthetic_dataset(str(tmp_path / "other"), atlas=synthetic_atlas(20, 3, name="other"))
    assert main(arguments(other, training_run, tmp_path / "out")) == 1
    assert "24 parcels (synthetic) against 20 (other)" in capsys.readouterr().err


def test_a_checkpoint_of_another_scale_is_fed_in_its_own_units(
    dataset: Dataset, training_run: Path, finished: Path, tmp_path: Path
) -> None:
    """The same weights with doubled IQRs see half the series: other numbers, and the score says so."""
    model = small_model(dataset.contract, seed=10)
    model.contract = replace(model.contract, iqr=2 * model.contract.iqr)
    save_checkpoint(str(tmp_path / "loud"), model, {}, [])
    args = arguments(dataset, tmp_path / "loud", tmp_path / "out", "tasks=[reconstruction]", "include_untrained=false")
    assert main(args) == 0
    scores = {s.model: s for s in read_scores(Store(tmp_path / "out")) if s.metric == "r2"}
    assert any("amplitude" in note for note in scores["BrainLM loud"].notes)
    condition = (("centring", "visible"), ("mask", "random"), ("mask_ratio", 0.75))
    here = values(tmp_path / "out")["reconstruction", "BrainLM loud", "r2", condition]
    assert abs(here - values(finished)["reconstruction", "BrainLM pretrain", "r2", condition]) > 1e-3


def test_a_failing_unit_lets_the_others_finish_and_is_reported(
    dataset: Dataset,
    training_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from eval.baselines.simple import Persistence

    def broken(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    args = arguments(dataset, training_run, tmp_path, "tasks=[forecasting]")
    with monkeypatch.context() as patch:
        patch.setattr(Persistence, "reconstruct", broken)
        assert main(args) == 1
    assert "the disk is on fire" in capsys.readouterr().err
    assert "persistence" not in {s.model for s in read_scores(Store(tmp_path))}
    assert main(args) == 0
    assert "7 units of work, 6 done before" in capsys.readouterr().out


def test_one_subject_is_scored_without_interval(training_run: Path, tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path / "one"), num_subjects={"train": 4, "val": 1, "test": 1})
    assert (
        main(
            [
                f"dataset={dataset.store.url}",
                f"out={tmp_path / 'out'}",
                "report=false",
                "ray.workers=0",
                "tasks=[forecasting]",
                "forecasting.horizons=[10]",
            ]
        )
        == 0
    )
    scores = read_scores(Store(tmp_path / "out"))
    assert all(s.ci_low is None for s in scores)
    assert any("no interval" in note for note in scores[0].notes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reconstruction.mask_ratios=[1.5]", "mask_ratios"),
        ("forecasting.horizons=[15]", "multiple of the patch length"),
        ("tasks=[divination]", "tasks"),
        ("networks.reference=oracle", "networks.reference"),
        ("bogus=1", "bogus"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(
    override: str,
    message: str,
    dataset: Dataset,
    training_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments(dataset, training_run, tmp_path), override]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo", "abide", "all"])
def test_shipped_configs_are_valid(name: str) -> None:
    from brainlm.config import load_config
    from eval.settings import EvalSettings

    path = Path(__file__).parents[2] / "eval" / "configs" / f"{name}.yaml"
    assert load_config(EvalSettings, path).dataset
    assert path.read_text().startswith("#")


def test_relative_paths_work_from_another_working_directory(
    dataset: Dataset, training_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brainlm.config import load_config
    from eval.planning import make_plan, unit_for_worker
    from eval.settings import EvalSettings

    monkeypatch.chdir(training_run.parent)
    args = arguments(dataset, Path(training_run.name), tmp_path, "out=results")
    plan = make_plan(load_config(EvalSettings, None, args))
    sent = plan.for_workers()
    assert sent.settings.out == str(training_run.parent / "results")
    assert unit_for_worker(plan.units[0]).spec.checkpoint == str(training_run / "checkpoints" / "step-10")


def test_scores_say_how_series_were_filtered(finished: Path) -> None:
    assert all("data: no temporal filter" in s.notes for s in read_scores(Store(finished)))


def test_siblings_are_resampled_together(training_run: Path, tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(str(tmp_path / "data"), window_len=40, num_timepoints=40)
    ids = [entry.recording_id for entry in dataset.split("test").entries]
    table = pd.DataFrame({"recording_id": ids, "family": ["f1", "f1", "", ""]})
    table.to_parquet(tmp_path / "data" / "recordings.parquet")
    assert main(arguments(dataset, training_run, tmp_path / "out", "tasks=[forecasting]")) == 0
    scores = read_scores(Store(tmp_path / "out"))
    assert {s.num_subjects for s in scores} == {4}
    assert all("subjects of one family are resampled together" in s.notes for s in scores)
    frame = pd.read_parquet(next((tmp_path / "out" / "subjects").glob("forecasting--mean--*.parquet")))
    assert frame["group"].nunique() == 3


@pytest.mark.parametrize("suffix", [".parquet", ".parcels.parquet", ".examples.npz"])
def test_damaged_unit_is_named_and_not_shown_as_a_traceback(
    suffix: str, finished: Path, dataset: Dataset, training_run: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "results"
    shutil.copytree(finished, out)
    damaged = next(p for p in (out / "subjects").iterdir() if re.fullmatch(f"{STEM}{re.escape(suffix)}", p.name))
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert main(arguments(dataset, training_run, out)) == 1
    message = capsys.readouterr().err
    assert damaged.name.removesuffix(suffix) in message
    assert "remove these files and run again" in message


def test_scores_of_the_split_that_baselines_were_tuned_on_say_so(
    dataset: Dataset, training_run: Path, tmp_path: Path, finished: Path
) -> None:
    assert main(arguments(dataset, training_run, tmp_path, "split=val", "tasks=[forecasting]")) == 0
    note = "data: baselines were tuned on the recordings that are scored here"
    assert all(note in score.notes for score in read_scores(Store(tmp_path)))
    assert not any(note in score.notes for score in read_scores(Store(finished)))


def test_a_checkpoint_of_another_cohort_is_scaled_by_either_statistics(dataset: Dataset, tmp_path: Path) -> None:
    """Scaled by the data set, a checkpoint of a louder cohort scores as one with the data set's own statistics."""
    own = dataset.contract
    louder = replace(own, median=2 * own.median, iqr=2 * own.iqr, statistics_from="louder people")
    for name, contract in (("same", own), ("louder", louder)):
        model = BrainLM(small_model(own, seed=3).config, contract)
        model.load_state_dict(small_model(own, seed=3).state_dict())
        save_checkpoint(str(tmp_path / name), model, {"step": 1}, [TRAINED_ON])
    more = ["tasks=[reconstruction]", "reconstruction={mask_ratios: [0.5], baselines: [mean]}"]
    assert main(arguments(dataset, tmp_path / "same", tmp_path / "a", *more)) == 0
    assert main(arguments(dataset, tmp_path / "louder", tmp_path / "b", *more, "scaled_by=[checkpoint, dataset]")) == 0
    (same,) = (value for key, value in values(tmp_path / "a").items() if key[:3] == KEY and key[3] == CONDITION)
    found = {
        s.model: s for s in read_scores(Store(tmp_path / "b")) if s.metric == "r2" and s.condition == dict(CONDITION)
    }
    by_dataset = found["BrainLM louder, scaled by the data set"]
    assert by_dataset.value == same
    assert by_dataset.statistics_from == "cohort"
    assert any("scaled by the statistics of the data set" in note for note in by_dataset.notes)
    assert found["BrainLM louder"].value != same
    assert found["BrainLM louder"].statistics_from == "checkpoint"
    assert any("amplitude" in note for note in found["BrainLM louder"].notes)


KEY = ("reconstruction", "BrainLM same", "r2")
CONDITION = (("centring", "recording"), ("mask", "random"), ("mask_ratio", 0.5))
