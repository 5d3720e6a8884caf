"""Confounds and censored timepoints from tables in fMRIPrep's format."""

import gzip
import json
import tempfile
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from brainlm.errors import DataError
from data_prep import confounds
from data_prep.clean import clean, degrees_of_freedom
from data_prep.confounds import MOTION_COLUMNS, drop_short_segments, framewise_displacement, is_aroma, read_confounds
from data_prep.settings import CleanSettings, ScrubSettings

NUM_TIMEPOINTS = 120
TR_S = 2.0
EXPANDED = [
    name + suffix for name in MOTION_COLUMNS for suffix in ("", "_derivative1", "_power2", "_derivative1_power2")
]
COMPONENTS = [f"a_comp_cor_{number:02d}" for number in range(4)]


def make_table(rng, num_timepoints=NUM_TIMEPOINTS):
    """As fMRIPrep 20 to 24 write it, without most of the columns."""
    columns = {}
    for name in MOTION_COLUMNS:
        values = 0.05 * rng.normal(size=num_timepoints).cumsum()
        steps = np.concatenate([[np.nan], np.diff(values)])
        columns |= {name: values, f"{name}_derivative1": steps}
        columns |= {f"{name}_power2": values**2, f"{name}_derivative1_power2": steps**2}
    for name in ("csf", "white_matter", "global_signal"):
        columns[name] = 500 + rng.normal(size=num_timepoints)
    for name in (*COMPONENTS, "w_comp_cor_00", "c_comp_cor_00"):
        columns[name] = rng.normal(size=num_timepoints)
    for k in (1, 2, 3):  # below 1 / 128 Hz
        columns[f"cosine{k - 1:02d}"] = np.cos(np.pi * k * (np.arange(num_timepoints) + 0.5) / num_timepoints)
    columns["framewise_displacement"] = np.concatenate([[np.nan], rng.exponential(0.2, num_timepoints - 1)])
    columns["std_dvars"] = np.concatenate([[np.nan], rng.exponential(1.0, num_timepoints - 1)])
    columns["motionOutlierScore"] = np.zeros(num_timepoints)  # a user's own, in camel case
    return pd.DataFrame(columns)


def sidecar():
    """Say which components belong to which mask, as fMRIPrep does."""
    masks = dict.fromkeys(COMPONENTS, "combined") | {"w_comp_cor_00": "WM", "c_comp_cor_00": "CSF"}
    return {name: {"Mask": mask, "Method": "aCompCor", "Retained": True} for name, mask in masks.items()}


def write(folder, table, name="sub-01_task-rest_desc-confounds_timeseries.tsv", meta=None):
    path = folder / name
    table.to_csv(path, sep="," if path.suffix == ".csv" else "\t", index=False, na_rep="n/a")
    if meta is not None:
        path.with_suffix(".json").write_text(json.dumps(meta))
    return path


@pytest.mark.parametrize("name", ["sub-01_task-rest_desc-confounds_timeseries.tsv", "motion 7.tsv", "x.csv"])
@pytest.mark.parametrize(
    ("strategy", "denoised", "expected"),
    [
        ("6P", "", list(MOTION_COLUMNS)),
        ("24P", "", EXPANDED),
        ("aCompCor", "", [*EXPANDED, *COMPONENTS, "cosine00", "cosine01", "cosine02"]),
        ("ICA-AROMA", "ICA-AROMA", ["csf", "white_matter"]),
    ],
)
def test_a_strategy_takes_its_columns_from_a_table_of_any_name(tmp_path, rng, name, strategy, denoised, expected):
    table = make_table(rng)
    path = write(tmp_path, table, name, sidecar())
    before = path.read_bytes()
    for global_signal in (False, True):
        settings = CleanSettings(strategy=strategy, global_signal=global_signal)
        found = read_confounds(path, settings, NUM_TIMEPOINTS, denoised=denoised)
        assert sorted(found.names) == sorted(expected + ["global_signal"] * global_signal)
        np.testing.assert_allclose(found.regressors, table[list(found.names)].bfill(), rtol=1e-12, atol=1e-15)
        assert found.keep_mask.all()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_columns_by_name_join_a_strategy_once(tmp_path, rng):
    path = write(tmp_path, make_table(rng))
    settings = CleanSettings(strategy="6P", confounds=("csf", "trans_x", "csf", "std_dvars"))
    found = read_confounds(path, settings, NUM_TIMEPOINTS)
    assert sorted(found.names) == sorted([*MOTION_COLUMNS, "csf", "std_dvars"])
    only = read_confounds(path, CleanSettings(confounds=("csf", "rot_x")), NUM_TIMEPOINTS)
    assert only.names == ("csf", "rot_x")
    assert only.regressors is not None
    assert only.regressors.shape == (NUM_TIMEPOINTS, 2)
    alone = read_confounds(path, CleanSettings(global_signal=True), NUM_TIMEPOINTS)
    assert alone.names == ("global_signal",)


