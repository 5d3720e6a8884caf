"""Parcel series of other programs: the same numbers from every format, and no axis or order guessed."""

import gzip
import io
import tracemalloc

import numpy as np
import pytest

from brainlm.errors import DataError
from data_prep import text_series
from data_prep.read_series import missing_columns, read_series
from data_prep.text_series import read_text_table

NAMES = ("L_V1", "L_V2", "R_V1", "R_V2")
LABELS = (3, 130, 300, 2001)


@pytest.fixture
def bold(rng):
    return (1000 + np.cumsum(rng.normal(size=(40, 4)), axis=0)).astype(np.float32)


def read(path, orientation="from_atlas", names=NAMES, labels=LABELS):
    return read_series(path, len(names), orientation, names, labels)


def write(path, rows, separator=",", corner=None, columns=None, labels=None):
    """Write numbers with a header and a first column of labels, where they are given."""
    lines = []
    if columns is not None:
        lines.append(separator.join([*([corner] if corner is not None else []), *columns]))
    for number, row in enumerate(rows):
        label = [] if labels is None else [labels[number]]
        lines.append(separator.join([*label, *(f"{value:.9g}" for value in row)]))
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def times(count):
    return [f"timepoint_{number}" for number in range(count)]


# .npy


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_number_type_and_order_is_read_along_either_axis(tmp_path, bold, dtype, order):
    stored = np.asarray(bold, dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", stored)
    np.save(tmp_path / "b.npy", np.asarray(stored.T, order=order))
    np.testing.assert_array_equal(read(tmp_path / "a.npy"), stored.astype(np.float32))
    np.testing.assert_array_equal(read(tmp_path / "b.npy"), stored.astype(np.float32))
    with pytest.raises(DataError, match="expected 4 columns, one for each parcel of the atlas; found 40"):
        read(tmp_path / "b.npy", "timepoints_by_parcels")


def test_square_series_are_ambiguous_until_told(tmp_path, rng):
    square = rng.normal(size=(4, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", square)
    with pytest.raises(DataError, match="ambiguous"):
        read(tmp_path / "a.npy")
    np.testing.assert_array_equal(read(tmp_path / "a.npy", "parcels_by_timepoints"), square.T)


class _Bomb:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_pickles_and_archives_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([[_Bomb()] * 4] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="pickled objects, which are never loaded"):
        read(tmp_path / "a.npy")
    assert not (tmp_path / "executed").exists()
    np.savez(tmp_path / "b.npz", a=np.zeros(3))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(DataError, match="archive of several"):
        read(tmp_path / "b.npy")


def npy(shape, dtype="<f4", data=b"", fortran=False):
    """Return the bytes of an .npy file with any header."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy((10**9, 424)), "cut off or damaged: the header promises"),
        (npy((-1, 4), data=b"\0" * 16), "cut off or damaged"),
        (npy((2**40, 2**40)), "cut off or damaged"),
        (npy((3, 4), data=b"\0" * 47), "48 bytes; the file has 47"),
        (npy((3, 4), data=b"\0" * 96), "48 bytes; the file has 96"),
        (npy((0, 4)), "expected 1 to"),
        (npy((3, 4), "<c8", b"\0" * 96), "complex64 of shape"),
        (npy((3, 4), [("a", "<f4")], b"\0" * 48), "expected a table of numbers"),
        (npy((3, 4), "|b1", b"\0" * 12), "bool of shape"),
        (npy((12,), data=b"\0" * 48), "expected a table of numbers"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 70_000, "not a readable"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "not a readable"),
        (b"\x93NUMPY\x09\x00", "not a readable"),
        (b"", "not a readable"),
        (b"1 2 3\n", "not a readable"),
    ],
)
def test_npy_header_is_checked_against_the_file_before_anything_is_allocated(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.npy")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


# text


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        *(("a.csv", ","), ("a.csv", "; "), ("a.tsv", "\t"), ("a.txt", "  "), ("a.1D", "\t"), ("a.dat", " ")),
        *(("a.TXT", ","), ("a.csv.gz", ","), ("a.tsv.gz", "\t"), ("a.txt.gz", " ")),
    ],
)
def test_plain_text_is_read_in_every_format(tmp_path, bold, name, separator):
    np.testing.assert_array_equal(read(write(tmp_path / name, bold, separator)), bold)
    np.testing.assert_array_equal(read(write(tmp_path / name, bold.T, separator)), bold)


@pytest.mark.parametrize(
    "header",
    [
        *("L_V1,L_V2,R_V1,R_V2", '"L_V1","L_V2","R_V1","R_V2"', "0,1,2,3", "1,2,3,4", "3,130,300,2001"),
        *("#3,#130,#300,#2001", "# any words at all", "#1,#2,#3"),
    ],
)
def test_header_is_no_timepoint(tmp_path, bold, header):
    path = write(tmp_path / "a.csv", bold)
    path.write_text(f"{header}\n{path.read_text()}")
    np.testing.assert_array_equal(read(path), bold)


@pytest.mark.parametrize("corner", ["", "Unnamed: 0", "index", "volume"])
def test_first_column_that_numbers_the_rows_is_no_parcel(tmp_path, bold, corner):
    numbers = [str(number) for number in range(len(bold))]
    np.testing.assert_array_equal(read(write(tmp_path / "a.csv", bold, ",", corner, NAMES, numbers)), bold)


def test_first_column_of_numbers_without_a_header_is_no_timepoint(tmp_path, bold):
    path = write(tmp_path / "a.txt", bold.T, " ", labels=["1", "2", "3", "4"])
    np.testing.assert_array_equal(read(path), bold)
    path = write(tmp_path / "b.txt", bold.T, " ", labels=[str(label) for label in LABELS])
    np.testing.assert_array_equal(read(path), bold)


def test_layout_of_uk_biobank_is_read(tmp_path, bold):
    path = write(tmp_path / "fMRI.Glasser.csv.gz", bold.T, ",", "label_name", times(40), NAMES)
    np.testing.assert_array_equal(read(path), bold)


@pytest.mark.parametrize("names", [NAMES, [str(label) for label in LABELS]])
@pytest.mark.parametrize("by_rows", [True, False])
def test_parcels_in_another_order_are_brought_into_the_atlas_order(tmp_path, rng, bold, names, by_rows):
    order = rng.permutation(4)
    shuffled, theirs = bold[:, order], [names[column] for column in order]
    if by_rows:
        path = write(tmp_path / "a.csv", shuffled.T, ",", "label_name", times(40), theirs)
    else:
        path = write(tmp_path / "a.csv", shuffled, ",", None, theirs)
    np.testing.assert_array_equal(read(path), bold)


def test_names_tell_the_axes_of_a_square_file(tmp_path, rng):
    square = rng.normal(size=(4, 4)).astype(np.float32)
    path = write(tmp_path / "a.csv", square.T, ",", "label_name", times(4), NAMES)
    np.testing.assert_array_equal(read(path), square)
    with pytest.raises(DataError, match=r"source\.orientation says timepoints_by_parcels, but the first column holds"):
        read(path, "timepoints_by_parcels")


def test_unknown_missing_and_double_names_are_spelled_out(tmp_path, bold):
    path = write(tmp_path / "a.csv", bold, ",", None, ["L_V1", "L_V2", "R_V1", "R_MT"])
    with pytest.raises(DataError, match=r"1 unknown \(R_MT\); 1 missing \(R_V2\)"):
        read(path)
    path = write(tmp_path / "a.csv", bold, ",", None, ["L_V1", "L_V2", "R_V1", "R_V1"])
    with pytest.raises(DataError, match=r"1 missing \(R_V2\); 1 given twice \(R_V1\)"):
        read(path, "timepoints_by_parcels")
    path = write(tmp_path / "a.csv", bold[:, :3], ",", None, NAMES[:3])
    with pytest.raises(DataError, match=r"1 missing \(R_V2\)"):
        read(path)


@pytest.mark.parametrize("commented", ["", "# "])
def test_foreign_names_are_refused_unless_the_layout_is_stated(tmp_path, bold, commented):
    path = write(tmp_path / "a.csv", bold)
    path.write_text(f"{commented}WM,Vent,Brain,LCau\n{path.read_text()}")
    with pytest.raises(DataError, match=r"none of the 4 names of parcels \(WM, Vent, Brain, LCau\)"):
        read(path)
    np.testing.assert_array_equal(read(path, "timepoints_by_parcels"), bold)


def test_parcel_called_na_keeps_its_name(tmp_path, bold):
    names = ("NA", "nan", "R_V1", "None")
    path = write(tmp_path / "a.csv", bold[:, ::-1].T, ",", "label_name", times(40), names[::-1])
    np.testing.assert_array_equal(read(path, names=names), bold)


def test_comments_of_afni_are_passed_over(tmp_path, bold):
    lines = [" ".join(f"{value:.9g}" for value in row) + " \t # volume" for row in bold]
    (tmp_path / "a.1D").write_text("# 3dROIstats\n\n" + "\n# between\n".join(lines) + "\n\n")
    np.testing.assert_array_equal(read(tmp_path / "a.1D"), bold)


def test_missing_cells_are_nan_and_a_delimiter_at_the_end_is_no_column(tmp_path):
    (tmp_path / "a.csv").write_text("5,n/a,7,8,\n5,,NaN,8,\n\n6,3,7,-inf,\n")
    np.testing.assert_array_equal(
        read(tmp_path / "a.csv"), [[5, np.nan, 7, 8], [5, np.nan, np.nan, 8], [6, 3, 7, -np.inf]]
    )
    (tmp_path / "b.csv").write_text("L_V1,L_V2,R_V1,R_V2\n5,1,7,\n5,2,8,\n6,3,7,\n")
    assert np.isnan(read(tmp_path / "b.csv")[:, 3]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7,2,3,5\n4,5,6,7\n4,5\n", r"2 to 4 columns \(line 1 has 4, line 3 has 2\)"),
        ("# a comment\n7,2,3,5\n\n4,5,x,7\n", "line 4, column 3: expected a number, found 'x'"),
        ("7,2,3,5\n4,1_000,6,7\n", "line 2, column 2: expected a number, found '1_000'"),
        ("1,5;2,5;3,5;4,5\n1,5;2,5;3,5;4,5\n", "expected a number, found '2,5'"),
        ("7,x,3,5\n4,5,6,7\n", "line 1, column 2: expected a number, found 'x'"),
        ("a,1.5,2.5\nb,1.5,x\nc,1,2\nd,1,2\n", "line 2, column 3"),
        ("7,2,3,5\n4,True,6,7\n", "line 2, column 2: expected a number, found 'True'"),
        ("x,2,3.5,4\n1,2,3,4\n", "expected 4 columns"),
        ("1.5,2\r3,4\r", "cannot be taken apart"),
        ("", "no numbers"),
        ("# nothing\n", "no numbers"),
        ("L_V1,L_V2,R_V1\n1,2,3,4\n1,2,3,4.5\n1,2,3,4\n1,2,3,4\n1,2,3,4\n", "1 missing|names for"),
        ("\x00\x01\x02", "expected"),
    ],
)
def test_wrong_text_is_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_fast_and_slow_reader_agree(tmp_path, rng):
    values = rng.normal(size=(30, 7)) * 10.0 ** rng.integers(-40, 40, size=(30, 7))
    values[3, 4], values[5, 6], values[7, 0] = np.nan, np.inf, -0.0
    for separator in (",", "\t", " ", ";"):
        for labels in (None, [f"row {number}" if separator != " " else f"r{number}" for number in range(30)]):
            path = write(tmp_path / "a.txt", values, separator, labels=labels)
            layout = text_series._find_layout(path)
            fast, slow = text_series._read_fast(path, layout), text_series._read_slow(path, layout)
            np.testing.assert_array_equal(fast[0], slow[0])
            assert fast[1] == slow[1] == labels
            with np.errstate(over="ignore"):
                expected = np.array([[np.float64(f"{v:.9g}") for v in row] for row in values]).astype(np.float32)
            np.testing.assert_array_equal(fast[0], expected)


@pytest.mark.parametrize("unit", [b"1 2 3 4\n", b"# nothing\n", b"1 ", b"\n"])
def test_gzip_bombs_are_refused_in_bounded_memory(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(text_series, "MAX_TEXT_BYTES", 8 * 1024**2)
    monkeypatch.setattr(text_series, "MAX_LINE_BYTES", 64 * 1024)
    monkeypatch.setattr(text_series, "MAX_LINES", 50_000)
    monkeypatch.setattr(text_series, "MAX_VALUES", 10_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(unit * (32 * 1024**2 // len(unit)), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="this is no recording"):
            read(tmp_path / "a.txt.gz")
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_cut_off_gzip_is_refused(tmp_path, bold):
    path = write(tmp_path / "a.csv.gz", bold)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)


def test_values_beyond_float32_become_infinite_and_are_missing(tmp_path, bold):
    path = write(tmp_path / "a.csv", np.where(bold == bold[3, 1], 1e300, bold.astype(np.float64)))
    found = read(path)
    assert np.isinf(found[3, 1])
    np.testing.assert_array_equal(missing_columns(found), [False, True, False, False])


def test_unknown_formats_and_absent_files_are_named(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read \.mat: expected .*\.npy"):
        read(tmp_path / "a.mat")
    with pytest.raises(DataError, match=r"^there is no file b\.npy$"):
        read(tmp_path / "b.npy")


def test_constant_and_broken_columns_are_missing(bold):
    bold[:, 1] = 7
    bold[5, 2] = np.inf
    np.testing.assert_array_equal(missing_columns(bold), [False, True, True, False])


def test_real_text_series_keep_their_numbers(shared_data):
    path = shared_data / "nitime_examples" / "fmri_timeseries.csv"
    table = read_text_table(path)
    expected = np.genfromtxt(path, delimiter=",", skip_header=1)
    np.testing.assert_array_equal(table.values, expected.astype(np.float32))
    assert table.column_names is not None
    assert table.column_names[:3] == ["WM", "Vent", "Brain"]


@pytest.mark.parametrize("name", ["a.1D", "a.csv.gz", "a.npy"])
def test_real_series_of_cpac_survive_every_format(shared_data, tmp_path, name):
    bold = np.load(next((shared_data / "abide_cc200" / "ts").glob("Leuven*.npy")))
    labels = [str(label) for label in range(1, 201)]
    names = [f"cc200_{label}" for label in labels]
    if name.endswith(".npy"):
        np.save(tmp_path / name, bold)
    else:  # as C-PAC heads its files
        write(tmp_path / name, bold, "\t", None, [f"#{label}" for label in labels])
    found = read(tmp_path / name, "from_atlas", names, range(1, 201))
    np.testing.assert_array_equal(found, bold)
