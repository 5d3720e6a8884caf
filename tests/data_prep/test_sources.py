"""What is found in a table, and how phenotypes and splits are joined to it."""

import os
import tracemalloc
import uuid

import fsspec
import numpy as np
import pandas as pd
import pytest

from brainlm.config import build
from brainlm.errors import DataError
from data_prep.read_table import category, read_table
from data_prep.settings import SourceSettings
from data_prep.source_entry import SourceEntry
from data_prep.sources import find_recordings, inputs_hash
from data_prep.words import denoised_by


def table(folder, text, **settings):
    (folder / "list.tsv").write_text(text)
    return build(SourceSettings, {"kind": "table", "path": str(folder / "list.tsv"), **settings}, "test")


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


def test_tables_and_files_may_lie_on_object_storage(tmp_path):
    root = f"memory://{uuid.uuid4().hex}/study"
    text = "participant_id\tfile\tconfounds\nb\tts/b.npy\tts/b.tsv\na\tts/a.npy\tn/a\nc\tts/c.npy\tts/c.tsv\n"
    for name, content in (("list.tsv", text), ("ts/a.npy", "1"), ("ts/b.npy", "12"), ("ts/b.tsv", "123")):
        with fsspec.open(f"{root}/{name}", "w") as file:
            file.write(content)
    (tmp_path / "list.tsv").write_text(text)
    columns = {"confounds": "confounds"}
    remote = {"kind": "table", "path": f"{root}/list.tsv", "columns": columns}
    local = {"kind": "table", "path": str(tmp_path / "list.tsv"), "root": root, "columns": columns}
    for tree in (remote, local):
        entries = find_recordings(build(SourceSettings, tree, "test")).entries
        assert [entry.file for entry in entries] == [f"{root}/ts/{name}.npy" for name in "abc"]
        assert [entry.source for entry in entries] == ["ts/a.npy", "ts/b.npy", "ts/c.npy"]
        assert [entry.file_stamp.partition(":")[0] for entry in entries] == ["1", "2", ""]
        assert [entry.confounds_stamp.partition(":")[0] for entry in entries] == ["", "3", ""]
        assert entries[0].confounds == ""


def test_files_may_be_named_by_whole_paths_and_urls(tmp_path):
    text = f"participant_id\tfile\na\t{tmp_path}/far/a.npy\nb\ts3://bucket/far/b.npy\n"
    settings = table(tmp_path, text.replace("s3://bucket", "memory://bucket"), root=str(tmp_path / "root"))
    entries = find_recordings(settings).entries
    assert [entry.file for entry in entries] == [f"{tmp_path}/far/a.npy", "memory://bucket/far/b.npy"]
    assert [entry.source for entry in entries] == ["far/a.npy", "far/b.npy"]


def test_what_has_denoised_a_recording_is_told_by_column_name_or_setting(tmp_path):
    settings = table(
        tmp_path,
        "participant_id\tfile\thow\na\tx.nii\tFIX\nb\ty_desc-smoothAROMAnonaggr_bold.nii\tn/a\nc\tz.nii\tNA\n",
        columns={"denoised": "how"},
        denoised="by hand",
    )
    assert [entry.denoised for entry in find_recordings(settings).entries] == ["FIX", "ICA-AROMA", "by hand"]


def test_splits_are_given_by_a_column_and_wrong_ones_are_named(tmp_path):
    text = "participant_id\tfile\tfold\na\tx.npy\ttrain\nb\ty.npy\ttest\nc\tz.npy\tn/a\n"
    source = find_recordings(table(tmp_path, text), "fold")
    assert [entry.split for entry in source.entries] == ["train", "test", ""]
    with pytest.raises(DataError, match=r"'fold' of 1 recordings is none of train, val, test: sub-b \('Test'\)"):
        find_recordings(table(tmp_path, text.replace("test", "Test")), "fold")
    with pytest.raises(DataError, match="no column 'fold2'"):
        find_recordings(table(tmp_path, text), "fold2")


def test_phenotypes_of_another_table_join_by_subject(tmp_path):
    people = tmp_path / "people.csv"
    people.write_text("participant_id,age,site,family,fold\nsub-a,30,S1,F1,train\nb,NA,NA,NA,test\nz,9,S1,F1,val\n")
    text = "participant_id\tfile\nsub-b\ty.npy\na\tx.npy\n"
    settings = table(tmp_path, text, participants=str(people), phenotypes=["age"])
    source = find_recordings(settings, "fold")
    assert [(e.subject, e.site, e.family, e.split) for e in source.entries] == [
        ("a", "S1", "F1", "train"),
        ("b", "", "", "test"),  # two people without a known family must not become one family
    ]
    np.testing.assert_array_equal(source.subjects["age"], [30, np.nan])
    people.write_text("participant_id,age\na,30\n")
    with pytest.raises(DataError, match="does not list 1 of 2 subjects that have recordings: b"):
        find_recordings(settings)
    people.write_text("participant_id,age\na,30\nb,1\nsub-a,31\n")
    with pytest.raises(DataError, match="subject a: age is 30 and 31"):
        find_recordings(settings)
    people.write_text("participant_id,age\na,30\nb,1\na,30\n")
    assert find_recordings(settings).subjects["age"].tolist() == [30, 1]
    people.write_text("participant_id,age\na,30\n,3\n")
    with pytest.raises(DataError, match="1 rows have no participant_id"):
        find_recordings(settings)