def test_cosines_of_the_components_do_not_count_twice_beside_our_high_pass(tmp_path, rng):
    path = write(tmp_path, make_table(rng).round(7), meta=sidecar())
    settings = CleanSettings(strategy="aCompCor", high_pass_hz=0.01)
    found = read_confounds(path, settings, NUM_TIMEPOINTS)
    others = [number for number, name in enumerate(found.names) if not name.startswith("cosine")]
    assert found.regressors is not None
    assert len(others) == len(found.names) - 3
    with_cosines = degrees_of_freedom(settings, TR_S, found.regressors, found.keep_mask)
    assert with_cosines == degrees_of_freedom(settings, TR_S, found.regressors[:, others], found.keep_mask)


@pytest.mark.parametrize(
    ("dropped", "settings", "message"),
    [
        ("rot_z_power2", {"strategy": "24P"}, "no column 'rot_z_power2', which clean.strategy 24P needs"),
        ("trans_x", {"strategy": "6P"}, "no column 'trans_x', which clean.strategy 6P needs"),
        ("csf", {"strategy": "ICA-AROMA"}, "no column 'csf', which clean.strategy ICA-AROMA needs"),
        ("cosine", {"strategy": "aCompCor"}, "no cosine columns"),
        ("a_comp_cor_02", {"strategy": "aCompCor"}, "JSON file do not fit together, or columns are missing"),
        ("global_signal", {"global_signal": True}, "no column 'global_signal', which clean.global_signal needs"),
        ("csf", {"confounds": ("csf",)}, "no column 'csf', which clean.confounds needs"),
        ("std_dvars", {"scrub": ScrubSettings()}, "set it to null to censor by displacement alone"),
    ],
)
def test_a_missing_column_is_named(tmp_path, rng, dropped, settings, message):
    table = make_table(rng)
    table = table.drop(columns=[name for name in table.columns if name.startswith(dropped)])
    path = write(tmp_path, table, meta=sidecar())
    denoised = "AROMA" if settings.get("strategy") == "ICA-AROMA" else ""
    with pytest.raises(DataError, match=message):
        read_confounds(path, CleanSettings(**settings), NUM_TIMEPOINTS, denoised=denoised)


def test_components_need_a_sidecar_that_lists_them(tmp_path, rng):
    settings = CleanSettings(strategy="aCompCor")
    path = write(tmp_path, make_table(rng))
    with pytest.raises(DataError, match=r"needs the file sub-01_task-rest_desc-confounds_timeseries\.json beside"):
        read_confounds(path, settings, NUM_TIMEPOINTS)
    for meta in ({}, {"a_comp_cor_00": {}}, {"a_comp_cor_00": {"Mask": "WM"}}):
        path.with_suffix(".json").write_text(json.dumps(meta))
        with pytest.raises(DataError, match=r"clean.strategy aCompCor: .* do not fit together"):
            read_confounds(path, settings, NUM_TIMEPOINTS)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match=r"clean\.strategy aCompCor"):
        read_confounds(path, settings, NUM_TIMEPOINTS)


