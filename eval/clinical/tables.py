"""Tables that the report draws the clinical task from: predictions, folds, groups of people, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainlm.store import Store
from eval.clinical.answers import CONDITIONS, Answers, Condition, answers_by_condition, interval
from eval.clinical.fold_work import BY
from eval.clinical.metrics import NUM_BINS, FloatArray, bin_of
from eval.models import MethodSpec
from eval.settings import IntervalsSettings
from eval.task import UnitOutput, to_parquet

Outputs = Sequence[tuple[MethodSpec, UnitOutput]]
FIT = ("num_train", "num_test", "validation_loss", "cross_validated", "chosen")
IN_GROUPS = {True: ("mae", "pearson_r"), False: ("auc", "balanced_accuracy")}
"""Metrics of groups of people, of a regression and of a classification: none looks at differences between groups."""


def write_clinical(store: Store, outputs: Outputs, intervals: IntervalsSettings) -> None:
    """Write ``clinical_predictions.parquet``, ``_folds``, ``_groups`` and ``_calibration``."""
    everything = [
        (spec.name, condition, answers, output)
        for spec, output in outputs
        for condition, answers in answers_by_condition(output.table)
    ]
    tables = {
        "predictions": [_predictions(name, answers) for name, _, answers, _ in everything],
        "folds": [_folds(name, condition, answers, output) for name, condition, answers, output in everything],
        "groups": [_groups(name, condition, answers, intervals) for name, condition, answers, _ in everything],
        "calibration": [_calibration(name, condition, answers) for name, condition, answers, _ in everything],
    }
    for name, frames in tables.items():
        filled = [frame for frame in frames if len(frame)]
        if filled:
            store.write_bytes(f"clinical_{name}.parquet", to_parquet(pd.concat(filled, ignore_index=True)))


def _predictions(model: str, answers: Answers) -> pd.DataFrame:
    frame = answers.frame
    columns = [*CONDITIONS, "kind", "repeat", "fold", "group", "recording", "truth", "label"]
    if answers.is_regression:
        predicted = frame["predicted"].to_numpy(np.float64)
    else:
        predicted = answers.probabilities[:, 1] if len(answers.classes) == 2 else np.full(len(frame), np.nan)
    return frame[columns].assign(model=model, predicted=predicted)


def _folds(model: str, condition: Condition, answers: Answers, output: UnitOutput) -> pd.DataFrame:
    found = answers.by_fold.assign(model=model, metric=answers.first_metric, **_named(condition))
    if output.validation is None or not len(output.validation):
        return found
    keys = [*CONDITIONS, "repeat", "fold"]
    here = (output.validation[list(CONDITIONS)] == list(condition)).all(axis=1)
    more = output.validation.loc[here, [*keys, *FIT]]
    named = {"model": model, "metric": answers.first_metric}
    return more.merge(found[[*keys, "value"]], on=keys, how="left").assign(**named)  # also folds without an answer


def _groups(model: str, condition: Condition, answers: Answers, intervals: IntervalsSettings) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for column in (str(name) for name in answers.frame.columns if str(name).startswith(BY)):
        if column.removeprefix(BY) == condition[0]:  # a group of one value says nothing about that value
            continue
        for label in sorted(set(answers.frame[column]) - {""}):
            part = answers.only((answers.frame[column] == label).to_numpy(bool))
            counts = {
                "num_subjects": part.frame["subject"].nunique(),
                "num_recordings": part.frame["recording"].nunique(),
            }
            for name in IN_GROUPS[answers.is_regression]:
                value = part.value(part.metrics[name])
                if not np.isfinite(value):
                    continue
                drawn = part.replicates(part.metrics[name], intervals.num_bootstrap, intervals.seed)
                low, high = interval(drawn, len(part.groups), intervals.level)
                rows.append(
                    {"model": model, **_named(condition), "by": column.removeprefix(BY), "label": label, **counts}
                    | {"metric": name, "value": value, "ci_low": _nan(low), "ci_high": _nan(high)}
                )
    return pd.DataFrame(rows)


def _calibration(model: str, condition: Condition, answers: Answers) -> pd.DataFrame:
    rows = []
    for label, predicted, observed, bins in _curves(answers):
        for number in np.unique(bins):
            here = bins == number
            rows.append(
                {"model": model, **_named(condition), "kind": answers.frame["kind"].iloc[0], "class": label}
                | {"bin": int(number), "predicted": float(predicted[here].mean())}
                | {"observed": float(observed[here].mean()), "num": int(here.sum())}
            )
    return pd.DataFrame(rows)


def _curves(answers: Answers) -> Iterator[tuple[str, FloatArray, FloatArray, np.ndarray[Any, np.dtype[np.int64]]]]:
    """Yield class, prediction, fact and bin: tenths of the predictions of a regression, or of the way from 0 to 1."""
    truth = answers.frame["truth"].to_numpy(np.float64)
    if answers.is_regression:
        predicted = answers.frame["predicted"].to_numpy(np.float64)
        rank = np.argsort(np.argsort(predicted, kind="stable"), kind="stable")
        yield "", predicted, truth, (rank * NUM_BINS // max(len(rank), 1)).astype(np.int64)
        return
    for number, label in enumerate(answers.classes):
        if len(answers.classes) == 2 and number == 0:
            continue
        predicted = answers.probabilities[:, number]
        yield label, predicted, (truth == number).astype(np.float64), bin_of(predicted)


def _named(condition: Condition) -> dict[str, str]:
    return dict(zip(CONDITIONS, condition, strict=True))


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
