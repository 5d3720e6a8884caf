"""The sections of tasks that are not in this repository: one table a metric."""

from __future__ import annotations

from eval.report_input import Results, condition_groups
from eval.report_page import Section
from eval.report_tables import caption_text, make_table, metric_text, other_conditions
from eval.settings import TASKS

WITH_SECTION = {*TASKS, "clinical"}


def own_tasks(results: Results) -> list[str]:
    return list(dict.fromkeys(score.task for score in results.scores if score.task not in WITH_SECTION))


def own_section(results: Results, task: str) -> Section:
    """Lay the scores of a task out: models down, its first condition across."""
    section = Section(title=task, anchor="".join(c if c.isalnum() else "-" for c in task))
    scores = results.task_scores(task)
    for metric in dict.fromkeys(score.metric for score in scores):
        text = metric_text(metric)
        of_metric = [score for score in scores if score.metric == metric]
        column = next(name for name in of_metric[0].condition)
        for group in condition_groups(of_metric, column):
            here = [s for s in of_metric if all(s.condition.get(k) == v for k, v in group.items())]
            extra = other_conditions(group)
            table = make_table(
                results,
                here,
                column=column,
                column_text=lambda value, column=column: f"{column} {value}",  # type: ignore[misc]
                title=text.name + (f", {extra}" if extra else ""),
                caption=caption_text(results, here, text),
                higher_is_better=text.higher_is_better,
                mark_best="_minus_reference" not in metric,
            )
            (section.tables if metric == scores[0].metric else section.more_tables).append(table)
    return section
