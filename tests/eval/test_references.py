"""References beside fine-tuned models: the same subjects, known answers, folds scored together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from brainlm.dataset import Dataset
from eval.references import confounds_of, connectivity, main, values_of
from tests.phenotypes import write_phenotype_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_phenotype_dataset(str(tmp_path_factory.mktemp("references") / "dataset"))


def write_run(folder: Path, dataset: Dataset, fold: int) -> Path:
    """A finished run whose model knows the truth to within a little noise."""
    rng = np.random.default_rng(fold)
    names = [entry.recording_id for split in ("train", "val", "test") for entry in dataset.split(split).entries]  # type: ignore[arg-type]
    roles = {0: "test", 1: "val", 2: "train"}
    split = pd.DataFrame({"recording_id": names, "subject": names, "group": names})
    split["split"] = [roles[(i + fold) % 3] for i in range(len(names))]
    folder.mkdir()
    split.to_parquet(folder / "split.parquet")
    rows = split[split["split"] != "train"].copy()
    age, sex = values_of(dataset, "age"), values_of(dataset, "sex")
    rows["true_age"] = [age[name] for name in rows["recording_id"]]
    rows["predicted_age"] = rows["true_age"].fillna(50) + rng.standard_normal(len(rows))
    rows["probability_sex_F"] = [0.9 if sex[name] == "F" else 0.2 for name in rows["recording_id"]]
    rows["probability_sex_M"] = 1 - rows["probability_sex_F"]
    rows.to_parquet(folder / "predictions.parquet")
    targets = [{"column": "age"}, {"column": "sex", "kind": "classification"}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"dataset": dataset.store.url}, "targets": targets}))
    (folder / "scores.json").write_text(json.dumps({"data_hash": dataset.content_hash}))
    return folder


def test_folds_are_scored_together_beside_the_references(dataset: Dataset, tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / str(fold), dataset, fold)) for fold in range(3)]
    assert main(["--runs", *runs, "--out", str(tmp_path / "out.json")]) == 0
    records = {(r["target"], r["method"], r["metric"]): r for r in json.loads((tmp_path / "out.json").read_text())}
    own = records["age", "fine-tuned", "r2"]
    assert own["num_recordings"] == 67  # everybody whose age is known, once
    assert own["value"] > 0.98
    assert records["age", "fine-tuned", "mae"]["value"] == pytest.approx(0.8, abs=0.2)  # years
    assert records["sex", "fine-tuned", "auc"]["value"] == 1
    assert records["sex", "constant", "auc"]["value"] == pytest.approx(0.5, abs=0.15)
    assert records["age", "constant", "r2"]["value"] == pytest.approx(0, abs=0.05)
    assert records["age", "confounds", "r2"]["value"] < 0.2  # site and length say nothing here
    for r in records.values():
        assert r["method"] in ("constant", "confounds") or r["low"] < r["value"] + 1e-9 < r["high"] + 2e-9


def test_ridge_on_connectivity_is_what_it_says(dataset: Dataset, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", dataset, 0)
    assert main(["--runs", str(run), "--out", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    (found,) = [r for r in records if (r["target"], r["method"], r["metric"]) == ("age", "FC", "r2")]
    split = pd.read_parquet(run / "split.parquet")
    age, fc = values_of(dataset, "age"), connectivity(dataset)
    parts = {
        role: [name for name in split["recording_id"][split["split"] == role] if not np.isnan(age[name])]
        for role in ("train", "val", "test")
    }
    scaler = StandardScaler().fit(np.stack([fc[name] for name in parts["train"]]))
    x = {role: scaler.transform(np.stack([fc[name] for name in names])) for role, names in parts.items()}
    y = {role: np.array([age[name] for name in names]) for role, names in parts.items()}
    tried = [Ridge(alpha=a).fit(x["train"], y["train"]) for a in np.logspace(-2, 6, 17)]
    best = min(tried, key=lambda model: float(np.square(model.predict(x["val"]) - y["val"]).sum()))
    error = best.predict(x["test"]) - y["test"]
    assert found["value"] == pytest.approx(1 - np.square(error).sum() / np.square(y["test"] - y["test"].mean()).sum())


def test_features_are_known_things(dataset: Dataset) -> None:
    name = dataset.split("test").entries[0].recording_id
    bold = dataset.split("test").recording(0)
    expected = np.arctanh(np.corrcoef(bold.T)[np.triu_indices(12, 1)])
    np.testing.assert_allclose(connectivity(dataset)[name], expected, atol=1e-5)
    assert confounds_of(dataset)[name].sum() == 1  # the site; motion and length are not in this table


def test_what_is_no_run_is_refused(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", str(tmp_path)]) == 1
    assert "no finished fine-tuning run of targets (no config.yaml)" in capsys.readouterr().err
    run = write_run(tmp_path / "run", dataset, 0)
    again = write_run(tmp_path / "again", dataset, 0)
    assert main(["--runs", str(run), str(again)]) == 1
    assert "is tested in two runs" in capsys.readouterr().err
    (run / "scores.json").write_text(json.dumps({"data_hash": "other"}))
    assert main(["--runs", str(run)]) == 1
    assert "is another one by now" in capsys.readouterr().err
