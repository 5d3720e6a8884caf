"""What is found in a table or a BIDS folder, and what is refused at once."""

import json

import numpy as np
import pandas as pd
import pytest

from brainlm.config import build
from brainlm.errors import DataError
from data_prep.settings import SourceSettings
from data_prep.sources import find_recordings


def table(folder, text, **settings):
    (folder / "list.tsv").write_text(text)
    return build(SourceSettings, {"kind": "table", "path": str(folder / "list.tsv"), **settings}, "test")


def bids(root, **settings):
    return build(SourceSettings, {"kind": "bids", "path": str(root), **settings}, "test")


def test_table_makes_ids_from_bids_words_and_paths_from_patterns(tmp_path):
    settings = table(
        tmp_path,
        "participant_id\tses\tsex(1=M,2=F)\nsub-007\t1\t2\nsub-007\t2\t2\n",
        columns={"session": "ses", "file": "{participant_id}/{sex(1=M,2=F)}-{ses}.npy"},
        phenotypes=["sex(1=M,2=F)"],
        tr_s=2.0,
    )
    source = find_recordings(settings)
    assert [entry.recording_id for entry in source.entries] == ["sub-007_ses-1", "sub-007_ses-2"]
    assert source.entries[0].source == "sub-007/2-1.npy"
    assert source.entries[0].file == str(tmp_path / "sub-007" / "2-1.npy")
    assert source.entries[0].tr_s == 2.0
    assert len(source.subjects) == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_tables_are_read_alike(tmp_path, kind):
    frame = pd.DataFrame({"participant_id": ["a", "b"], "file": ["a.npy", "b.npy"], "age": [30.5, np.nan]})
    path = tmp_path / f"list.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    settings = build(SourceSettings, {"kind": "table", "path": str(path), "phenotypes": ["age"]}, "test")
    source = find_recordings(settings)
    assert [entry.subject for entry in source.entries] == ["a", "b"]
    assert np.isnan(source.subjects["age"][1])


@pytest.mark.parametrize("bad", ["a.b", "a b", "a/b"])
def test_ids_that_cannot_be_file_names_are_refused(tmp_path, bad):
    with pytest.raises(DataError, match="without dots, slashes or blanks; found .*" + bad):
        find_recordings(table(tmp_path, f"participant_id\tfile\n{bad}\tx.npy\n"))


def test_recordings_found_twice_are_named(tmp_path):
    with pytest.raises(DataError, match=r"found twice: sub-a \(x.npy\), sub-a \(y.npy\)"):
        find_recordings(table(tmp_path, "participant_id\tfile\na\tx.npy\na\ty.npy\nb\tz.npy\n"))


def test_absent_columns_are_named_beside_those_that_exist(tmp_path):
    with pytest.raises(DataError, match=r"no column 'file' \(it has participant_id, path\)"):
        find_recordings(table(tmp_path, "participant_id\tpath\na\tx.npy\n"))


def test_two_values_of_a_phenotype_for_one_subject_are_named(tmp_path):
    text = "participant_id\tsession\tfile\tage\na\t1\tx.npy\t30\na\t2\ty.npy\t31\nb\t1\tz.npy\t20\n"
    with pytest.raises(DataError, match="subject a: age is 30 and 31"):
        find_recordings(table(tmp_path, text, columns={"session": "session"}, phenotypes=["age"]))


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


@pytest.mark.parametrize("value", ["[2.0]", "[2.0, 2.0]", '{"s": 2}', '"two"'])
def test_sidecar_without_a_number_refuses_its_recording_alone(toy, rng, value):
    root = toy.write_bids(rng, num_subjects=2)
    sidecar = next((root / "sub-00" / "func").glob("*bold.json"))
    sidecar.write_text(f'{{"RepetitionTime": {value}}}')
    entries = find_recordings(bids(root)).entries
    assert "RepetitionTime: expected a number, found" in entries[0].refusal
    assert entries[1].refusal == ""


def test_one_person_has_one_name_with_and_without_the_prefix(tmp_path):
    settings = table(
        tmp_path,
        "participant_id\tses\tfile\nsub-0050272\t1\tx.npy\n0050272\t2\ty.npy\n",
        columns={"session": "ses"},
    )
    source = find_recordings(settings)
    assert [entry.subject for entry in source.entries] == ["0050272", "0050272"]
    assert [entry.recording_id for entry in source.entries] == ["sub-0050272_ses-1", "sub-0050272_ses-2"]
    assert source.subjects["subject"].tolist() == ["0050272"]


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    settings = table(tmp_path, "")
    text = "participant_id\tfile\tage\r\n0050272\tx.npy\tn/a\r\n0050273\ty.npy\t31\r\n"
    (tmp_path / "list.tsv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = find_recordings(settings)
    assert [(entry.subject, entry.source) for entry in source.entries] == [("0050272", "x.npy"), ("0050273", "y.npy")]
