"""Which small model, trained how, learns most from real recordings in the same processor time.

    python benchmarks/recipes.py --dataset runs/abide/dataset --out runs/abide/recipes [--minutes 3] [--only base wide]

Each recipe changes one thing of `train/configs/abide.yaml`. Its number of steps is what `--minutes` of one core hold:
the processor time of a step is measured for all recipes in turns first (median), so that other work on the machine
changes no recipe's share. Every recipe is one ordinary run of `train/pretrain.py`, in float32 on one thread, with its
own cosine to zero; then `eval/run.py` scores the validation split. The winner has the highest mean of R2 (primary:
units of each recording's and parcel's SD) at 20, 50 and 75 % hidden there. Nothing of the test split is read.

The same command goes on after an interruption. `recipes.json` and `recipes.png` (validation R2 at 75 % hidden, on
17 windows, against minutes) are written to `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from brainlm.config import load_config
from brainlm.dataset import open_dataset
from brainlm.loader import WindowLoader
from brainlm.model import BrainLM
from brainlm.store import Store
from eval.results import read_scores
from train.param_groups import param_groups
from train.settings import PretrainSettings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "train/configs/abide.yaml"
RATIOS = (0.2, 0.5, 0.75)
RECIPES: dict[str, tuple[str, ...]] = {
    "base": (),
    "lr 2e-3": ("optimizer.lr=2e-3",),
    "lr 8e-3": ("optimizer.lr=8e-3",),
    "batch 8": ("data.batch_size=8",),
    "batch 2": ("data.batch_size=2",),
    "wide": ("model.width=128", "model.decoder_width=128", "model.mlp_width=256", "model.decoder_mlp_width=256"),
    "2 + 1 layers": ("model.depth=2",),
    "2 + 2 layers": ("model.depth=2", "model.decoder_depth=2"),
    "full decoder": ("model.decoder=full",),
    "decode 250": ("masks.num_decoded=250",),
    "decode all": ("masks.num_decoded=null",),
    "ratio 0.75 alone": ("masks.ratios=[0.75]",),
    "ratio 0.5 alone": ("masks.ratios=[0.5]",),
    "patches of 10": ("model.patch_len=10",),
    "2 heads": ("model.num_heads=2", "model.decoder_num_heads=2"),
}


def settings_of(recipe: str, dataset: str, out: Path, steps: int) -> tuple[list[str], PretrainSettings]:
    """Return a recipe's overrides of the config, and what they resolve to."""
    overrides = [
        f"data.dataset={dataset}", f"run.out={out}", f"run.steps={steps}", "engine.precision=fp32", "engine.threads=1",
        f"validation.every={max(steps // 12, 1)}", f"run.log_every={max(steps // 12, 1)}",
        *RECIPES[recipe],
    ]  # fmt: skip
    return overrides, load_config(PretrainSettings, str(CONFIG), overrides)


class Step:
    """A recipe's training step, repeated on its first batches for timing."""

    def __init__(self, settings: PretrainSettings) -> None:
        dataset = open_dataset(settings.data.datasets[0])
        config = settings.model.resolved
        torch.manual_seed(0)
        self.model = BrainLM(config, dataset.contract.with_windows(config.window_len, config.patch_len))
        self.optimizer = torch.optim.AdamW(param_groups(self.model, settings.optimizer.weight_decay), lr=1e-4)
        self.loader = WindowLoader(
            dataset.split("train"), self.model.contract, settings.masks, batch_size=settings.data.batch_size,
            windows_per_recording=settings.data.windows_per_recording, seed=0,
        )  # fmt: skip

    def cpu_s(self, step: int) -> float:
        """Return the processor time of one step, data included."""
        started = time.process_time()
        (batch,) = self.loader.batches_at(step)
        loss = self.model(batch.windows, batch.mask, batch.present, batch.ids_decoded, None)
        (loss.sum / batch.num_scored_values).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def measure_steps(recipes: list[str], dataset: str, repeats: int = 12) -> dict[str, float]:
    """Return each recipe's median processor time of a step, taken in turns."""
    torch.set_num_threads(1)
    steps = {recipe: Step(settings_of(recipe, dataset, Path("unused"), 1000)[1]) for recipe in recipes}
    times: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for repeat in range(repeats + 2):
        for recipe, step in steps.items():
            seconds = step.cpu_s(repeat)
            if repeat >= 2:  # the first ones allocate
                times[recipe].append(seconds)
    return {recipe: statistics.median(values) for recipe, values in times.items()}


