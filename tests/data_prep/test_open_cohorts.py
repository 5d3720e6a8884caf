"""Open cohorts by nilearn's own fetchers, on local copies laid out as they expect: nothing is downloaded."""

import numpy as np
import pandas as pd
import pytest
import requests
from nilearn.datasets.func import adhd_ids

from brainlm.config import build
from brainlm.errors import ConfigError, DataError, StoreError
from data_prep.atlas_image import load_atlas
from data_prep.read_recording import read_recording
from data_prep.settings import AtlasSettings, CheckSettings, SourceSettings
from data_prep.sources import find_recordings


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Make every download fail at once, as it does on a machine without a network."""

    def fail(*arguments, **words):
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(requests.Session, "send", fail)


def settings(folder, dataset, **words):
    return build(SourceSettings, {"kind": "nilearn", "path": str(folder), "dataset": dataset, **words}, "test")


def read(entry, toy):
    atlas = load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))
    return read_recording(toy.folder / entry.file, entry, atlas, "from_atlas", CheckSettings())


@pytest.fixture
def abide(toy, rng):
    """Three subjects of two sites that passed the quality check and one that did not, in the PCP's table and files."""
    folder = toy.folder / "data" / "ABIDE_pcp"
    files = folder / "cpac" / "nofilt_noglobal"
    files.mkdir(parents=True)
    rows, series = [], {}
    for number, (site, name) in enumerate(
        [("UM_1", "UM_1"), ("LEUVEN_2", "Leuven_2"), ("UM_1", "UM_1"), ("NYU", "NYU")]
    ):
        subject = 50272 + number
        file_id = f"{name}_{subject:07d}" if number != 2 else "no_filename"
        rating = "fail" if site == "NYU" else "OK"
        rows.append(
            {
                "Unnamed: 0": number,
                "SUB_ID": subject,
                "SITE_ID": site,
                "FILE_ID": file_id,
                "DX_GROUP": 1,
                "AGE_AT_SCAN": 20.5 + number,
                "SEX": 1,
                "FIQ": -9999 if number == 0 else 101,
                "COMMENT": "tired, restless",
                "func_mean_fd": 0.1 * number,
                "qc_rater_1": rating,
                "qc_anat_rater_2": "maybe",
                "qc_func_rater_2": "OK",
                "qc_anat_rater_3": "OK",
                "qc_func_rater_3": "OK",
            }
        )
        series[str(subject)] = toy.write_series(rng, 30)
        header = "\t".join(f"#{label}" for label in (3, 7, 130, 300, 1000, 1001))
        np.savetxt(files / f"{file_id}_rois_cc200.1D", series[str(subject)], delimiter="\t", header=header, comments="")
    pd.DataFrame(rows).to_csv(folder / "Phenotypic_V1_0b_preprocessed1.csv", index=False)
    return toy.folder / "data", series


def test_abide_series_have_the_repetition_time_of_their_site(abide, toy):
    folder, series = abide
    source = find_recordings(settings(folder, "abide_pcp", columns={"file": "rois_cc200"}, phenotypes=["FIQ"]))
    assert [(e.subject, e.site, e.tr_s) for e in source.entries] == [
        ("50272", "UM_1", 2.0),
        ("50273", "LEUVEN_2", 1.667),
    ]
    assert source.entries[1].source == "ABIDE_pcp/cpac/nofilt_noglobal/Leuven_2_0050273_rois_cc200.1D"
    assert source.entries[1].mean_fd_mm == pytest.approx(0.1)
    assert all(entry.file_stamp for entry in source.entries)
    np.testing.assert_array_equal(source.subjects["FIQ"], [np.nan, 101])  # ABIDE writes -9999 for missing
    found = read(source.entries[1], toy)
    np.testing.assert_allclose(found.bold, series["50273"], rtol=1e-6)


def test_abide_needs_to_be_told_what_to_read(abide):
    with pytest.raises(ConfigError, match=r"source\.columns\.file: for abide_pcp, .* rois_cc200"):
        find_recordings(settings(abide[0], "abide_pcp"))


def test_absent_files_say_that_the_network_is_needed(abide):
    (abide[0] / "ABIDE_pcp/cpac/nofilt_noglobal/Leuven_2_0050273_rois_cc200.1D").unlink()
    with pytest.raises(StoreError, match=r"cannot be downloaded .* needs the network"):
        find_recordings(settings(abide[0], "abide_pcp", columns={"file": "rois_cc200"}))