def test_missing_and_given_value_of_one_subject_are_two_values(tmp_path):
    text = "participant_id\tses\tfile\tage\na\t1\tx.npy\t30\na\t2\ty.npy\tn/a\n"
    with pytest.raises(DataError, match=r"subject a: age is 30\.0 and missing"):
        find_recordings(table(tmp_path, text, columns={"session": "ses"}, phenotypes=["age"]))


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_missing_values_stay_missing_and_names_stay_names(tmp_path, kind):
    frame = pd.DataFrame(
        {
            "name": ["NA", "nan", "None", "null", "007"],
            "age": [1.5, None, 3, None, 5],
            "sex": ["M", None, "F", "", "NA"],
        }
    )
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t", na_rep="n/a")
    table_read = read_table(path, ["name"])
    assert table_read["name"].tolist() == ["NA", "nan", "None", "null", "007"]
    np.testing.assert_array_equal(table_read["age"], [1.5, np.nan, 3, np.nan, 5])
    assert [category(value) for value in table_read["sex"]] == ["M", "", "F", "", ""]
    assert read_table(path, ["name"], ["age", "absent"]).columns.tolist() == ["age"]


def test_numbers_keep_every_digit(tmp_path, rng):
    values = rng.normal(size=500) * 10.0 ** rng.integers(-30, 30, size=500)
    (tmp_path / "t.csv").write_text("x\n" + "\n".join(map(repr, values.tolist())) + "\n")
    np.testing.assert_array_equal(read_table(tmp_path / "t.csv", [])["x"], values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\ta\n1\t2\t3\n", "several columns are called 'a'"),
        ("a\tb\n1\t2\t3\n", "line 2 has 3 cells, the header 2"),
        ("a\tb\n1\t2\n1\t2\t3\n", "line 3 has 3 cells, the header 2"),
        ("", "the table is empty"),
    ],
)
def test_tables_whose_cells_would_shift_are_refused(tmp_path, text, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.tsv", [])


def test_hash_of_inputs_knows_values_and_sizes_but_not_places_and_times(tmp_path):
    def found(folder, age="30", size=4):
        folder.mkdir(exist_ok=True)
        (folder / "x.npy").write_bytes(b"1" * size)
        source = find_recordings(table(folder, f"participant_id\tfile\tage\na\tx.npy\t{age}\n", phenotypes=["age"]))
        return inputs_hash(source.entries, source.subjects)

    before = found(tmp_path / "one")
    assert found(tmp_path / "two") == before
    os.utime(tmp_path / "one" / "x.npy", (1, 1))
    assert found(tmp_path / "one") == before
    assert found(tmp_path / "one", age="31") != before
    assert found(tmp_path / "one", size=5) != before
    assert found(tmp_path / "one", age="n/a") != found(tmp_path / "one", age="0")


def entries_of(count):
    return [
        SourceEntry(
            recording_id=f"sub-{n:06d}", subject=f"{n:06d}", file=f"/d/{n}.npy", source=f"{n}.npy", file_stamp="4:5"
        )
        for n in range(count)
    ]


def test_hash_of_inputs_needs_no_memory_that_grows(monkeypatch):
    monkeypatch.setattr("data_prep.sources.ROWS_AT_ONCE", 500)
    peaks = []
    for count in (1_000, 8_000):
        entries = entries_of(count)
        subjects = pd.DataFrame({"subject": [entry.subject for entry in entries], "age": 1.0})
        tracemalloc.start()
        inputs_hash(entries, subjects)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 * peaks[0]


def test_long_tables_are_listed_in_blocks_in_the_order_of_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.listed_files.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("data_prep.packed_entries.ENTRIES_PER_BLOCK", 10)
    monkeypatch.setattr("data_prep.packed_entries.ENTRIES_PER_RUN", 16)
    numbers = np.random.default_rng(0).permutation(100)
    for number in range(0, 100, 2):
        (tmp_path / f"{number:06d}.npy").write_bytes(b"x" * number)
    rows = "\n".join(f"{n:06d}\t{n:06d}.npy\t{20 + n % 60}" for n in numbers)
    source = find_recordings(table(tmp_path, f"participant_id\tfile\tage\n{rows}\n", phenotypes=["age"]))
    assert [entry.recording_id for entry in source.entries] == [f"sub-{n:06d}" for n in range(100)]
    sizes = [entry.file_stamp.partition(":")[0] for entry in source.entries]
    assert sizes == [str(n) if n % 2 == 0 else "" for n in range(100)]
    assert source.subjects["age"].tolist() == [20 + n % 60 for n in range(100)]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("sub-1_task-rest_space-MNI152NLin6Asym_desc-smoothAROMAnonaggr_bold.nii.gz", "ICA-AROMA"),
        ("sub-1_task-rest_space-MNI152NLin6Asym_desc-denoisedSmoothed_bold.nii.gz", "denoised"),
        ("rfMRI_REST1_LR_hp2000_clean.nii.gz", "FIX"),
        ("rfMRI_REST1_LR_Atlas_MSMAll_hp0_clean_rclean_tclean.dtseries.nii", "FIX"),
        ("rfMRI.ica/filtered_func_data_clean.nii.gz", "FIX"),
        ("denoised_func_data_nonaggr.nii.gz", "ICA-AROMA"),
        ("sub-1_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", ""),
        ("hp2000_clean/rfMRI_REST1_LR_hp2000.nii.gz", ""),
        ("filtered_func_data.nii.gz", ""),
    ],
)
def test_names_tell_what_was_denoised(name, meaning):
    assert denoised_by(name) == meaning
