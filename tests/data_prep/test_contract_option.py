"""`contract=CHECKPOINT`: a new cohort is prepared as the model was fed."""

from pathlib import Path

import numpy as np
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import SPLITS, open_dataset
from brainlm.testing import small_model


@pytest.fixture
def source(toy, rng):
    """A data set of another cohort, filtered and at a TR of 1.5 s, that serves as what a model was trained on."""
    tree = toy.settings(
        toy.write_table(rng, num_subjects=8, num_timepoints=90),
        name="source",
        out=str(toy.folder / "source"),
        clean={"high_pass_hz": 0.02, "detrend": True},
        target_tr_s=1.5,
    )
    assert toy.prepare(tree) == 0
    return tree


@pytest.fixture
def cohort(toy, rng):
    tree = toy.settings(toy.write_table(rng, num_subjects=5, num_timepoints=80, name="new", first=30), name="new")
    del tree["windows"]
    return tree | {"out": str(toy.folder / "new-dataset"), "splits": {"val": 0.0, "test": 0.0}}


def test_tr_filter_windows_and_statistics_are_the_contract_s(toy, source, cohort):
    assert toy.prepare(cohort, f"contract={source['out']}") == 0
    theirs, ours = open_dataset(source["out"]).contract, open_dataset(cohort["out"]).contract
    assert (ours.tr_s, ours.high_pass_hz, ours.window_len) == (1.5, 0.02, 40)
    assert ours.cleaning["detrend"] is True
    np.testing.assert_array_equal(ours.iqr, theirs.iqr)
    np.testing.assert_array_equal(ours.median, theirs.median)
    assert ours.statistics_from.startswith("the contract of")


def test_series_are_those_of_the_same_settings_given_by_hand(toy, source, cohort):
    assert toy.prepare(cohort, f"contract={source['out']}") == 0
    by_hand = cohort | {
        "out": str(toy.folder / "by-hand"),
        "clean": {"high_pass_hz": 0.02, "detrend": True},
        "target_tr_s": 1.5,
        "windows": {"window_len": 40, "patch_len": 10},
    }
    assert toy.prepare(by_hand) == 0
    for split in SPLITS:
        ours, theirs = open_dataset(cohort["out"]).split(split), open_dataset(by_hand["out"]).split(split)
        for index in range(len(theirs)):
            np.testing.assert_array_equal(ours.recording(index), theirs.recording(index))


def test_series_need_no_atlas_image(toy, source, cohort):
    del cohort["atlas"]
    assert toy.prepare(cohort, f"contract={source['out']}") == 0
    theirs, ours = open_dataset(source["out"]).contract, open_dataset(cohort["out"]).contract
    assert ours.atlas.to_json() == theirs.atlas.to_json()


def test_statistics_of_the_cohort_can_be_asked_for(toy, source, cohort):
    assert toy.prepare(cohort, f"contract={source['out']}", "statistics=cohort") == 0
    ours = open_dataset(cohort["out"]).contract
    assert "of new" in ours.statistics_from
    assert not np.array_equal(ours.iqr, open_dataset(source["out"]).contract.iqr)


def test_every_recording_can_be_for_testing(toy, source, cohort):
    splits = {"splits": {"val": 0.0, "test": 1.0}}
    assert toy.prepare(cohort | splits, f"contract={source['out']}") == 0
    assert len(open_dataset(cohort["out"]).split("test")) == 5
    assert (
        toy.prepare(cohort | splits | {"out": str(toy.folder / "x")}, f"contract={source['out']}", "statistics=cohort")
        == 1
    )


def test_another_scale_is_said(toy, source, cohort):
    for path in (toy.folder / "new" / "ts").glob("*.npy"):
        np.save(path, (np.load(path) * 5).astype(np.float32))
    assert toy.prepare(cohort, f"contract={source['out']}") == 0
    assert any("amplitude" in line for line in open_dataset(cohort["out"]).manifest["warnings"])


def test_a_checkpoint_serves_as_a_data_set_does(toy, source, cohort):
    model = small_model(open_dataset(source["out"]).contract)
    save_checkpoint(str(toy.folder / "checkpoint"), model, {}, train_subjects=["1"])
    del cohort["atlas"]
    assert toy.prepare(cohort, f"contract={toy.folder / 'checkpoint'}") == 0
    np.testing.assert_array_equal(open_dataset(cohort["out"]).contract.iqr, model.contract.iqr)


def test_settings_that_contradict_the_contract_are_named(toy, source, cohort, capsys):
    assert toy.prepare(cohort | {"clean": {"high_pass_hz": 0.01}}, f"contract={source['out']}") == 1
    assert "clean.high_pass_hz: 0.01 here, 0.02 in the contract" in capsys.readouterr().err
    assert toy.prepare(cohort, f"contract={source['out']}", "target_tr_s=2.0") == 1
    assert "target_tr_s: 2 here, 1.5" in capsys.readouterr().err


def test_another_atlas_is_refused_with_the_differences(toy, source, cohort, capsys):
    table = Path(cohort["atlas"]["labels"])
    table.write_text(table.read_text().replace("parcel130", "other130"))
    assert toy.prepare(cohort, f"contract={source['out']}") == 1
    message = capsys.readouterr().err
    assert "parcel130 against other130" in message


def test_no_contract_there_is_an_error(toy, cohort, capsys):
    assert toy.prepare(cohort, f"contract={toy.folder}") == 1
    assert "there is no input_contract.json" in capsys.readouterr().err
