"""Time parcellation of a 91 x 109 x 91 x 490 .nii.gz, from the compressed file to the means of 424 parcels.

    python benchmarks/parcellate.py [--repeats 5] [--volumes 490] [--json PATH] [--cases int16 float32] [--methods ...]

Methods: `ours`; `ours, cleaned` (the same, and 24 confounds and all but 0.01 to 0.1 Hz removed); `nilearn`
(NiftiLabelsMasker, its defaults but for standardising); `loop` (a numpy mean over each label of the loaded array);
`floor` (decompression alone, by isal, which ours reads with, in pieces of an int16 volume). A method is a function of
the image's path and the atlas; it returns the means, which are compared with ours, or nothing.

Each run is a fresh process, the methods taking turns. Timed is the function alone, without imports, reading of an atlas
and putting its labels on the image's grid (0.1 s), which a worker does once for a cohort; nilearn's `fit` is left out
likewise. `peak_mb` is the largest resident memory of that process (VmHWM), interpreter and imported libraries included.
Reported are medians over the repeats, of memory the largest.

The image is made here: brain and grey values of the MNI152 template that nilearn carries, smoothed, around 10000;
noise of 1.2 % of the signal plus 30 everywhere, smooth over neighbouring voxels, new in each volume, written by zlib at
level 1 (nibabel's default). The cases `int16` and `float32` are zero outside of the brain, as HCP and UK Biobank
release images (compressed to 24 % and 23 %): decompression is quick there, and the sums count most. `int16-head` and
`float32-head` have noise everywhere (64 % and 91 %; for comparison: a raw int16 scan at 5 mm compresses to 46 %).

Labels: A424 where ../shared/data holds it, else 424 compact parcels of the template's grey matter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

A424 = Path(__file__).parents[2] / "shared" / "data" / "atlases" / "A424+2mm.nii.gz"
SHAPE = (91, 109, 91)
AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1.0]])
NUM_PARCELS, TR_S = 424, 0.735
CASES = ("int16", "float32", "int16-head", "float32-head")
NUM_NOISES = 24  # two of them, shifted, make the noise of a volume: deflate looks back 32 KiB, never to another volume
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Means = NDArray[np.floating[Any]] | None
Method = Callable[[str, str], Callable[[], Means]]


# --- methods: prepare what is not timed, and return what is ---


def ours(image: str, labels: str) -> Callable[[], Means]:
    from data_prep.atlas_image import load_atlas
    from data_prep.nifti_stream import NiftiStream
    from data_prep.parcellate import parcellate
    from data_prep.settings import AtlasSettings, CheckSettings

    atlas = load_atlas(AtlasSettings(image=labels, name="benchmark"))
    with NiftiStream(image) as stream:
        atlas.on_grid(stream.header.shape, stream.header.affine)
    like_nilearn: dict[str, Any] = {"checks": CheckSettings(), "mean_over": "all"}
    return lambda: parcellate(image, atlas, space="", tr_s=None, tr_from="", **like_nilearn).bold


def cleaned(image: str, labels: str) -> Callable[[], Means]:
    from data_prep.clean import clean
    from data_prep.settings import CleanSettings

    means = ours(image, labels)

    def work() -> Means:
        bold = means()
        assert bold is not None
        bold = np.nan_to_num(bold, nan=0.0).astype(np.float32)
        regressors = np.random.default_rng(0).normal(size=(len(bold), min(24, len(bold) // 20)))
        low_pass_hz = 0.1 if len(bold) >= 200 else None  # short ones keep no degree of freedom
        settings = CleanSettings(high_pass_hz=0.01, low_pass_hz=low_pass_hz)
        clean(bold, settings, TR_S, regressors, np.ones(len(bold), dtype=bool))
        return None

    return work


def nilearn(image: str, labels: str) -> Callable[[], Means]:
    import nibabel
    from nilearn.maskers import NiftiLabelsMasker

    atlas: Any = nibabel.load(labels)
    whole = nibabel.Nifti1Image(np.asarray(atlas.dataobj).astype(np.int32), atlas.affine)
    masker = NiftiLabelsMasker(whole, standardize=None, reports=False).fit()
    return lambda: np.asarray(masker.transform(image))


def loop(image: str, labels: str) -> Callable[[], Means]:
    import nibabel

    atlas: Any = nibabel.load(labels)
    volume = np.asarray(atlas.dataobj)

    def work() -> Means:
        loaded: Any = nibabel.load(image)
        data = np.asarray(loaded.dataobj)
        names = np.unique(volume[volume > 0])
        return np.stack([data[volume == name].mean(axis=0, dtype=np.float64) for name in names], axis=1)

    return work


def floor(image: str, labels: str) -> Callable[[], Means]:
    from isal import igzip

    piece = int(np.prod(SHAPE)) * 2

    def work() -> Means:
        with igzip.open(image, "rb") as stream:
            while stream.read(piece):
                pass
        return None

    return work


METHODS: dict[str, Method] = {"ours": ours, "ours, cleaned": cleaned, "nilearn": nilearn, "loop": loop, "floor": floor}


# --- the image and the atlas ---


def template() -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return brain mask, intensity and grey matter of the MNI152 template on the grid of the image."""
    from nilearn import datasets
    from scipy.ndimage import affine_transform

    found = []
    for load in (datasets.load_mni152_brain_mask, datasets.load_mni152_template, datasets.load_mni152_gm_template):
        source = load(resolution=2)
        to_source = np.linalg.inv(source.affine) @ AFFINE
        found.append(affine_transform(source.get_fdata(dtype=np.float32), to_source, output_shape=SHAPE, order=1))
    return found[0] > 0.5, found[1], found[2]


