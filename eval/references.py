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
    given = config["data"]["dataset"]
    dataset = open_dataset(given if isinstance(given, str) else given[0])
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
    """Return, by method, test truth and answers of one fold: original units, or probabilities of the classes."""
    value_of = values_of(fold.dataset, wanted.column)
    subject_of = dict(zip(fold.split["recording_id"], fold.split["subject"], strict=True))
    names = {role: list(fold.split["recording_id"][fold.split["split"] == role]) for role in SPLITS}
    once = {(subject_of[name], str(value_of[name])): value_of[name] for name in names["train"]}
    target = Target.fit(wanted, list(once.values()))
    roles: dict[str, list[str]] = {}
    truth: dict[str, FloatArray] = {}
    for role, everybody in names.items():
        encoded, known = target.encode([value_of[name] for name in everybody])
        roles[role] = [name for name, is_known in zip(everybody, known, strict=True) if is_known]
        truth[role] = encoded[known].astype(np.float64)
    test = roles["test"]
    group_of = dict(zip(fold.split["recording_id"], fold.split["group"], strict=True))
    base = pd.DataFrame({"group": [group_of[name] for name in test]}, index=test)
    if target.kind == "regression":
        base["truth"] = [float(value_of[name]) for name in test]
    else:
        base["truth"] = [target.classes[int(number)] for number in truth["test"]]

    def table(answer: FloatArray) -> pd.DataFrame:
        if target.kind == "regression":
            return base.assign(answer=[target.original(float(u)) for u in answer[:, 0]])
        return base.join(pd.DataFrame(answer, index=test, columns=[f"p {label}" for label in target.classes]))

    rows = fold.predictions.set_index("recording_id").loc[test]
    if target.kind == "regression":
        own = base.assign(answer=rows[f"predicted_{target.column}"].astype(float))
        guess = np.zeros((len(test), 1))
    else:
        columns = {f"probability_{target.column}_{label}": f"p {label}" for label in target.classes}
        own = base.join(rows[list(columns)].rename(columns=columns).astype(float))
        guess = np.tile(target.shares, (len(test), 1))
    return {
        "fine-tuned": own,
        "FC": table(fit_and_predict(target, fc, roles, truth)),
        "confounds": table(fit_and_predict(target, confounds_of(fold.dataset), roles, truth)),
        "constant": table(guess),
    }


def fit_and_predict(
    target: Target, features: dict[str, FloatArray], roles: dict[str, list[str]], y: dict[str, FloatArray]
) -> FloatArray:
    """Fit on train with each strength, take the best on val, answer for test: standardised, or probabilities."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    x = {role: np.stack([features[name] for name in names]) for role, names in roles.items()}
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
    """Return the records of one method; errors of a regression in original units.

    Raises
    ------
    DataError
        If folds had other classes to learn from.
    """
    groups = list(table["group"])
    if wanted.kind == "classification":
        columns = sorted(name for name in table.columns if name.startswith("p "))
        if table[columns].isna().to_numpy().any():
            raise DataError(f"target {wanted.column}: a class is missing among the training subjects of a fold")
        classes = [name.removeprefix("p ") for name in columns]
        y: Any = np.array([classes.index(label) for label in table["truth"]], dtype=np.int64)
        predicted: Any = table[columns].to_numpy(dtype=np.float64)
        named: dict[str, Any] = {"auc": metrics.macro_auc, "balanced_accuracy": metrics.balanced_accuracy}
    else:
        y, predicted = (table[name].to_numpy(dtype=np.float64) for name in ("truth", "answer"))
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
