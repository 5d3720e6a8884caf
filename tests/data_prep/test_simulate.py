"""The simulated cohort: what is planted is found again in the files, and a run can be stopped, repeated and split."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.signal import welch

from brainlm.config import load_config
from brainlm.errors import ConfigError
from brainlm.state_space import SimulatedTruth, load_truth
from data_prep import simulate
from data_prep.simulated_atlas import NETWORKS, AtlasConfig, SimulatedAtlas, make_atlas
from data_prep.simulated_cohort import SimulateConfig, SimulatedSeries, plan_cohort, simulate_series
from data_prep.simulated_dynamics import DynamicsConfig, reference_couplings, sample_dynamics
from data_prep.simulated_images import parcel_series
from data_prep.simulated_motion import MOTION_COLUMNS, framewise_displacement

CONFIGS = Path(simulate.__file__).parent / "configs"
TINY = str(CONFIGS / "tiny_cohort.yaml")
SHORT = ["acquisition.fewest_timepoints=40", "acquisition.most_timepoints=44", "cohort.num_subjects=2"]
PATCH_LEN = 20


def settings(*overrides: str) -> SimulateConfig:
    return load_config(SimulateConfig, TINY, list(overrides))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cohort as its config file describes it, written by two processes."""
    out = tmp_path_factory.mktemp("simulated") / "cohort"
    assert simulate.main(["--config", TINY, f"out={out}", "num_workers=2"]) == 0
    return out


@pytest.fixture(scope="module")
def population() -> tuple[list[SimulatedSeries], SimulatedTruth]:
    """Series of more subjects than the tiny cohort has, to see effects."""
    return simulate_series(settings("cohort.num_subjects=30", "cohort.num_task_subjects=4"))


@pytest.fixture(scope="module")
def atlas() -> SimulatedAtlas:
    return make_atlas(AtlasConfig(), 1)


