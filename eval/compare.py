"""Compare two results folders: which scores changed, by how much, and is it more than chance?

    python eval/compare.py A B [--out comparison.json] [--task NAME] [--metric NAME]
    python eval/compare.py A B --model "BrainLM before=BrainLM after"

A and B are folders or URLs that eval/run.py wrote, on the same data. Prints what differs between the runs, and B - A of
each task's first metric with 95 % intervals, paired by what is resampled; the JSON file holds every metric. Exit code 0
when the comparison was made.
"""

from __future__ import annotations

import argparse
import logging
import sys

from brainlm.errors import BrainLMError
from brainlm.store import Store
from eval.compared_scores import compare_folders
from eval.comparison_text import comparison_text
from eval.results_folder import read_results_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="results folder or URL")
    parser.add_argument("b", metavar="B", help="results folder or URL; differences are B - A")
    parser.add_argument("--out", default="", metavar="PATH", help="JSON file to write, a path or URL")
    parser.add_argument("--task", default="", metavar="NAME", help="compare this task alone")
    parser.add_argument("--metric", default="", metavar="NAME", help="show this metric instead of each task's first")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME_IN_A=NAME_IN_B", help="models to pair; may be repeated"
    )
    parser.add_argument("--other-data", action="store_true", help="accept folders of other data or another split")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        a, b = read_results_folder(args.a), read_results_folder(args.b)
        comparison = compare_folders(a, b, args.model, args.task, args.other_data)
        print(comparison_text(comparison, args.metric))
        if args.out:
            folder, slash, name = args.out.rpartition("/")
            Store(folder + slash if slash else ".").write_json(name, comparison.to_json())
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
