"""Simple models beside fine-tuned ones: the same subjects, the same split, the same scores.

    python eval/references.py --runs runs/finetune_fold* --out references.json

Takes folders of fine-tuning runs (several: folds of one cohort, whose test predictions are scored together). Fits on
each run's training subjects, chooses strengths on its validation subjects, and predicts its test subjects:

* `FC`: correlations of all pairs of parcels (Fisher z), ridge or logistic regression;
* `confounds`: site, mean framewise displacement and length alone, the same;
* `constant`: mean or shares of the training subjects.

Prints and writes a record {target, method, metric, value, low, high} each, the fine-tuned model's among them, with 95 %
intervals over families, else subjects.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from brainlm import metrics
from brainlm.config import build
from brainlm.dataset import SPLITS, Dataset, open_dataset
from brainlm.errors import BrainLMError, DataError
from brainlm.metrics import with_interval
from brainlm.store import Store
from brainlm.targets import Target, TargetSettings
from eval.features import functional_connectivity

FloatArray = NDArray[np.float64]
STRENGTHS = tuple(np.logspace(-2, 6, 17).tolist())
MAX_CORRELATION = 0.999


@dataclass(frozen=True, eq=False)
class Fold:
    """One fine-tuning run: its split, its predictions, and what it was told."""

    dataset: Dataset
    split: pd.DataFrame
    predictions: pd.DataFrame
    targets: tuple[TargetSettings, ...]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, metavar="FOLDER", help="folders of fine-tuning runs")
    parser.add_argument("--out", metavar="PATH", help="JSON file to write")
    args = parser.parse_args(argv)
    print(f"{'target':26}{'method':14}{'metric':20}value [95 % interval]")
    try:
        records = compare([read_fold(folder) for folder in args.runs])
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out:
        Path(args.out).write_text(json.dumps(records, indent=1))
    return 0


def read_fold(folder: str) -> Fold:
    """Read a finished fine-tuning run.

    Raises
    ------
    DataError
        If it is not finished, or its data set is another one by now.
    """
    store = Store(folder)
    for name in ("config.yaml", "split.parquet", "predictions.parquet", "scores.json"):
        if not store.exists(name):
            raise DataError(f"{folder} is no finished fine-tuning run of targets (no {name})")
    config = yaml.safe_load(store.read_bytes("config.yaml"))
    dataset = open_dataset(config["data"]["dataset"])
    if dataset.content_hash != store.read_json("scores.json")["data_hash"]:
        raise DataError(f"{folder}: the data set {dataset.store.url} is another one by now")
    return Fold(
        dataset=dataset,
        split=pd.read_parquet(io.BytesIO(store.read_bytes("split.parquet"))),
        predictions=pd.read_parquet(io.BytesIO(store.read_bytes("predictions.parquet"))),
        targets=tuple(build(TargetSettings, target, "targets") for target in config["targets"]),
    )


def compare(folds: Sequence[Fold]) -> list[dict[str, Any]]:
    """Score the fine-tuned models and the references on the test subjects of all folds together.

    Raises
    ------
    DataError
        If the folds are of other targets, or a recording is tested in two of them.
    """
    if len({fold.targets for fold in folds}) > 1:
        raise DataError("the runs have other targets: compare runs of one configuration")
    tested = pd.concat([fold.predictions.query("split == 'test'") for fold in folds])
    if tested["recording_id"].duplicated().any():
        raise DataError(f"{tested['recording_id'][tested['recording_id'].duplicated()].iloc[0]} is tested in two runs")
    features: dict[str, dict[str, FloatArray]] = {}
    records = []
    for wanted in folds[0].targets:
        answers: dict[str, list[pd.DataFrame]] = {}
        for fold in folds:
            if fold.dataset.content_hash not in features:
                features[fold.dataset.content_hash] = connectivity(fold.dataset)
            fc = features[fold.dataset.content_hash]
            for method, table in fold_answers(fold, wanted, fc).items():
                answers.setdefault(method, []).append(table)
        for method, tables in answers.items():
            records += scores(wanted, method, pd.concat(tables))
    return records


def fold_answers(fold: Fold, wanted: TargetSettings, fc: dict[str, FloatArray]) -> dict[str, pd.DataFrame]:
    """Return, by method, test truth and answers of one fold: standardised values, or probabilities of the classes."""
    truth = values_of(fold.dataset, wanted.column)
    roles: dict[str, list[str]] = {
        role: [name for name in fold.split["recording_id"][fold.split["split"] == role] if not pd.isna(truth[name])]
        for role in SPLITS
    }
    target = Target.fit(wanted, [truth[name] for name in roles["train"]])
    group = dict(zip(fold.split["recording_id"], fold.split["group"], strict=True))
    test = roles["test"]
    y = target.encode([truth[name] for name in test])[0].astype(np.float64)
    base = pd.DataFrame({"truth": y, "group": [group[name] for name in test]}, index=test)
    base["unit"] = target.scale * target.sd

    def table(answer: FloatArray) -> pd.DataFrame:
        columns = pd.DataFrame(answer, index=test, columns=[f"answer{i}" for i in range(answer.shape[1])])
        return base.join(columns)

    confounds = confounds_of(fold.dataset)
    found = {"fine-tuned": table(own_answers(fold, target, test))}
    for method, x in (("FC", fc), ("confounds", confounds)):
        found[method] = table(fit_and_predict(target, x, roles, truth))
    guess = np.zeros((len(test), 1)) if target.kind == "regression" else np.tile(target.shares, (len(test), 1))
    found["constant"] = table(guess)
    return found


def own_answers(fold: Fold, target: Target, test: Sequence[str]) -> FloatArray:
    """Return what the fine-tuned model predicted, as the references predict."""
    rows = fold.predictions.set_index("recording_id").loc[list(test)]
    if target.kind == "classification":
        return rows[[f"probability_{target.column}_{label}" for label in target.classes]].to_numpy(dtype=np.float64)
    answer: FloatArray = (target.transformed(list(rows[f"predicted_{target.column}"])) - target.mean) / target.sd
    return answer[:, None]


def fit_and_predict(
    target: Target, features: dict[str, FloatArray], roles: dict[str, list[str]], truth: dict[str, Any]
) -> FloatArray:
    """Fit on train with each strength, take the best on val, answer for test."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    x = {role: np.stack([features[name] for name in names]) for role, names in roles.items()}
    y = {role: target.encode([truth[name] for name in names])[0].astype(np.float64) for role, names in roles.items()}
    scaler = StandardScaler().fit(x["train"])
    x = {role: scaler.transform(values) for role, values in x.items()}
    best: tuple[float, FloatArray] | None = None
    for strength in STRENGTHS:
        if target.kind == "regression":
            model = Ridge(alpha=strength).fit(x["train"], y["train"])
            score = -metrics.mse(y["val"], model.predict(x["val"]))
            answer = model.predict(x["test"])[:, None]
        else:
            weight = "balanced" if len(set(target.weights)) > 1 else None
            model = LogisticRegression(C=1 / strength, class_weight=weight, max_iter=2000).fit(x["train"], y["train"])
            p = model.predict_proba(x["val"])
            score = float(np.log(np.maximum(p[np.arange(len(p)), y["val"].astype(int)], 1e-12)).mean())
            answer = model.predict_proba(x["test"])
        if best is None or score > best[0]:
            best = score, answer
    assert best is not None
    return best[1]