def read_recording(out: Path, recording_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Average the labels of an image by the definition, and read its motion parameters."""
    folder = out / recording_id.split("_")[0] / "func"
    image = nib.load(next(folder.glob(f"{recording_id}_space-*_bold.nii.gz")))
    labels = np.asarray(nib.load(next((out / "atlas").glob("*_dseg.nii.gz"))).dataobj)
    data = image.get_fdata()
    bold = np.stack([data[labels == value].mean(axis=0) for value in np.unique(labels[labels > 0])], axis=1)
    with open(folder / f"{recording_id}_desc-confounds_timeseries.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return bold, np.array([[float(row[name]) for name in MOTION_COLUMNS] for row in rows])


def without_motion(series: np.ndarray, motion: np.ndarray) -> np.ndarray:
    design = np.column_stack([np.ones(len(motion)), motion])
    return series - design @ np.linalg.lstsq(design, series, rcond=None)[0]


def hide_patches(shape: tuple[int, int], ratio: float, rng: np.random.Generator) -> np.ndarray:
    """True = visible."""
    return np.repeat(rng.random((shape[0] // PATCH_LEN, shape[1])) >= ratio, PATCH_LEN, axis=0)


def r_squared(bold: np.ndarray, predicted: np.ndarray, hidden: np.ndarray) -> float:
    """R2 in units of each parcel's standard deviation, about the parcel's mean."""
    centred = (bold - bold.mean(axis=0)) / bold.std(axis=0)
    error = (bold - predicted) / bold.std(axis=0)
    return float(1 - (error[hidden] ** 2).sum() / (centred[hidden] ** 2).sum())


def files_of(out: Path) -> Iterator[Path]:
    return (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file())


# The files


def test_label_means_without_motion_are_the_planted_series(cohort: Path) -> None:
    plan = plan_cohort(settings())
    for recording in plan.recordings[:3]:
        bold, motion = read_recording(cohort, recording.recording_id)
        planted = parcel_series(plan, recording)
        # The regression also takes a few percent of the signal, so both sides go through it.
        pairs = zip(without_motion(bold, motion).T, without_motion(planted, motion).T)
        assert min(np.corrcoef(found, expected)[0, 1] for found, expected in pairs) > 0.99
        baseline = (bold - planted).mean(axis=0)
        np.testing.assert_allclose(baseline, plan.truth.baseline(recording.recording_id), atol=0.3)


def test_motion_leaves_a_trace_that_regression_removes(cohort: Path) -> None:
    plan = plan_cohort(settings())
    lost = []
    for recording in plan.recordings:
        bold, motion = read_recording(cohort, recording.recording_id)
        planted = parcel_series(plan, recording)
        lost.append(np.var(bold - bold.mean(axis=0) - planted) / np.var(planted))
        difference = without_motion(bold - planted, motion)
        assert np.var(difference) < 0.01 * np.var(planted)
    assert np.median(lost) > 0.03


def test_image_is_in_mni_space_with_the_repetition_time(cohort: Path) -> None:
    image = nib.load(next(cohort.glob("sub-001/func/*task-rest*_bold.nii.gz")))
    labels = nib.load(cohort / "atlas" / "sim56_dseg.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert image.shape[:3] == labels.shape
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)
    np.testing.assert_allclose(image.get_qform(), image.get_sform())
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header.get_zooms() == (8.0, 8.0, 8.0, 2.0)
    sidecar = json.loads(next(cohort.glob("sub-001/func/*task-rest*_bold.json")).read_text())
    assert (sidecar["RepetitionTime"], sidecar["TaskName"]) == (2.0, "rest")


def test_outside_of_the_brain_is_zero_and_inside_is_not(cohort: Path) -> None:
    data = nib.load(next(cohort.glob("sub-002/func/*task-rest*_bold.nii.gz"))).get_fdata()
    brain = plan_cohort(settings()).atlas.brain
    assert (data[~brain] == 0).all()
    assert data[brain].min() > 400


def test_float_images_hold_the_same_series(tmp_path: Path) -> None:
    found = []
    for data_type in ("int16", "float32"):
        out = tmp_path / data_type
        config = settings(*SHORT, "cohort.num_task_subjects=0", f"acquisition.data_type={data_type}", f"out={out}")
        simulate.write_cohort(config)
        found.append(read_recording(out, "sub-001_task-rest")[0])
    np.testing.assert_allclose(found[0], found[1], atol=0.5)


def test_confounds_table_is_as_fmriprep_writes_it(cohort: Path) -> None:
    with open(cohort / "sub-003" / "func" / "sub-003_task-rest_desc-confounds_timeseries.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {*MOTION_COLUMNS, "framewise_displacement", "csf", "white_matter"} == set(rows[0])
    displacement = [row["framewise_displacement"] for row in rows]
    assert displacement[0] == "n/a"
    motion = np.array([[float(row[name]) for name in MOTION_COLUMNS] for row in rows])
    np.testing.assert_allclose(np.array(displacement[1:], float), framewise_displacement(motion)[1:], atol=1e-6)


def test_events_are_the_blocks_of_the_planted_input(cohort: Path) -> None:
    truth = load_truth(cohort)
    with open(cohort / "sub-001" / "func" / "sub-001_task-checkerboard_events.tsv") as file:
        events = [(float(row["onset"]), float(row["duration"])) for row in csv.DictReader(file, delimiter="\t")]
    inputs = truth.system("sub-001_task-checkerboard")[1]
    assert inputs is not None
    times = np.arange(len(inputs)) * truth.tr_s
    is_on = np.any([(times >= onset) & (times < onset + duration) for onset, duration in events], axis=0)
    np.testing.assert_array_equal(inputs[:, 0] > 0, is_on)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-12)
    assert truth.system("sub-001_task-rest")[1] is None


def test_tables_agree_with_one_another(cohort: Path) -> None:
    truth = load_truth(cohort / "truth")
    with open(cohort / "atlas" / "sim56_dseg.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert tuple(row["name"] for row in rows) == truth.parcels
    assert tuple(row["network"] for row in rows) == truth.networks
    labels = np.asarray(nib.load(cohort / "atlas" / "sim56_dseg.nii.gz").dataobj)
    assert sorted({int(row["index"]) for row in rows}) == np.unique(labels[labels > 0]).tolist()
    with open(cohort / "participants.tsv") as file:
        assert len(list(csv.DictReader(file, delimiter="\t"))) == 6
    images = sorted(path.name.split("_space-")[0] for path in cohort.rglob("*_bold.nii.gz"))
    assert images == sorted(truth.recordings)
    assert json.loads((cohort / "truth" / "truth.json").read_text()) == truth.facts
    description = json.loads((cohort / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert "Simulated" in description["Name"]


# Stopping, repeating, splitting


def test_files_are_the_same_for_one_and_two_processes(cohort: Path, tmp_path: Path) -> None:
    simulate.write_cohort(settings(f"out={tmp_path / 'one'}", "num_workers=1"))
    assert list(files_of(tmp_path / "one")) == list(files_of(cohort))
    for name in files_of(cohort):
        assert (tmp_path / "one" / name).read_bytes() == (cohort / name).read_bytes(), name


def test_series_of_a_recording_do_not_depend_on_the_others(cohort: Path) -> None:
    full, truth = simulate_series(settings())
    again, _ = simulate_series(settings("cohort.num_task_subjects=0"))
    by_id = {series.recording_id: series.bold for series in full}
    for series in again:
        np.testing.assert_array_equal(series.bold, by_id[series.recording_id])
    assert set(by_id) == set(truth.recordings)


def test_a_stopped_run_is_completed_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(*SHORT, f"out={tmp_path / 'cohort'}", "num_workers=1")
    whole = settings(*SHORT, f"out={tmp_path / 'whole'}", "num_workers=1")
    written: list[str] = []
    original = simulate.write_recording

    def stop_after_two(plan, recording, out) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        original(plan, recording, out)
        written.append(recording.recording_id)

    monkeypatch.setattr(simulate, "write_recording", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        simulate.write_cohort(config)
    assert not (tmp_path / "cohort" / "simulation.json").exists()

    def count(plan, recording, out) -> None:
        original(plan, recording, out)
        written.append(recording.recording_id)

    monkeypatch.setattr(simulate, "write_recording", count)
    simulate.write_cohort(config)
    assert sorted(written) == sorted(load_truth(tmp_path / "cohort").recordings)
    simulate.write_cohort(whole)
    for name in files_of(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cohort" / name).read_bytes(), name
    with caplog.at_level("INFO"):
        simulate.write_cohort(config)
    assert "already there" in caplog.text


def test_a_lost_recording_is_made_again(tmp_path: Path) -> None:
    config = settings(*SHORT, f"out={tmp_path / 'cohort'}", "num_workers=1")
    simulate.write_cohort(config)
    lost = next((tmp_path / "cohort").rglob("sub-002*_bold.nii.gz"))
    content = lost.read_bytes()
    lost.unlink()
    simulate.write_cohort(config)
    assert lost.read_bytes() == content
    assert (tmp_path / "cohort" / "simulation.json").exists()


def test_other_settings_in_the_same_folder_are_an_error_that_names_them(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (cohort / "simulation.json").read_bytes()
    with pytest.raises(ConfigError, match=r"acquisition.tr_s 2.0, 1.5; seed 1, 7"):
        simulate.write_cohort(settings(f"out={cohort}", "seed=7", "acquisition.tr_s=1.5"))
    assert simulate.main(["--config", TINY, f"out={cohort}", "seed=7"]) == 1
    assert "error:" in capsys.readouterr().err
    assert (cohort / "simulation.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        simulate.write_cohort(settings(f"out={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--config", TINY, "--dry-run", f"out={tmp_path / 'cohort'}"]) == 0
    assert "8 recordings of 6 subjects" in capsys.readouterr().out
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize(
    "override", ["atlas.num_parcels=57", "atlas.num_parcels=1900", "acquisition.data_type=int8", "effects.oops=1"]
)
def test_settings_that_cannot_be_are_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        plan_cohort(settings(override))


@pytest.mark.parametrize("name", ["demo_cohort.yaml", "tiny_cohort.yaml"])
def test_shipped_configs_are_valid(name: str) -> None:
    assert load_config(SimulateConfig, CONFIGS / name, []).cohort.num_subjects > 0


# The atlas


def test_parcels_are_balanced_mirrored_and_labelled_with_gaps(atlas: SimulatedAtlas) -> None:
    sizes = np.bincount(atlas.labels[atlas.labels > 0])[atlas.label_values]
    assert sizes.min() > 0.9 * sizes.max()
    assert atlas.label_values.max() > 255
    assert np.diff(atlas.label_values).max() > 1
    left, right = atlas.coords_mm[: atlas.num_parcels // 2], atlas.coords_mm[atlas.num_parcels // 2 :]
    np.testing.assert_allclose(left * [-1, 1, 1], right, atol=1e-9)
    assert (left[:, 0] < 0).all()
    assert set(atlas.networks) == set(NETWORKS)


@pytest.mark.parametrize("mirrored", [False, True], ids=["x, y, z", "|x|, y, z"])
@pytest.mark.parametrize("num_neighbours", [1, 5])
def test_positions_do_not_give_networks_away(atlas: SimulatedAtlas, mirrored: bool, num_neighbours: int) -> None:
    coords = np.abs(atlas.coords_mm) * [1, 0, 0] + atlas.coords_mm * [0, 1, 1] if mirrored else atlas.coords_mm
    # Blocks are octants of the head, so that a parcel's neighbours are held out with it.
    blocks = (atlas.coords_mm > np.median(atlas.coords_mm, axis=0)) @ [1, 2, 4]
    correct = []
    for block in range(8):
        train, test = np.flatnonzero(blocks != block), np.flatnonzero(blocks == block)
        distance = ((coords[test, None] - coords[None, train]) ** 2).sum(axis=-1)
        nearest = atlas.network_ids[train[np.argsort(distance, axis=1, kind="stable")[:, :num_neighbours]]]
        votes = np.stack([(nearest == index).sum(axis=1) for index in range(len(NETWORKS))], axis=1)
        correct.append(votes.argmax(axis=1) == atlas.network_ids[test])
    assert np.concatenate(correct).mean() < 0.4


# What is planted


def test_kalman_smoother_beats_the_gaussian_conditional(population) -> None:
    series, truth = population
    rest = [item for item in series if item.task == "rest"]
    train, test = rest[:20], rest[20:]
    cov = np.mean([np.corrcoef(item.bold.T) for item in train], axis=0)
    optimal, conditional = [], []
    rng = np.random.default_rng(0)
    for item in test:
        system, inputs = truth.system(item.recording_id)
        bold = (item.bold - truth.baseline(item.recording_id))[: len(item.bold) // PATCH_LEN * PATCH_LEN]
        visible = hide_patches(bold.shape, 0.75, rng)
        predicted = np.zeros_like(bold)
        for start in range(0, len(bold), PATCH_LEN):
            seen, rows = visible[start], slice(start, start + PATCH_LEN)
            gain = np.linalg.solve(cov[np.ix_(seen, seen)], cov[seen]) * bold.std(axis=0)
            predicted[rows] = (bold / bold.std(axis=0))[rows][:, seen] @ gain
        optimal.append(r_squared(bold, system.smooth(bold, visible, inputs), ~visible))
        conditional.append(r_squared(bold, predicted, ~visible))
    assert 0.7 < np.mean(optimal) < 0.85
    assert np.mean(optimal) > np.mean(conditional) + 0.02


def test_forecasting_is_possible_but_hard(population) -> None:
    series, truth = population
    error, total, horizon = 0.0, 0.0, 20
    for item in series:
        if item.task == "rest":
            bold = item.bold - truth.baseline(item.recording_id)
            predicted = truth.system(item.recording_id)[0].forecast(bold[:-horizon], horizon)
            error += float(((bold[-horizon:] - predicted) ** 2 / bold.var(axis=0)).sum())
            total += float((bold[-horizon:] ** 2 / bold.var(axis=0)).sum())
    assert 0.05 < 1 - error / total < 0.3


def test_series_have_the_planted_variance(population) -> None:
    series, truth = population
    ratios = []
    for item in series:
        if item.task == "rest":
            ratios.append(item.bold.var(axis=0) / truth.system(item.recording_id)[0].marginal_variance())
    np.testing.assert_allclose(np.mean(ratios), 1.0, atol=0.1)


def test_spectra_are_like_bold(population) -> None:
    series, truth = population
    networks = np.array(truth.networks)
    frequency, power = welch(np.stack([item.bold[:220] for item in series]), fs=1 / truth.tr_s, nperseg=110, axis=1)
    for name in NETWORKS:
        spectrum = power[:, :, networks == name].mean(axis=(0, 2))
        # White noise would have 0.4 of its power below 0.1 Hz at this repetition time.
        assert spectrum[frequency <= 0.1].sum() / spectrum.sum() > 0.75, name


def test_response_peaks_when_the_settings_say() -> None:
    config, tr_s = DynamicsConfig(), 0.1
    dynamics = sample_dynamics(config, reference_couplings() * 0, np.ones(len(NETWORKS)), tr_s)
    # A neural event leaves the neural state at once: remove its decay and follow the response stages alone.
    num = len(NETWORKS)
    stages = dynamics.transition[num:, num:]
    state = np.zeros(len(stages))
    state[0] = 1.0
    response = []
    for _ in range(300):
        response.append(state[-num])
        state = stages @ state
    assert abs(np.argmax(response) * tr_s - config.response_peak_s) <= 2 * tr_s


def test_age_and_severity_show_in_functional_connectivity(population) -> None:
    series, truth = population
    rest = [item for item in series if item.task == "rest"]
    networks, facts = np.array(truth.networks), truth.facts
    connectivity = np.stack([np.corrcoef(item.bold.T) for item in rest])
    age, severity = (np.array([item.subject[name] for item in rest], dtype=float) for name in ("age", "severity"))
    first, second = (np.flatnonzero(networks == name) for name in facts["age_effect"]["coupled_networks"])
    coupled = connectivity[:, first][:, :, second].mean(axis=(1, 2))
    assert np.corrcoef(coupled, age)[0, 1] < -0.5
    moved = truth.severity_parcels
    assert set(networks[moved]) == {facts["severity_effect"]["from"]}
    stayed = np.setdiff1d(np.flatnonzero(networks == facts["severity_effect"]["from"]), moved)
    target = np.flatnonzero(networks == facts["severity_effect"]["to"])
    difference = connectivity[:, moved][:, :, target].mean(axis=(1, 2)) - connectivity[:, moved][:, :, stayed].mean(
        axis=(1, 2)
    )
    assert np.corrcoef(difference, severity)[0, 1] > 0.6
    assert abs(np.corrcoef(age, severity)[0, 1]) < 0.1


def test_task_drives_the_visual_network(population) -> None:
    series, truth = population
    visual = np.array(truth.networks) == truth.facts["task_effect"]["network"]
    followed = []
    for item in series:
        if item.task != "rest":
            system, inputs = truth.system(item.recording_id)
            expected = system.smooth(np.zeros(item.bold.shape), np.zeros(item.bold.shape, dtype=bool), inputs)
            followed.append(np.corrcoef(item.bold[:, visual].mean(axis=1), expected[:, visual].mean(axis=1))[0, 1])
    assert np.mean(followed) > 0.4
