"""Recordings found by the pattern of their paths, on local disk and on object storage; UK Biobank's warps."""

import os
import stat
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml

from brainlm.config import build
from brainlm.errors import DataError
from data_prep.atlas_image import load_atlas
from data_prep.input_files import file_stamp, find_files, relative_source, size_of, stamps_of
from data_prep.read_recording import read_recording
from data_prep.settings import AtlasSettings, CheckSettings, SourceSettings
from data_prep.sources import find_recordings

HCP = (
    "{subject}/MNINonLinear/Results/rfMRI_{task}_{run}/rfMRI_{task}_{run}_Atlas_MSMAll_hp2000_clean.dtseries.nii",
    "100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_Atlas_MSMAll_hp2000_clean.dtseries.nii",
    "100307/MNINonLinear/Results/rfMRI_REST2_RL/rfMRI_REST2_RL_Atlas_MSMAll_hp2000_clean.dtseries.nii",
    "100408/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_Atlas_MSMAll_hp2000_clean.dtseries.nii",
)


def pattern(path, text, **settings):
    return build(SourceSettings, {"kind": "pattern", "path": str(path), "pattern": text, **settings}, "test")


def write_all(root, paths, content=b"12345"):
    for path in paths:
        with fsspec.open(f"{root}/{path}", "wb", auto_mkdir=True) as file:
            file.write(content)
    return str(root)


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "data") if request.param == "local" else f"memory://{uuid.uuid4().hex}/data"


def test_layout_of_the_human_connectome_project(root):
    write_all(root, [*HCP[1:], HCP[1].replace("_hp2000_clean", ""), "100307/release.txt", ".hidden/x"])
    entries = find_recordings(pattern(root, HCP[0], tr_s=0.72)).entries
    assert [entry.recording_id for entry in entries] == [
        "sub-100307_task-REST1_run-LR",
        "sub-100307_task-REST2_run-RL",
        "sub-100408_task-REST1_run-LR",
    ]
    assert {entry.denoised for entry in entries} == {"FIX"}
    assert entries[0].source == HCP[1]
    assert entries[0].file == f"{root}/{HCP[1]}"
    assert [size_of(entry.file_stamp) for entry in entries] == [5, 5, 5]


def test_confounds_and_phenotypes_join_by_the_fields_of_the_paths(root, tmp_path):
    files = ["sub-007_1/ts.csv", "sub-007_2/ts.csv", "sub-008_1/ts.csv"]
    write_all(root, [*files, "sub-007_1/motion.tsv", "sub-008_1/motion.tsv"])
    (tmp_path / "people.csv").write_text("eid,age,centre,split\n007,55,A,train\n008,n/a,B,test\n009,60,B,val\n")
    settings = pattern(
        root,
        "{subject}_{session}/ts.csv",
        confounds_pattern="{subject}_{session}/mot*.tsv",
        participants=str(tmp_path / "people.csv"),
        columns={"subject": "eid", "site": "centre"},
        phenotypes=["age"],
    )
    source = find_recordings(settings, "split")
    assert [entry.recording_id for entry in source.entries] == ["sub-007_ses-1", "sub-007_ses-2", "sub-008_ses-1"]
    assert [entry.confounds.removeprefix(root) for entry in source.entries] == [
        "/sub-007_1/motion.tsv",
        "",
        "/sub-008_1/motion.tsv",
    ]
    assert [entry.split for entry in source.entries] == ["train", "train", "test"]
    assert [entry.site for entry in source.entries] == ["A", "A", "B"]
    assert source.subjects["subject"].tolist() == ["007", "008"]
    np.testing.assert_array_equal(source.subjects["age"], [55, np.nan])
    assert source.warnings == ["1 subjects of the table of phenotypes have no recording"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**/{subject}.csv", ["a", "b", "c"]),
        ("*/{subject}.csv", ["b"]),
        ("x/**/{subject}.csv", ["b", "c"]),
        ("x/?/{subject}.csv", ["c"]),
        ("{subject}.csv", ["a"]),
        ("x/{session}/{subject}.c?v", ["c"]),
    ],
)
def test_wildcards_stay_within_a_folder_unless_doubled(root, text, expected):
    write_all(root, ["a.csv", "x/b.csv", "x/y/c.csv", "x/y/._c.csv", "x/.git/d.csv", "x/y/c.csv.gz"])
    assert [entry.subject for entry in find_recordings(pattern(root, text)).entries] == expected


