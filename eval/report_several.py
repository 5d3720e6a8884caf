"""The page that puts several data sets side by side: models down, data sets across, for each task and condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from brainlm.errors import DataError
from brainlm.store import Store
from eval.report_clinical_tables import metric_words
from eval.report_input import Results, condition_groups, listed
from eval.report_page import Section, render_page
from eval.report_tables import caption_text, make_table, metric_text
from eval.results import FILE_NAME, read_scores
from eval.several import LISTED
from eval.summary import HEADLINE, condition_words

REPORT_NAME = "report.html"
IN_ROW = ("part", "readout")


def write_overview(store: Store) -> None:
    """Write ``report.html`` of the folder that `eval.several` fills.

    Raises
    ------
    DataError
        If there is no score.
    """
    listing = store.read_json(LISTED)
    times = Counter(entry["name"] for entry in listing)
    labels = {
        entry["content_hash"]: entry["name"]
        if times[entry["name"]] == 1
        else f"{entry['name']} {entry['content_hash'][:8]}"
        for entry in listing
    }
    scores = read_scores(store)
    if not scores:
        raise DataError(f"{store.url_of(FILE_NAME)} holds no score: see what failed, and run eval/run.py again")
    lacking = [label for key, label in labels.items() if all(score.dataset_hash != key for score in scores)]
    place = {key: number for number, key in enumerate(labels)}
    marked = [replace(s, condition={**s.condition, "dataset": place[s.dataset_hash]}) for s in scores]
    results = Results(store=store, scores=marked, all_scores=marked, left_out=0, run={})
    tasks = dict.fromkeys(score.task for score in marked)
    models = [results.labels[model] for model in results.models]
    page = render_page(
        "several.html.j2",
        title=f"{listed(models) if models else 'Baselines'} on {listed(list(labels.values()))}",
        folders=[(entry["folder"], labels[entry["content_hash"]]) for entry in listing],
        caveats=[
            "Every data set is scored by itself: its baselines learned from its own train split, and intervals are "
            "over its own subjects. Scores of two data sets differ also because the recordings do.",
            *(f"{label}: nothing could be scored." for label in lacking),
            *sorted(results.common_notes),
        ],
        sections=[_section(results, task, list(labels.values())) for task in tasks],
    )
    store.write_bytes(REPORT_NAME, page.encode())


def _section(results: Results, task: str, labels: Sequence[str]) -> Section:
    section = Section(title=task.capitalize(), anchor="".join(c if c.isalnum() else "-" for c in task))
    of_task = results.task_scores(task)
    metrics = HEADLINE.get(task, (of_task[0].metric,))
    for metric in metrics:
        text = metric_words(metric) if task == "clinical" else metric_text(metric)
        of_metric = [score for score in of_task if score.metric == metric]
        for group in condition_groups(of_metric, "dataset", *IN_ROW):
            here = [s for s in of_metric if all(s.condition.get(k) == v for k, v in group.items())]
            section.tables.append(
                make_table(
                    results,
                    here,
                    column="dataset",
                    column_text=lambda number: labels[number],
                    row_conditions=IN_ROW,
                    title=", ".join(part for part in (text.name, condition_words(group)) if part),
                    caption=caption_text(results, here, text),
                    higher_is_better=text.higher_is_better,
                )
            )
    return section
