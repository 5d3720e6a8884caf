"""From a planned recording to its files: the 4-D image, its sidecar, the confounds table and, for a task, its events.

A voxel of parcel p is ``gain * baseline * (1 + x_p(t)) + offset + motion artefact + own noise``; the mean over the
parcel is then the planted series. White matter and fluid have slow drifts of their own, so that their confounds mean
something.
"""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.simulated_atlas import SPACE, SimulatedAtlas
from data_prep.simulated_cohort import (
    CohortPlan,
    PlannedRecording,
    random_stream,
    recording_motion,
    voxel_noise_sd,
)
from data_prep.simulated_motion import confounds_table
from data_prep.simulated_truth import block_is_on, block_length

FloatArray = NDArray[np.float64]
# Standard deviation of the slow drift of a tissue, as a share of its baseline, and the drift's time constant.
TISSUE_DRIFT = {"white_matter": (2, 0.002), "csf": (3, 0.004)}
TISSUE_DRIFT_S = 30.0


def image_stem(recording_id: str, resolution_mm: float) -> str:
    """Return the path of a recording's image without its ending, relative to the cohort's folder."""
    resolution = f"{resolution_mm:g}".replace(".", "p")
    subject = recording_id.split("_")[0]
    return f"{subject}/func/{recording_id}_space-{SPACE}_res-{resolution}_desc-preproc_bold"


def write_recording(plan: CohortPlan, recording: PlannedRecording, out: Path) -> None:
    """Write the files of one recording, the image last: a recording whose image is there is complete."""
    config = plan.config
    motion = recording_motion(plan, recording)
    image_TV, tissue = paint_voxels(plan, recording, motion)
    stem = image_stem(recording.recording_id, config.atlas.resolution_mm)
    folder = out / stem.rsplit("/", 1)[0]
    sidecar: dict[str, Any] = {
        "TaskName": recording.task,
        "RepetitionTime": config.acquisition.tr_s,
        "StartTime": 0.0,
        "SliceTimingCorrected": True,
        "SkullStripped": True,
        "Description": "Simulated data, not a measurement of any person.",
    }
    write_atomically(out / f"{stem}.json", json_bytes(sidecar))
    write_atomically(
        folder / f"{recording.recording_id}_desc-confounds_timeseries.tsv", confounds_table(motion, tissue).encode()
    )
    if recording.task != "rest":
        write_atomically(folder / f"{recording.recording_id}_events.tsv", events_table(plan, recording).encode())
    write_atomically(out / f"{stem}.nii.gz", image_bytes(plan, image_TV))


def parcel_series(plan: CohortPlan, recording: PlannedRecording) -> FloatArray:
    """Draw the planted series of one recording about its baseline, shape (T, P), image units, without voxel noise."""
    system, inputs = plan.truth.system(recording.recording_id)
    rng = random_stream(plan.config.seed, "series", recording.recording_id)
    return system.simulate(recording.num_timepoints, rng, inputs)


def paint_voxels(
    plan: CohortPlan, recording: PlannedRecording, motion: FloatArray
) -> tuple[NDArray[np.float32], dict[str, FloatArray]]:
    """Paint one recording into the brain.

    Returns
    -------
    image_TV : ndarray, shape (T, V), float32
        Brain voxels in the order of ``atlas.brain``.
    tissue_series : dict of ndarray, shape (T,)
        Mean signal of white matter and fluid, as in a confounds table.
    """
    config, atlas, subject = plan.config, plan.atlas, recording.subject
    rng = random_stream(config.seed, "voxels", recording.recording_id)
    num_timepoints = recording.num_timepoints
    baseline_V = subject.site_gain * plan.baseline_V
    parcels, tissue = atlas.parcel_of_voxel, atlas.tissue[atlas.brain]

    series = parcel_series(plan, recording)
    parcel_baseline = plan.truth.baseline(recording.recording_id) - subject.site_offset
    relative = np.zeros((num_timepoints, atlas.num_parcels + 1))  # last column: voxels of no parcel
    relative[:, :-1] = series / parcel_baseline
    image_TV = relative.astype(np.float32)[:, parcels]
    for code, drift in TISSUE_DRIFT.values():
        image_TV[:, tissue == code] += (drift * _slow_drift(num_timepoints, config.acquisition.tr_s, rng))[:, None]
    image_TV *= baseline_V.astype(np.float32)
    image_TV += (baseline_V + subject.site_offset).astype(np.float32)
    centred = subject.site_gain * (motion - motion.mean(axis=0))
    for parameter, weight_V in zip(centred.T, plan.motion_weights_V6.T):
        # Products one at a time: the same bytes whatever the number of threads of the linear algebra library.
        image_TV += np.multiply.outer(parameter.astype(np.float32), weight_V.astype(np.float32))
    noise_TV = rng.standard_normal(image_TV.shape, dtype=np.float32)
    noise_TV *= np.float32(voxel_noise_sd(config))
    image_TV += noise_TV
    means = {name: image_TV[:, tissue == code] for name, (code, _) in TISSUE_DRIFT.items()}
    return image_TV, {name: values.mean(axis=1, dtype=np.float64) for name, values in means.items() if values.size}


