"""Recordings of a BIDS derivatives folder, in the layout that fMRIPrep writes, on local disk or object storage.

::

    participants.tsv                                                      (here or in the folder above derivatives)
    sub-01/ses-1/func/sub-01_ses-1_task-rest_run-1_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz
                      sub-01_ses-1_task-rest_run-1_space-MNI152NLin6Asym_desc-preproc_bold.json    RepetitionTime
                      sub-01_ses-1_task-rest_run-1_space-fsLR_den-91k_bold.dtseries.nii
                      sub-01_ses-1_task-rest_run-1_desc-confounds_timeseries.tsv

A run is one recording. Of its images, `source.bids.space` and ``desc`` choose one, in the words of fMRIPrep's
``--output-spaces``: ``MNI152NLin6Asym``, ``MNI152NLin6Asym:res-2``, ``fsLR:den-91k``. The echoes of a run are parts of
it, not recordings. Names are taken apart by nilearn.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from brainlm.errors import DataError, StoreError
from brainlm.store import Store
from data_prep.input_files import AT_ONCE, file_stamp, folder_of, is_url, join, list_remote, size_of
from data_prep.local_input import MAX_SIDECAR_BYTES, check_sidecar_size
from data_prep.packed_entries import PackedEntries
from data_prep.phenotypes import Participants, join_subjects, no_participants, read_participants
from data_prep.read_table import number
from data_prep.settings import BidsSettings, SourceSettings
from data_prep.source_entry import MAX_LISTED, Source, SourceEntry
from data_prep.words import denoised_by

SPATIAL_ENTITIES = ("space", "res", "den", "desc", "hemi", "cohort")  # of a derivative, not of the acquisition
PART_ENTITIES = ("echo", "part")  # of an acquisition that is one recording
IMAGE = re.compile(r"sub-.*_bold\.(nii|nii\.gz|dtseries\.nii)")
SIDECAR = re.compile(r"(.*_)?bold(\.dtseries)?\.json")
CONFOUNDS = ("desc-confounds_timeseries.tsv", "desc-confounds_regressors.tsv")  # since, and before fMRIPrep 20.2
READ_AT_ONCE = 200  # sidecars
RUNS_AT_ONCE = 1000
Entities = dict[str, str | None]


@dataclass
class _Folder:
    """What lies in one folder of the tree, as far as it matters here."""

    images: list[str] = field(default_factory=list)
    sidecars: list[str] = field(default_factory=list)
    confounds: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Image:
    """An image of a run: its path below the root, its entities, and why it cannot be taken ("" if it can)."""

    path: str
    entities: Entities
    refusal: str

    @property
    def words(self) -> str:
        """What tells it from the run's other images."""
        return "_".join(f"{key}-{self.entities[key]}" for key in SPATIAL_ENTITIES if self.entities.get(key))


def find_bids_recordings(settings: SourceSettings, split_column: str | None = None) -> Source:
    """List the runs under ``sub-*``; a run without an image that can be taken becomes a refusal, not a gap.

    Raises
    ------
    DataError
        If there is no such folder, or several images of a run can be taken.
    """
    root = settings.path
    folders, stamps = _list_folders(root)
    runs: dict[str, list[str]] = {}
    num_images = 0
    for path, entities in _images(folders):
        num_images += 1
        if settings.bids.task and entities.get("task") not in settings.bids.task:
            continue
        runs.setdefault(_run_id(entities), []).append(path)
    if not num_images:
        raise DataError(f"no sub-*/[ses-*/]func/*_bold.nii[.gz] under {root}{_hint(root)}")
    participants = _participants(settings, split_column)
    entries = PackedEntries(_entries(runs, settings, folders, participants, stamps, split_column))
    subjects, notes = join_subjects((entry.subject for entry in entries), participants, settings.allow_unlisted)
    if not participants.is_given:
        notes.append("there is no participants.tsv: no phenotypes")
    return Source(entries, subjects, {"num_images": num_images}, notes)