def train_and_score(recipe: str, dataset: str, out: Path, steps: int) -> dict[str, Any]:
    """Run one recipe, or what is left of it, and return its validation scores and curve."""
    folder = out / recipe.replace(" ", "_").replace("+", "and")
    overrides, _ = settings_of(recipe, dataset, folder, steps)
    run_program("train/pretrain.py", CONFIG, overrides)
    results = folder / "validation"
    run_program(
        "eval/run.py", ROOT / "eval/configs/abide.yaml",
        [f"dataset={dataset}", f"checkpoints=[{folder}]", f"out={results}", "split=val", "tasks=[reconstruction]",
         "include_untrained=false", "report=false", "ray.workers=0", f"reconstruction.mask_ratios={list(RATIOS)}",
         "reconstruction.own_weights=[]", "reconstruction.reference=gaussian", "reconstruction.centrings=[recording]"],
    )  # fmt: skip
    scores = [
        s for s in read_scores(Store(str(results))) if s.metric == "r2" and s.condition["centring"] == "recording"
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "recipe": recipe,
        "changes": RECIPES[recipe],
        "steps": steps,
        "num_parameters": manifest["num_parameters"],
        "git_commit": manifest["git_commit"],
        "curve": [(line["step"], line["val_r2"]) for line in lines if "val_r2" in line],
        "val": {str(s.condition["mask_ratio"]): s.value for s in scores if s.model_kind == "brainlm"},
        "baselines": {
            f"{s.model} {s.condition['mask_ratio']}": s.value for s in scores if s.model_kind == "baseline"
        },
    }  # fmt: skip


def run_program(program: str, config: Path, overrides: list[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / program), "--config", str(config), *overrides], check=True, cwd=ROOT)


def draw(records: list[dict[str, Any]], step_s: dict[str, float], path: Path) -> None:
    """Draw validation R2 against minutes of one core."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, record in enumerate(records):
        steps, r2 = zip(*record["curve"], strict=True)
        minutes = [step * step_s[record["recipe"]] / 60 for step in steps]
        axes.plot(minutes, r2, label=record["recipe"], linestyle=("-", "--", ":")[number // 10])
    axes.set_xlabel("minutes of one core")
    axes.set_ylabel("validation R2, 75 % hidden")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="runs/abide/dataset")
    parser.add_argument("--out", type=Path, default=Path("runs/abide/recipes"))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    timed = args.out / "step_seconds.json"  # kept, so that a run that goes on has the same numbers of steps
    step_s: dict[str, float] = json.loads(timed.read_text()) if timed.exists() else {}
    if missing := [recipe for recipe in args.only if recipe not in step_s]:
        step_s |= measure_steps(missing, args.dataset)
        timed.write_text(json.dumps(step_s, indent=1))
    records = []
    for recipe in args.only:
        steps = round(60 * args.minutes / step_s[recipe])
        records.append(train_and_score(recipe, args.dataset, args.out.resolve(), steps))
        (args.out / "recipes.json").write_text(json.dumps(records, indent=1))
    draw(records, step_s, args.out / "recipes.png")
    print(f"{'recipe':18} {'parameters':>10} {'ms a step':>9} {'steps':>6}   R2 at 20 %   50 %    75 %    mean")
    for record in sorted(records, key=lambda r: -statistics.mean(r["val"][str(q)] for q in RATIOS)):
        scores = [record["val"][str(q)] for q in RATIOS]
        shown = "   ".join(f"{value:.3f}" for value in (*scores, statistics.mean(scores)))
        name, milliseconds = record["recipe"], 1000 * step_s[record["recipe"]]
        print(f"{name:18} {record['num_parameters']:10,} {milliseconds:9.0f} {record['steps']:6}        {shown}")
    for name, value in records[0]["baselines"].items():
        print(f"{name:30} {value:.3f}")


if __name__ == "__main__":
    main()
