"""Small NIfTI images, atlases and BIDS folders, painted from known series."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

SHARED_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
VOXEL_MM = 14.0
SHAPE = (12, 14, 12)
LABELS = (3, 7, 130, 300, 1000, 1001)  # with gaps, above 127 and 255
LAS = np.array([[-VOXEL_MM, 0, 0, 77], [0, VOXEL_MM, 0, -105], [0, 0, VOXEL_MM, -63], [0, 0, 0, 1.0]])
SPACE = "MNI152NLin6Asym"
MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


@dataclass(frozen=True)
class Toy:
    """An atlas of six parcels on a coarse grid, and images painted into it."""

    folder: Path

    @property
    def labels(self) -> np.ndarray:
        """Shape SHAPE: a block of the brain's inside for each label, 0 around."""
        volume = np.zeros(SHAPE)
        for number, label in enumerate(LABELS):
            volume[3:9, 2 + number * 2 : 4 + number * 2, 4:9] = label
        return volume

    def write_atlas(
        self, name: str = "atlas.nii.gz", labels: np.ndarray | None = None, dtype: Any = np.float32
    ) -> Path:
        import nibabel

        image = nibabel.Nifti1Image((self.labels if labels is None else labels).astype(dtype), LAS)
        image.header["sform_code"] = image.header["qform_code"] = 4
        nibabel.save(image, self.folder / name)
        table = "\n".join(f"{label}\tparcel{label}\tnet{label % 2}" for label in reversed(LABELS))
        (self.folder / "atlas.tsv").write_text(f"index\tname\tnetwork\n{table}\n")
        return self.folder / name

    def paint(self, series: np.ndarray) -> np.ndarray:
        """Return (X, Y, Z, T): each voxel of parcel p holds column p of the series."""
        volume = np.zeros((*SHAPE, len(series)), dtype=np.float64)
        labels = self.labels
        for column, label in enumerate(LABELS):
            volume[labels == label] = series[:, column]
        return volume

    def write_image(
        self,
        path: Path,
        volume: np.ndarray,
        *,
        tr_s: float = 2.0,
        dtype: Any = np.float32,
        slope: tuple[float, float] | None = None,
        code: int = 4,
        affine: np.ndarray = LAS,
        big_endian: bool = False,
    ) -> Path:
        import nibabel

        path.parent.mkdir(parents=True, exist_ok=True)
        if slope is not None:
            volume = np.round((volume - slope[1]) / slope[0]).astype(dtype)
        header = nibabel.Nifti1Header(endianness=">" if big_endian else "<")
        header.set_data_dtype(np.dtype(dtype).newbyteorder(">" if big_endian else "<"))
        image = nibabel.Nifti1Image(volume, affine, header=header)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = tr_s
        image.set_sform(affine, code=code)
        image.set_qform(affine, code=code)
        if slope is not None:
            image.header.set_slope_inter(*slope)
        nibabel.save(image, path)
        return path

    def write_series(self, rng: np.random.Generator, num_timepoints: int = 60) -> np.ndarray:
        """Return (T, 6) slow random series around 1000."""
        walk = np.cumsum(rng.normal(size=(num_timepoints, len(LABELS))), axis=0)
        return np.asarray(1000 + walk + rng.normal(size=walk.shape))

    def write_bids(self, rng: np.random.Generator, num_subjects: int = 6, num_timepoints: int = 60) -> Path:
        """Write a folder as fMRIPrep leaves it: images, sidecars, confounds, participants."""
        root = self.folder / "bids"
        rows = ["participant_id\tage\tsite\tfamily_id"]
        for number in range(num_subjects):
            subject = f"sub-{number:02d}"
            age = "n/a" if number == 1 else str(20 + number)
            rows.append(f"{subject}\t{age}\tsite{number % 2}\tfam{number // 2}")
            stem = root / subject / "func" / f"{subject}_task-rest"
            image = Path(f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz")
            self.write_image(image, self.paint(self.write_series(rng, num_timepoints)))
            Path(str(image).replace(".nii.gz", ".json")).write_text(json.dumps({"RepetitionTime": 2.0}))
            motion = rng.normal(scale=0.01, size=(num_timepoints, 6))
            lines = ["\t".join([*MOTION, "trans_x_derivative1"])]
            steps = ["n/a", *(str(value) for value in np.diff(motion[:, 0]))]
            lines += ["\t".join([*(f"{v:.8f}" for v in row), step]) for row, step in zip(motion, steps)]
            Path(f"{stem}_desc-confounds_timeseries.tsv").write_text("\n".join(lines) + "\n")
        (root / "participants.tsv").write_text("\n".join(rows) + "\n")
        return root

    def write_table(
        self,
        rng: np.random.Generator,
        num_subjects: int = 6,
        num_timepoints: int = 60,
        name: str = "table",
        first: int = 0,
    ) -> Path:
        """Write series files, and a table that lists them; returns the table."""
        folder = self.folder / name
        (folder / "ts").mkdir(parents=True)
        rows = ["file_id\tsub_id\tage\tsex(1=M,2=F)\tsite\ttr"]
        for number in range(first, first + num_subjects):
            np.save(folder / "ts" / f"S_{number:03d}.npy", self.write_series(rng, num_timepoints).astype(np.float32))
            rows.append(f"S_{number:03d}\t{number:03d}\t{20 + number}\t{1 + number % 2}\tsite{number % 2}\t2.0")
        (folder / "list.tsv").write_text("\n".join(rows) + "\n")
        return folder / "list.tsv"

    def settings(self, source: Path, **changes: Any) -> dict[str, Any]:
        """Return a settings tree for a table (a file) or a BIDS folder."""
        tree: dict[str, Any] = {
            "name": "toy",
            "out": str(self.folder / "dataset"),
            "source": {"kind": "bids", "path": str(source), "columns": {"family": "family_id"}},
            "atlas": {
                "image": str(self.folder / "atlas.nii.gz"),
                "labels": str(self.folder / "atlas.tsv"),
                "name": "toy",
                "space": SPACE,
                "network_column": "network",
            },
            "windows": {"window_len": 40, "patch_len": 10},
            "splits": {"val": 0.3, "test": 0.2, "seed": 11},
            "shards": {"recordings_per_shard": 2},
            "ray": {"address": "off"},
        }
        if source.is_file():
            tree["source"] = {
                "kind": "table",
                "path": str(source),
                "columns": {
                    "recording_id": "file_id",
                    "subject": "sub_id",
                    "site": "site",
                    "file": "ts/{file_id}.npy",
                    "tr_s": "tr",
                },
                "phenotypes": ["age", "sex(1=M,2=F)"],
            }
        return tree | changes

    def prepare(self, tree: dict[str, Any], *overrides: str) -> int:
        """Run the program on a settings tree; return its exit status."""
        from data_prep.prepare import main

        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return main(["--config", str(path), *overrides])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    made = Toy(tmp_path)
    made.write_atlas()
    return made


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real test recordings (../shared/data) are not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tree_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads every file below a folder, except for what is in ``log/``, which holds times."""

    def read(folder: Path) -> dict[str, bytes]:
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if not name.startswith("log/")}

    return read
