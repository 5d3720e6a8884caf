"""What a results folder holds besides scores: run.json, examples, per-parcel and per-step tables."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainlm.atlas import Atlas
from brainlm.config import to_tree
from brainlm.intervals import bootstrap_counts, bootstrap_interval, metric_value
from brainlm.significance import holm, paired_p_value
from brainlm.store import Store
from eval.cohort import FloatArray
from eval.make_scores import unit_sums
from eval.models import MethodSpec
from eval.planning import Plan
from eval.scoring import r2
from eval.settings import IntervalsSettings
from eval.task import UnitOutput, to_npz, to_parquet

Outputs = Sequence[tuple[MethodSpec, UnitOutput]]
NUM_PICKED = 6
PACKAGES = ("brainlm", "torch", "numpy", "pandas", "scipy", "scikit-learn", "ray")


def write_parcels(store: Store, outputs: Outputs, atlas: Atlas) -> None:
    """Write ``parcels.parquet``: primary R2 of each parcel, model and mask ratio, over all recordings."""
    frames = []
    for spec, output in outputs:
        if output.parcels is None:
            continue
        table = output.parcels[output.parcels["n"] > 0]
        column = table["parcel"].to_numpy()
        coords = atlas.coords_mm[column]
        frames.append(
            pd.DataFrame(
                {
                    "parcel": [atlas.parcel_names[i] for i in column],
                    "column": column,
                    "x_mm": coords[:, 0],
                    "y_mm": coords[:, 1],
                    "z_mm": coords[:, 2],
                    "network": [atlas.networks[i] if atlas.networks else "" for i in column],
                    "model": spec.name,
                    "mask_ratio": table["mask_ratio"].to_numpy(),
                    "r2": (1 - table["sse"] / table["sst"]).to_numpy(),
                }
            )
        )
    if frames:
        store.write_bytes("parcels.parquet", to_parquet(pd.concat(frames, ignore_index=True)))


def write_forecast_curves(store: Store, outputs: Outputs, intervals: IntervalsSettings, reference: str) -> None:
    """Write ``forecast_curves.parquet``: primary R2 at each step ahead, with its interval.

    Columns ``difference``, ``p_value`` and ``p_corrected`` compare with the baseline `reference` on the same subjects;
    corrected is for all models and steps of a horizon (Holm).
    """
    steps: dict[tuple[str, int, int], pd.DataFrame] = {}
    for spec, output in outputs:
        for key, part in output.table.groupby(["horizon", "step"], sort=True):
            horizon, step = (int(str(number)) for number in key)
            steps[spec.name, horizon, step] = unit_sums(part.drop(columns=["horizon", "step"]), "group")[["sse", "sst"]]
    rows: list[dict[str, Any]] = []
    for (model, horizon, step), frame in steps.items():
        sums = _arrays(frame)
        low, high = bootstrap_interval(
            sums, r2, bootstrap_counts(len(frame), intervals.num_bootstrap, intervals.seed), intervals.level
        )
        row: dict[str, Any] = {"model": model, "horizon": horizon, "step": step, "r2": metric_value(sums, r2)}
        row |= {"ci_low": low, "ci_high": high, "reference": reference}
        row |= {"difference": np.nan, "p_value": np.nan, "p_corrected": np.nan}
        base = steps.get((reference, horizon, step))
        if base is not None and model != reference and list(base.index) == list(frame.index):
            row["difference"] = row["r2"] - metric_value(_arrays(base), r2)
            row["p_value"] = paired_p_value(sums, _arrays(base), r2, intervals.num_exchanges, intervals.seed)
        rows.append(row)
    for horizon in {row["horizon"] for row in rows}:
        tested = [row for row in rows if row["horizon"] == horizon and np.isfinite(row["p_value"])]
        for row, corrected in zip(tested, holm([row["p_value"] for row in tested])):
            row["p_corrected"] = corrected
    store.write_bytes("forecast_curves.parquet", to_parquet(pd.DataFrame(rows)))


def _arrays(frame: pd.DataFrame) -> dict[str, FloatArray]:
    return {str(name): frame[name].to_numpy(np.float64) for name in frame.columns}


def write_examples(store: Store, outputs: Outputs, plan: Plan) -> None:
    """Write ``examples.npz``: a few windows, what was hidden, and what each method put there.

    ``truth_z`` (n, P, W) and ``prediction_<model>`` (n, P, W) in units of each recording's and parcel's standard
    deviation (NaN = missing parcel, or not hidden), ``mask`` (n, L), ``parcels`` columns worth showing, ``names``
    of all parcels, ``models``, ``tr_s``, ``mask_ratio``.
    """
    with_examples = [(spec, output.examples) for spec, output in outputs if len(output.examples)]
    if not with_examples:
        return
    first = with_examples[0][1]
    atlas = plan.dataset.contract.atlas
    arrays: dict[str, Any] = {name: first[name] for name in ("truth_z", "mask", "mask_ratio")}
    hidden = first["mask"][0].reshape(atlas.num_parcels, -1)
    scored = np.isfinite(first["truth_z"][0]).all(axis=1)
    good = np.flatnonzero(scored & hidden.any(axis=1) & ~hidden.all(axis=1))
    good = good if len(good) else np.flatnonzero(scored)
    arrays["parcels"] = good[np.unique(np.linspace(0, len(good) - 1, min(NUM_PICKED, len(good))).astype(int))]
    arrays["names"] = np.array(atlas.parcel_names)
    arrays["models"] = np.array([spec.name for spec, _ in with_examples])
    arrays["tr_s"] = np.array(plan.dataset.contract.tr_s)
    for spec, examples in with_examples:
        arrays[f"prediction_{spec.name}"] = examples["prediction"]
    store.write_bytes("examples.npz", to_npz(arrays))


def write_run(store: Store, plan: Plan, seconds: dict[str, float], command: Sequence[str], started: str) -> None:
    """Write ``run.json``: settings, data, checkpoints, versions, durations."""
    manifest, contract = plan.dataset.manifest, plan.dataset.contract
    counts = {split: len(plan.dataset.split(split)) for split in ("train", "val", "test")}
    store.write_json(
        "run.json",
        {
            "config": to_tree(plan.settings),
            "dataset": {
                "name": plan.dataset.name,
                "content_hash": plan.dataset.content_hash,
                "counts": manifest.get("counts", counts),
                "num_recordings": counts,
                "atlas": {
                    "name": contract.atlas.name,
                    "sha256": contract.atlas.sha256,
                    "num_parcels": contract.atlas.num_parcels,
                    "num_usable_parcels": sum(plan.usable),
                },
                "tr_s": contract.tr_s,
                "high_pass_hz": contract.high_pass_hz,
                "low_pass_hz": contract.low_pass_hz,
                "units": contract.units,
                "centring": contract.centring,
                "cleaning": contract.cleaning,
                "flags": list(contract.flags),
                "warnings": list(manifest.get("warnings", [])),
            },
            "checkpoints": [
                {
                    "name": info.name,
                    "path": info.folder,
                    "weights_sha256": info.weights_sha256,
                    "num_parameters": info.num_parameters,
                    "config": info.config,
                    "manifest": info.manifest,
                    "statistics_from": info.contract.statistics_from,
                    "num_seen_subjects": info.num_seen_subjects,
                }
                for info in plan.checkpoints
            ],
            "units": [
                {**dataclasses.asdict(unit.spec), "task": unit.task, "file": f"{unit.stem}.parquet"}
                for unit in plan.units
            ],
            "skipped_tasks": dict(plan.skipped),
            "warnings": list(plan.warnings),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "git": git_state(),
            "started": started,
            "seconds": seconds,
            "command": list(command),
        },
    )


def git_state() -> dict[str, Any] | None:
    """Return commit and whether files differ from it, None outside a repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    return ["python", *sys.argv]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