def write_labels(folder: Path) -> str:
    import nibabel

    if A424.is_file():
        return str(A424)
    mask, _, grey = template()
    voxels = np.argwhere(mask & (grey > 0.3))
    centres = voxels[np.random.default_rng(0).choice(len(voxels), NUM_PARCELS, replace=False)]
    nearest = np.zeros(len(voxels), dtype=np.int16)
    for start in range(0, len(voxels), 4096):
        distance = ((voxels[start : start + 4096, None] - centres) ** 2).sum(axis=-1)
        nearest[start : start + 4096] = 1 + distance.argmin(axis=1)
    labels = np.zeros(SHAPE, dtype=np.int16)
    labels[tuple(voxels.T)] = nearest
    image = nibabel.Nifti1Image(labels, AFFINE)
    image.set_sform(AFFINE, code=4)
    nibabel.save(image, folder / "labels.nii.gz")
    return str(folder / "labels.nii.gz")


def write_image(path: Path, case: str, num_volumes: int) -> float:
    """Write the image of a case; return the compressed fraction of its size."""
    import nibabel
    from nibabel.openers import Opener
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    mask, intensity, _ = template()
    signal = gaussian_filter(10000 * mask * (0.6 + 0.4 * intensity), 1.0)
    noises = []
    for _ in range(NUM_NOISES):
        noise = gaussian_filter(rng.standard_normal(SHAPE, dtype=np.float32), 0.8)
        noises.append(noise / noise.std())
    dtype = np.dtype(case.removesuffix("-head"))
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape((*SHAPE, num_volumes))
    header.set_sform(AFFINE, code=4)
    header.set_xyzt_units("mm", "sec")
    header["pixdim"][4], header["magic"], header["vox_offset"] = TR_S, b"n+1", 352
    with Opener(path, "wb") as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(num_volumes):
            one, other = rng.choice(NUM_NOISES, 2, replace=False)
            noise = (noises[one] + np.roll(noises[other], rng.integers(1, 40), axis=0)) / np.sqrt(2)
            volume = signal + (0.012 * signal + 30) * noise
            # Not a product with the mask: -5 * 0 is -0, and random signs of zero compress as no release does.
            volume = np.abs(volume) if case.endswith("-head") else np.where(mask, volume, 0.0)
            file.write((np.round(volume) if dtype.kind == "i" else volume).astype(dtype).tobytes(order="F"))
    return path.stat().st_size / (np.prod(SHAPE) * num_volumes * dtype.itemsize)


# --- running ---


def run_once(method: str, image: str, labels: str, out: str) -> None:
    """Time a method in this process, and write what it found."""
    work = METHODS[method](image, labels)
    started = time.perf_counter()
    means = work()
    seconds = time.perf_counter() - started
    if means is not None:
        np.save(out, means)
    status = Path("/proc/self/status").read_text()
    peak_mb = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb}))


def in_new_process(method: str, image: str, labels: str, out: Path) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--once", method, image, labels, str(out)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(case: str, image: str, labels: str, methods: list[str], repeats: int, folder: Path) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for repeat in range(repeats):
        for method in methods if repeat % 2 == 0 else reversed(methods):
            runs[method].append(in_new_process(method, image, labels, folder / f"{method}.npy"))
    records = []
    for method, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        peak_mb = max(run["peak_mb"] for run in found)
        records.append({"case": case, "method": method, "seconds": seconds, "peak_mb": peak_mb, "repeats": repeats})
    return records


def compare(methods: list[str], folder: Path) -> None:
    """Stop if methods disagree: then their times say nothing."""
    if "ours" not in methods:
        return
    mine = np.load(folder / "ours.npy")
    for method in methods:
        if method != "ours" and (folder / f"{method}.npy").is_file():
            np.testing.assert_allclose(np.load(folder / f"{method}.npy"), mine, rtol=1e-4, err_msg=method)


def show(records: list[dict[str, Any]]) -> None:
    mine = next((record["seconds"] for record in records if record["method"] == "ours"), None)
    for record in records:
        ratio = f"{record['seconds'] / mine:6.2f} x ours" if mine else ""
        print(
            f"{record['case']:15} {record['method']:10} {record['seconds']:7.2f} s {ratio}  {record['peak_mb']:6.0f} MB"
        )
    limit = next((record["seconds"] for record in records if record["method"] == "floor"), None)
    if mine and limit:
        print(f"{records[0]['case']:15} ours takes {mine / limit:.2f} x the floor", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--volumes", type=int, default=490)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--cases", nargs="+", default=["int16", "float32"], choices=CASES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--once", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        run_once(*args.once)
        return 0
    records = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            labels = write_labels(folder)
            fraction = write_image(folder / "image.nii.gz", case, args.volumes)
            print(f"{case}: {args.volumes} volumes of {SHAPE}, compressed to {fraction:.0%}", flush=True)
            found = measure(case, str(folder / "image.nii.gz"), labels, args.methods, args.repeats, folder)
            compare(args.methods, folder)
            show(found)
            records += found
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