def test_a_temporary_folder_that_nilearn_cannot_use_is_refused(tmp_path, rng, monkeypatch):
    path = write(tmp_path, make_table(rng))
    (tmp_path / "tsv").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tsv"))
    with pytest.raises(DataError, match="temporary folder with tsv in its name"):
        read_confounds(path, CleanSettings(strategy="6P"), NUM_TIMEPOINTS)


def test_first_differences_are_filled_and_other_gaps_are_refused_where_timepoints_are_kept(tmp_path, rng):
    table = make_table(rng)
    table["framewise_displacement"] = 0.1
    table.loc[40, "trans_x"] = np.nan
    table.loc[50, "rot_y_derivative1"] = np.inf
    settings = CleanSettings(strategy="24P", scrub=ScrubSettings(std_dvars=None, min_segment=0))
    path = write(tmp_path, table)
    with pytest.raises(DataError, match=r"missing values after the first row, .*'rot_y_derivative1', 'trans_x'"):
        read_confounds(path, settings, NUM_TIMEPOINTS)
    table.loc[[40, 50], "framewise_displacement"] = 2.0
    found = read_confounds(write(tmp_path, table), settings, NUM_TIMEPOINTS)
    np.testing.assert_array_equal(np.flatnonzero(~found.keep_mask), [40, 50])
    bold = rng.normal(size=(NUM_TIMEPOINTS, 3)).astype(np.float32)
    assert np.isfinite(clean(bold, settings, TR_S, found.regressors, found.keep_mask)).all()


def test_text_among_the_numbers_is_refused(tmp_path, rng):
    table = make_table(rng).astype({"csf": object})
    table.loc[3, "csf"] = "broken"
    path = write(tmp_path, table)
    with pytest.raises(DataError, match=r"not all numbers: .*broken"):
        read_confounds(path, CleanSettings(confounds=("csf",)), NUM_TIMEPOINTS)


def test_a_table_of_another_length_is_refused_even_if_nothing_is_asked_of_it(tmp_path, rng):
    path = write(tmp_path, make_table(rng))
    with pytest.raises(DataError, match="120 rows of confounds, the recording 121 timepoints"):
        read_confounds(path, CleanSettings(), 121)
    with pytest.raises(DataError, match=r"there is no confounds table gone.tsv"):
        read_confounds(tmp_path / "gone.tsv", CleanSettings(), 121)
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(DataError, match=r"cannot read the confounds empty.tsv"):
        read_confounds(tmp_path / "empty.tsv", CleanSettings(), 121)


def test_a_packed_table_is_read(tmp_path, rng):
    plain = write(tmp_path, make_table(rng))
    packed = tmp_path / f"{plain.name}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    settings = CleanSettings(strategy="6P")
    expected, found = (read_confounds(path, settings, NUM_TIMEPOINTS) for path in (plain, packed))
    np.testing.assert_array_equal(found.regressors, expected.regressors)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot read the confounds"):
        read_confounds(packed, settings, NUM_TIMEPOINTS)


