"""Largest memory of a worker that prepares the longest recordings that are accepted.

    python benchmarks/prepare_memory.py [--cases npy csv ...] [--json PATH]

Each case is two equal recordings at the limit (`MAX_VALUES` numbers, or the most volumes of an image), before and after
resampling, prepared by `data_prep/prepare.py` itself on a private Ray with one worker at a time, as users run it. What
is asked for costs the most that settings can: 24 confounds out of a table near the limit of its size, a band-pass, as
many censored timepoints as a filter takes (`MAX_CENSORED`), resampling. Reported is the largest resident memory (VmHWM)
of any of Ray's workers, from start to end of the program: interpreter, libraries, mapped files and the later stages
included.

Cases: `npy`, `npy-float64`; `csv` (a row a timepoint); `csv-quoted`, which only the slow reader can read; `csv.gz` (a
row a parcel, as UK Biobank releases them); `ptseries`, `dtseries` (CIFTI, four grayordinates a parcel); `nii.gz`, a
2 mm image that repeats 50 volumes, as gzip members one after the other: the file is small, what is read is not.

Labels are those of `benchmarks/parcellate.py`. Records: {case, method, seconds, peak_mb}.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.parcellate import AFFINE, SHAPE, write_labels
from data_prep.clean import MAX_CENSORED
from data_prep.confounds import EXPANSIONS, MAX_TABLE_BYTES, MOTION_COLUMNS
from data_prep.nifti_stream import MAX_TIMEPOINTS as MAX_VOLUMES
from data_prep.text_series import MAX_VALUES

PREPARE = Path(__file__).parents[1] / "data_prep" / "prepare.py"
NUM_PARCELS, TR_S, NEAR_TR_S = 424, 0.735, 0.736  # resampled to nearly as many timepoints
NUM_TIMEPOINTS = MAX_VALUES // NUM_PARCELS - 1  # in text, the column of names counts too
VERTICES_A_PARCEL = 4
VOLUMES_A_MEMBER = 50
NUM_RECORDINGS = 2
POLL_S = 0.05
LEFT = "CIFTI_STRUCTURE_CORTEX_LEFT"

Series = NDArray[np.float32]


# --- recordings: write the file of a case and return it ---


def npy(folder: Path, bold: Series) -> Path:
    np.save(folder / "bold.npy", bold)
    return folder / "bold.npy"


def npy_float64(folder: Path, bold: Series) -> Path:
    np.save(folder / "bold.npy", bold.astype(np.float64))
    return folder / "bold.npy"


def csv(folder: Path, bold: Series) -> Path:
    with (folder / "bold.csv").open("w") as file:
        file.writelines(",".join(map("{:.9g}".format, row.tolist())) + "\n" for row in bold)
    return folder / "bold.csv"


def csv_quoted(folder: Path, bold: Series) -> Path:
    with (folder / "bold.csv").open("w") as file:
        file.writelines(",".join(map('"{:.6g}"'.format, row.tolist())) + "\n" for row in bold)
    return folder / "bold.csv"


def csv_gz(folder: Path, bold: Series) -> Path:
    with gzip.open(folder / "bold.csv.gz", "wt", compresslevel=1) as file:
        file.write("label_name," + ",".join(f"timepoint_{k}" for k in range(len(bold))) + "\n")
        names = _parcel_names()
        file.writelines(f"{name}," + ",".join(map("{:.9g}".format, bold[:, k].tolist())) + "\n" for k, name in names)
    return folder / "bold.csv.gz"


def ptseries(folder: Path, bold: Series) -> Path:
    import nibabel
    from nibabel.cifti2 import Cifti2Image, ParcelsAxis, SeriesAxis

    vertices = [{LEFT: np.arange(k, k + 1)} for k in range(NUM_PARCELS)]
    voxels = [np.zeros((0, 3), dtype=int)] * NUM_PARCELS
    axis = ParcelsAxis([name for _, name in _parcel_names()], voxels, vertices, nvertices={LEFT: NUM_PARCELS})
    image = Cifti2Image(bold, (SeriesAxis(0, TR_S, len(bold), "SECOND"), axis))
    nibabel.save(image, folder / "bold.ptseries.nii")
    return folder / "bold.ptseries.nii"


def dtseries(folder: Path, bold: Series) -> Path:
    import nibabel
    from nibabel.cifti2 import Cifti2Image, SeriesAxis

    values = np.repeat(bold, VERTICES_A_PARCEL, axis=1)
    image = Cifti2Image(values, (SeriesAxis(0, TR_S, len(bold), "SECOND"), _surface()))
    image.nifti_header.set_data_dtype(np.float32)
    nibabel.save(image, folder / "bold.dtseries.nii")
    return folder / "bold.dtseries.nii"


def nii_gz(folder: Path, bold: Series) -> Path:
    import nibabel

    labels = np.asarray(nibabel.load(folder / "labels.nii.gz").dataobj).astype(np.int64)
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*SHAPE, len(bold)))
    header.set_sform(AFFINE, code=4)
    header.set_xyzt_units("mm", "sec")
    header["pixdim"][4], header["magic"], header["vox_offset"] = TR_S, b"n+1", 352
    volumes = b""
    for row in bold[:VOLUMES_A_MEMBER]:
        volumes += np.append(0, np.round(row)).astype(np.int16)[labels].tobytes(order="F")
    member = gzip.compress(volumes, 6)
    with (folder / "bold.nii.gz").open("wb") as file:
        file.write(gzip.compress(header.binaryblock + bytes(4)))
        for _ in range(len(bold) // VOLUMES_A_MEMBER):
            file.write(member)
    return folder / "bold.nii.gz"


CASES: dict[str, Callable[[Path, Series], Path]] = {
    "npy": npy, "npy-float64": npy_float64, "csv": csv, "csv-quoted": csv_quoted, "csv.gz": csv_gz,
    "ptseries": ptseries, "dtseries": dtseries, "nii.gz": nii_gz,
}  # fmt: skip


def _parcel_names() -> list[tuple[int, str]]:
    return [(k, f"parcel{k + 1}") for k in range(NUM_PARCELS)]


def _surface() -> Any:
    from nibabel.cifti2 import BrainModelAxis

    num_vertices = NUM_PARCELS * VERTICES_A_PARCEL
    return BrainModelAxis.from_surface(np.arange(num_vertices), num_vertices, LEFT)


# --- what is prepared with it ---


def write_atlas(folder: Path, case: str) -> Path:
    import nibabel
    from nibabel.cifti2 import Cifti2Image, LabelAxis

    coords = ("", "") if case != "dtseries" else ("\tx_mm\ty_mm\tz_mm", "\t-1\t2\t3")
    rows = "".join(f"{k + 1}\t{name}{coords[1]}\n" for k, name in _parcel_names())
    (folder / "labels.tsv").write_text(f"index\tname{coords[0]}\n{rows}")
    if case != "dtseries":
        image: Any = nibabel.load(write_labels(folder))
        volume = np.asarray(image.dataobj)
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.int16), image.affine), folder / "labels.nii.gz")
        return folder / "labels.nii.gz"
    table = {k: (f"parcel{k}" if k else "???", (0, 0, 0, 0)) for k in range(NUM_PARCELS + 1)}
    data = np.repeat(np.arange(1, NUM_PARCELS + 1), VERTICES_A_PARCEL).astype(np.float32)[None]
    nibabel.save(Cifti2Image(data, (LabelAxis(["map"], [table]), _surface())), folder / "atlas.dlabel.nii")
    return folder / "atlas.dlabel.nii"


def write_confounds(path: Path, num_timepoints: int, rng: np.random.Generator) -> None:
    """Write a table near the limit of its size, which censors as many timepoints as a filter takes."""
    names = ["framewise_displacement", "std_dvars"]
    names += [name + suffix for suffix in EXPANSIONS for name in MOTION_COLUMNS]
    width = len(" 0.12345678")
    num_columns = min(int(0.95 * MAX_TABLE_BYTES) // (width * num_timepoints), MAX_VALUES // num_timepoints - 1)
    names += [f"w_comp_cor_{k:03d}" for k in range(num_columns - len(names))]
    moved = rng.choice(np.arange(100, num_timepoints), MAX_CENSORED, replace=False)
    with path.open("w") as file:
        file.write("\t".join(names) + "\n")
        for k in range(num_timepoints):
            row = rng.uniform(0, 1, len(names))
            row[0] = 0.9 if k in moved else 0.1
            row[1] = 1.0
            file.write("\t".join(map("{:.8f}".format, row.tolist())) + "\n")


def prepare(folder: Path, case: str) -> list[str]:
    """Write all that a case needs; return the command that prepares it."""
    rng = np.random.default_rng(0)
    atlas = write_atlas(folder, case)
    num_timepoints = MAX_VOLUMES if case == "nii.gz" else NUM_TIMEPOINTS
    target_tr_s = NEAR_TR_S if case != "nii.gz" else TR_S * num_timepoints / NUM_TIMEPOINTS
    bold = rng.normal(1000, 10, (num_timepoints, NUM_PARCELS)).astype(np.float32)
    file = CASES[case](folder, bold)
    write_confounds(folder / "confounds.tsv", num_timepoints, rng)
    rows = "".join(f"{subject}\t{file.name}\tconfounds.tsv\n" for subject in range(NUM_RECORDINGS))
    (folder / "table.tsv").write_text(f"participant_id\tfile\tconfounds\n{rows}")
    config = {
        "name": "memory",
        "out": str(folder / "dataset"),
        "source": {
            "kind": "table",
            "path": str(folder / "table.tsv"),
            "columns": {"confounds": "confounds"},
            "tr_s": TR_S,
            "space": "MNI152NLin6Asym",
        },
        "atlas": {
            "name": "benchmark",
            "image": str(atlas),
            "labels": str(folder / "labels.tsv"),
            "space": "fsLR" if case == "dtseries" else "MNI152NLin6Asym",
        },
        "clean": {"strategy": "24P", "scrub": {"min_segment": 0}, "high_pass_hz": 0.01, "low_pass_hz": 0.2},
        "target_tr_s": target_tr_s,
        "checks": {"min_kept": 0.1, "min_fit": 0.0, "max_outside_brain": 1.0},
        "splits": {"val": 0.0, "test": 0.0},
        "ray": {"num_cpus": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return [sys.executable, str(PREPARE), "--config", str(folder / "config.yaml")]


# --- measuring ---


def measure(case: str) -> dict[str, Any]:
    """Return the record of a case."""
    with tempfile.TemporaryDirectory() as name:
        command = prepare(Path(name), case)
        started = time.perf_counter()
        peak_mb, output, status = largest_worker_mb(command)
        seconds = time.perf_counter() - started
        if status != 0:
            raise SystemExit(f"{case}: {' '.join(command)} has ended with {status}\n{output}")
    return {"case": case, "method": "ours", "seconds": seconds, "peak_mb": peak_mb}


def largest_worker_mb(command: list[str]) -> tuple[float, str, int]:
    """Run a program that starts Ray; return its largest worker in MB, what it printed, and its exit status."""
    path = os.pathsep.join([str(PREPARE.parents[1]), os.environ.get("PYTHONPATH", "")])
    peak_mb = 0.0
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}
        ) as program:
            while program.poll() is None:
                peak_mb = max([peak_mb, *_workers_mb(program.pid)])
                time.sleep(POLL_S)
        output.seek(0)
        return peak_mb, output.read(), program.returncode


def _workers_mb(pid: int) -> Iterator[float]:
    """Yield the largest memory so far of each worker below a process."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:  # it has ended
        return
    name = status["Name"].strip()
    if name.startswith("ray::") and "Agent" not in name and "VmHWM" in status:
        yield int(status["VmHWM"].split()[0]) * 1024 / 1e6
    for child in children:
        yield from _workers_mb(int(child))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args(argv)
    records = []
    for case in args.cases:
        records.append(measure(case))
        print(f"{case:12} {records[-1]['peak_mb']:5.0f} MB {records[-1]['seconds']:6.0f} s", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