def _entries(
    runs: dict[str, list[str]],
    settings: SourceSettings,
    folders: dict[str, _Folder],
    participants: Participants,
    stamps: dict[str, str],
    split_column: str | None,
) -> Iterator[SourceEntry]:
    """Yield the entries of the runs in the order of their ids. A block of runs is in memory, and what sidecars say."""
    root, left, known = settings.path, iter(sorted(runs)), dict[str, "float | DataError | None"]()
    while block := list(islice(left, RUNS_AT_ONCE)):
        chosen = {
            run_id: _choose(
                run_id,
                [_Image(path, _entities(path), _refusal(path, _entities(path), settings.bids)) for path in paths],
            )
            for run_id in block
            for paths in [runs[run_id]]
        }
        fit = [image for image in chosen.values() if not image.refusal]
        tr_s = _repetition_times(root, fit, folders, known, stamps)
        for run_id, image in chosen.items():
            entry = _entry(run_id, image, settings, folders, participants, tr_s.get(image.path), split_column)
            yield replace(
                entry,
                file_stamp=_stamp(entry.file, root, stamps),
                confounds_stamp=_stamp(entry.confounds, root, stamps),
            )


@lru_cache(maxsize=4 * RUNS_AT_ONCE)
def _entities(path: str) -> Entities:
    from nilearn.interfaces.bids import parse_bids_filename

    entities: Entities = parse_bids_filename(path)["entities"]
    return entities


def _list_folders(root: str) -> tuple[dict[str, _Folder], dict[str, str]]:
    """Return the folders that hold functional files or sidecars, and the stamps that a listing gave on the way."""
    folders: dict[str, _Folder] = {}
    stamps: dict[str, str] = {}
    for path, stamp in _list_remote(root) if is_url(root) else _list_local(root):
        folder, _, name = path.rpartition("/")
        here = folders.setdefault(folder, _Folder())
        if SIDECAR.fullmatch(name):
            here.sidecars.append(path)
            if (size_of(stamp) or 0) > MAX_SIDECAR_BYTES:
                stamps[path] = stamp
        elif folder.rpartition("/")[2] != "func":
            continue
        elif IMAGE.fullmatch(name):
            here.images.append(path)
            if stamp:
                stamps[path] = stamp
        elif name.endswith(CONFOUNDS):
            here.confounds.add(path)
            if stamp:
                stamps[path] = stamp
    for here in folders.values():
        here.sidecars.sort(key=lambda path: (len(path), path))  # the less specific first
    return folders, stamps