def image_bytes(plan: CohortPlan, image_TV: NDArray[np.float32]) -> bytes:
    """Return a recording as the bytes of a ``.nii.gz`` file, the same bytes every time."""
    acquisition = plan.config.acquisition
    brain_xyz = plan.atlas.brain
    if acquisition.data_type == "int16":
        step, values = acquisition.int16_step, np.rint(image_TV / np.float32(acquisition.int16_step))
    else:
        step, values = None, image_TV
    # NIfTI runs x fastest, time slowest: volumes are rows, voxels in Fortran order.
    where = np.flatnonzero(brain_xyz.ravel(order="F"))
    order = np.argsort(np.ravel_multi_index(np.nonzero(brain_xyz), brain_xyz.shape, order="F"), kind="stable")
    volume = np.zeros(brain_xyz.size, dtype=f"<{np.dtype(acquisition.data_type).str[1:]}")
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(nifti_header(plan.atlas, volume.dtype, (*brain_xyz.shape, len(image_TV)), acquisition.tr_s, step))
        for row in values:
            volume[where] = row[order]
            file.write(volume.tobytes())
    return buffer.getvalue()


def atlas_bytes(atlas: SimulatedAtlas) -> bytes:
    """Return the atlas as the bytes of a ``.nii.gz`` label image."""
    header = nifti_header(atlas, atlas.labels.dtype, atlas.labels.shape, None, None)
    return gzip.compress(header + atlas.labels.astype("<i2").tobytes(order="F"), compresslevel=6, mtime=0)


def nifti_header(
    atlas: SimulatedAtlas,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    tr_s: float | None,
    step: float | None,
) -> bytes:
    """Return the first 352 bytes of a NIfTI file on the atlas grid, in MNI space (sform and qform code 4)."""
    import nibabel as nib

    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_zooms((*np.abs(np.diag(atlas.affine)[:3]), *([] if tr_s is None else [tr_s])))
    header.set_qform(atlas.affine, code=4)
    header.set_sform(atlas.affine, code=4)
    header.set_xyzt_units("mm", "unknown" if tr_s is None else "sec")
    if step is not None:
        header.set_slope_inter(step, 0.0)
    header["descrip"] = b"simulated"
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + bytes(4)


def events_table(plan: CohortPlan, recording: PlannedRecording) -> str:
    """Return the task blocks as the text of a BIDS ``_events.tsv``."""
    acquisition = plan.config.acquisition
    is_on = block_is_on(recording.num_timepoints, acquisition.tr_s, acquisition.block_s)
    length = block_length(acquisition.tr_s, acquisition.block_s)
    lines = ["onset\tduration\ttrial_type"]
    for start in np.flatnonzero(np.diff(is_on.astype(int), prepend=0) == 1):
        held = int(is_on[start : start + length].sum())
        lines.append(f"{start * acquisition.tr_s:g}\t{held * acquisition.tr_s:g}\tcheckerboard")
    return "\n".join(lines) + "\n"


def json_bytes(tree: Any) -> bytes:
    """Return a tree as the bytes of a JSON file."""
    return (json.dumps(tree, indent=2, allow_nan=False) + "\n").encode()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it: a killed run leaves no half file under the real name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _slow_drift(num_timepoints: int, tr_s: float, rng: np.random.Generator) -> FloatArray:
    decay = np.exp(-tr_s / TISSUE_DRIFT_S)
    noise = rng.standard_normal(num_timepoints)
    drift = np.empty(num_timepoints)
    drift[0] = noise[0]
    for t in range(1, num_timepoints):
        drift[t] = decay * drift[t - 1] + np.sqrt(1 - decay**2) * noise[t]
    return drift
