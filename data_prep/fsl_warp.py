"""Bring an image from its own space to the template with FSL's applywarp, for layouts that keep images and warps apart.

UK Biobank stores resting-state images in native space (``filtered_func_data_clean.nii.gz``) beside the warp to
MNI152 (``reg/example_func2standard_warp.nii.gz``). FSL is a program of its own that cannot be installed with this one:
its ``applywarp`` must be on ``PATH``. Where it is not, each such recording is refused with that reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brainlm.errors import DataError

MAX_SECONDS = 3600.0
MAX_MESSAGE = 300  # characters of the program's own words in a refusal


@contextmanager
def warped(image: Path, warp: Path, reference: Path) -> Iterator[Path]:
    """Give the path of a temporary image in template space for the length of a ``with`` block.

    The warp maps the image's own space to the reference's, as FEAT's ``example_func2standard_warp`` does; values are
    interpolated linearly between voxels. The copy (about 1.3 GB for 490 volumes at 2 mm, before compression) lies in
    ``$TMPDIR``.

    Raises
    ------
    DataError
        If applywarp is not on ``PATH``, a file is absent, or applywarp fails, with its own words.
    """
    program = shutil.which("applywarp")
    if program is None:
        raise DataError(
            "native space: the image must be warped to the template, and FSL's applywarp is not on PATH; install FSL, "
            "or give images in template space"
        )
    for what, path in (("image", image), ("warp", warp), ("warp reference", reference)):
        if not path.is_file():
            raise DataError(f"there is no {what} {path.name}")
    with tempfile.TemporaryDirectory(prefix="brainlm-warp-") as folder:
        out = Path(folder) / "warped.nii.gz"
        command = [
            program,
            f"--in={image}",
            f"--ref={reference}",
            f"--warp={warp}",
            f"--out={out}",
            "--interp=trilinear",
        ]
        environment = os.environ | {"FSLOUTPUTTYPE": "NIFTI_GZ"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=MAX_SECONDS, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"applywarp did not end within {MAX_SECONDS:g} s") from error
        except OSError as error:
            raise DataError(f"applywarp cannot be run: {error}") from error
        if done.returncode != 0 or not out.is_file():
            said = " ".join((done.stderr or done.stdout).split())
            for path in (image, warp, reference, out):  # refusals are kept in the data set: no paths of this machine
                said = said.replace(str(path), path.name)
            raise DataError(f"applywarp failed (exit status {done.returncode}): {said[:MAX_MESSAGE]}")
        yield out