def test_field_that_stands_twice_must_be_one_text(root):
    write_all(root, ["a_b/a_b.csv", "a_b/a.csv", "c/d.csv"])
    assert [item.path for item in find_files(root, "{subject}/{subject}.csv")] == ["a_b/a_b.csv"]
    assert [item.fields for item in find_files(root, "{subject}_{run}/{subject}_{run}.csv")] == [
        {"subject": "a", "run": "b"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{subjct}/a.csv", r"\{subjct\}: expected the fields"),
        ("{subject}{run}.csv", "nothing between them"),
        ("../{subject}.csv", "stay below it"),
        ("a/*.csv", r"must have the field \{subject\}"),
        ("{subject}/none.csv", "no file under .* fits"),
    ],
)
def test_wrong_patterns_are_explained(tmp_path, text, message):
    write_all(tmp_path, ["s/a.csv"])
    with pytest.raises(DataError, match=message):
        find_recordings(pattern(tmp_path, text))


def test_wildcard_that_takes_in_two_files_of_a_recording_is_an_error(tmp_path):
    write_all(tmp_path, ["s/a.csv", "s/b.csv", "s/c.tsv", "s/d.tsv"])
    with pytest.raises(DataError, match=r"found twice: sub-s \(s/a.csv\), sub-s \(s/b.csv\)"):
        find_recordings(pattern(tmp_path, "{subject}/*.csv"))
    with pytest.raises(DataError, match=r"two files belong to one recording: s/c.tsv and s/d.tsv"):
        find_recordings(pattern(tmp_path, "{subject}/a.csv", confounds_pattern="{subject}/*.tsv"))


def test_names_of_sources_never_hold_a_path_of_this_machine(tmp_path):
    assert relative_source("/data/ukb/1/ts.csv", "/data/ukb") == "1/ts.csv"
    assert relative_source("/secret/home/1/ts.csv", "/data/ukb") == "1/ts.csv"
    assert relative_source("s3://bucket/ukb/1/ts.csv", "s3://bucket/ukb/") == "1/ts.csv"
    assert relative_source("s3://key:secret@host/bucket/1/ts.csv", "/data") == "1/ts.csv"
    assert relative_source("1/ts.csv", "") == "1/ts.csv"


def test_stamps_tell_size_and_change_and_absence(root):
    write_all(root, ["a", "b"])
    urls = [f"{root}/a", f"{root}/b", f"{root}/absent"]
    stamps = stamps_of([*urls, ""])
    assert stamps[urls[2]] == "" == file_stamp(urls[2])
    assert [size_of(stamps[url]) for url in urls] == [5, 5, None]
    assert stamps[urls[0]] == file_stamp(urls[0])
    write_all(root, ["a"], b"123456")
    assert file_stamp(urls[0]) != stamps[urls[0]]
    assert file_stamp(urls[1]) == stamps[urls[1]]


# UK Biobank's images in native space

APPLYWARP = """#!{python}
import sys, pathlib, shutil, os
here = pathlib.Path(__file__).parent
(here / "arguments").write_text("\\n".join(sys.argv[1:] + [os.environ["FSLOUTPUTTYPE"]]))
given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
if pathlib.Path(given["warp"]).read_bytes() == b"bad":
    sys.exit(f"Cannot open volume {{given['warp']}}")
shutil.copy(given["in"], given["out"])
"""


@pytest.fixture
def biobank(toy, rng, tmp_path, monkeypatch):
    """Images in the scanner's space beside their warps, and a small program in place of FSL's on PATH.

    The program notes its arguments and copies the image, whose header here says MNI: so it must be the copy that is
    averaged, with its own header, and the command line is what FSL would be given. FSL itself is never run in tests.
    """
    series = toy.write_series(rng, 20)
    for number in (1, 2):
        folder = tmp_path / "ukb" / f"100000{number}_20227_2_0" / "fMRI" / "rfMRI.ica"
        toy.write_image(folder / "filtered_func_data_clean.nii.gz", toy.paint(series), tr_s=0.735)
        (folder / "reg").mkdir()
    (folder / "reg" / "example_func2standard_warp.nii.gz").write_bytes(b"bad")
    first = tmp_path / "ukb" / "1000001_20227_2_0" / "fMRI" / "rfMRI.ica" / "reg"
    (first / "example_func2standard_warp.nii.gz").write_bytes(b"good")
    (tmp_path / "standard.nii.gz").write_bytes(b"grid")
    program = tmp_path / "bin" / "applywarp"
    program.parent.mkdir()
    program.write_text(APPLYWARP.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(program.parent) + os.pathsep + os.environ["PATH"])
    folder = "{subject}_20227_{session}_0/fMRI/rfMRI.ica"
    settings = pattern(
        tmp_path / "ukb",
        f"{folder}/filtered_func_data_clean.nii.gz",
        warp=f"{folder}/reg/example_func2standard_warp.nii.gz",
        warp_reference=str(tmp_path / "standard.nii.gz"),
        space="MNI152NLin6Asym",
        tr_s=0.735,
    )
    return settings, series, program


