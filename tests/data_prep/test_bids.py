"""What is found in a folder of fMRIPrep's outputs, on local disk and on object storage, and what is refused at once."""

import gc
import json
import re
import shutil
import uuid
import warnings

import fsspec
import numpy as np
import pytest
from nilearn.interfaces.bids import get_bids_files

from brainlm.config import build
from brainlm.errors import DataError
from data_prep.local_input import MAX_SIDECAR_BYTES, local_input
from data_prep.settings import SourceSettings
from data_prep.sources import find_recordings, inputs_hash

FUNC = "sub-01/ses-1/func/sub-01_ses-1_task-rest"
MNI = "space-MNI152NLin6Asym"


def bids(root, **settings):
    return build(SourceSettings, {"kind": "bids", "path": str(root), **settings}, "test")


def test_bids_sessions_runs_and_tasks_become_words_of_a_recording(toy, rng):
    root = toy.folder / "bids"
    volume = toy.paint(toy.write_series(rng, 5))
    stem = root / "sub-01" / "ses-a" / "func" / "sub-01_ses-a_task-rest_run-2"
    toy.write_image(root / f"{stem}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii", volume)
    (root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    entry = find_recordings(bids(root)).entries[0]
    assert entry.recording_id == "sub-01_ses-a_task-rest_run-2"
    assert (entry.subject, entry.session, entry.task, entry.run) == ("01", "a", "rest", "2")
    assert entry.space == "MNI152NLin6Asym"
    assert entry.tr_s == 1.5  # inherited


def test_nearer_sidecar_wins(toy, rng):
    root = toy.write_bids(rng, num_subjects=1, num_timepoints=5)
    (root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    assert find_recordings(bids(root)).entries[0].tr_s == 2.0


def test_native_images_beside_normalised_ones_are_ignored_and_alone_they_are_refused(toy, rng):
    root = toy.write_bids(rng, num_subjects=2, num_timepoints=5)
    images = sorted(root.rglob("*.nii.gz"))
    native = [image.with_name(image.name.replace("space-MNI152NLin6Asym", "space-T1w")) for image in images]
    native[0].write_bytes(images[0].read_bytes())
    images[1].rename(native[1])
    entries = find_recordings(bids(root)).entries
    assert [entry.refusal == "" for entry in entries] == [True, False]
    assert "space-T1w" in entries[1].refusal


def test_two_template_spaces_of_a_run_need_a_choice(toy, rng):
    root = toy.write_bids(rng, num_subjects=1, num_timepoints=5)
    image = next(root.rglob("*.nii.gz"))
    other = image.with_name(image.name.replace("NLin6Asym", "NLin2009cAsym"))
    other.write_bytes(image.read_bytes())
    with pytest.raises(DataError, match=r"source\.bids\.space"):
        find_recordings(bids(root))
    entries = find_recordings(bids(root, bids={"space": ["MNI152NLin2009cAsym"]})).entries
    assert [entry.space for entry in entries] == ["MNI152NLin2009cAsym"]


def test_tasks_can_be_chosen(toy, rng):
    root = toy.write_bids(rng, num_subjects=2, num_timepoints=5)
    with pytest.raises(DataError, match="no recordings"):
        find_recordings(bids(root, bids={"task": ["nback"]}))


def test_folder_above_derivatives_is_told_where_to_look(toy, rng):
    root = toy.write_bids(rng, num_subjects=1, num_timepoints=5)
    above = toy.folder / "study"
    (above / "derivatives").mkdir(parents=True)
    root.rename(above / "derivatives" / "fmriprep")
    with pytest.raises(DataError, match=r"set source\.path to .*derivatives/fmriprep"):
        find_recordings(bids(above))


@pytest.mark.parametrize("value", ["[2.0]", "[2.0, 2.0]", '{"s": 2}', '"two"', f"1{'0' * 400}", "true", "false"])
def test_sidecar_without_a_number_refuses_its_recording_alone(toy, rng, value):
    root = toy.write_bids(rng, num_subjects=2)
    sidecar = next((root / "sub-00" / "func").glob("*bold.json"))
    sidecar.write_text(f'{{"RepetitionTime": {value}}}')
    entries = find_recordings(bids(root)).entries
    assert "RepetitionTime: expected a number, found" in entries[0].refusal
    assert entries[1].refusal == ""


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"participant_id\tsite\nsub-00\tK\xf6ln\n", "byte 0xf6 in line 2"),
        (b"\xff\xfe" + "participant_id\tsite\n".encode("utf-16-le"), "byte 0xff in line 1"),
        (b"participant_id\tsite\nsub-00\tA\nsub-01\t\0\0\n", "a zero byte in line 3"),
    ],
    ids=["latin-1", "utf-16", "binary"],
)
def test_a_table_of_participants_that_is_no_text_is_refused(toy, rng, content, found):
    root = toy.write_bids(rng, num_subjects=2, num_timepoints=5)
    (root / "participants.tsv").write_bytes(content)
    with pytest.raises(DataError, match=rf"participants\.tsv: expected text in UTF-8, found {found}: save the table"):
        find_recordings(bids(root))