def scores(wanted: TargetSettings, method: str, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the records of one method. Errors of a regression are in original units where t is linear in them."""
    answer = table[[name for name in table.columns if name.startswith("answer")]].to_numpy()
    groups = list(table["group"])
    if wanted.kind == "classification":
        y: Any = table["truth"].to_numpy().astype(np.int64)
        named: dict[str, Any] = {"auc": metrics.macro_auc, "balanced_accuracy": metrics.balanced_accuracy}
        predicted = answer
    else:
        unit = table["unit"].to_numpy() if wanted.transform != "log1p_minmax" else 1.0
        y, predicted = table["truth"].to_numpy() * unit, answer[:, 0] * unit
        named = {"r2": metrics.r2, "pearson_r": metrics.pearson_r, "mae": metrics.mae}
    records = []
    for name, metric in named.items():
        found = with_interval(metric, y, predicted, groups)
        print(f"{wanted.column[:25]:26}{method:14}{name:20}{found}")
        records.append({"target": wanted.column, "method": method, "metric": name, **found.record()})
    return records


def connectivity(dataset: Dataset) -> dict[str, FloatArray]:
    """Return the Fisher z of all pairs of parcels by recording; 0 where a parcel is missing."""
    found = {}
    for split in SPLITS:
        reader = dataset.split(split)
        for index, entry in enumerate(reader.entries):
            kept = reader.kept(index, 0, entry.num_timepoints)
            series = reader.recording(index)[kept]
            matrix = functional_connectivity(np.ascontiguousarray(series.T))
            upper = matrix[np.triu_indices(len(matrix), 1)]
            found[entry.recording_id] = np.arctanh(np.clip(upper, -MAX_CORRELATION, MAX_CORRELATION))
    return found


def confounds_of(dataset: Dataset) -> dict[str, FloatArray]:
    """Return site (one column each), mean framewise displacement (0 where unknown) and length by recording."""
    table = _table(dataset, "recordings.parquet")
    columns = [pd.get_dummies(table["site"].fillna(""), dtype=float)] if "site" in table else []
    for name in ("mean_fd_mm", "num_timepoints"):
        if name in table:
            columns.append(table[[name]].astype(float).fillna(0.0))
    x = pd.concat(columns, axis=1).to_numpy(dtype=np.float64)
    return dict(zip(table["recording_id"], x, strict=True))


def values_of(dataset: Dataset, column: str) -> dict[str, Any]:
    """Return a column of the subjects, or else of the recordings, by recording."""
    recordings, subjects = _table(dataset, "recordings.parquet"), _table(dataset, "subjects.parquet")
    if column in subjects.columns:
        by_subject = dict(zip(subjects["subject"], subjects[column], strict=True))
        return {
            name: by_subject.get(subject)
            for name, subject in zip(recordings["recording_id"], recordings["subject"], strict=True)
        }
    return dict(zip(recordings["recording_id"], recordings[column], strict=True))


def _table(dataset: Dataset, name: str) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(dataset.store.read_bytes(name)))


if __name__ == "__main__":
    sys.exit(main())
