"""The inspection: silent on a sound data set, and clear about each way in which one can be damaged or hostile."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from google_crc32c import value as crc32c
from numcodecs import Zstd

from brainlm.dataset import open_dataset
from brainlm.errors import DataError
from brainlm.scaling import centre
from brainlm.shards import encode_shard, write_shard
from brainlm.store import Store
from data_prep import check_archive, inspect_dataset
from data_prep.finish import content_hash
from data_prep.one_recording import series_sha256
from data_prep.parquet_tables import write_parquet
from data_prep.zstd_size import MAGIC, unpacked_size


@pytest.fixture
def data_set(toy, tmp_path, tmp_path_factory):
    """A copy, to be altered, of a data set with censored timepoints and a missing parcel."""
    made = tmp_path_factory.getbasetemp() / "inspected"
    if not made.exists():
        rng = np.random.default_rng(3)
        source = toy.write_bids(rng, num_subjects=8)
        for number in (1, 4):
            stem = source / f"sub-{number:02d}" / "func" / f"sub-{number:02d}_task-rest"
            path = Path(f"{stem}_desc-confounds_timeseries.tsv")
            table = pd.read_csv(path, sep="\t")
            table.loc[20:22, "trans_x"] += 20.0
            table.to_csv(path, sep="\t", index=False, na_rep="n/a")
            series = toy.write_series(rng)
            series[:, 2] = 0
            toy.write_image(Path(f"{stem}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"), toy.paint(series))
        settings = toy.settings(
            source,
            clean={"scrub": {"fd_mm": 10.0, "std_dvars": None, "min_segment": 0}},
            shards={"dtype": "float16", "recordings_per_shard": 3},
        )
        settings["out"] = str(made)
        assert toy.prepare(settings) == 0
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def lines(folder, capsys, *options):
    """Inspect; return faults and notes, and check that the exit status says whether there are faults."""
    capsys.readouterr()
    status = inspect_dataset.main([str(folder), *options])
    found = capsys.readouterr().out.splitlines()
    faults = [line for line in found if line.startswith("fault")]
    assert status == (1 if faults else 0)
    return faults, [line for line in found if line.startswith("note")]


def faults(folder, capsys, *options):
    return "\n".join(lines(folder, capsys, *options)[0])


def edit_json(folder, name, change):
    path = folder / name
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def recordings(folder):
    return pd.read_parquet(folder / "recordings.parquet")


def rehash(folder):
    """Give the manifest the content hash of what is there now, as somebody who forges a data set would."""
    dataset = open_dataset(str(folder))
    new = content_hash(dataset.manifest["shards"], dataset.contract, recordings(folder))
    edit_json(folder, "dataset.json", lambda tree: tree.update(content_hash=new))


def forge_table(folder, table):
    write_parquet(Store(str(folder)), "recordings.parquet", table)
    rehash(folder)


def forge_tar(folder, name, data):
    """Replace a tar, and say so in index and manifest."""
    (folder / "shards" / f"{name}.tar").write_bytes(data)
    facts = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder, f"shards/{name}.index.json", lambda tree: tree.update(facts))
    edit_json(
        folder,
        "dataset.json",
        lambda tree: [row.update(facts) for rows in tree["shards"].values() for row in rows if row["name"] == name],
    )
    rehash(folder)


def archive(folder, name):
    return zarr.open_group(str(folder / "recordings.zarr"), mode="r+")[name]


def test_sound_data_set_has_no_fault_and_its_tables_are_printed(data_set, capsys, tmp_path):
    assert inspect_dataset.main([str(data_set), "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "8 recordings of 8 subjects, no fault found" in out
    assert [line.split() for line in out.splitlines()[1:3]] == [["2", "4", "4", "0", f"site{n}"] for n in "01"]
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["num_faults"] == 0
    assert told["counts"] == {"recordings": 8, "subjects": 8, "timepoints": 480}
    assert {row["site"] for row in told["repetition_times"]} == {"site0", "site1"}
    assert lines(data_set, capsys, "--quick")[0] == []
    table = recordings(data_set)
    assert (table["num_kept"] < table["num_timepoints"]).sum() == 2  # so that the tests below mean something
    assert (table["num_missing_parcels"] == 1).sum() == 2


def test_recordings_longer_than_a_block_are_checked_alike(data_set, capsys, monkeypatch):
    monkeypatch.setattr(check_archive, "BLOCK_MB", 7 * 4 * 6 / 1024**2)  # seven timepoints
    assert lines(data_set, capsys)[0] == []
    archive(data_set, "bold")[9, 0] += 1
    assert "has changed (sha256)" in faults(data_set, capsys)


def test_nothing_in_the_data_set_is_changed(data_set, capsys, tree_bytes):
    before = tree_bytes(data_set)
    lines(data_set, capsys)
    assert tree_bytes(data_set) == before


def test_changed_byte_of_a_tar_is_found(data_set, capsys):
    tar = data_set / "shards" / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[1500] ^= 1
    tar.write_bytes(data)
    assert "train-00000.tar: its bytes have changed (sha256)" in faults(data_set, capsys)
    tar.write_bytes(data[:-512])
    assert f"{len(data) - 512} bytes, dataset.json says {len(data)}" in faults(data_set, capsys, "--quick")
    tar.unlink()
    assert "train-00000" in faults(data_set, capsys)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_series_of_another_recording_under_a_right_hash_is_found(data_set, capsys, dtype):
    table = recordings(data_set).set_index("recording_id")
    shard = [
        entry
        for entry in open_dataset(str(data_set)).split("train").entries
        if table.loc[entry.recording_id, "shard"] == "train-00000"
    ]
    series = []
    for entry in shard:
        rows = slice(table.loc[entry.recording_id, "first_row"], None)
        bold, keep_mask = (archive(data_set, name)[rows][: entry.num_timepoints] for name in ("bold", "keep_mask"))
        series.append(centre(np.nan_to_num(bold), keep_mask))
    data, entries = encode_shard(list(zip(shard, series)), dtype)

    def write():
        row = write_shard(Store(str(data_set)), "train-00000", data, entries)
        edit_json(data_set, "dataset.json", lambda tree: tree["shards"]["train"].__setitem__(0, row))
        rehash(data_set)

    write()
    assert lines(data_set, capsys)[0] == []  # written again as it was, it is still sound
    data, entries = encode_shard(list(zip(shard, [series[1], series[0], *series[2:]])), dtype)
    write()
    found = lines(data_set, capsys)[0]
    assert sum("its series is not the archive's, centred" in line for line in found) == 2
    assert "is not the archive's" in faults(data_set, capsys, "--quick")


def test_changed_value_hole_and_infinity_in_the_archive_are_found(data_set, capsys):
    table = recordings(data_set)
    bold = archive(data_set, "bold")
    first = table["first_row"].tolist()
    bold[first[0] + 3, 0] += 1
    bold[first[2] + 5, 1] = np.nan
    bold[first[3] + 5, 1] = np.inf
    found = faults(data_set, capsys)
    for row in (0, 2, 3):
        assert f"{table['recording_id'][row]}: its series in the archive has changed (sha256)" in found
    assert f"{table['recording_id'][2]}: values that are not numbers in columns [1]" in found
    assert f"{table['recording_id'][3]}: 1 infinite values" in found


def test_missing_parcels_must_agree_between_archive_coverage_table_and_index(data_set, capsys):
    table = recordings(data_set)
    row = table.index[table["num_missing_parcels"] == 0][0]
    rows = slice(table["first_row"][row], table["first_row"][row] + table["num_timepoints"][row])
    name = table["recording_id"][row]
    archive(data_set, "bold")[rows, 3] = np.nan
    table.loc[row, "sha256"] = series_sha256(np.asarray(archive(data_set, "bold")[rows]))
    forge_table(data_set, table)
    found = faults(data_set, capsys)
    assert "sha256" not in found
    assert f"{name}: 1 parcels are missing, the table says 0" in found
    assert f"{name}: index and archive miss different parcels [3]" in found
    archive(data_set, "coverage")[table["archive_row"][1], :2] = 0
    assert "values and coverage contradict each other: signal without coverage in [0, 1]" in faults(data_set, capsys)
    archive(data_set, "coverage")[table["archive_row"][1], :2] = 7
    assert "coverage that is no fraction" in faults(data_set, capsys)


def test_censored_timepoints_must_be_those_of_the_archive(data_set, capsys):
    table = recordings(data_set)
    row = table.index[table["num_kept"] < table["num_timepoints"]][0]
    first = table["first_row"][row]
    keep_mask = archive(data_set, "keep_mask")
    censored = int(np.flatnonzero(~keep_mask[first : first + 60])[0])
    keep_mask[first + censored] = True
    found = faults(data_set, capsys)
    assert f"{table['recording_id'][row]}: its censored timepoints are not the archive's" in found
    assert f"{table['num_kept'][row] + 1} timepoints are kept, the table says {table['num_kept'][row]}" in found


def test_values_where_nobody_is_are_found(data_set, capsys):
    rows = archive(data_set, "bold").shape[0]
    archive(data_set, "bold").resize((rows + 40, 6))
    archive(data_set, "keep_mask").resize((rows + 40,))
    archive(data_set, "coverage").resize((10, 6))
    assert lines(data_set, capsys)[0] == []
    archive(data_set, "bold")[rows + 5, 2] = 1.0
    assert f"rows {rows} to {rows + 40} belong to no recording and hold values" in faults(data_set, capsys)
    archive(data_set, "bold")[rows + 5, 2] = np.nan
    archive(data_set, "coverage")[9, 1] = 0.5
    assert "rows of coverage of no recording hold values: [9]" in faults(data_set, capsys)


def test_subject_in_two_splits_is_found(data_set, capsys):
    table = recordings(data_set)
    train, test = (table.index[table["split"] == split][0] for split in ("train", "test"))
    table.loc[train, "subject"] = table.loc[test, "subject"]
    forge_table(data_set, table)
    found = faults(data_set, capsys)
    assert f"subject {table.loc[test, 'subject']}: in several splits: test, train" in found
    assert f"{table.loc[train, 'recording_id']}: the index says subject" in found
    assert "train: dataset.json says" not in found
    assert "hashes" not in found


def test_a_family_in_two_splits_is_a_fault_where_it_was_to_be_kept_together(data_set, capsys):
    table = recordings(data_set)
    table["family"] = "one"
    forge_table(data_set, table)
    found, notes = lines(data_set, capsys)
    assert found == []
    assert any("family one: in several splits (test, train, val)" in line for line in notes)
    edit_json(data_set, "dataset.json", lambda tree: tree["cohorts"][0]["config"]["splits"].update(group_by="family"))
    assert "family one: in several splits: test, train, val" in faults(data_set, capsys)
    edit_json(data_set, "dataset.json", lambda tree: tree["cohorts"][0]["config"]["splits"].update(group_by="age"))
    subjects = pd.read_parquet(data_set / "subjects.parquet")
    write_parquet(Store(str(data_set)), "subjects.parquet", subjects.assign(age=20))
    assert "age 20: in several splits" in faults(data_set, capsys)


def test_equal_series_across_splits_and_unlisted_ones_are_found(data_set, capsys):
    table = recordings(data_set)
    train = table.index[table["split"] == "train"]
    table.loc[train[1], "series_sha256"] = table.loc[train[0], "series_sha256"]
    forge_table(data_set, table)
    pair = sorted(table.loc[train[:2], "recording_id"])
    assert f"{', '.join(pair)}: equal series that dataset.json does not list" in faults(data_set, capsys)
    edit_json(data_set, "dataset.json", lambda tree: tree.update(duplicates=[pair]))
    found, notes = lines(data_set, capsys)
    assert found == []
    assert any(f"{', '.join(pair)}: equal series, in one split" in line for line in notes)
    test = table.index[table["split"] == "test"][0]
    table.loc[test, "series_sha256"] = table.loc[train[0], "series_sha256"]
    forge_table(data_set, table)
    assert "equal series in several splits" in faults(data_set, capsys)


def test_folds_that_part_a_subject_or_name_strangers_are_found(data_set, capsys):
    table = recordings(data_set)
    folds = pd.DataFrame({"recording_id": table["recording_id"], "fold": ["A", "B"] * 4})
    table["series_sha256"] = [*table["series_sha256"][:6], "same", "same"]
    forge_table(data_set, table)
    folds.loc[len(folds)] = ["stranger", "A"]
    folds.loc[len(folds)] = [table["recording_id"][0], "B"]
    write_parquet(Store(str(data_set)), "folds.parquet", folds)
    found = faults(data_set, capsys)
    assert "series same: in several folds: A, B" in found
    assert "1 recordings are not in recordings.parquet: stranger" in found
    assert f"in two folds: {table['recording_id'][0]}" in found


def test_counts_refusals_subjects_and_content_hash_are_checked(data_set, capsys):
    def change(tree):
        tree["counts"]["train"]["subjects"] += 1
        tree["num_refused"] = 5
        tree["content_hash"] = "0" * 64

    edit_json(data_set, "dataset.json", change)
    subjects = pd.read_parquet(data_set / "subjects.parquet")
    gone = subjects["subject"][0]
    write_parquet(Store(str(data_set)), "subjects.parquet", subjects.iloc[1:])
    found = faults(data_set, capsys)
    assert "train: dataset.json says {'recordings'" in found
    assert "0 rows, dataset.json says 5" in found
    assert "the content hash does not fit" in found
    assert f"1 subjects are not there: {gone}" in found


def test_repetition_times_that_contradict_one_another_are_found(data_set, capsys):
    table = recordings(data_set)
    table.loc[0, "tr_s"] = 2.5
    table.loc[1, "resampled"] = True
    forge_table(data_set, table)
    found = faults(data_set, capsys)
    assert f"1 recordings do not have the TR 2 s: {table['recording_id'][0]}" in found
    assert f"resampled contradicts source_tr_s and tr_s: {', '.join(table['recording_id'][:2])}" in found


def test_statistics_of_other_series_are_found(data_set, capsys):
    contract = json.loads((data_set / "input_contract.json").read_text())
    contract["median"][2] += 0.5 * contract["iqr"][2]
    contract["iqr"][1] *= 50
    (data_set / "input_contract.json").write_text(json.dumps(contract))
    rehash(data_set)
    names = contract["atlas"]["parcel_names"]
    found = faults(data_set, capsys)
    assert f"1 medians are not those of the train series: {names[2]}" in found
    assert f"1 IQRs cannot be those of the train series: {names[1]}" in found


def test_parcels_that_never_vary_are_noted(data_set, capsys):
    contract = json.loads((data_set / "input_contract.json").read_text())
    contract["iqr"][1] = 0.0
    (data_set / "input_contract.json").write_text(json.dumps(contract))
    rehash(data_set)
    assert any("IQR 0, masked out" in line for line in lines(data_set, capsys)[1])
    contract["iqr"] = [0.0] * 6
    (data_set / "input_contract.json").write_text(json.dumps(contract))
    rehash(data_set)
    assert "no parcel is usable" in faults(data_set, capsys)


def test_leftovers_are_noted_and_are_no_fault(data_set, capsys):
    for name in ("staging/x.npz", "shards/train-00099.tar", "recordings.parquet.tmp", "shards/a.tar.tmp", "mine.txt"):
        (data_set / name).parent.mkdir(exist_ok=True)
        (data_set / name).write_bytes(b"")
    found, notes = lines(data_set, capsys)
    assert found == []
    told = "\n".join(notes)
    assert "staging: left by a stopped run" in told
    assert "recordings.parquet.tmp: left by a stopped run" in told
    assert "shards/a.tar.tmp: left by a stopped run" in told
    assert "shards/train-00099.tar: not of this data set" in told
    assert "mine.txt: not of this data set" in told


def test_rows_of_a_stopped_addition_are_not_part_of_the_data_set(data_set, capsys):
    table = recordings(data_set)
    more = table.iloc[:1].assign(recording_id="new", addition=1, first_row=10**6, archive_row=99)
    write_parquet(Store(str(data_set)), "recordings.parquet", pd.concat([table, more], ignore_index=True))
    assert lines(data_set, capsys)[0] == []


def test_a_data_set_without_the_newer_columns_is_read(data_set, capsys):
    new = ["archive_row", "num_kept", "tsnr", "mean_coverage", "num_constant_parcels", "duration_s", "denoised"]
    write_parquet(Store(str(data_set)), "recordings.parquet", recordings(data_set).drop(columns=new))
    edit_json(data_set, "dataset.json", lambda tree: tree.pop("cohorts"))
    found, notes = lines(data_set, capsys)
    assert found == []
    assert any("made by an earlier version" in line for line in notes)


def with_member(data, name, kind=tarfile.REGTYPE, link="", size=3):
    """Return the bytes of a tar with one more member, as `tarfile` would append it."""
    tar = io.BytesIO(data)
    with tarfile.open(fileobj=tar, mode="a", format=tarfile.USTAR_FORMAT) as file:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        member.size = size if kind == tarfile.REGTYPE else 0
        file.addfile(member, io.BytesIO(b"x" * size))
    return tar.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("../../evil.npy", tarfile.REGTYPE, "has .. in its name"),
        ("/etc/evil.npy", tarfile.REGTYPE, "has an absolute name"),
        ("a/evil.npy", tarfile.REGTYPE, "lies in a folder"),
        ("evil.npy", tarfile.REGTYPE, "'evil.npy' is not in the index"),
        ("link.npy", tarfile.SYMTYPE, "is no plain file"),
        ("hard.npy", tarfile.LNKTYPE, "is no plain file"),
        ("device.npy", tarfile.CHRTYPE, "is no plain file"),
        ("TWICE", tarfile.REGTYPE, "is there twice"),
    ],
)
def test_members_that_no_shard_has_are_found(data_set, capsys, name, kind, said):
    data = (data_set / "shards" / "train-00000.tar").read_bytes()
    if name == "TWICE":
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            name = tar.getnames()[0]
    forge_tar(data_set, "train-00000", with_member(data, name, kind, link="/etc/passwd"))
    for option in ((), ("--quick",)):
        found = lines(data_set, capsys, *option)[0]
        assert len(found) == 1
        assert said in found[0]


def test_extended_headers_of_absurd_size_are_not_read(data_set, capsys):
    data = (data_set / "shards" / "train-00000.tar").read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 10**12
    forge_tar(data_set, "train-00000", data[:end] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    found = faults(data_set, capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "claims 1000000000000 bytes" in found
    assert peak < 100e6


def test_bytes_behind_the_end_of_a_tar_and_missing_members_are_found(data_set, capsys):
    data = (data_set / "shards" / "train-00000.tar").read_bytes()
    forge_tar(data_set, "train-00000", data + bytes(512) + b"secret" + bytes(506))
    assert "bytes after the end of the archive" in faults(data_set, capsys)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    cut = members[-1].offset
    forge_tar(data_set, "train-00000", data[:cut] + bytes(len(data) - cut))
    assert f"members that the index lists are not there: {members[-1].name}" in faults(data_set, capsys)


def test_the_text_beside_an_array_must_say_what_the_index_says(data_set, capsys):
    tar = data_set / "shards" / "train-00000.tar"
    data = tar.read_bytes()
    wrong = data.replace(b'"site": "site0"', b'"site": "site9"', 1).replace(b'"site": "site1"', b'"site": "site9"', 1)
    assert wrong != data
    forge_tar(data_set, "train-00000", wrong)
    assert ".json does not say what the index says" in faults(data_set, capsys)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "", 5, "a/b"])
def test_shard_names_that_leave_the_folder_are_refused(data_set, capsys, name):
    edit_json(data_set, "dataset.json", lambda tree: tree["shards"]["train"][0].update(name=name))
    found = lines(data_set, capsys)[0]
    assert len(found) == 1
    assert "expected a shard's name" in found[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(counts=[]), "counts must be a dict"),
        (lambda tree: tree.update(shards=None), "shards must be a dict"),
        (lambda tree: tree.update(duplicates="x"), "duplicates must be a list"),
        (lambda tree: tree["shards"].update(secret=[]), "unknown splits ['secret']"),
        (lambda tree: tree["shards"].update(train={}), "must be a list"),
        (lambda tree: tree["shards"]["train"].append(tree["shards"]["train"][0]), "is listed twice"),
        (lambda tree: tree["shards"]["train"][0].update(num_recordings=10**30), "expected a shard's name"),
        (lambda tree: tree.update(format_version=99), "expected a data set of format 1"),
        (lambda tree: tree.update(cohorts=[5]), "counts"),
        (lambda tree: tree["counts"].update(train=[1]), "dataset.json says [1]"),
    ],
)
def test_manifest_of_wrong_types_is_refused(data_set, capsys, change, said):
    edit_json(data_set, "dataset.json", change)
    found = faults(data_set, capsys)
    assert said in found or (said == "counts" and "cannot be checked" in found)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "5", '{"shards": NaN'])
def test_text_that_is_no_manifest_is_refused(data_set, capsys, text):
    (data_set / "dataset.json").write_text(text)
    assert faults(data_set, capsys)


@pytest.mark.parametrize("name", ["dataset.json", "shards/train-00000.index.json", "recordings.parquet"])
def test_files_of_absurd_size_are_not_read(data_set, capsys, name):
    os.truncate(data_set / name, 50 * 1024**3)  # a hole: it takes no room on disk
    tracemalloc.start()
    found = faults(data_set, capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "53687091200 bytes, expected at most" in found
    assert peak < 100e6


def test_a_table_that_unpacks_to_absurd_size_is_not_read(data_set, capsys):
    number = np.zeros(6_000_000, dtype=np.int8)
    pd.DataFrame({"x": number}).to_parquet(data_set / "recordings.parquet")  # one row group, as ours are not
    assert (data_set / "recordings.parquet").stat().st_size < 50_000
    assert "6000000 rows" in faults(data_set, capsys)
    (data_set / "recordings.parquet").write_bytes(gzip.compress(b"PAR1"))
    assert "is not a readable parquet table" in faults(data_set, capsys)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("first_row", 10, "share rows of the archive"),
        ("first_row", 10**7, "the archive has 480"),
        ("first_row", -1, "column first_row has impossible numbers"),
        ("num_timepoints", 2**60, "column num_timepoints has impossible numbers"),
        ("archive_row", 0, "share a row of coverage"),
        ("archive_row", 10**9, "no row 1000000000 of coverage"),
        ("recording_id", "../x", "recording ids must be plain names, found ../x"),
        ("recording_id", None, "column recording_id has empty cells"),
        ("split", "hidden", "found hidden"),
        ("tr_s", "two", "column tr_s must hold numbers"),
    ],
)
def test_table_that_disagrees_with_the_bytes_is_refused(data_set, capsys, column, value, said):
    table = recordings(data_set)
    if isinstance(value, str) or value is None:
        table[column] = table[column].astype(object).astype(str if column == "tr_s" else object)
    table.loc[3, column] = value
    write_parquet(Store(str(data_set)), "recordings.parquet", table)
    assert said in faults(data_set, capsys)


def test_columns_that_are_needed_and_not_there_are_named(data_set, capsys):
    write_parquet(Store(str(data_set)), "recordings.parquet", recordings(data_set).drop(columns=["sha256", "split"]))
    assert "there are no columns split, sha256" in faults(data_set, capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(shape=[480, 7]), "expected shape (rows, 6), found [480, 7]"),
        (lambda tree: tree.update(shape=[2**60, 6]), "expected shape"),
        (lambda tree: tree.update(shape=[240, 6]), "the archive has 240"),
        (lambda tree: tree.update(data_type="float64"), "expected float32, found 'float64'"),
        (lambda tree: tree.update(codecs=[{"name": "numcodecs.pickle"}]), "codecs must be among"),
        (lambda tree: tree["codecs"][0]["configuration"]["codecs"].append({"name": "pickle"}), "codecs must be among"),
        (lambda tree: tree["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 6]), "MB; expected at most"),
        (lambda tree: tree["codecs"][0]["configuration"].update(chunk_shape=[7, 6]), "do not divide"),
        (lambda tree: tree.update(codecs="x"), "expected a list of codecs"),
        (lambda tree: tree.update(node_type="group"), "expected an array of Zarr format 3"),
        (lambda tree: tree.update(storage_transformers=[{"name": "x"}]), "storage transformers"),
        (lambda tree: tree.pop("chunk_grid"), "impossible chunks None"),
    ],
)
def test_hostile_metadata_of_the_archive_are_refused_and_the_shards_are_still_checked(data_set, capsys, change, said):
    edit_json(data_set, "recordings.zarr/bold/zarr.json", change)
    tar = data_set / "shards" / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[1500] ^= 1
    tar.write_bytes(data)
    found = faults(data_set, capsys)
    assert said in found
    assert "its bytes have changed" in found


def test_a_damaged_object_of_the_archive_is_a_fault_of_its_recordings(data_set, capsys):
    path = data_set / "recordings.zarr" / "bold" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:200])
    found = lines(data_set, capsys)[0]
    assert {line.split()[2] for line in found if line.startswith("fault  archive")} >= {
        f"{name}:" for name in recordings(data_set)["recording_id"]
    }


@pytest.mark.parametrize("name", ["bold", "keep_mask", "coverage"])
def test_chunks_that_unpack_to_more_than_a_chunk_are_not_unpacked(data_set, capsys, name):
    bomb = Zstd().encode(bytes(300 * 1024**2))
    assert len(bomb) < 50_000
    if name == "bold":  # one object of one chunk, followed by the index of its chunks and a checksum
        index = struct.pack("<QQ", 0, len(bomb)) + struct.pack("<QQ", 2**64 - 1, 2**64 - 1)
        array = archive(data_set, name)
        index = index[: 16 * (array.shards[0] // array.chunks[0])]
        bomb += index + struct.pack("<I", crc32c(index))
    object_name = {"bold": "0/0", "keep_mask": "0", "coverage": "0/0"}[name]
    (data_set / "recordings.zarr" / name / "c" / object_name).write_bytes(bomb)
    tracemalloc.start()
    found = faults(data_set, capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a chunk unpacks to 314572800 bytes, expected" in found
    assert peak < 100e6


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65791, 65792, 70000])
def test_size_of_a_frame_is_read_from_its_header(size):
    assert unpacked_size(Zstd().encode(bytes(size))[:18]) == size


@pytest.mark.parametrize("head", [b"", b"PK\3\4" + bytes(14), MAGIC + b"\x00\x58" + bytes(12), MAGIC + b"\xe0\x01"])
def test_frames_without_a_size_are_refused(head):
    with pytest.raises(DataError, match="Zstandard frame"):
        unpacked_size(head)


def test_no_data_set_is_a_fault_not_a_crash(tmp_path, capsys):
    assert "holds no finished data set" in faults(tmp_path, capsys)


def test_faults_beyond_a_thousand_are_counted(capsys):
    found = inspect_dataset.Inspection("x")
    for number in range(1500):
        found.findings.fault("shards", number, "broken\x1b[31m" + "y" * 5000)
    inspect_dataset.show(found, quick=False)
    out = capsys.readouterr().out
    assert "fault  shards     and 500 more" in out
    assert "1500 faults" in out
    assert "\x1b" not in out
    assert len(out) < 1_000_000
