"""Open cohorts that nilearn can download: ABIDE I, ADHD-200 (its 40 subjects), and the development cohort.

The fetchers look for each file below ``source.path`` first and download what is absent, so that a second run, or a
copy made elsewhere, needs no network. Their three layouts are brought to one table here; nothing else knows them.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from brainlm.errors import ConfigError, DataError, StoreError
from data_prep.input_files import is_url, relative_source, stamps_of
from data_prep.phenotypes import join_subjects, participants_of, subject_label
from data_prep.settings import ColumnNames, SourceSettings
from data_prep.source_entry import Source, SourceEntry
from data_prep.words import denoised_by, space_of

ABIDE_FILES = re.compile(r"rois_\w+|func_preproc")
ABIDE_AT_ONCE = 50  # series
ABIDE_MISSING = -9999  # its code for a value that was not taken
# Seconds between volumes by site: the scan parameters published with ABIDE I (Di Martino et al. 2014, Molecular
# Psychiatry 19). Neither the phenotypes nor the parcel series carry them.
ABIDE_TR_S = {
    "CALTECH": 2.0,
    "CMU": 2.0,
    "KKI": 2.5,
    "LEUVEN": 1.667,
    "MAX_MUN": 3.0,
    "NYU": 2.0,
    "OHSU": 2.5,
    "OLIN": 1.5,
    "PITT": 1.5,
    "SBL": 2.2,
    "SDSU": 2.0,
    "STANFORD": 2.0,
    "TRINITY": 2.0,
    "UCLA": 3.0,
    "UM": 2.0,
    "USM": 2.0,
    "YALE": 2.0,
}


@dataclass(frozen=True)
class _Cohort:
    """Phenotypes and files of a cohort: ``files`` and ``confounds`` are paths by subject label."""

    phenotypes: pd.DataFrame
    files: dict[str, str]
    confounds: dict[str, str]
    tr_s: dict[str, float]
    tr_from: str
    columns: ColumnNames
    kept: tuple[str, ...]
    """Phenotypes that are kept unless the settings name others."""


def find_open_recordings(settings: SourceSettings, split_column: str | None = None) -> Source:
    """List the recordings of an open cohort, downloading what is absent.

    Raises
    ------
    DataError
        If a file belongs to no row of the cohort's phenotypes.
    StoreError
        If a file is absent and cannot be downloaded.
    """
    if is_url(settings.path):
        raise ConfigError(f"source.path: nilearn downloads to a local folder, found {settings.path}")
    assert settings.dataset is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn's own
        try:
            cohort = COHORTS[settings.dataset](settings)
        except OSError as error:  # requests' errors are OSErrors
            raise StoreError(
                f"{settings.dataset}: a file is not below {settings.path} and cannot be downloaded ({error}). The "
                "first run needs the network"
            ) from error
    columns = _columns(settings.columns, cohort.columns)
    settings = replace(settings, columns=columns, phenotypes=settings.phenotypes or cohort.kept)
    participants = participants_of(cohort.phenotypes, settings.dataset or "", settings, split_column)
    stamps = stamps_of([*cohort.files.values(), *cohort.confounds.values()])
    entries = []
    for subject, file in cohort.files.items():
        confounds = cohort.confounds.get(subject, "")
        tr_s = settings.tr_s or cohort.tr_s.get(subject)
        entries.append(
            SourceEntry(
                recording_id=f"sub-{subject}",
                subject=subject,
                site=participants.site(subject),
                family=participants.family(subject),
                file=file,
                source=relative_source(file, settings.path),
                space=space_of(file) or settings.space or "",
                tr_s=tr_s,
                tr_from="source.tr_s" if settings.tr_s else cohort.tr_from,
                confounds=confounds,
                mean_fd_mm=participants.mean_fd_mm(subject),
                denoised=denoised_by(file) or settings.denoised or "",
                split=participants.split(split_column, subject) if split_column else "",
                file_stamp=stamps.get(file, ""),
                confounds_stamp=stamps.get(confounds, ""),
            )
        )
    rows, notes = join_subjects(cohort.files, participants, settings.allow_unlisted)
    return Source(entries, rows, {"dataset": settings.dataset, "num_files": len(entries)}, notes)


def _columns(given: ColumnNames, own: ColumnNames) -> ColumnNames:
    """Return the cohort's columns, and instead those that the settings give."""
    plain = ColumnNames()
    changed = {
        name: value for name in own.__dataclass_fields__ if (value := getattr(given, name)) != getattr(plain, name)
    }
    return replace(own, **changed)


