"""Continuing a model on one's own cohort, beside training from scratch, at equal steps.

    python benchmarks/init_from.py --table ../shared/data/abide_cc200/participants.tsv --out runs/abide/init_from
        [--steps 800] [--seeds 0 1 2]

The recordings of one site (`--cohort`, a prefix: Leuven) are the user's cohort, those of all others what the first
model is pretrained on. The cohort is prepared with the contract of the others, in the split that its subjects' hashes
give. On it are trained, with the settings of `train/configs/abide.yaml` and the same batches: `scratch`, fresh weights;
`init_from`, the first model's weights, with the same learning rate and with a quarter of it. Printed is the R2 of
validation subjects at 75 % hidden (their own SD as unit), the median over seeds (of fresh weights and batches).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 100
WAYS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "init_from": ("init",),
    "init_from, lr 1e-3": ("init", "optimizer.lr=1e-3"),
}


def run_program(program: str, config: str, *overrides: str) -> None:
    command = [sys.executable, str(ROOT / program), "--config", str(ROOT / config), *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def divide(table: Path, cohort: str, out: Path) -> tuple[Path, Path]:
    """Write the rows of the cohort, and all others, as tables of their own beside links to the series."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    paths = []
    for name, wanted in (("others", False), ("cohort", True)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for entry in table.parent.iterdir():
            link = folder / entry.name
            if entry.name != table.name and not link.exists():
                link.symlink_to(entry.resolve())
        chosen = [row for row in rows if row["site"].startswith(cohort) == wanted]
        with (folder / table.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(chosen)
        paths.append(folder / table.name)
    return paths[0], paths[1]


def curve(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_r2"] for line in lines if "val_r2" in line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--cohort", default="Leuven")
    parser.add_argument("--out", type=Path, default=Path("runs/abide/init_from"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--first-steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out = args.out.resolve()
    others, cohort = divide(args.table.resolve(), args.cohort, out / "tables")
    prepare, train = "data_prep/configs/abide_cc200.yaml", "train/configs/abide.yaml"
    run_program("data_prep/prepare.py", prepare, "name=others", f"out={out}/others", f"source.path={others}")
    same = f"contract={out}/others"
    run_program("data_prep/prepare.py", prepare, "name=cohort", f"out={out}/cohort", f"source.path={cohort}", same)
    run_program(
        "train/pretrain.py", train, f"data.dataset={out}/others", f"run.out={out}/first",
        f"run.steps={args.first_steps}", "engine.precision=fp32",
    )  # fmt: skip
    first = json.loads((out / "first" / "done.json").read_text())["checkpoint"]

    found: dict[str, list[dict[int, float]]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        for number, (way, options) in enumerate(WAYS.items()):
            folder = out / f"way{number}-seed{seed}"
            overrides = [f"init_from={first}" if option == "init" else option for option in options]
            config = ROOT / train
            if "init" in options:  # the sizes are the checkpoint's
                config = out / "without_model.yaml"
                lines = (ROOT / train).read_text().splitlines()
                config.write_text("\n".join(line for line in lines if not line.startswith("model:")))
            run_program(
                "train/pretrain.py", str(config), f"data.dataset={out}/cohort", f"run.out={folder}",
                f"run.steps={args.steps}", f"run.seed={seed}", f"validation.every={EVERY}", "engine.precision=fp32",
                *overrides,
            )  # fmt: skip
            found[way].append(curve(folder))
    print(f"{'steps':>6} " + " ".join(f"{way:>20}" for way in WAYS))
    for step in found["scratch"][0]:
        cells = (statistics.median(curve[step] for curve in found[way]) for way in WAYS)
        print(f"{step:6} " + " ".join(f"{value:20.3f}" for value in cells))


if __name__ == "__main__":
    main()