@pytest.fixture
def atlas(toy):
    return load_atlas(AtlasSettings(image=str(toy.folder / "atlas.nii.gz"), name="toy"))


def test_images_in_native_space_are_warped_by_fsl(biobank, atlas, tmp_path):
    settings, series, program = biobank
    entry = find_recordings(settings).entries[0]
    assert (entry.recording_id, entry.denoised, entry.refusal) == ("sub-1000001_ses-2", "FIX", "")
    image = tmp_path / "ukb" / entry.source
    found = read_recording(image, entry, atlas, "from_atlas", CheckSettings())
    np.testing.assert_allclose(found.bold, series, rtol=1e-6)
    words = (program.parent / "arguments").read_text().splitlines()
    out = next(word for word in words if word.startswith("--out=")).removeprefix("--out=")
    assert sorted(words) == sorted(
        [
            f"--in={image}",
            f"--ref={tmp_path / 'standard.nii.gz'}",
            f"--warp={image.parent / 'reg' / 'example_func2standard_warp.nii.gz'}",
            f"--out={out}",
            "--interp=trilinear",
            "NIFTI_GZ",
        ]
    )
    assert out.endswith(".nii.gz")
    assert not os.path.exists(os.path.dirname(out))


def test_words_of_fsl_are_the_reason_of_a_refusal_without_paths(biobank, atlas, tmp_path):
    entry = find_recordings(biobank[0]).entries[1]
    with pytest.raises(DataError, match=r"applywarp failed .* Cannot open volume example_func2standard_warp.nii.gz$"):
        read_recording(tmp_path / "ukb" / entry.source, entry, atlas, "from_atlas", CheckSettings())


def test_without_fsl_each_native_image_is_refused_with_that_reason(biobank, atlas, tmp_path, monkeypatch):
    entry = find_recordings(biobank[0]).entries[0]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"native space: .* FSL's applywarp is not on PATH"):
        read_recording(tmp_path / "ukb" / entry.source, entry, atlas, "from_atlas", CheckSettings())


def test_image_without_its_warp_is_refused_alone(biobank, tmp_path):
    warp = tmp_path / "ukb/1000001_20227_2_0/fMRI/rfMRI.ica/reg/example_func2standard_warp.nii.gz"
    warp.unlink()
    entries = find_recordings(biobank[0]).entries
    assert "there is no warp to the template" in entries[0].refusal
    assert entries[1].refusal == ""


# The layouts that have a config

CONFIGS = Path(__file__).parents[2] / "data_prep" / "configs"
UKB = "1000001_20227_2_0/fMRI/rfMRI.ica"


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ("hcp_cifti", HCP[1:3], ["sub-100307_task-REST1_run-LR", "sub-100307_task-REST2_run-RL"]),
        (
            "hcp_volumes",
            ["100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_hp2000_clean.nii.gz"],
            ["sub-100307_task-REST1_run-LR"],
        ),
        ("ukb_parcels", ["1000001_2/fMRI/fMRI.Glasser.csv.gz"], ["sub-1000001_ses-2"]),
        (
            "ukb_images",
            [f"{UKB}/filtered_func_data_clean.nii.gz", f"{UKB}/reg/example_func2standard_warp.nii.gz"],
            ["sub-1000001_ses-2"],
        ),
        (
            "fmriprep",
            [
                f"sub-01/func/sub-01_task-rest_space-MNI152NLin6Asym_res-2_desc-{desc}_bold.nii.gz"
                for desc in ("preproc", "x")
            ],
            ["sub-01_task-rest"],
        ),
    ],
)
def test_layouts_with_a_config_are_found_by_it(tmp_path, config, files, expected):
    root = write_all(tmp_path / "data", files)
    write_all(tmp_path, ["grid.nii.gz"])
    tree = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["source"] | {"path": root}
    subject = {"hcp_cifti": "Subject", "hcp_volumes": "Subject", "fmriprep": "participant_id"}.get(config, "eid")
    columns = [subject, *tree.get("phenotypes", []), *(["assessment_centre"] if "ukb" in config else [])]
    people = ["100307", "1000001", "01"]
    lines = [",".join(columns), *(",".join([name] * len(columns)) for name in people)]
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    tree["participants"] = str(tmp_path / "people.csv")
    if "warp" in tree:
        tree["warp_reference"] = str(tmp_path / "grid.nii.gz")
    entries = find_recordings(build(SourceSettings, tree, "test")).entries
    assert [entry.recording_id for entry in entries] == expected
    assert [entry.refusal for entry in entries] == [""] * len(entries)
    assert {entry.denoised for entry in entries} == {"" if config == "fmriprep" else "FIX"}