def test_sidecar_of_brackets_refuses_its_recording_alone(toy, rng):
    root = toy.write_bids(rng, num_subjects=2)
    sidecar = next((root / "sub-00" / "func").glob("*bold.json"))
    sidecar.write_text("[" * 200_000 + "]" * 200_000)
    entries = find_recordings(bids(root)).entries
    assert "is not a readable JSON sidecar" in entries[0].refusal
    assert entries[1].refusal == ""


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "bids") if request.param == "local" else f"memory://{uuid.uuid4().hex}/bids"


def write_all(root, files):
    """Write files with any content: nothing but names, sidecars and sizes is looked at."""
    for path, content in files.items():
        with fsspec.open(f"{root}/{path}", "wb", auto_mkdir=True) as file:
            file.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def names(root, *paths, **settings):
    write_all(root, dict.fromkeys(paths, b"1234"))
    return find_recordings(bids(root, **settings)).entries


def test_local_and_remote_folders_give_the_same_entries(toy, rng):
    root = toy.write_bids(rng, num_subjects=3, num_timepoints=5)
    (root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    next((root / "sub-01" / "func").glob("*bold.json")).unlink()
    remote = f"memory://{uuid.uuid4().hex}/study/derivatives/fmriprep"
    fsspec.filesystem("memory").put(str(root), remote, recursive=True)
    here, there = find_recordings(bids(root)), find_recordings(bids(remote))
    assert [entry.tr_s for entry in there.entries] == [2.0, 1.5, 2.0]
    assert [entry.source for entry in there.entries] == [entry.source for entry in here.entries]
    assert [entry.file for entry in there.entries] == [f"{remote}/{entry.source}" for entry in here.entries]
    assert [entry.confounds.rpartition("/")[2] for entry in there.entries] == [
        entry.confounds.rpartition("/")[2] for entry in here.entries
    ]
    assert here.subjects.equals(there.subjects)
    assert inputs_hash(here.entries, here.subjects) == inputs_hash(there.entries, there.subjects)


def test_every_image_that_nilearn_finds_is_looked_at(toy, rng):
    root = toy.write_bids(rng, num_subjects=2, num_timepoints=5)
    shutil.copytree(root / "sub-00" / "func", root / "sub-00" / "ses-2" / "func")
    for path in (root / "sub-00" / "ses-2" / "func").iterdir():
        path.rename(path.with_name(path.name.replace("sub-00_", "sub-00_ses-2_")))
    (root / "sub-00" / "anat").mkdir()
    (root / "sub-00" / "anat" / "sub-00_task-rest_bold.nii.gz").write_bytes(b"")
    (root / "sub-00" / "figures" / "func").mkdir(parents=True)
    (root / "sub-00" / "figures" / "func" / "sub-00_task-rest_bold.nii.gz").write_bytes(b"")
    theirs = get_bids_files(root, file_tag="bold", file_type="nii*", modality_folder="func")
    assert sorted(entry.file for entry in find_recordings(bids(root)).entries) == sorted(theirs)


def test_resolutions_of_a_run_are_chosen_as_fmriprep_writes_them(root):
    paths = [f"{FUNC}_{MNI}_res-{res}_desc-preproc_bold.nii.gz" for res in ("1", "2")]
    plain = f"{FUNC}_{MNI}_desc-preproc_bold.nii.gz"
    with pytest.raises(
        DataError, match=r"found 2 .*res-1.*res-2.*source\.bids\.space, such as \[MNI152NLin6Asym:res-1\]"
    ):
        names(root, *paths)
    assert [e.source for e in names(root, bids={"space": ["MNI152NLin6Asym:res-2"]})] == paths[1:]
    assert [e.source for e in names(root, plain, bids={"space": ["MNI152NLin6Asym:res-native"]})] == [plain]
    with pytest.raises(DataError, match="expected NAME, NAME:res-X"):
        names(root, bids={"space": ["MNI152NLin6Asym:2"]})


def test_denoised_images_are_known_by_their_description(root):
    paths = [f"{FUNC}_{MNI}_desc-{desc}_bold.nii.gz" for desc in ("preproc", "smoothAROMAnonaggr")]
    with pytest.raises(DataError, match=r"source\.bids\.desc, such as \[preproc\]"):
        names(root, *paths)
    assert [e.denoised for e in names(root, bids={"desc": ["preproc"]})] == [""]
    assert [e.denoised for e in names(root, bids={"desc": ["smoothAROMAnonaggr"]})] == ["ICA-AROMA"]
    assert [e.denoised for e in names(root, bids={"desc": ["preproc"]}, denoised="FIX")] == ["FIX"]


def test_runs_tasks_and_acquisitions_are_recordings_and_echoes_are_not(root):
    stems = [f"{FUNC}_acq-a_run-{run}" for run in (1, 2)] + [FUNC.replace("rest", "nback")]
    paths = [f"{stem}_{MNI}_desc-preproc_bold.nii.gz" for stem in stems]
    echoes = [f"{stems[0]}_echo-{echo}_desc-preproc_bold.nii.gz" for echo in (1, 2, 3)]
    write_all(root, {f"{stems[0]}_desc-confounds_timeseries.tsv": b"a\n"})
    entries = names(root, *paths, *echoes)
    assert [entry.recording_id for entry in entries] == [
        "sub-01_ses-1_task-nback",
        "sub-01_ses-1_task-rest_acq-a_run-1",
        "sub-01_ses-1_task-rest_acq-a_run-2",
    ]
    assert [entry.refusal for entry in entries] == ["", "", ""]
    assert [entry.confounds.removeprefix(f"{root}/") for entry in entries] == [
        "",
        f"{stems[0]}_desc-confounds_timeseries.tsv",
        "",
    ]
    assert [bool(entry.confounds_stamp) for entry in entries] == [False, True, False]


def test_image_stored_twice_is_named_by_its_files(root):
    stem = f"{FUNC}_{MNI}_desc-preproc_bold"
    with pytest.raises(DataError, match=r"set one of these files aside: .*_bold\.nii, .*_bold\.nii\.gz"):
        names(root, f"{stem}.nii", f"{stem}.nii.gz")


def test_run_of_echoes_alone_is_refused_once(root):
    entries = names(root, *(f"{FUNC}_echo-{echo}_{MNI}_desc-preproc_bold.nii.gz" for echo in (1, 2, 3)))
    assert len(entries) == 1
    assert "3 single echoes and no combined image" in entries[0].refusal


def test_cifti_outputs_are_taken_when_asked_for(root):
    volume, dense = f"{FUNC}_{MNI}_desc-preproc_bold.nii.gz", f"{FUNC}_space-fsLR_den-91k_bold.dtseries.nii"
    write_all(root, {f"{FUNC}_space-fsLR_den-91k_bold.json": {"RepetitionTime": 0.8}})
    assert [e.source for e in names(root, volume, dense)] == [volume]
    for space in ("fsLR", "fsLR:den-91k"):
        (entry,) = names(root, bids={"space": [space], "desc": ["preproc"]})
        assert (entry.source, entry.space, entry.tr_s, entry.refusal) == (dense, "fsLR", 0.8, "")


def test_cifti_outputs_alone_say_what_to_set(root):
    (entry,) = names(root, f"{FUNC}_space-fsLR_den-91k_bold.dtseries.nii")
    assert "source.bids.space (such as [fsLR]) with a CIFTI atlas" in entry.refusal


def test_run_that_is_not_in_the_space_asked_for_is_refused_not_forgotten(root):
    paths = [f"{FUNC}_{MNI}_desc-preproc_bold.nii.gz", f"{FUNC}_space-T1w_desc-preproc_bold.nii.gz"]
    (entry,) = names(root, *paths, bids={"space": ["MNI152NLin2009cAsym"]})
    assert entry.refusal == "in space-MNI152NLin6Asym only, source.bids.space asks for MNI152NLin2009cAsym"


def test_subjects_that_the_table_lacks_are_named(root):
    stems = [f"sub-{number}/func/sub-{number}_task-rest_{MNI}_bold.nii.gz" for number in (1, 2, 3)]
    write_all(root, {"participants.tsv": b"participant_id\tage\nsub-1\t30\nsub-9\t40\n"})
    with pytest.raises(DataError, match=r"does not list 2 of 3 subjects that have recordings: 2, 3.*allow_unlisted"):
        names(root, *stems)
    source = find_recordings(bids(root, allow_unlisted=True))
    np.testing.assert_array_equal(source.subjects["age"], [30, np.nan, np.nan])
    assert source.warnings == [
        "2 subjects are not in the table of phenotypes: 2, 3",
        "1 subjects of the table of phenotypes have no recording",
    ]


def test_phenotypes_lie_above_the_derivatives(root):
    inside = f"{root}/derivatives/fmriprep"
    write_all(root, {"participants.tsv": b"participant_id\tage\tsite\nsub-01\t30\tNA\n"})
    entry = names(inside, f"{FUNC}_{MNI}_bold.nii.gz")[0]
    assert find_recordings(bids(inside)).subjects["age"].tolist() == [30]
    assert entry.site == ""  # a missing site is no site called NA


def test_cohort_without_phenotypes_is_noted(root):
    names(root, f"{FUNC}_{MNI}_bold.nii.gz")
    source = find_recordings(bids(root))
    assert source.warnings == ["there is no participants.tsv: no phenotypes"]
    assert source.subjects["subject"].tolist() == ["01"]


def test_sidecar_of_any_size_is_never_read(toy, rng, monkeypatch):
    root = toy.write_bids(rng, num_subjects=2, num_timepoints=5)
    sidecar = next((root / "sub-00" / "func").glob("*bold.json"))
    with sidecar.open("wb") as file:
        file.truncate(MAX_SIDECAR_BYTES + 1)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(root), "/large/study", recursive=True)
    try:
        for place in (root, "memory://large/study"):
            entries = find_recordings(bids(place)).entries
            assert re.search(rf"bold\.json has {MAX_SIDECAR_BYTES + 1} bytes: expected a JSON", entries[0].refusal)
            assert entries[1].refusal == ""
    finally:
        filesystem.rm("/large", recursive=True)


