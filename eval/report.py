"""Write ``report.html``: what was run on what, which claims hold, and every number behind them, in one file.

The page is made from the files of a results folder alone. ``results.json`` must be there; whatever else is missing is
said in a sentence where it would have stood. Verdicts are computed from the records: a model is ahead or behind only if
an interval says so.
"""

from __future__ import annotations

import argparse
import logging
import sys

from brainlm.errors import BrainLMError
from brainlm.store import Store
from eval.figures import quiet_drawing
from eval.report_brain import brain_section
from eval.report_claims import caveats, lead, make_claims
from eval.report_clinical import clinical_section
from eval.report_examples import examples_section
from eval.report_forecasting import forecasting_section
from eval.report_input import listed, read_results
from eval.report_networks import networks_section
from eval.report_own_tasks import own_section, own_tasks
from eval.report_page import Artist, render_page
from eval.report_provenance import provenance
from eval.report_reconstruction import reconstruction_section
from eval.report_several import write_overview
from eval.report_tables import RECORD_COLUMNS, record_rows
from eval.report_training import training_section
from eval.several import LISTED

REPORT_NAME = "report.html"


def write_report(results_folder: str) -> None:
    """Write ``report.html`` and the files in ``figures/`` of a results folder; of several data sets their tables.

    Parameters
    ----------
    results_folder : str
        Any fsspec URL; what `eval/run.py` wrote.

    Raises
    ------
    DataError
        If there is no ``results.json``, or it is not a list of scores.
    """
    store = Store(results_folder)
    if store.exists(LISTED):
        write_overview(store)
        return
    results = read_results(results_folder)
    artist = Artist(store=results.store)
    with quiet_drawing():
        sections = [
            make(results, artist)
            for make in (
                training_section,
                reconstruction_section,
                examples_section,
                brain_section,
                forecasting_section,
                clinical_section,
                networks_section,
            )
        ]
        sections += [own_section(results, task) for task in own_tasks(results)]
    models = [results.labels[model] for model in results.models]
    page = render_page(
        "report.html.j2",
        title=f"{listed(models) if models else 'Baselines'} on {results.scores[0].dataset}",
        lead=lead(results),
        simulated=results.is_simulated,
        claims=make_claims(results),
        no_claims="" if results.models else "No checkpoint was scored, so there is nothing to claim about a model.",
        caveats=caveats(results),
        sections=[section for section in sections if not section.is_empty],
        not_here=[(section.title, " ".join(section.absent)) for section in sections if section.is_empty],
        facts=provenance(results),
        record_columns=RECORD_COLUMNS,
        records=record_rows(results),
        level=results.level_text,
    )
    results.store.write_bytes(REPORT_NAME, page.encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write report.html from the files of a results folder.")
    parser.add_argument("results_folder", help="folder or URL that eval/run.py wrote")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_report(args.results_folder)
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Store(args.results_folder).url_of(REPORT_NAME))
    return 0


if __name__ == "__main__":
    sys.exit(main())
