"""How near do forecasting baselines come to the best possible forecast, on a linear system whose optimum is known?

    python benchmarks/forecasters.py [--subjects 100] [--parcels 60] [--horizon 20] [--steps 400] [--json PATH]

A stable linear system with private noise is simulated (networks of parcels, each driven by an autoregressive state);
forecasters are trained on some subjects, tuned on others and scored on the rest, as `eval/run.py` does. The optimum is
the Kalman filter of the system itself. It knows the mean of the process, which nobody else does: the forecasters are
compared with `optimum, mean unknown`, which is given what they are given.

Records: {method, r2, below_optimum, seconds}.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainlm.fitting import FitSettings
from brainlm.testing import write_synthetic_dataset
from eval.baselines.forecasters import MAKERS, ForecasterSettings
from eval.baselines.optimum import MEAN_UNKNOWN
from eval.cohort import Cohort
from eval.make_scores import sums_by_condition
from eval.task import Runtime
from eval.tasks.forecasting import Forecasting, ForecastingSettings

WINDOW_LEN, PATCH_LEN = 200, 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=100, help="to train on; a fifth tunes, two fifths are scored")
    parser.add_argument("--parcels", type=int, default=60)
    parser.add_argument("--horizon", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", default=",".join(MAKERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cohort = Cohort.of(
            write_synthetic_dataset(
                f"{folder}/dataset",
                num_subjects={"train": args.subjects, "val": args.subjects // 5, "test": args.subjects * 2 // 5},
                num_timepoints=2 * WINDOW_LEN,
                window_len=WINDOW_LEN,
                patch_len=PATCH_LEN,
                num_parcels=args.parcels,
                num_networks=7,
                with_truth=True,
            )
        )
        settings = ForecastingSettings(
            horizons=(args.horizon,),
            max_windows_per_recording=2,
            baselines=tuple(args.methods.split(",")),
            forecasters=ForecasterSettings(fit=FitSettings(steps=args.steps)),
        )
        task = Forecasting(settings)
        records: list[dict[str, Any]] = []
        for spec in task.baselines(cohort):
            begin = time.perf_counter()
            (sums,) = sums_by_condition(task, task.compute(spec, cohort, Runtime()).table).values()
            records.append({"method": spec.name, "r2": sums.value(), "seconds": time.perf_counter() - begin})
            print(f"{spec.name:20s} {sums.value():8.4f} {records[-1]['seconds']:8.1f} s", flush=True)
    best = next(record["r2"] for record in records if record["method"] == MEAN_UNKNOWN)
    records = [record | {"below_optimum": best - record["r2"]} for record in records]
    print(f"\n{'method':22s} {'r2':>8s} {'below the optimum':>18s}")
    for record in records:
        print(f"{record['method']:22s} {record['r2']:8.4f} {record['below_optimum']:18.4f}")
    if args.json:
        args.json.write_text(json.dumps(records, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
