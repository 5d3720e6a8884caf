"""One typed record a score, and ``results.json``, a plain list of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from brainlm.errors import DataError
from brainlm.store import Store

FILE_NAME = "results.json"
ADDED = {"p_value", "p_corrected"}
"""Fields that older files do not have."""
ModelKind = Literal["brainlm", "untrained", "baseline", "control", "optimum"]
StatisticsFrom = Literal["checkpoint", "cohort"]
ConditionValue = str | int | float


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number with its interval, and all that is needed to know what it means.

    Parameters
    ----------
    task, version : str, int
        Which benchmark, and which edition of it: scores of different versions are not compared.
    dataset, dataset_hash, split : str
        Data that were scored.
    model, model_kind, model_hash : str
        `model_hash` is the sha256 of a checkpoint's weights, or identifies a baseline's code and training data.
    metric, value, ci_low, ci_high
        The interval is None where it cannot be computed (one subject).
    p_value, p_corrected : float or None
        Of a difference from the reference baseline: two-sided, by exchanging the two methods' results of subjects; and
        corrected for all comparisons of the task (Holm); in ``clinical`` by the corrected resampled t test over folds,
        and for all methods that are compared with one reference.
    num_subjects, num_recordings : int
    condition : mapping
        What was varied, e.g. ``{"mask_ratio": 0.5, "centring": "recording"}``.
    statistics_from : {"checkpoint", "cohort"}
        Whose median and IQR scaled the model's input.
    notes : tuple of str
        What a reader of the number must know.
    """

    task: str
    version: int
    dataset: str
    dataset_hash: str
    split: str
    model: str
    model_kind: ModelKind
    model_hash: str
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    num_subjects: int
    num_recordings: int
    condition: dict[str, ConditionValue]
    statistics_from: StatisticsFrom
    notes: tuple[str, ...] = ()
    p_value: float | None = None
    p_corrected: float | None = None

    def __post_init__(self) -> None:
        where = f"score {self.task}/{self.model}/{self.metric}"
        if self.model_kind not in get_args(ModelKind) or self.statistics_from not in get_args(StatisticsFrom):
            raise DataError(f"{where}: unknown model_kind {self.model_kind!r} or statistics {self.statistics_from!r}")
        if not math.isfinite(self.value):
            raise DataError(f"{where}: the value is not finite ({self.value})")
        ends = (self.ci_low, self.ci_high)
        if (ends[0] is None) != (ends[1] is None) or any(end is not None and not math.isfinite(end) for end in ends):
            raise DataError(f"{where}: an interval has two finite ends or none, found {ends}")
        if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
            raise DataError(f"{where}: the interval is upside down, {ends}")
        if any(p is not None and not 0 < p <= 1 for p in (self.p_value, self.p_corrected)):
            raise DataError(f"{where}: p values lie in (0, 1], found {self.p_value} and {self.p_corrected}")
        if self.num_subjects < 0 or self.num_recordings < 0 or self.version < 1:
            raise DataError(f"{where}: counts and version cannot be negative")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def write_scores(store: Store, scores: Sequence[Score]) -> None:
    """Write ``results.json`` atomically."""
    store.write_json(FILE_NAME, [score.to_json() for score in scores])


def read_scores(store: Store) -> list[Score]:
    """Read ``results.json``, refusing records that are not complete or hold keys nobody knows.

    Raises
    ------
    DataError
        If there is no such file; or naming the first bad record.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if not store.exists(FILE_NAME):
        raise DataError(
            f"{store.url} holds no {FILE_NAME}: run python eval/run.py --config eval/configs/<name>.yaml "
            f"out={store.url} first"
        )
    tree = store.read_json(FILE_NAME)
    if not isinstance(tree, list):
        raise DataError(f"{store.url_of(FILE_NAME)}: expected a list of records, found {type(tree).__name__}")
    known = {field.name for field in dataclasses.fields(Score)}
    for number, record in enumerate(tree):
        odd = [type(record).__name__]
        if isinstance(record, dict):
            odd = sorted(known.symmetric_difference(record) - (ADDED - record.keys()))
        if odd:
            raise DataError(f"{store.url_of(FILE_NAME)}, record {number}: unknown or missing: {', '.join(odd)}")
    try:
        adapter = TypeAdapter(list[Score], config=ConfigDict(strict=False))
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise DataError(f"{store.url_of(FILE_NAME)}: {error}") from error