@pytest.mark.parametrize("name", ["long.tsv", "long.tsv.gz", "wide.csv"])
def test_an_absurd_table_is_refused_in_bounded_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(confounds, "MAX_TABLE_BYTES", 2_000_000)
    monkeypatch.setattr(confounds, "MAX_VALUES", 100_000)
    bomb = b"1,2" * 600_000 if name.startswith("wide") else b"a\n" + b"1\n" * 20_000_000
    (tmp_path / name).write_bytes(gzip.compress(bomb) if name.endswith(".gz") else bomb)
    del bomb
    tracemalloc.start()
    with pytest.raises(DataError, match=r"longer than 2000000 bytes|600001 columns: too many"):
        read_confounds(tmp_path / name, CleanSettings(), NUM_TIMEPOINTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_rows_beyond_the_recording_are_not_read(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"a\n" + b"1\n" * 1_000_000)
    with pytest.raises(DataError, match="more than 120 rows of confounds, the recording 120 timepoints"):
        read_confounds(tmp_path / "x.tsv", CleanSettings(), NUM_TIMEPOINTS)


@pytest.mark.parametrize("min_segment", [0, 1, 3, 5, 8])
@pytest.mark.parametrize(("fd_mm", "std_dvars"), [(0.3, None), (0.5, 2.0), (0.6, 3.5), (5.0, 50.0)])
def test_scrubbing_censors_what_nilearn_censors(tmp_path, rng, min_segment, fd_mm, std_dvars):
    from nilearn.interfaces.fmriprep import load_confounds

    scrub = ScrubSettings(fd_mm=fd_mm, std_dvars=std_dvars, min_segment=min_segment)
    for _ in range(5):
        table = make_table(rng).drop(columns="motionOutlierScore")
        path = write(tmp_path, table)
        found = read_confounds(path, CleanSettings(scrub=scrub), NUM_TIMEPOINTS).keep_mask
        _, kept = load_confounds(
            str(tmp_path / "sub-01_task-rest_desc-preproc_bold.nii.gz"),
            strategy=("motion", "scrub"),
            motion="basic",
            scrub=min_segment,
            fd_threshold=fd_mm,
            std_dvars_threshold=1e9 if std_dvars is None else std_dvars,
        )
        kept = np.arange(NUM_TIMEPOINTS) if kept is None else kept
        np.testing.assert_array_equal(np.flatnonzero(found), kept)


def test_scrubbing_without_numbers_to_judge_by_is_refused(tmp_path, rng):
    settings = CleanSettings(scrub=ScrubSettings())
    table = make_table(rng)
    with pytest.raises(DataError, match="have neither"):
        read_confounds(write(tmp_path, table[["csf"]]), settings, NUM_TIMEPOINTS)
    table.loc[[9, 11], "std_dvars"] = np.nan
    with pytest.raises(DataError, match=r"std_dvars has no value at 2 timepoints after the first \(such as 9\)"):
        read_confounds(write(tmp_path, table), settings, NUM_TIMEPOINTS)
    table["framewise_displacement"] = 9.0
    table["std_dvars"] = 1.0
    with pytest.raises(DataError, match="all 120 timepoints after 0 dummy scans are censored"):
        read_confounds(write(tmp_path, table), settings, NUM_TIMEPOINTS)


def test_short_segments_fall_at_the_ends_too_but_never_a_whole_recording():
    keep = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=bool)
    np.testing.assert_array_equal(drop_short_segments(keep, 3), [0, 0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(drop_short_segments(keep, 0), keep)
    assert drop_short_segments(np.ones(2, dtype=bool), 5).all()


def test_displacement_adds_rotations_as_arcs_and_the_first_timepoint_has_none(tmp_path):
    table = pd.DataFrame(np.zeros((3, 6)), columns=list(MOTION_COLUMNS))
    table["trans_x"] = [0.0, 0.5, 0.5]
    table["rot_z"] = [0.0, 0.0, 0.01]
    np.testing.assert_allclose(framewise_displacement(table), [np.nan, 0.5, 0.5])
    assert read_confounds(write(tmp_path, table), CleanSettings(), 3).mean_fd_mm == pytest.approx(0.5)
    table["framewise_displacement"] = ["n/a", 0.2, 0.4]
    found = read_confounds(write(tmp_path, table), CleanSettings(), 3)
    assert found.mean_fd_mm == pytest.approx(0.3)
    np.testing.assert_allclose(found.fd_mm, [np.nan, 0.2, 0.4])
    table["framewise_displacement"] = ["n/a", "n/a", 0.4]
    assert read_confounds(write(tmp_path, table), CleanSettings(), 3).mean_fd_mm is None
    assert read_confounds(write(tmp_path, table[["rot_x"]]), CleanSettings(), 3).fd_mm is None


def with_unsteady(table, indices):
    spikes = {f"non_steady_state_outlier{n:02d}": np.arange(len(table)) == i for n, i in enumerate(indices)}
    return pd.concat([table, pd.DataFrame(spikes).astype(int)], axis=1)


def test_dummy_scans_are_those_given_or_those_marked_at_the_start(tmp_path, rng):
    path = write(tmp_path, with_unsteady(make_table(rng), [0, 1, 2, 60]))
    for dummies, expected in ((0, 0), (5, 5), ("auto", 3)):
        found = read_confounds(path, CleanSettings(dummy_scans=dummies), NUM_TIMEPOINTS)
        assert found.num_dummy_scans == expected
        np.testing.assert_array_equal(np.flatnonzero(~found.keep_mask), np.arange(expected))
    none_marked = write(tmp_path, make_table(rng))
    assert read_confounds(none_marked, CleanSettings(dummy_scans="auto"), NUM_TIMEPOINTS).num_dummy_scans == 0
    with pytest.raises(DataError, match="120 dummy scans leave nothing of 120 timepoints"):
        read_confounds(path, CleanSettings(dummy_scans=120), NUM_TIMEPOINTS)


@pytest.mark.parametrize("settings", [{"strategy": "6P"}, {"confounds": ("csf",)}, {"scrub": ScrubSettings(fd_mm=99)}])
def test_timepoints_that_are_not_steady_take_part_in_no_fit(tmp_path, rng, settings):
    table = with_unsteady(make_table(rng), [0, 1, 60])
    table["std_dvars"] = 1.0
    found = read_confounds(write(tmp_path, table), CleanSettings(dummy_scans=1, **settings), NUM_TIMEPOINTS)
    np.testing.assert_array_equal(np.flatnonzero(~found.keep_mask), [0, 1, 60])


def test_cleaning_twice_is_refused_by_name(tmp_path, rng):
    path = write(tmp_path, make_table(rng), meta=sidecar())
    for settings in ({"strategy": "24P"}, {"global_signal": True}, {"confounds": ("csf",)}):
        with pytest.raises(DataError, match=r"denoised already \(FIX\).* set clean.strategy: none"):
            read_confounds(path, CleanSettings(**settings), NUM_TIMEPOINTS, denoised="FIX")
    with pytest.raises(DataError, match=r"denoised already \(smoothAROMAnonaggr\).*or clean.strategy: ICA-AROMA"):
        read_confounds(path, CleanSettings(strategy="6P"), NUM_TIMEPOINTS, denoised="smoothAROMAnonaggr")
    for denoised in ("", "FIX"):
        with pytest.raises(DataError, match="second step on images that ICA-AROMA has denoised"):
            read_confounds(path, CleanSettings(strategy="ICA-AROMA"), NUM_TIMEPOINTS, denoised=denoised)
    with pytest.raises(ValueError, match="takes no further confounds"):
        CleanSettings(strategy="ICA-AROMA", confounds=("rot_x",))
    harmless = CleanSettings(detrend=True, high_pass_hz=0.01, scrub=ScrubSettings(), dummy_scans=2)
    assert read_confounds(path, harmless, NUM_TIMEPOINTS, denoised="FIX").regressors is None
    assert [is_aroma(name) for name in ("ICA-AROMA", "smoothAROMAnonaggr", "ica_aroma", "FIX", "")] == [True] * 3 + [
        False
    ] * 2


def test_without_a_table_only_what_needs_none_is_done():
    found = read_confounds(None, CleanSettings(detrend=True, dummy_scans=3), 10)
    assert (found.regressors, found.names, found.mean_fd_mm, found.fd_mm) == (None, (), None, None)
    np.testing.assert_array_equal(np.flatnonzero(~found.keep_mask), [0, 1, 2])
    asking = {
        "clean.strategy 6P": {"strategy": "6P"},
        "clean.confounds": {"confounds": ("a",)},
        "clean.scrub": {"scrub": ScrubSettings()},
        "clean.dummy_scans auto": {"dummy_scans": "auto"},
    }
    for name, settings in asking.items():
        with pytest.raises(DataError, match=f"there is no confounds table, and {name} asks for one"):
            read_confounds(None, CleanSettings(**settings), 10)
