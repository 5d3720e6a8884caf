"""How the best weights of a fine-tuning run do on validation and test subjects: predictions and scores on disk."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from brainlm import metrics
from brainlm.dataset import Dataset
from brainlm.members import ChosenRecordings, Members
from brainlm.metrics import Score, with_interval
from brainlm.predictor import Predictor
from brainlm.store import Store
from brainlm.targets import Target
from train.finetune_settings import FinetuneSettings
from train.phenotypes import read_members
from train.predictor_parts import load_encoder
from train.subject_split import SubjectSplit, split_subjects

logger = logging.getLogger(__name__)

PREDICTIONS, SCORES = "predictions.parquet", "scores.json"
EXPLAINED = {
    "r2": "1 - SSE / SST about the mean of the scored subjects, original units",
    "pearson_r": "correlation, original units",
    "mae": "mean absolute error, original units",
    "mse": "mean squared error, original units",
    "mse_transformed": "mean squared error, units of the transform (the paper's)",
    "auc": "area under the ROC curve; of several classes the mean of each against the others",
    "balanced_accuracy": "mean over classes of the share recognised",
    "accuracy": "share recognised",
}


def predict_all(predictor: Predictor, source: Members, split: SubjectSplit) -> pd.DataFrame:
    """Predict every validation and test recording: one row each, with truth and prediction of each target."""
    rows = []
    for role in ("val", "test"):
        members = split.roles[role]
        reader = ChosenRecordings(source, members)
        truth = {target.column: source.values(target.column, members) for target in predictor.targets}
        for index, member in enumerate(members):
            found = predictor.predict(reader.as_recording(index), native_tr=True)
            row = {
                "recording_id": member.recording_id, "subject": member.subject, "group": member.group, "split": role,
                "num_windows": found.num_windows, "num_kept": found.num_kept,
            }  # fmt: skip
            rows.append(row | found.columns() | _truth(truth, index))
    return pd.DataFrame(rows)


def _truth(columns: dict[str, list[Any]], index: int) -> dict[str, Any]:
    return {f"true_{name}": None if values[index] is None else values[index] for name, values in columns.items()}


def score_table(table: pd.DataFrame, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return one record a target, split and metric, intervals over families (else subjects), and say those of test."""
    records = []
    for role in ("val", "test"):
        rows = table[table["split"] == role]
        for target in targets:
            for name, score in scores_of(target, rows).items():
                records.append({"target": target.column, "split": role, "metric": name, **score.record()})
                if role == "test":
                    logger.info(
                        "test %s: %s %s, %d recordings of %d families or subjects",
                        target.column, name, score, score.num, score.num_groups,
                    )  # fmt: skip
    return records


def scores_of(target: Target, rows: pd.DataFrame) -> dict[str, Score]:
    """Return the scores of one target over rows with known truth."""
    given = list(rows[f"true_{target.column}"])
    wanted, known = target.encode(given)
    groups = [group for group, is_known in zip(rows["group"], known, strict=True) if is_known]
    if target.kind == "classification":
        columns = [f"probability_{target.column}_{label}" for label in target.classes]
        p: NDArray[np.float64] = rows[columns].to_numpy(dtype=np.float64)[known]
        classes = wanted[known].astype(np.int64)
        named = {
            "auc": metrics.macro_auc,
            "balanced_accuracy": metrics.balanced_accuracy,
            "accuracy": metrics.accuracy,
        }
        return {name: with_interval(metric, classes, p, groups) for name, metric in named.items()}
    predicted = list(rows[f"predicted_{target.column}"])
    truth = np.array([float(value) for value, is_known in zip(given, known, strict=True) if is_known])
    answer = np.array(predicted, dtype=np.float64)[known]
    found = {
        name: with_interval(getattr(metrics, name), truth, answer, groups) for name in ("r2", "pearson_r", "mae", "mse")
    }
    t = target.transformed(given)[known]
    found["mse_transformed"] = with_interval(metrics.mse, t, target.transformed(predicted)[known], groups)
    return found


def score_run(settings: FinetuneSettings, dataset: Dataset, checkpoint: str) -> None:
    """Predict and score validation and test subjects with the best weights, unless that was done. Rank zero alone."""
    store = Store(settings.run.storage or settings.run.out)
    if store.exists(SCORES):
        return
    predictor = Predictor.from_pretrained(checkpoint)
    if torch.cuda.is_available():
        predictor.to("cuda")
    source = read_members(dataset)
    pretrained_on = load_encoder(settings, dataset).pretrained_on
    split = split_subjects(source, settings.split, pretrained_on, predictor.contract)
    names = ("init_from", "untrained", "permuted", "encoder_trained", "git_commit", "dataset", "data_hash", "step")
    facts = {name: predictor.manifest.get(name) for name in names}
    write_scores(store, predictor, source, split, {"checkpoint": checkpoint, **facts})


def write_scores(
    store: Store, predictor: Predictor, source: Members, split: SubjectSplit, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Predict and score with the best weights; write both files and say the test scores. Rank zero alone."""
    table = predict_all(predictor, source, split)
    records = score_table(table, predictor.targets)
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    store.write_bytes(PREDICTIONS, buffer.getvalue())
    notes = []
    if split.num_pretraining_subjects is None:
        notes.append("whom the checkpoint was pretrained on is not known: scores may be too high for new subjects")
    elif split.num_pretraining_subjects:
        notes.append(
            f"the checkpoint was pretrained on {split.num_pretraining_subjects} of these subjects, or their families: "
            "scores are too high for new ones"
        )
    for line in (facts.get("init_from") or {}).get("differs", []):
        notes.append(f"the data set differs from what the checkpoint was trained on: {line}")
    if facts.get("permuted"):
        notes.append("a control: the targets of the training subjects were permuted")
    if facts.get("untrained"):
        notes.append("a control: the encoder's weights were random, not those of the checkpoint")
    counts = {role: split.num_subjects(role) for role in split.roles}
    tree = {
        **facts, "num_subjects": counts, "statistics_from": predictor.contract.statistics_from,
        "pretraining_subjects": split.num_pretraining_subjects, "notes": notes, "metrics": EXPLAINED,
        "scores": records,
    }  # fmt: skip
    store.write_json(SCORES, tree)
    for note in notes:
        logger.warning("%s", note)
    return records