def _list_local(root: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(root):
        raise DataError(f"there is no BIDS folder {root}")

    yield from _walk(root, "", {"sub-": {"ses-": {"func": {}}, "func": {}}})


def _walk(root: str, below: str, into: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the files of a folder and of those folders below that begin with a key of `into`."""
    try:
        with os.scandir(os.path.join(root, below)) as scanned:
            items = sorted((item.name, item.is_dir()) for item in scanned)
    except OSError as error:
        raise StoreError(f"cannot list {os.path.join(root, below)}: {error}") from error
    for name, is_folder in items:
        if not is_folder:
            yield f"{below}{name}", ""
        for prefix, deeper in into.items():
            if is_folder and name.startswith(prefix) and (prefix.endswith("-") or name == prefix):
                yield from _walk(root, f"{below}{name}/", deeper)


def _list_remote(root: str) -> Iterator[tuple[str, str]]:
    """List subject by subject, several at once: of all files of a study, few are kept."""
    expected = re.compile(r"sub-[^/]+/(ses-[^/]+/)?(func/)?[^/]+")
    store = Store(root)
    names = store.names()
    if not names:
        raise DataError(f"there is no BIDS folder {root}, or it is empty")

    def below(subject: str) -> list[tuple[str, str]]:
        found = ((f"{subject}/{item.path}", item.stamp) for item in list_remote(join(root, subject)))
        return [(path, stamp) for path, stamp in found if expected.fullmatch(path)]

    yield from ((name, "") for name in names if SIDECAR.fullmatch(name))
    subjects = [name for name in names if name.startswith("sub-") and "." not in name]  # sub-01.html is a report
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for found in pool.map(below, subjects):
            yield from found


def _images(folders: dict[str, _Folder]) -> Iterator[tuple[str, Entities]]:
    for here in folders.values():
        for path in here.images:
            entities = _entities(path)
            if entities.get("part") != "phase":  # the phase of the signal is no BOLD
                yield path, entities


def _hint(root: str) -> str:
    """Say where the derivatives are, when the folder above them was given."""
    store = Store(root if is_url(root) else os.path.abspath(root))
    for name in store.names("derivatives"):
        folder = f"derivatives/{name}"
        if "." not in name and any(inside.startswith("sub-") for inside in store.names(folder)):
            return f"; set source.path to {join(root, folder)}"
    return ""


def _run_id(entities: Entities) -> str:
    left_out = SPATIAL_ENTITIES + PART_ENTITIES
    return "_".join(f"{key}-{value}" for key, value in entities.items() if key not in left_out and value is not None)


def _refusal(path: str, entities: Entities, wanted: BidsSettings) -> str:
    """Return why an image cannot be taken; "" where it can."""
    space = entities.get("space") or ""
    is_cifti = path.endswith(".dtseries.nii")
    asked = ", ".join(wanted.space)
    if is_cifti and not any(_fits(item, entities) for item in wanted.space):
        why = "a CIFTI image, to be asked for by source.bids.space (such as [fsLR]) with a CIFTI atlas"
        return f"space-{space}: {why}" + (f"; source.bids.space is {asked}" if asked else "")
    if not is_cifti and not space.startswith("MNI"):
        found = f"its name says space-{space}" if space else "its name has no space entity (a raw scan)"
        return f"native space: expected an image in an MNI template space, {found}"
    if wanted.space and not any(_fits(item, entities) for item in wanted.space):
        res = f"_res-{entities['res']}" if entities.get("res") else ""
        return f"in space-{space}{res} only, source.bids.space asks for {asked}"
    desc = entities.get("desc")
    if wanted.desc and desc not in wanted.desc and not (is_cifti and desc is None):  # fMRIPrep's CIFTI has no desc
        return f"of desc-{desc} only, source.bids.desc asks for {', '.join(wanted.desc)}"
    return ""


def _fits(item: str, entities: Entities) -> bool:
    """Say whether an image is in a space that is written like fMRIPrep's output spaces: ``NAME[:res-X][:den-Y]``."""
    space, *modifiers = item.split(":")
    if space != entities.get("space"):
        return False
    for modifier in modifiers:
        key, _, value = modifier.partition("-")
        if key not in ("res", "den", "cohort") or not value:
            raise DataError(f"source.bids.space: expected NAME, NAME:res-X, or NAME:den-X, found {item!r}")
        if (entities.get(key) or "native") != value:
            return False
    return True


def _choose(run_id: str, images: list[_Image]) -> _Image:
    """Return the one image of a run that is taken, or one of those that are refused."""
    fit = [image for image in images if not image.refusal]
    whole = [image for image in fit if not image.entities.get("echo")]
    if fit and not whole and len({image.entities.get("echo") for image in fit}) > 1:
        return replace(
            fit[0],
            refusal=f"{len(fit)} single echoes and no combined image: combine the echoes first",
        )
    fit = whole or fit
    if not fit:
        # What was asked for says more than what lies in native space beside it.
        return min(images, key=lambda image: (image.refusal.startswith("native"), image.path))
    if len(fit) > 1:
        listed = ", ".join(image.words or "without space" for image in fit[:MAX_LISTED])
        keys = [key for key in SPATIAL_ENTITIES if len({image.entities.get(key) for image in fit}) > 1]
        hints = []
        if set(keys) & {"space", "res", "den", "cohort"}:
            first = fit[0].entities
            example = first.get("space") or ""
            example += "".join(
                f":{key}-{first[key]}" for key in ("res", "den", "cohort") if key in keys and first.get(key)
            )
            hints.append(f"source.bids.space, such as [{example}]")
        if "desc" in keys:
            hints.append(f"source.bids.desc, such as [{fit[0].entities.get('desc')}]")
        if not keys:
            hints.append(f"one of these files aside: {', '.join(image.path for image in fit[:MAX_LISTED])}")
        raise DataError(
            f"{run_id}: expected one image of a run, found {len(fit)} ({listed}); set "
            f"{' and '.join(hints) or 'source.bids.space or source.bids.desc'}"
        )
    return fit[0]


def _participants(settings: SourceSettings, split_column: str | None) -> Participants:
    if settings.participants is not None:
        return read_participants(settings.participants, settings, split_column)
    folder = settings.path.rstrip("/") if is_url(settings.path) else os.path.realpath(settings.path)
    for _ in range(3):  # here, or above derivatives/fmriprep
        if folder and not folder.endswith(":/"):
            path = join(folder, "participants.tsv")
            if file_stamp(path):
                return read_participants(path, settings, split_column)
            folder = folder_of(folder)
    return no_participants("participants.tsv")


def _entry(
    run_id: str,
    image: _Image,
    settings: SourceSettings,
    folders: dict[str, _Folder],
    participants: Participants,
    found_tr: float | DataError | None,
    split_column: str | None,
) -> SourceEntry:
    entities = image.entities
    subject = entities.get("sub") or ""
    folder = image.path.rpartition("/")[0]
    tables = (f"{folder}/{run_id}_{suffix}" for suffix in CONFOUNDS)
    confounds = next((path for path in tables if path in folders[folder].confounds), "")
    entry = SourceEntry(
        recording_id=run_id,
        subject=subject,
        session=entities.get("ses") or "",
        task=entities.get("task") or "",
        run=entities.get("run") or "",
        site=participants.site(subject),
        family=participants.family(subject),
        file=join(settings.path, image.path),
        source=image.path,
        space=entities.get("space") or "",
        confounds=join(settings.path, confounds) if confounds else "",
        mean_fd_mm=participants.mean_fd_mm(subject),
        denoised=denoised_by(image.path) or settings.denoised or "",
        split=participants.split(split_column, subject) if split_column else "",
        refusal=image.refusal,
    )
    if isinstance(found_tr, DataError):
        return replace(entry, refusal=str(found_tr))
    if found_tr is None:
        return replace(entry, tr_s=settings.tr_s, tr_from="source.tr_s")
    return replace(entry, tr_s=found_tr, tr_from="RepetitionTime of the sidecar")


def _stamp(path: str, root: str, stamps: dict[str, str]) -> str:
    return stamps.get(path.removeprefix(f"{root.rstrip('/')}/"), "") or file_stamp(path)


def _repetition_times(
    root: str,
    images: list[_Image],
    folders: dict[str, _Folder],
    known: dict[str, float | DataError | None],
    stamps: dict[str, str],
) -> dict[str, float | DataError | None]:
    """Return RepetitionTime of each image by the BIDS inheritance principle: the sidecar nearest to it wins.

    What sidecars say is in `known`, and added to it, so that each is read once.
    """
    of_image = {}
    for image in images:
        parts = image.path.split("/")[:-1]
        above = ["/".join(parts[:number]) for number in range(len(parts) + 1)]
        of_image[image.path] = [
            path
            for folder in above
            if folder in folders
            for path in folders[folder].sidecars
            if all(image.entities.get(key) == value for key, value in _entities(path).items())
        ]
    unread = {path for paths in of_image.values() for path in paths if path not in known}
    known |= _read_sidecars(root, sorted(unread), stamps)
    found: dict[str, float | DataError | None] = {}
    for image_path, paths in of_image.items():
        tr_s: float | DataError | None = None
        for path in paths:
            if known[path] is not None:
                tr_s = known[path]
        found[image_path] = tr_s
    return found


def _read_sidecars(root: str, paths: list[str], stamps: dict[str, str]) -> dict[str, float | DataError | None]:
    """Return RepetitionTime of each sidecar, None where it has none, the error where it cannot be read."""
    store = Store(root if is_url(root) else os.path.abspath(root))
    values: dict[str, float | DataError | None] = {}
    for path in paths:  # of remote ones, the listing has told which are too large
        try:
            stamp = stamps.get(path, "") if is_url(root) else file_stamp(join(root, path))
            check_sidecar_size(path.rpartition("/")[2], size_of(stamp) or 0)
        except DataError as error:
            values[path] = error
    paths = [path for path in paths if path not in values]
    for first in range(0, len(paths), READ_AT_ONCE):
        for path, data in store.read_many(paths[first : first + READ_AT_ONCE]).items():
            name = path.rpartition("/")[2]
            try:
                value: Any = json.loads(data).get("RepetitionTime")
            except (ValueError, AttributeError, RecursionError) as error:  # brackets in brackets, a thousand deep
                values[path] = DataError(f"{name} is not a readable JSON sidecar: {error}")
                continue
            try:
                values[path] = number(value, f"{name}: RepetitionTime")
            except DataError as error:
                values[path] = error
    return values