def _abide_pcp(settings: SourceSettings) -> _Cohort:
    """ABIDE I by the Preprocessed Connectomes Project: C-PAC, unfiltered, without global signal regression."""
    from nilearn.datasets import fetch_abide_pcp

    derivative = settings.columns.file
    if not ABIDE_FILES.fullmatch(derivative):
        raise ConfigError(
            f"source.columns.file: for abide_pcp, expected what to read, such as rois_cc200, rois_aal or func_preproc; "
            f"found {derivative!r}"
        )
    fetched = fetch_abide_pcp(data_dir=settings.path, derivatives=[], verbose=0)
    table: pd.DataFrame = fetched["phenotypic"].drop(columns=["i", "Unnamed: 0"], errors="ignore")
    table = table.replace(ABIDE_MISSING, float("nan")).replace(str(ABIDE_MISSING), float("nan"))
    subjects = table["SUB_ID"].map(subject_label)
    table = table.assign(SUB_ID=subjects)
    folder = os.path.join(settings.path, "ABIDE_pcp", "cpac", "nofilt_noglobal")
    ending = ".1D" if derivative.startswith("rois") else ".nii.gz"  # of the first, the fetcher returns arrays, no paths
    files = {
        subject: os.path.join(folder, f"{file_id}_{derivative}{ending}")
        for subject, file_id in zip(subjects, table["FILE_ID"])
    }
    absent = [int(subject) for subject, file in files.items() if not os.path.isfile(file)]
    for first in range(0, len(absent), ABIDE_AT_ONCE):  # the fetcher also loads the series that it downloads
        these = absent[first : first + ABIDE_AT_ONCE]
        fetch_abide_pcp(data_dir=settings.path, derivatives=[derivative], SUB_ID=these, verbose=0)
    sites = {subject: re.sub(r"_\d+$", "", str(site)).upper() for subject, site in zip(subjects, table["SITE_ID"])}
    return _Cohort(
        phenotypes=table,
        files=files,
        confounds={},
        tr_s={subject: ABIDE_TR_S[site] for subject, site in sites.items() if site in ABIDE_TR_S},
        tr_from="ABIDE's scan parameters of the site",
        columns=ColumnNames(subject="SUB_ID", site="SITE_ID", mean_fd_mm="func_mean_fd"),
        kept=("AGE_AT_SCAN", "SEX", "DX_GROUP", "SITE_ID"),
    )


def _adhd(settings: SourceSettings) -> _Cohort:
    """The 40 subjects of ADHD-200 that nilearn offers, registered to MNI by their authors.

    The fetcher says 2 s for all of them; the cohort's sites differ, so the headers decide (or ``source.tr_s``). Its
    phenotypes are not in the order of its files: they are joined by subject.
    """
    from nilearn.datasets import fetch_adhd

    fetched = fetch_adhd(n_subjects=None, data_dir=settings.path, verbose=0)
    return _Cohort(
        phenotypes=fetched["phenotypic"].drop(columns="Unnamed: 0", errors="ignore"),
        files=_by_subject(fetched["func"], r"(\d{7})_rest"),
        confounds=_by_subject(fetched["confounds"], r"(\d{7})_regressors"),
        tr_s={},
        tr_from="the image's header",
        columns=ColumnNames(subject="Subject", site="site"),
        kept=("age", "sex", "adhd", "site"),
    )


def _development_fmri(settings: SourceSettings) -> _Cohort:
    """Children and adults who watch a film (Richardson et al. 2018), by fMRIPrep, at 4 mm, with all its confounds."""
    from nilearn.datasets import fetch_development_fmri

    fetched = fetch_development_fmri(data_dir=settings.path, reduce_confounds=False, verbose=0)
    files = _by_subject(fetched["func"], r"sub-([A-Za-z0-9]+)_task")
    return _Cohort(
        phenotypes=fetched["phenotypic"],
        files=files,
        confounds=_by_subject(fetched["confounds"], r"sub-([A-Za-z0-9]+)_task"),
        tr_s=dict.fromkeys(files, float(fetched["t_r"])),
        tr_from="nilearn's fetch_development_fmri",
        columns=ColumnNames(subject="participant_id"),
        kept=("Age", "AgeGroup", "Child_Adult", "Gender", "Handedness"),
    )


COHORTS: dict[str, Callable[[SourceSettings], _Cohort]] = {
    "abide_pcp": _abide_pcp,
    "adhd": _adhd,
    "development_fmri": _development_fmri,
}


def _by_subject(paths: list[Any], expression: str) -> dict[str, str]:
    """Return paths by the subject in their names."""
    found: dict[str, str] = {}
    for path in map(str, paths):
        match = re.search(expression, os.path.basename(path))
        if match is None or match.group(1) in found:
            raise DataError(f"the name {os.path.basename(path)} gives no subject, or one that another file has")
        found[match.group(1)] = path
    return found
