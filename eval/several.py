"""Score the same checkpoints on several data sets, and put their scores into one table.

::

    <out>/<name of a data set>/     a results folder, as of that data set alone
    <out>/results.json              the scores of all of them
    <out>/datasets.json             which folder is which data set
    <out>/report.html               their tables side by side

A second run computes only what is missing, also with one more data set. All data sets are opened, and all checkpoints
held against them, before anything is computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from brainlm.dataset import open_dataset
from brainlm.errors import BrainLMError, ConfigError
from brainlm.store import Store
from eval.planning import Plan, make_plan
from eval.results import read_scores, write_scores
from eval.results_folder import RUN
from eval.settings import EvalSettings

LISTED = "datasets.json"


def make_plans(settings: EvalSettings) -> list[Plan]:
    """Work out what must be computed of each data set.

    Raises
    ------
    BrainLMError
        What `make_plan` raises, with the data set before it.
    """
    plans = []
    for of_one in divide(settings):
        try:
            plans.append(make_plan(of_one))
        except BrainLMError as error:
            raise type(error)(f"data set {of_one.dataset}: {error}") from error
    return plans


def divide(settings: EvalSettings) -> list[EvalSettings]:
    """Return the settings of each data set, with a results folder named after it."""
    opened = [open_dataset(url) for url in settings.datasets]
    times = Counter(dataset.name for dataset in opened)
    folders = [
        re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset.name)
        + (f"-{dataset.content_hash[:8]}" if times[dataset.name] > 1 else "")
        for dataset in opened
    ]
    out = settings.out.rstrip("/")
    return [
        replace(settings, dataset=url, datasets=(), out=f"{out}/{folder}")
        for url, folder in zip(settings.datasets, folders, strict=True)
    ]


def evaluate_several(settings: EvalSettings, evaluate: Callable[[Plan], int]) -> int:
    """Evaluate one data set after another, then write what is common to all."""
    store = Store(settings.out)
    if store.exists(RUN):
        raise ConfigError(f"out={store.url} is the results folder of one data set: choose another for several")
    plans, exit_code = make_plans(settings), 0
    for number, plan in enumerate(plans, start=1):
        print(f"\ndata set {number} of {len(plans)}: {plan.dataset.name}, {plan.settings.dataset}", flush=True)
        exit_code = max(exit_code, evaluate(plan))
    write_scores(store, [score for plan in plans for score in read_scores(Store(plan.settings.out))])
    store.write_json(LISTED, [_listed(plan) for plan in plans])
    if settings.report:
        from eval.report_several import write_overview  # drawing libraries are loaded here

        write_overview(store)
        print(f"\nLook at {store.url_of('report.html')}: all data sets side by side.")
    return exit_code


def _listed(plan: Plan) -> dict[str, str]:
    return {
        "folder": plan.settings.out.rpartition("/")[2],
        "name": plan.dataset.name,
        "content_hash": plan.dataset.content_hash,
        "url": plan.settings.dataset,
    }
