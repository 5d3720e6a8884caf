"""Write a simulated cohort with known truth, as fMRIPrep would have left it.

    python data_prep/simulate.py --config data_prep/configs/demo_cohort.yaml [section.key=value ...]

The folder is a BIDS derivatives data set that ``data_prep/prepare.py`` reads like any other:

    <out>/dataset_description.json  participants.tsv  participants.json
          atlas/sim424_dseg.nii.gz  atlas/sim424_dseg.tsv      labels; index, name, hemisphere, coordinates, network
          sub-001/func/sub-001_task-rest_space-MNI152NLin2009aSym_res-4_desc-preproc_bold.nii.gz and .json
                       sub-001_task-rest_desc-confounds_timeseries.tsv
                       sub-001_task-checkerboard_events.tsv    where there is a task
          truth/state_space.npz  truth/truth.json              read with brainlm.state_space.load_truth
          simulation.json                                      written last: settings, seed, versions

A run that was stopped is completed by the same command. A folder with other settings is never touched.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import brainlm
from brainlm.config import load_config, parse_entry_args, to_tree, to_yaml
from brainlm.errors import BrainLMError, ConfigError, StoreError
from data_prep.simulated_atlas import SPACE
from data_prep.simulated_cohort import CohortPlan, PlannedRecording, SimulateConfig, plan_cohort
from data_prep.simulated_images import atlas_bytes, image_stem, json_bytes, write_atomically, write_recording

LOGGER = logging.getLogger(__name__)

DONE_FILE = "simulation.json"
STARTED_FILE = ".simulation_started.json"
# Settings that do not change what is written.
FREE_SETTINGS = ("out", "num_workers")
PARTICIPANT_COLUMNS = {
    "age": {"Description": "Age", "Units": "years"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Scanner; each has its own gain and offset"},
    "severity": {"Description": "Symptom score of a simulated questionnaire, 0 to 80"},
    "family_id": {"Description": "Subjects with the same value are siblings"},
}


def main(argv: list[str] | None = None) -> int:
    """Write the cohort that the settings describe; return 0 when all of it is there."""
    args = parse_entry_args(__doc__ or "", argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        config = load_config(SimulateConfig, args.config, args.overrides)
        if args.dry_run:
            describe(config)
        else:
            write_cohort(config)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrainLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe(config: SimulateConfig) -> None:
    """Print the resolved settings and what would be written."""
    num = config.cohort.num_subjects + config.cohort.num_task_subjects
    acquisition = config.acquisition
    # 1.8 million mm^3 of brain; compressed, a brain voxel takes about this many bytes.
    num_voxels = 1.8e6 / config.atlas.resolution_mm**3
    bytes_per_voxel = 1.2 if acquisition.data_type == "int16" else 3.6
    size = num * num_voxels * bytes_per_voxel * (acquisition.fewest_timepoints + acquisition.most_timepoints) / 2
    print(to_yaml(config), end="")
    print(f"# {num} recordings of {config.cohort.num_subjects} subjects, about {size / 1e6:.0f} MB, to {config.out}")


def write_cohort(config: SimulateConfig) -> None:
    """Write the cohort, or what is missing of it.

    Raises
    ------
    ConfigError
        If the folder holds a cohort with other settings, or something that is not a cohort.
    StoreError
        If a file cannot be written.
    """
    out = Path(config.out)
    try:
        if not _may_write(config, out):
            LOGGER.info("already there: %s", out)
            return
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / STARTED_FILE, json_bytes({"config": _identity(config)}))
        (out / DONE_FILE).unlink(missing_ok=True)
        plan = plan_cohort(config)
        _write_tables(plan, out)
        missing = [item for item in plan.recordings if not _is_there(item.recording_id, config, out)]
        num_there = len(plan.recordings) - len(missing)
        for _ in _with_progress(_write_recordings(plan, missing, out), num_there, len(plan.recordings)):
            pass
        write_atomically(out / DONE_FILE, json_bytes(_completion(plan)))
        (out / STARTED_FILE).unlink()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot write the simulated cohort to {out}: {error}") from error
    LOGGER.info("wrote %d recordings of %d subjects to %s", len(plan.recordings), len(plan.subjects), out)


def _may_write(config: SimulateConfig, out: Path) -> bool:
    """Return whether there is something left to write; raise if the folder belongs to something else."""
    for name in (DONE_FILE, STARTED_FILE):
        if not (out / name).exists():
            continue
        try:
            marker = json.loads((out / name).read_text())
            found, recordings = marker["config"], marker.get("recordings", [])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{out / name} cannot be read: remove the folder or choose another one") from error
        differences = _differences(found, _identity(config))
        if differences:
            raise ConfigError(
                f"{out} holds a cohort simulated with other settings: choose another folder (out=...) or remove it. "
                f"It has, and the settings say: {'; '.join(differences)}"
            )
        return name == STARTED_FILE or not all(_is_there(item, config, out) for item in recordings)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no simulated cohort: choose another folder (out=...)")
    return True


def _is_there(recording_id: str, config: SimulateConfig, out: Path) -> bool:
    return (out / f"{image_stem(recording_id, config.atlas.resolution_mm)}.nii.gz").exists()


def _identity(config: SimulateConfig) -> dict[str, Any]:
    return {name: value for name, value in to_tree(config).items() if name not in FREE_SETTINGS}


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for name in sorted(found.keys() | wanted.keys())
            for line in _differences(found.get(name), wanted.get(name), f"{path}.{name}" if path else name)
        ]
    return [] if found == wanted else [f"{path} {found!r}, {wanted!r}"]


def _write_tables(plan: CohortPlan, out: Path) -> None:
    """Write everything but the recordings; cheap, so a completed run writes it again."""
    stem = f"sim{plan.atlas.num_parcels}_dseg"
    write_atomically(out / "atlas" / f"{stem}.nii.gz", atlas_bytes(plan.atlas))
    write_atomically(out / "atlas" / f"{stem}.tsv", plan.atlas.table().encode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, facts=np.array(json.dumps(plan.truth.facts)), **plan.truth.arrays)
    write_atomically(out / "truth" / "state_space.npz", buffer.getvalue())
    write_atomically(out / "truth" / "truth.json", json_bytes(plan.truth.facts))
    rows = [subject.row() for subject in plan.subjects]
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    write_atomically(out / "participants.tsv", ("\n".join(lines) + "\n").encode())
    write_atomically(out / "participants.json", json_bytes(PARTICIPANT_COLUMNS))
    description = {
        "Name": "Simulated cohort with known truth (no real person was measured)",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "BrainLM data_prep/simulate.py",
                "Version": brainlm.__version__,
                "Description": f"Linear-Gaussian simulation painted into {SPACE}; the truth is in truth/.",
            }
        ],
    }
    write_atomically(out / "dataset_description.json", json_bytes(description))


def _completion(plan: CohortPlan) -> dict[str, Any]:
    packages = {name: version(name) for name in ("numpy", "scipy", "nibabel", "nilearn")}
    return {
        "config": _identity(plan.config),
        "seed": plan.config.seed,
        "recordings": [item.recording_id for item in plan.recordings],
        "versions": {"brainlm": brainlm.__version__, "python": platform.python_version(), **packages},
    }


def _write_recordings(plan: CohortPlan, recordings: list[PlannedRecording], out: Path) -> Iterator[str]:
    """Write recordings, in this process or in several; yield each id when it is done."""
    num_workers = min(plan.config.num_workers or os.cpu_count() or 1, len(recordings))
    if num_workers <= 1:
        for recording in recordings:
            write_recording(plan, recording, out)
            yield recording.recording_id
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(plan, out)) as pool:
        futures = {pool.submit(_write_one, index): recording for index, recording in _indexed(plan, recordings)}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future].recording_id
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _indexed(plan: CohortPlan, recordings: list[PlannedRecording]) -> Iterator[tuple[int, PlannedRecording]]:
    wanted = {item.recording_id for item in recordings}
    return ((index, item) for index, item in enumerate(plan.recordings) if item.recording_id in wanted)


# What a worker process works on, set once when it starts.
_worker_job: list[tuple[CohortPlan, Path]] = []


def _start_worker(plan: CohortPlan, out: Path) -> None:
    _worker_job[:] = [(plan, out)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, killed ones included."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_one(index: int) -> None:
    plan, out = _worker_job[0]
    write_recording(plan, plan.recordings[index], out)


def _with_progress(done: Iterator[str], num_done: int, num_total: int) -> Iterator[str]:
    """Show a bar on a terminal and about ten plain lines elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(done, initial=num_done, total=num_total, unit="recording")
        return
    every = max(1, num_total // 10)
    for recording_id in done:
        num_done += 1
        if num_done % every == 0 or num_done == num_total:
            LOGGER.info("%d/%d recordings", num_done, num_total)
        yield recording_id


if __name__ == "__main__":
    sys.exit(main())
