"""What a report reads of the clinical task: its targets, the readout chosen for each network, the reference, tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from eval.figures import Look
from eval.report_input import Results, dig
from eval.results import Score

TASK = "clinical"
FIRST_METRICS = ("r2", "auc")
CHANCE = {"r2": 0.0, "auc": 0.5}
FOLD_WORDS = {"random": "random folds", "sites": "each site left out"}
READOUT_WORDS = {
    "linear": "a linear readout",
    "SVR": "a support vector machine as readout",
    "attentive": "an attentive readout",
    "fine-tuned": "fine-tuning",
}
READOUT_MARKERS = {"linear": "o", "SVR": "D", "attentive": "s", "fine-tuned": "^"}
PERMUTED = ", permuted targets"
CONFOUNDS_ONLY = "confounds only"
TABLES = {
    "predictions": "the predictions of single recordings were not kept, so none are drawn",
    "folds": "what single folds gave was not kept, so there is no table of folds, and the readout named in the summary "
    "is the linear one, not the one that was best on validation",
    "groups": "scores within sites and other groups were not kept, so there is no table of them",
    "calibration": "the calibration was not kept, so there is no diagram of it",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A model as it is scored on a target; ``readout`` is "" for all but networks."""

    model: str
    readout: str = ""

    @property
    def key(self) -> str:
        return f"{self.model}/{self.readout}"

    @classmethod
    def of(cls, score: Score) -> Method:
        return cls(model=score.model, readout=str(score.condition.get("readout", "")))

    def label(self, results: Results) -> str:
        return results.labels.get(self.model, self.model) + (f", {self.readout}" if self.readout else "")

    def look(self, results: Results) -> Look:
        look = results.looks[self.model]
        return replace(look, label=self.label(results), marker=READOUT_MARKERS.get(self.readout, look.marker))


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """The scores of one target, and the tables that belong to them."""

    name: str
    place: int
    """Its place among the targets, from 1."""
    scores: list[Score]
    tables: Mapping[str, pd.DataFrame]
    """By the names of `TABLES`; those that are not there are left out."""

    @property
    def metric(self) -> str:
        return next((m for m in FIRST_METRICS if any(s.metric == m for s in self.scores)), FIRST_METRICS[0])

    @property
    def is_regression(self) -> bool:
        return self.metric == "r2"

    @property
    def chance(self) -> float:
        return CHANCE[self.metric]

    @property
    def slug(self) -> str:
        """Name for files and ids."""
        return f"clinical-{self.place}-" + (re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-") or "target")

    @cached_property
    def base(self) -> dict[str, str]:
        """Folds and treatment of confounds that the summary is about: random, kept; or what there is."""
        usual = {"folds": "random", "confounds": "kept"}
        found = {name: {str(s.condition[name]) for s in self.scores if name in s.condition} for name in usual}
        return {name: usual[name] if usual[name] in there else min(there) for name, there in found.items() if there}

    @property
    def base_words(self) -> str:
        folds = self.base.get("folds", "")
        return f"{FOLD_WORDS.get(folds, folds)}, confounds {self.base.get('confounds', 'kept')}"

    def find(self, metric: str, **condition: object) -> list[Score]:
        return [
            s for s in self.scores if s.metric == metric and all(s.condition.get(k) == v for k, v in condition.items())
        ]

    def score(self, method: Method, metric: str = "", **condition: object) -> Score | None:
        """Return a method's score under a condition."""
        found = self.find(metric or self.metric, **condition)
        return next((s for s in found if Method.of(s) == method), None)

    @property
    def reference(self) -> str:
        """Baseline that the others are compared with; "" if none is named."""
        named = [str(s.condition["reference"]) for s in self.scores if "reference" in s.condition]
        return Counter(named).most_common(1)[0][0] if named else ""

    def readouts(self, model: str) -> list[str]:
        here = self.find(self.metric, **self.base)
        return list(dict.fromkeys(Method.of(s).readout for s in here if s.model == model))

    def validation_losses(self, model: str) -> dict[str, float]:
        """Return the mean validation loss of each scored readout of a model; empty where none was kept."""
        rows = self.rows("folds", **self.base)
        if rows is None:
            return {}
        rows = rows[(rows["model"] == model) & rows["readout"].isin(self.readouts(model))]
        if "cross_validated" in rows and rows["cross_validated"].any():
            rows = rows[rows["cross_validated"]]  # the best of many looks at one fold would always win
        means = rows.groupby("readout", sort=False)["validation_loss"].mean()
        return {str(readout): float(loss) for readout, loss in means.items() if np.isfinite(loss)}

    def chosen(self, model: str) -> Method | None:
        """Return a model with the readout that has the lowest validation loss: test scores have no say in it.

        Where no losses were kept it is the linear readout.
        """
        readouts, losses = self.readouts(model), self.validation_losses(model)
        if not readouts:
            return None
        usual = "linear" if "linear" in readouts else readouts[0]
        return Method(model=model, readout=min(losses, key=lambda name: losses[name]) if losses else usual)

    def best_network(self, results: Results) -> Method | None:
        """Return the checkpoint and readout with the lowest validation loss, else the first checkpoint."""
        chosen = [method for model in results.models if (method := self.chosen(model)) is not None]
        losses = {m: self.validation_losses(m.model).get(m.readout, float("inf")) for m in chosen}
        return min(chosen, key=lambda method: losses[method], default=None)

    def rows(self, table: str, **condition: object) -> pd.DataFrame | None:
        """Return the rows of this target in a table; None if there are none."""
        frame = self.tables.get(table)
        if frame is None:
            return None
        kept = frame["target"] == self.name
        for name, value in condition.items():
            kept &= frame[name] == value
        return frame[kept] if kept.any() else None

    def rows_of(self, table: str, method: Method, **condition: object) -> pd.DataFrame | None:
        return self.rows(table, model=method.model, readout=method.readout, **condition)


def clinical_targets(results: Results) -> list[Target]:
    """Return every target that was scored, in the order of the records."""
    scores = results.task_scores(TASK)
    if not scores:
        return []
    tables = {name: frame for name in TABLES if (frame := results.table(f"clinical_{name}.parquet")) is not None}
    names = dict.fromkeys(str(s.condition.get("target", "target")) for s in scores)
    return [
        Target(
            name=name,
            place=place,
            scores=[s for s in scores if str(s.condition.get("target", "target")) == name],
            tables=tables,
        )
        for place, name in enumerate(names, start=1)
    ]


def removed_text(results: Results) -> str:
    """Say what it means that confounds were removed."""
    named = dig(results.run, "config", "clinical", "confounds")
    which = f" ({', '.join(map(str, named))}, as far as the data set has them)" if isinstance(named, list) else ""
    return (
        f"Confounds removed: in every fold a linear regression on the confounds{which}, fitted to the training people "
        "alone, is subtracted from the features before a method reads them. Methods that read the series themselves, "
        "and networks that are trained through, have no such score."
    )