@pytest.fixture
def adhd(toy, rng):
    folder = toy.folder / "data" / "adhd"
    rows = []
    for number, subject in enumerate(adhd_ids()):
        inside = folder / "data" / subject
        inside.mkdir(parents=True)
        (inside / f"{subject}_rest_tshift_RPI_voreg_mni.nii.gz").write_bytes(b"")
        (inside / f"{subject}_regressors.csv").write_text("csf,wm\n1,2\n")
        site = "NYU" if number % 2 else "KKI"
        rows.append(f"{number},{int(subject)},{site},{8 + number / 4},{'F' if number % 3 else 'M'},{number % 2}")
    series = toy.write_series(rng, 20)
    image = folder / "data" / subject / f"{subject}_rest_tshift_RPI_voreg_mni.nii.gz"
    toy.write_image(image, toy.paint(series), tr_s=2.5)
    # The real table is not in the order of the files either.
    text = "\n".join(["Unnamed: 0,Subject,site,age,sex,adhd", *reversed(rows)])
    (folder / "ADHD200_40subs_motion_parameters_and_phenotypics.csv").write_text(text + "\n")
    return toy.folder / "data", series


def test_adhd_phenotypes_are_joined_by_subject_not_by_order(adhd, toy):
    folder, series = adhd
    source = find_recordings(settings(folder, "adhd", space="MNI152NLin6Asym"))
    ids = adhd_ids()
    assert len(source.entries) == 40
    by_subject = {entry.subject: entry for entry in source.entries}
    ages = dict(zip(source.subjects["subject"], source.subjects["age"]))
    for number, subject in enumerate(ids):
        assert by_subject[subject].site == ("NYU" if number % 2 else "KKI")
        assert ages[subject] == 8 + number / 4
        assert subject in by_subject[subject].file
        assert subject in by_subject[subject].confounds
    found = read(by_subject[ids[-1]], toy)
    np.testing.assert_allclose(found.bold, series, rtol=1e-6)
    assert found.tr_s == 2.5  # by the header, whatever the fetcher says of all sites


@pytest.fixture
def development(toy, rng):
    folder = toy.folder / "data" / "development_fmri" / "development_fmri"
    folder.mkdir(parents=True)
    rows = ["participant_id\tAge\tAgeGroup\tChild_Adult\tGender\tHandedness\tother"]
    people = [
        ("sub-pixar001", 4.7, "4yo", "child"),
        ("sub-pixar002", 4.8, "4yo", "child"),
        ("sub-pixar123", 27, "Adult", "adult"),
    ]
    series = toy.write_series(rng, 20)
    for name, age, group, kind in people:
        rows.append(f"{name}\t{age}\t{group}\t{kind}\tM\tR\t1")
        (folder / f"{name}_task-pixar_desc-confounds_regressors.tsv").write_text("csf\tdvars\n1\t2\n")
        image = folder / f"{name}_task-pixar_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
        toy.write_image(image, toy.paint(series))
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder.parent, series


def test_development_cohort_keeps_space_confounds_and_ages(development, toy):
    folder, series = development
    source = find_recordings(settings(folder, "development_fmri"))
    assert [entry.subject for entry in source.entries] == ["pixar001", "pixar002", "pixar123"]
    assert source.subjects["Age"].tolist() == [4.7, 4.8, 27]
    entry = source.entries[2]
    assert (entry.space, entry.tr_s) == ("MNI152NLin2009cAsym", 2.0)
    assert entry.confounds.endswith("sub-pixar123_task-pixar_desc-confounds_regressors.tsv")
    np.testing.assert_allclose(read(entry, toy).bold, series, rtol=1e-6)


def test_repetition_time_that_the_header_contradicts_is_refused(development, toy, rng):
    entry = find_recordings(settings(development[0], "development_fmri")).entries[0]
    toy.write_image(toy.folder / entry.file, toy.paint(toy.write_series(rng, 20)), tr_s=1.0)
    with pytest.raises(DataError, match="2 s by nilearn's fetch_development_fmri, 1 s in the image's header"):
        read(entry, toy)


def test_object_storage_cannot_hold_what_nilearn_downloads():
    with pytest.raises(ConfigError, match="nilearn downloads to a local folder"):
        find_recordings(settings("s3://bucket/data", "adhd"))
