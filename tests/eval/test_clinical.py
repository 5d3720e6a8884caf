"""The clinical task in one piece: planted effects are found, permuted targets give chance, nothing leaks or is lost."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainlm.checkpoint import save_checkpoint
from brainlm.dataset import Dataset, open_dataset
from brainlm.errors import ConfigError, DataError
from brainlm.intervals import bootstrap_counts
from brainlm.store import Store
from brainlm.testing import small_model
from eval.clinical.features import fisher_z
from eval.clinical.people import find_people
from eval.clinical.settings import ClinicalSettings
from eval.cohort import Cohort
from eval.compare import main as compare
from eval.results import Score, read_scores
from eval.run import main
from tests.phenotypes import MISSING_AGE, write_phenotype_dataset

SETTINGS = (
    "clinical={targets: [{column: age}, {column: coupling}, {column: coupled, kind: classification}, "
    "{column: accent}], repeats: 1, folds: 4, baselines: ['FC, linear', 'FC tangent, linear', 'FC, SVR'], "
    "readouts: [linear, parcels], confounds: [site], by: [site, sex]}"
)
Captured = pytest.CaptureFixture[str]


def add_columns(dataset: Dataset) -> None:
    """Add ``coupling``, how strongly the first parcels are correlated; its upper half; and ``accent``, of sites."""
    people = find_people(Cohort.of(dataset), ClinicalSettings())
    rng = np.random.default_rng(3)
    z = np.array([fisher_z(people, row)[:6].mean() for row in range(len(people))])
    coupling = (z - z.mean()) / z.std()
    accent = np.array([5.0 if site == "a" else 0.0 for site in people.sites()]) + rng.standard_normal(len(people))
    by_subject = {member.subject: row for row, member in enumerate(people.members)}
    table = pd.read_parquet(io.BytesIO(dataset.store.read_bytes("subjects.parquet")))
    rows = [by_subject[subject] for subject in table["subject"]]
    table["coupling"], table["accent"] = coupling[rows], accent[rows]
    table["coupled"] = np.where(table["coupling"] > 0, "yes", "no")
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    dataset.store.write_bytes("subjects.parquet", buffer.getvalue())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    found = write_phenotype_dataset(str(tmp_path_factory.mktemp("clinical") / "dataset"), num_timepoints=160)
    add_columns(found)
    return open_dataset(found.store.url)


@pytest.fixture(scope="module")
def checkpoint(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("pretrained") / "tiny")
    save_checkpoint(
        folder, small_model(dataset.contract), {}, [entry.subject for entry in dataset.split("train").entries]
    )
    return folder


def run(dataset: Dataset, checkpoint: str, out: Path, *more: str) -> int:
    return main(
        [
            f"dataset={dataset.store.url}", f"checkpoints=[{checkpoint}]", f"out={out}", "tasks=[clinical]",
            "ray.workers=0", "report=false", "intervals={num_bootstrap: 200}", SETTINGS, *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(dataset: Dataset, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert run(dataset, checkpoint, out) == 0
    return out


def score(out: Path, model: str, metric: str, target: str, **condition: str) -> Score:
    wanted = {"target": target, "folds": "random", "confounds": "kept", **condition}
    found = [
        s
        for s in read_scores(Store(out))
        if s.model == model and s.metric == metric and all(s.condition.get(k) == v for k, v in wanted.items())
    ]
    assert len(found) == 1, (model, metric, wanted)
    return found[0]


def test_planted_effects_are_found_by_what_can_see_them(finished: Path) -> None:
    for method in ("FC, linear", "FC tangent, linear", "FC, SVR"):
        assert score(finished, method, "r2", "coupling").value > 0.3, method
        assert score(finished, method, "auc", "coupled").value > 0.7, method
    loudness = score(finished, "BrainLM tiny", "r2", "age", readout="parcels")  # correlations do not know it
    assert loudness.value > 0.5
    assert loudness.ci_low is not None
    assert loudness.ci_low > 0.3
    assert score(finished, "FC, linear", "r2", "age").value < 0.2
    against = score(finished, "BrainLM tiny", "r2_minus_reference", "age", readout="parcels")
    assert against.value > 0.4
    assert against.p_value is not None
    assert against.p_value < 0.05
    assert against.p_corrected is not None
    assert against.p_corrected >= against.p_value


def test_permuted_targets_and_constants_give_chance(finished: Path) -> None:
    for model, more in (
        ("FC, linear, permuted targets", {}),
        ("BrainLM tiny, permuted targets", {"readout": "linear"}),
    ):
        assert score(finished, model, "r2", "coupling", **more).value < 0.1
        chance = score(finished, model, "auc", "coupled", **more)
        assert abs(chance.value - 0.5) < 0.2
    assert -0.1 < score(finished, "constant", "r2", "coupling").value <= 0
    assert score(finished, "constant", "auc", "coupled").value == 0.5


def test_what_sites_explain_is_gone_when_confounds_are_removed(finished: Path) -> None:
    assert score(finished, "confounds only", "r2", "accent").value > 0.7
    assert score(finished, "FC, linear", "r2", "accent", confounds="removed").value < 0.2
    kept = score(finished, "FC, linear", "r2", "coupling").value
    assert abs(score(finished, "FC, linear", "r2", "coupling", confounds="removed").value - kept) < 0.2


def test_every_site_is_tested_by_the_others(finished: Path) -> None:
    folds = pd.read_parquet(finished / "clinical_folds.parquet")
    sites = folds[(folds["folds"] == "sites") & (folds["model"] == "FC, linear") & (folds["target"] == "coupling")]
    assert set(sites["fold"]) == {"a", "b"}
    assert score(finished, "FC, linear", "r2", "coupling", folds="sites").value > 0.2


def test_only_people_that_the_checkpoint_has_not_seen_are_tested(finished: Path, dataset: Dataset) -> None:
    scores = read_scores(Store(finished))
    assert {s.split for s in scores} == {"unseen"}
    assert score(finished, "FC, linear", "r2", "coupling").num_subjects == 60
    assert score(finished, "FC, linear", "r2", "age").num_subjects == 59  # one age is missing
    text = b"".join(path.read_bytes() for path in finished.rglob("*") if path.is_file())
    for entry in (*dataset.split("val").entries, *dataset.split("test").entries):
        assert entry.subject.encode() not in text
    assert MISSING_AGE.encode() not in text


def test_nobody_is_learned_from_and_tested(dataset: Dataset, checkpoint: str) -> None:
    people = find_people(replace(Cohort.of(dataset), pretrained=(checkpoint,)), ClinicalSettings())
    assert len(people) == 60
    assert {member.split for member in people.members} == {"val", "test"}
    assert len(set(people.groups)) == 59  # twins


def test_recordings_that_do_not_take_part_are_counted_by_reason(
    dataset: Dataset, checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    cohort = replace(Cohort.of(dataset), pretrained=(checkpoint,))
    pretrained = "of people that a checkpoint was pretrained on, or of their families"
    assert find_people(cohort, ClinicalSettings()).left_out == {pretrained: 8}
    in_test = find_people(cohort, replace(ClinicalSettings(), of="split"))
    assert in_test.left_out == {"not in the split test": 38}
    assert len(in_test) == 30
    one_parcel = np.arange(cohort.num_parcels) == 0
    without = find_people(replace(cohort, usable_P=one_parcel), ClinicalSettings())
    assert len(without) == 0
    assert sum(without.left_out.values()) == 68
    assert run(dataset, checkpoint, tmp_path, "--dry-run") == 0
    assert f"note: clinical: 8 recordings are left out, {pretrained}" in capsys.readouterr().out


def test_a_network_with_no_readout_left_is_refused(dataset: Dataset, tmp_path: Path, capsys: Captured) -> None:
    folder = str(tmp_path / "grouped")
    model = small_model(dataset.contract, patch_parcels=2)
    save_checkpoint(folder, model, {}, [entry.subject for entry in dataset.split("train").entries])
    assert run(dataset, folder, tmp_path / "out", "clinical.readouts=[parcels]", "include_untrained=false") == 1
    assert "clinical.readouts: none of parcels can be had of BrainLM grouped" in capsys.readouterr().err
    assert run(dataset, folder, tmp_path / "out", "clinical.readouts=[parcels, linear]", "--dry-run") == 0
    assert "BrainLM grouped has no readout parcels: a token of this model holds 2 parcels" in capsys.readouterr().out


def test_a_method_that_lacks_folds_says_so_and_is_not_compared(
    finished: Path, dataset: Dataset, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    shutil.copytree(finished, out)
    for file in (out / "subjects").glob("clinical--FC-SVR-random-0.1--*.parquet"):
        file.unlink()

    def fails(*_: object, **__: object) -> None:
        raise DataError("no disk")

    monkeypatch.setattr("eval.tasks.clinical.work", fails)
    assert run(dataset, checkpoint, out) == 1
    lacking = score(out, "FC, SVR", "r2", "coupling")
    assert any("3 of 4 folds alone" in note for note in lacking.notes)
    assert lacking.num_subjects < score(out, "FC, linear", "r2", "coupling").num_subjects
    compared = [
        s.model
        for s in read_scores(Store(out))
        if s.metric == "r2_minus_reference" and (s.condition["target"], s.condition["folds"]) == ("coupling", "random")
    ]
    assert "constant" in compared
    assert "FC, SVR" not in compared


def test_a_fold_with_nothing_to_learn_is_listed(dataset: Dataset, checkpoint: str, tmp_path: Path) -> None:
    """Of two sites one has all cases: at the other there is one class."""
    table = pd.read_parquet(io.BytesIO(dataset.store.read_bytes("subjects.parquet")))
    people = find_people(Cohort.of(dataset), ClinicalSettings())
    site = {member.subject: place for member, place in zip(people.members, people.sites(), strict=True)}
    of_site_a = np.array([site[subject] == "a" for subject in table["subject"]])
    table["case"] = np.where(of_site_a & (table["sex"] == "F"), "yes", "no")
    copy = tmp_path / "dataset"
    shutil.copytree(dataset.store.path(), copy)
    table.to_parquet(copy / "subjects.parquet")
    few = (
        "clinical={targets: [{column: case, kind: classification}], fold_kinds: [sites], readouts: [linear], "
        "baselines: ['FC, linear'], permuted_control: false}"
    )
    assert run(open_dataset(str(copy)), checkpoint, tmp_path / "out", few) == 0
    folds = pd.read_parquet(tmp_path / "out" / "clinical_folds.parquet").query("model == 'FC, linear'")
    assert set(folds["fold"]) == {"a", "b"}
    lost = folds[folds["fold"] == "a"]
    assert lost["chosen"].str.startswith("left out: target case: one class").all()
    assert lost["value"].isna().all()


def test_tables_for_the_report_are_there(finished: Path) -> None:
    names = ("predictions", "folds", "groups", "calibration")
    tables = {name: pd.read_parquet(finished / f"clinical_{name}.parquet") for name in names}
    predictions = tables["predictions"].query("model == 'FC, linear' and target == 'coupling' and folds == 'random'")
    assert len(predictions) == 2 * 60  # confounds kept and removed
    assert set(tables["groups"]["by"]) == {"site", "sex"}
    assert tables["calibration"]["observed"].between(-10, 200).all()
    assert tables["folds"]["validation_loss"].notna().sum() > 100


def test_a_second_run_computes_nothing_and_a_lost_unit_alone(
    finished: Path, dataset: Dataset, checkpoint: str, capsys: Captured
) -> None:
    before = (finished / "results.json").read_bytes()
    for file in (finished / "subjects").glob("clinical--FC-linear-random-0.1--*.parquet"):
        file.unlink()
    capsys.readouterr()
    assert run(dataset, checkpoint, finished) == 0
    assert "[1/1] clinical: FC, linear, random 0.1" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.slow
def test_workers_and_batches_change_no_digit(dataset: Dataset, checkpoint: str, tmp_path: Path) -> None:
    """Every method on Ray workers, the networks among them."""
    few = (
        "clinical={targets: [{column: age}], repeats: 1, folds: 3, fold_kinds: [random], confounds: [site], "
        "fit: {steps: 10, check_every: 5, lrs: [0.01]}}"
    )
    for folder, workers, batch in (("a", 2, 8), ("b", 0, 3)):
        more = (few, f"ray.workers={workers}", f"batch_size={batch}")
        assert run(dataset, checkpoint, tmp_path / folder, *more) == 0
    ours, theirs = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in "ab")
    assert len({record["model"] for record in ours}) == 7 + 2 + 1 + 2 + 1
    for a, b in zip(ours, theirs, strict=True):
        assert a["value"] == b["value"], a


@pytest.mark.slow
def test_fine_tuning_is_a_readout_like_others(
    dataset: Dataset, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the people and folds of the others, and its untrained twin with it; the planted loudness is found."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = tmp_path / "finetune.yaml"
    config.write_text(
        "run: {steps: 120, log_every: 60, snapshot_every: 60}\n"
        "data: {batch_size: 8, windows_per_recording: 2}\n"
        "targets: [{column: age}]\n"
        "encoder: {dropout: 0.0}\n"
        "head: {pooling: mean, dropout: 0.0}\n"
        "optimizer: {lr: 3.0e-3}\n"
        "engine: {precision: fp32, threads: 1}\n"
        "validation: {every: 30}\n"
    )
    only = (
        "clinical={targets: [{column: age}], repeats: 1, folds: 2, fold_kinds: [random], baselines: ['FC, linear'], "
        f"readouts: [linear, fine-tuned], permuted_control: false, finetune: {config}, confounds: [site]}}"
    )
    assert run(dataset, checkpoint, tmp_path / "out", only) == 0
    found = score(tmp_path / "out", "BrainLM tiny", "r2", "age", readout="fine-tuned")
    assert found.value > 0.3
    assert found.num_subjects == score(tmp_path / "out", "FC, linear", "r2", "age").num_subjects
    assert score(tmp_path / "out", "untrained", "r2", "age", readout="fine-tuned").model_kind == "untrained"
    removed = [s for s in read_scores(Store(tmp_path / "out")) if s.condition.get("confounds") == "removed"]
    assert removed
    assert all(s.condition.get("readout") != "fine-tuned" for s in removed)


def test_what_cannot_be_predicted_is_said(dataset: Dataset, checkpoint: str, tmp_path: Path, capsys: Captured) -> None:
    for column, kind, message in (
        ("nothing", "regression", "no column 'nothing' in subjects.parquet"),
        ("comment", "regression", "expected numbers, found text"),
        ("constant", "regression", "constant, all"),
    ):
        more = f"clinical={{targets: [{{column: {column}, kind: {kind}}}]}}"
        assert run(dataset, checkpoint, tmp_path, more) == 1
        assert message in capsys.readouterr().err


def test_confounds_are_numbers_or_classes(dataset: Dataset, tmp_path: Path) -> None:
    table = pd.read_parquet(io.BytesIO(dataset.store.read_bytes("subjects.parquet")))
    table["scanner"] = np.where(np.arange(len(table)) % 2, "old", "new")
    table["weight"] = [str(60 + i) if i else "heavy" for i in range(len(table))]
    table["note"] = [f"note {i}" for i in range(len(table))]
    table["part"] = [1.0 if i else np.nan for i in range(len(table))]
    shutil.copytree(dataset.store.path(), tmp_path / "dataset")
    table.to_parquet(tmp_path / "dataset" / "subjects.parquet")
    people = find_people(Cohort.of(open_dataset(str(tmp_path / "dataset"))), ClinicalSettings())
    assert people.confounds(["scanner"]).shape == (68, 2)
    assert people.confounds(["part", "nothing"]).shape == (68, 2)
    with pytest.raises(DataError, match="expected numbers, found text in 1 of 68 rows"):
        people.confounds(["weight"])
    with pytest.raises(DataError, match="confound note: 68 different texts"):
        people.confounds(["note"])


@pytest.mark.slow
def test_people_that_were_seen_are_marked(dataset: Dataset, checkpoint: str, tmp_path: Path) -> None:
    few = (
        "clinical={targets: [{column: age}], repeats: 1, folds: 2, fold_kinds: [random], readouts: [linear], "
        "baselines: ['FC, linear'], permuted_control: false, remove_confounds: false}"
    )
    assert run(dataset, checkpoint, tmp_path, few, "allow_seen_subjects=true") == 0
    scores = read_scores(Store(tmp_path))
    assert {s.split for s in scores} == {"all"}
    assert all(any("may be among those" in note for note in s.notes) for s in scores)
    assert score(tmp_path, "FC, linear", "r2", "age").num_subjects == 67


def test_without_targets_the_task_is_left_out(
    dataset: Dataset, checkpoint: str, tmp_path: Path, capsys: Captured
) -> None:
    assert run(dataset, checkpoint, tmp_path, "clinical={}") == 1
    assert "no target is given (clinical.targets" in capsys.readouterr().err


def test_settings_that_make_no_sense_are_refused() -> None:
    for message, settings in (
        ("expected some of", {"baselines": ("FC, forest",)}),
        ("each column once", {"targets": ({"column": "age"}, {"column": "age"})}),
        ("together", {"readouts": ("fine-tuned",)}),
        ("at least 2", {"folds": 1}),
    ):
        from brainlm.config import build

        with pytest.raises(ConfigError, match=message):
            build(ClinicalSettings, settings, "clinical")


def test_two_evaluations_are_compared_by_the_same_people(
    finished: Path, dataset: Dataset, tmp_path: Path, capsys: Captured
) -> None:
    other = str(tmp_path / "other")
    seen = [entry.subject for entry in dataset.split("train").entries]
    save_checkpoint(other, small_model(dataset.contract, seed=3), {}, seen)
    more = ("clinical.readouts=[linear]", "clinical.baselines=['FC, linear']")
    assert run(dataset, other, tmp_path / "after", *more) == 0
    words = [str(finished), str(tmp_path / "after"), "--out", str(tmp_path / "comparison.json"), "--task", "clinical"]
    assert compare([*words, "--model", "BrainLM tiny=BrainLM other"]) == 0
    printed = capsys.readouterr().out
    assert "clinical: r2\n" in printed
    assert "clinical: auc\n" in printed
    found = json.loads((tmp_path / "comparison.json").read_text())["scores"]
    assert {record["interval"] for record in found} == {"paired"}
    same = [record for record in found if record["model_a"] == "FC, linear"]
    assert same
    assert all(record["difference"] == record["ci_low"] == record["ci_high"] == 0 for record in same)

    condition = {"target": "age", "readout": "linear", "folds": "random", "confounds": "kept"}
    (record,) = [r for r in found if (r["model_a"], r["metric"], r["condition"]) == ("BrainLM tiny", "r2", condition)]
    frames = []
    for folder, model in ((finished, "BrainLM tiny"), (tmp_path / "after", "BrainLM other")):
        table = pd.read_parquet(folder / "clinical_predictions.parquet")
        here = (table["model"] == model) & (table[list(condition)] == list(condition.values())).all(axis=1)
        frames.append(table[here].set_index("group").sort_index())
    groups = sorted(frames[0].index.unique())
    assert len(groups) == len(frames[0]) - 1  # a recording a subject, and one family of two

    def r2(frame: pd.DataFrame) -> float:
        truth = frame["truth"].to_numpy()
        return float(1 - np.square(frame["predicted"] - truth).sum() / np.square(truth - truth.mean()).sum())

    drawn = []
    for counts in bootstrap_counts(len(groups), 2000, 0)[:400]:
        names = np.repeat(groups, counts.astype(int))
        drawn.append(r2(frames[1].loc[names]) - r2(frames[0].loc[names]))
    assert record["difference"] == pytest.approx(r2(frames[1]) - r2(frames[0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low
    assert abs(record["ci_low"] - low) < 0.2 * width  # 400 of 2000 draws
    assert abs(record["ci_high"] - high) < 0.2 * width
