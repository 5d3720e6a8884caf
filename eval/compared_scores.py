"""Put the scores of two results folders side by side, and refuse what may not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from brainlm.errors import ConfigError, DataError
from eval.comparison import Comparison, ScoreDifference, Unmatched
from eval.difference_interval import difference_interval
from eval.model_pairs import ModelPair, pair_models
from eval.results import Score
from eval.results_folder import ResultsFolder
from eval.run_differences import run_differences


def compare_folders(
    a: ResultsFolder, b: ResultsFolder, asked: Sequence[str] = (), task: str = "", other_data: bool = False
) -> Comparison:
    """Compare what both folders hold, and say what differs between the runs.

    Parameters
    ----------
    asked : sequence of str
        Models to pair, ``NAME_IN_A=NAME_IN_B``.
    task : str
        Only this one ("" = all).
    other_data : bool
        Accept other data or another split; intervals are then not paired.

    Raises
    ------
    ConfigError
        If a task or model is not there.
    DataError
        If the folders may not be compared, or have no score in common.
    """
    check_comparable(a, b, task, other_data)
    pairs = pair_models(a, b, asked)
    scores, unmatched = compare_scores(a, b, pairs, task)
    differences = run_differences(a, b, pairs)
    return Comparison(a=a, b=b, pairs=pairs, scores=scores, unmatched=unmatched, differences=differences)


def check_comparable(a: ResultsFolder, b: ResultsFolder, task: str = "", other_data: bool = False) -> None:
    """Refuse what may not be compared.

    Raises
    ------
    ConfigError
        If neither folder has the task.
    DataError
        If data or split differ (and `other_data` does not allow it), or the version of a task.
    """
    places = f"A is {a.store.url}, B is {b.store.url}"
    tasks = {score.task for score in (*a.scores, *b.scores)}
    if task and task not in tasks:
        raise ConfigError(f"--task: expected one of {', '.join(sorted(tasks))}, found {task!r} ({places})")
    for name in sorted(tasks & {task}) or sorted(tasks):
        versions = [sorted({s.version for s in folder.scores if s.task == name}) for folder in (a, b)]
        if all(versions) and versions[0] != versions[1]:
            raise DataError(
                f"{name}: expected one version of the task, found {_words(versions[0])} in A and {_words(versions[1])} "
                f"in B ({places}): run eval/run.py again where it is older, or choose another task with --task"
            )
    if other_data:
        return
    both = sorted(a.splits.keys() & b.splits.keys() & ({task} if task else tasks))
    for what, ours, theirs in (
        ("dataset_hash", a.dataset_hash[:12], b.dataset_hash[:12]),
        *(("split", a.splits[name], b.splits[name]) for name in both),
    ):
        if ours != theirs:
            raise DataError(
                f"{what}: expected the same data in both folders, found {ours} in A and {theirs} in B ({places}): "
                "score both on the same data, or accept it with --other-data"
            )


def compare_scores(
    a: ResultsFolder, b: ResultsFolder, pairs: Sequence[ModelPair], task: str = ""
) -> tuple[list[ScoreDifference], list[Unmatched]]:
    """Compare what both folders hold, and count what only one does.

    Parameters
    ----------
    pairs : sequence of ModelPair
        From `eval.model_pairs.pair_models`.
    task : str
        Only this one ("" = all).

    Raises
    ------
    DataError
        If a folder holds the same score twice, or the two have none in common.
    """
    name_in_b = {pair.a: pair.b for pair in pairs}
    of_a = _by_key(a, task, name_in_b)
    of_b = _by_key(b, task, {pair.b: pair.b for pair in pairs})
    found = [_difference(a, of_a[key], b, score) for key, score in of_b.items() if key in of_a]
    if not found:
        raise DataError(
            f"{a.store.url} and {b.store.url} have no score in common: A has models {', '.join(a.models)}; "
            f"B has {', '.join(b.models)}. Pair them with --model NAME_IN_A=NAME_IN_B"
        )
    left: tuple[tuple[Literal["A", "B"], list[Score]], ...] = (
        ("A", [score for key, score in of_a.items() if key not in of_b]),
        ("B", [score for key, score in of_b.items() if key not in of_a]),
    )
    unmatched = [
        Unmatched(folder=folder, task=name, model=model, num_scores=count)
        for folder, scores in left
        for (name, model), count in Counter((score.task, score.model) for score in scores).items()
    ]
    return found, unmatched


def _by_key(folder: ResultsFolder, task: str, name_in_b: dict[str, str]) -> dict[tuple[Any, ...], Score]:
    """Return scores by what must be equal; models without a partner keep a name that no other folder has."""
    found: dict[tuple[Any, ...], Score] = {}
    for score in folder.scores:
        if task and score.task != task:
            continue
        condition = dict(score.condition)
        if "reference" in condition:
            condition["reference"] = name_in_b.get(str(condition["reference"]), condition["reference"])
        model = name_in_b.get(score.model, (folder.store.url, score.model))
        key = (score.task, model, score.metric, frozenset(condition.items()))
        if key in found:
            raise DataError(
                f"{folder.store.url}: two scores of {score.task}, {score.model}, {score.metric}, {condition}"
            )
        found[key] = score
    return found


def _difference(a: ResultsFolder, score_a: Score, b: ResultsFolder, score_b: Score) -> ScoreDifference:
    same_data = (a.dataset_hash, score_a.split) == (b.dataset_hash, score_b.split)
    interval = difference_interval(a.made_of(score_a), b.made_of(score_b), same_data)
    common = [note for note in score_a.notes if note in score_b.notes]
    own_a = [f"A: {note}" for note in score_a.notes if note not in common]
    own_b = [f"B: {note}" for note in score_b.notes if note not in common]
    return ScoreDifference(
        task=score_b.task,
        version=score_b.version,
        metric=score_b.metric,
        condition=dict(score_b.condition),
        model_a=score_a.model,
        model_b=score_b.model,
        model_hash_a=score_a.model_hash,
        model_hash_b=score_b.model_hash,
        value_a=score_a.value,
        value_b=score_b.value,
        difference=score_b.value - score_a.value,
        ci_low=interval.low,
        ci_high=interval.high,
        interval=interval.pairing,
        excludes_zero=interval.excludes_zero,
        num_subjects_a=score_a.num_subjects,
        num_subjects_b=score_b.num_subjects,
        notes=(*common, *own_a, *own_b, *interval.notes),
    )


def _words(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in numbers)
