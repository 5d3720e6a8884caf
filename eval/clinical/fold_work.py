"""The work of one method in one fold: every target, with and without confounds, and the tables that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainlm.errors import DataError
from brainlm.targets import Target, TargetSettings, label_of, numbers
from eval.clinical.folds import Fold
from eval.clinical.people import People
from eval.clinical.problem import Answer, FloatArray, IntArray, Predictor, Problem
from eval.clinical.settings import ClinicalSettings

KEPT, REMOVED = "kept", "removed"
PROBABILITY = "p "
"""Begins the name of a column of probabilities; the class follows."""
BY = "by "
"""Begins the name of a column by which people are told apart."""
_PERMUTED = 0x9F
MakePredictor = Callable[[TargetSettings], Predictor]


def work(
    people: People,
    fold: Fold,
    settings: ClinicalSettings,
    make: MakePredictor,
    *,
    removals: Sequence[str],
    readout: str = "",
    permuted: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Learn each target in a fold and answer for its test rows.

    Parameters
    ----------
    make : callable
        Gives the predictor of a target.
    removals : sequence of {"kept", "removed"}
        Whether confounds are removed from the features.
    permuted : bool
        Exchange the values among people first, anew in each repeat: nothing is left to be found.

    Returns
    -------
    answers : DataFrame
        One row a target, removal and tested recording whose value is known.
    fits : DataFrame
        One row a target and removal: sizes, loss on validation, settings that were chosen; or why there was nothing to
        learn, so that these people are not scored.
    """
    tables, fits = [], []
    for wanted in settings.targets:
        values = people.values(wanted.column)
        known = known_values(wanted, values)
        if permuted:
            values = _permuted(values, people, known, [settings.seed, fold.repeat], wanted.column)
        rows = replace(fold, train=fold.train[known[fold.train]], test=fold.test[known[fold.test]])
        is_itself = fold.kind == "sites" and wanted.column == "site"  # a site is not known to the others
        if is_itself or not len(rows.train) or not len(rows.test):
            continue
        sizes = {"num_train": len(rows.train), "num_test": len(rows.test)}
        try:
            target = Target.fit(wanted, _of_subjects(values, people, rows.train, wanted.column))
        except DataError as error:  # one class at the other sites, for instance
            lost = {"validation_loss": np.nan, "cross_validated": True, "chosen": f"left out: {error}"}
            fits += [_about(wanted, readout, fold, removal) | sizes | lost for removal in removals]
            continue
        y = target.encode([values[row] for row in rows.train])[0].astype(np.float64)
        predictor = make(wanted)
        for removal in removals:
            problem = Problem(
                target=target,
                train=rows.train,
                y=y,
                groups=people.groups[rows.train],
                test=rows.test,
                nuisance=_filled(confounds_of(people, settings, wanted), rows.train) if removal == REMOVED else None,
                seed=settings.seed + fold.repeat,
            )
            answer = predictor.answer(problem)
            about = _about(wanted, readout, fold, removal)
            table = _answers(about, target, values, people, rows.test, answer, classes_of(wanted, values))
            tables.append(table.assign(**_labels(people, rows.test, settings.by)))
            found = {"validation_loss": answer.validation_loss, "cross_validated": answer.cross_validated}
            fits.append(about | sizes | found | {"chosen": answer.chosen})
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), pd.DataFrame(fits)


def _about(wanted: TargetSettings, readout: str, fold: Fold, removal: str) -> dict[str, Any]:
    what = {"target": wanted.column, "kind": wanted.kind, "readout": readout, "folds": fold.kind, "confounds": removal}
    return {**what, "repeat": fold.repeat, "fold": fold.name}


def known_values(wanted: TargetSettings, values: Sequence[object]) -> NDArray[np.bool_]:
    """Say of which rows the value is known."""
    if wanted.kind == "classification":
        return np.array([bool(label_of(value)) for value in values], dtype=bool)
    return np.isfinite(numbers(wanted.column, values))


def classes_of(wanted: TargetSettings, values: Sequence[object]) -> list[str]:
    """Return the classes in order; of a regression none."""
    return sorted({label_of(value) for value in values} - {""}) if wanted.kind == "classification" else []


def confounds_of(people: People, settings: ClinicalSettings, wanted: TargetSettings) -> FloatArray:
    """Return the confounds of a target, (rows, C): all that are set and there, but itself."""
    return people.confounds([name for name in settings.confounds if name != wanted.column])


def _labels(people: People, rows: IntArray, columns: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for column in columns:
        if people.source.has(column):
            labels = [label_of(value) for value in people.values(column)]
            found[f"{BY}{column}"] = [labels[row] for row in rows]
    return found


def _of_subjects(values: Sequence[object], people: People, rows: IntArray, column: str) -> list[object]:
    """Return the values of training subjects, one each; of a column that differs within subjects, of recordings."""
    if not people.source.is_of_subjects(column):
        return [values[row] for row in rows]
    return list({people.members[row].subject: values[row] for row in rows}.values())


def _filled(columns: FloatArray, train: IntArray) -> FloatArray:
    """Return columns with the mean over the training rows where a value is missing."""
    known = np.isfinite(columns[train])
    mean = np.where(known, columns[train], 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(np.isfinite(columns), columns, mean)


def _permuted(
    values: Sequence[object], people: People, known: NDArray[np.bool_], seed: Sequence[int], column: str
) -> list[object]:
    """Return the values, those that are known exchanged among subjects; or recordings, where these differ."""
    of_subjects = people.source.is_of_subjects(column)
    keys = [member.subject if of_subjects else member.recording_id for member in people.members]
    known_values = {key: value for key, value, here in zip(keys, values, known, strict=True) if here}
    names = list(known_values)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_PERMUTED, *seed])))
    exchanged = dict(zip(names, (known_values[names[i]] for i in rng.permutation(len(names))), strict=True))
    return [exchanged.get(key) for key in keys]


def _answers(
    about: dict[str, Any],
    target: Target,
    values: Sequence[object],
    people: People,
    rows: IntArray,
    answer: Answer,
    classes: Sequence[str],
) -> pd.DataFrame:
    found = answer.values
    if found.shape != (len(rows), target.num_outputs) or not np.isfinite(found).all():
        raise ValueError(
            f"a predictor of {target.column} answered with shape {found.shape} for {len(rows)} rows and "
            f"{target.num_outputs} outputs, or with what is not finite"
        )
    table = pd.DataFrame([people.identifiers(int(row)) for row in rows]).assign(**about)
    truth = [values[row] for row in rows]
    if target.kind == "regression":
        predicted = [target.original(float(u)) for u in found[:, 0]]
        return table.assign(
            truth=numbers(target.column, truth),
            predicted=predicted,
            truth_t=target.transformed(truth),
            predicted_t=found[:, 0] * target.sd + target.mean,
            label="",
        )
    labels = [label_of(value) for value in truth]
    columns: dict[str, Any] = {f"{PROBABILITY}{label}": 0.0 for label in classes}
    columns |= {f"{PROBABILITY}{label}": found[:, i] for i, label in enumerate(target.classes)}
    truth_number = np.array([classes.index(label) for label in labels], dtype=np.float64)
    return table.assign(truth=truth_number, label=labels).assign(**columns)