def test_sidecar_of_remote_confounds_is_not_copied_whatever_its_size(rng):
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/large/confounds.tsv", b"csf\n1\n")
    filesystem.pipe_file("/large/confounds.json", bytes(MAX_SIDECAR_BYTES + 1))
    try:
        expected = rf"confounds\.json has {MAX_SIDECAR_BYTES + 1} bytes"
        with pytest.raises(DataError, match=expected), local_input("memory://large/confounds.tsv"):
            pass
    finally:
        filesystem.rm("/large", recursive=True)


@pytest.fixture
def s3_bucket(monkeypatch):
    """A bucket on an S3 server over HTTP on the loopback interface."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("inputs")
    yield "s3://inputs"
    S3FileSystem.clear_instance_cache()
    with warnings.catch_warnings():  # s3fs leaves its connections to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    server.stop()


def test_inputs_on_a_real_s3_server_are_those_on_local_disk(toy, rng, s3_bucket):
    root = toy.write_bids(rng, num_subjects=3, num_timepoints=5)
    fsspec.filesystem("s3").put(str(root), f"{s3_bucket}/study", recursive=True)
    here, there = find_recordings(bids(root)), find_recordings(bids(f"{s3_bucket}/study"))
    assert inputs_hash(here.entries, here.subjects) == inputs_hash(there.entries, there.subjects)
    assert [entry.tr_s for entry in there.entries] == [2.0, 2.0, 2.0]
    pattern = {"kind": "pattern", "path": f"{s3_bucket}/study", "pattern": "sub-{subject}/func/*_bold.nii.gz"}
    entries = find_recordings(build(SourceSettings, pattern, "test")).entries
    assert [entry.file_stamp for entry in entries] == [entry.file_stamp for entry in there.entries]
    lines = [f"{entry.subject}\t{entry.source}\n" for entry in there.entries]
    with fsspec.open(f"{s3_bucket}/study/list.tsv", "w") as file:
        file.write("participant_id\tfile\n" + "".join([*lines, "x\tabsent.nii.gz\n"]))
    series = {"kind": "table", "path": f"{s3_bucket}/study/list.tsv"}
    listed = find_recordings(build(SourceSettings, series, "test")).entries
    assert [entry.file_stamp for entry in listed] == [*(entry.file_stamp for entry in there.entries), ""]
    with local_input(listed[0].file) as copy:
        assert copy.read_bytes() == (root / listed[0].source).read_bytes()
        assert copy.name == listed[0].source.rpartition("/")[2]
