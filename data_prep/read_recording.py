"""One recording, whatever its format, to parcel series: the only place that asks what kind of file it is.

==================================  =====================================================================
``.nii``, ``.nii.gz``               `data_prep.parcellate`, after `data_prep.fsl_warp` where it needs a warp
``.dtseries.nii``                   `data_prep.read_cifti.read_dense_series`
``.ptseries.nii``                   `data_prep.read_cifti.read_parcel_series`
``.npy`` and text, also ``.gz``     `data_prep.read_series`
==================================  =====================================================================
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from brainlm.errors import DataError
from data_prep.atlas_image import AtlasImage
from data_prep.fsl_warp import warped
from data_prep.local_input import local_input
from data_prep.parcellate import LONGEST_TR_S, Parcellated, parcellate
from data_prep.read_cifti import read_dense_series, read_parcel_series
from data_prep.read_series import missing_columns, read_series
from data_prep.settings import CheckSettings, MeanOver, Orientation
from data_prep.source_entry import CIFTI_SUFFIXES, IMAGE_SUFFIXES, SourceEntry


def read_recording(
    path: Path,
    entry: SourceEntry,
    atlas: AtlasImage,
    orientation: Orientation,
    checks: CheckSettings,
    mean_over: MeanOver = "covered",
) -> Parcellated:
    """Read the file of an entry as parcel series.

    Parameters
    ----------
    path : path
        The file on local disk; its name tells the format.
    entry : SourceEntry
        Its space, warp and repetition time are used.
    atlas : AtlasImage
    orientation : str
        Axes of series files.
    checks : CheckSettings
    mean_over : {"covered", "all"}
        Voxels of an image that a parcel's mean is over (`data_prep.parcellate`).

    Returns
    -------
    Parcellated
        Columns of missing parcels hold values that are not finite, or are constant.

    Raises
    ------
    DataError
        If the file cannot be read as what it claims to be; with what was expected and found.
    StoreError
        If a warp lies on storage that cannot be read.
    """
    name = path.name.lower()
    if name.endswith(CIFTI_SUFFIXES[0]):
        found = read_dense_series(path, atlas, tr_s=entry.tr_s, tr_from=entry.tr_from, checks=checks)
    elif name.endswith(CIFTI_SUFFIXES[1]):
        found = read_parcel_series(path, atlas, orientation, tr_s=entry.tr_s, tr_from=entry.tr_from)
    elif name.endswith(IMAGE_SUFFIXES):
        found = _read_volumes(path, entry, atlas, checks, mean_over)
    else:
        found = _read_series(path, entry, atlas, orientation)
    _check_tr(found.tr_s, entry)
    return found


def _read_volumes(
    path: Path, entry: SourceEntry, atlas: AtlasImage, checks: CheckSettings, mean_over: MeanOver
) -> Parcellated:
    with ExitStack() as inputs:
        if entry.warp:
            warp = inputs.enter_context(local_input(entry.warp))
            reference = inputs.enter_context(local_input(entry.warp_reference))
            path = inputs.enter_context(warped(path, warp, reference))
        return parcellate(
            path,
            atlas,
            space=entry.space,
            tr_s=entry.tr_s,
            tr_from=entry.tr_from,
            checks=checks,
            mean_over=mean_over,
        )


def _read_series(path: Path, entry: SourceEntry, atlas: AtlasImage, orientation: Orientation) -> Parcellated:
    labels = [int(label) for label in atlas.atlas.labels]
    bold = read_series(path, atlas.atlas.num_parcels, orientation, atlas.atlas.parcel_names, labels)
    if entry.tr_s is None:
        raise DataError("no repetition time: set source.columns.tr_s or source.tr_s")
    coverage = np.where(missing_columns(bold), np.float32(0.0), np.float32(1.0))
    return Parcellated(bold=bold, coverage=coverage, tr_s=entry.tr_s, tsnr=None)


def _check_tr(tr_s: float, entry: SourceEntry) -> None:
    """Refuse what cannot be seconds between volumes, wherever it was read; seconds and milliseconds are mixed up."""
    origin = entry.tr_from if entry.tr_s is not None else "the file's header"
    if not 0 < tr_s <= LONGEST_TR_S:
        hint = "; are these milliseconds?" if tr_s > LONGEST_TR_S else ""
        raise DataError(
            f"the repetition time must be above 0 s and at most {LONGEST_TR_S:g} s, found {tr_s:g} s by {origin}{hint}"
        )
