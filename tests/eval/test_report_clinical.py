"""The clinical section: tables, claims and figures from a folder of believable results; what is missing is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from brainlm.store import Store
from eval.report import write_report
from eval.report_claims import make_claims
from eval.report_clinical_claims import clinical_claims
from eval.report_clinical_input import clinical_targets
from eval.report_clinical_tables import paper_meaning
from eval.report_input import read_results
from eval.report_verdicts import Claim
from eval.results import Score, write_scores
from eval.summary import summary
from tests.eval.test_report import believable_scores, plain, write_table

pytest.importorskip("nilearn")

MODEL = "BrainLM demo"
NUM_PEOPLE, NUM_FOLDS, NUM_REPEATS = 60, 5, 2
REFERENCE = {"age_years": "FC, linear", "sex": "FC, SVR"}
SITES = ("Siteville", "Scanton", "Tiny")
LINEAR = {"readout": "linear"}
# model, kind, readout, quality (share of the truth in what it predicts), whether confounds can be removed
METHODS: tuple[tuple[str, str, str, float, bool], ...] = (
    (MODEL, "brainlm", "linear", 0.45, True),
    (MODEL, "brainlm", "SVR", 0.55, True),
    (MODEL, "brainlm", "attentive", 0.5, False),
    ("untrained", "untrained", "linear", 0.1, True),
    ("untrained", "untrained", "attentive", 0.1, False),
    ("FC, linear", "baseline", "", 0.5, True),
    ("FC tangent, linear", "baseline", "", 0.6, True),
    ("FC, SVR", "baseline", "", 0.5, True),
    ("raw series, SVR", "baseline", "", 0.05, False),
    ("confounds only", "control", "", 0.2, False),
    ("constant", "control", "", 0.0, False),
    (f"{MODEL}, permuted targets", "control", "attentive", 0.0, False),
    ("FC, linear, permuted targets", "control", "", 0.0, False),
)
VALIDATION_LOSS = {"linear": 0.8, "SVR": 0.7, "attentive": 0.6}
"""Attentive is chosen, although SVR is better on the test."""


def clinical_score(model: str, kind: str, target: str, metric: str, value: float, half: float, **where: Any) -> Score:
    return Score(
        task="clinical",
        version=1,
        dataset="sim-cohort",
        dataset_hash="5f0c" * 16,
        split="unseen",
        model=model,
        model_kind=kind,  # type: ignore[arg-type]
        model_hash=f"{model} v1",
        metric=metric,
        value=value,
        ci_low=value - half,
        ci_high=value + half,
        num_subjects=NUM_PEOPLE,
        num_recordings=NUM_PEOPLE,
        condition={"target": target, **where},
        statistics_from="checkpoint" if kind in ("brainlm", "untrained") else "cohort",
    )


def conditions(can_be_freed: bool) -> Iterator[tuple[str, str]]:
    for folds in ("random", "sites"):
        yield folds, "kept"
        if can_be_freed:
            yield folds, "removed"


def clinical_scores(half: float = 0.08) -> list[Score]:
    """Return scores of a regression and a classification; `half` is half an interval."""
    found = []
    for target, is_regression in (("age_years", True), ("sex", False)):
        for model, kind, readout, quality, can_be_freed in METHODS:
            for folds, confounds in conditions(can_be_freed):
                where = {"folds": folds, "confounds": confounds} | ({"readout": readout} if readout else {})
                less = 0.1 * (folds == "sites") + 0.1 * (confounds == "removed")
                first = quality - less if quality else -0.01
                metrics = {
                    "r2": first,
                    "pearson_r": max(first, 0) ** 0.5,
                    "mae": 9 * (1 - first) ** 0.5,
                    "mse_transformed": 1 - first,
                    "calibration_slope": 0.9,
                }
                if not is_regression:
                    first = 0.5 + max(first, 0) / 2
                    metrics = {"auc": first, "balanced_accuracy": first - 0.03, "brier": 0.25 - first / 8}
                    metrics["calibration_error"] = 0.07
                for metric, value in metrics.items():
                    found.append(clinical_score(model, kind, target, metric, value, half, **where))
                if model != REFERENCE[target] and can_be_freed | (confounds == "kept"):
                    theirs = 0.5 - less if is_regression else 0.5 + (0.5 - less) / 2
                    difference = clinical_score(
                        model, kind, target, f"{'r2' if is_regression else 'auc'}_minus_reference", first - theirs,
                        half / 2, **where, reference=REFERENCE[target],
                    )  # fmt: skip
                    p = 0.001 if abs(difference.value) > half / 2 else 0.7
                    found.append(replace(difference, p_value=p, p_corrected=min(1.0, p * 20)))
    return found


def write_clinical(folder: Path, scores: list[Score], *, without: str = "") -> str:
    """Write a results folder of the clinical task, but for one table."""
    store, rng = Store(folder), np.random.default_rng(0)
    write_scores(store, scores)
    tables: dict[str, list[dict[str, Any]]] = {"predictions": [], "folds": [], "groups": [], "calibration": []}
    age, sex = rng.uniform(20, 80, NUM_PEOPLE), rng.integers(0, 2, NUM_PEOPLE)
    site = np.array(SITES)[np.minimum(np.arange(NUM_PEOPLE) % 31 // 15, 2)]
    for target, truth in (("age_years", age), ("sex", sex.astype(np.float64))):
        for model, _, readout, quality, can_be_freed in METHODS:
            for folds, confounds in conditions(can_be_freed):
                where = {"target": target, "model": model, "readout": readout, "folds": folds, "confounds": confounds}
                for repeat in range(NUM_REPEATS if folds == "random" else 1):
                    predicted = predict(truth, quality, rng)
                    fold = rng.integers(0, NUM_FOLDS, NUM_PEOPLE).astype(str) if folds == "random" else site
                    tables["predictions"] += predictions(where, repeat, fold, truth, predicted)
                    tables["folds"] += fold_rows(where, repeat, fold, quality)
                if folds == "random" and confounds == "kept":
                    tables["groups"] += group_rows(where, {"site": site, "sex": np.array(["F", "M"])[sex]})
                    tables["calibration"] += bins(where, truth, predicted)
    for name, rows in tables.items():
        if name != without:
            write_table(store, f"clinical_{name}.parquet", pd.DataFrame(rows))
    return store.url


def predict(truth: NDArray[np.float64], quality: float, rng: np.random.Generator) -> NDArray[np.float64]:
    noise = (quality * (1 - quality)) ** 0.5 * rng.standard_normal(len(truth))
    predicted = truth.mean() + truth.std() * (quality * (truth - truth.mean()) / truth.std() + noise)
    return predicted if truth.max() > 1 else np.clip(predicted, 0, 1)


def kind_of(where: dict[str, Any]) -> str:
    return "regression" if where["target"] == "age_years" else "classification"


def predictions(where: dict[str, Any], repeat: int, fold: Any, truth: Any, predicted: Any) -> list[dict[str, Any]]:
    return [
        where
        | {
            "kind": kind_of(where),
            "repeat": repeat,
            "fold": fold[i],
            "group": f"{i * 7919:08x}",
            "recording": f"{i * 104729:08x}",
            "truth": truth[i],
            "predicted": predicted[i],
            "label": "" if kind_of(where) == "regression" else "FM"[int(truth[i])],
        }
        for i in range(len(truth))
    ]


def fold_rows(where: dict[str, Any], repeat: int, fold: Any, quality: float) -> list[dict[str, Any]]:
    metric = "r2" if kind_of(where) == "regression" else "auc"
    return [
        where
        | {
            "repeat": repeat,
            "fold": name,
            "num_train": int((fold != name).sum()),
            "num_test": int((fold == name).sum()),
            "metric": metric,
            "value": np.nan if name == "Tiny" else quality,
            "validation_loss": VALIDATION_LOSS.get(where["readout"], np.nan) + 0.01 * repeat,
            "chosen": "alpha 10",
        }
        for name in np.unique(fold)
    ]


def group_rows(where: dict[str, Any], groups: dict[str, Any]) -> list[dict[str, Any]]:
    metrics = ("mae", "pearson_r") if kind_of(where) == "regression" else ("auc", "balanced_accuracy")
    return [
        where
        | {
            "by": by,
            "label": label,
            "num_subjects": int((values == label).sum()),
            "num_recordings": int((values == label).sum()),
            "metric": metric,
            "value": 0.6,
            "ci_low": 0.5,
            "ci_high": 0.7,
        }
        for by, values in groups.items()
        for label in np.unique(values)
        for metric in metrics
    ]


def bins(where: dict[str, Any], truth: Any, predicted: Any) -> list[dict[str, Any]]:
    order = np.array_split(np.argsort(predicted), 10)
    return [
        where
        | {
            "kind": kind_of(where),
            "class": "" if kind_of(where) == "regression" else "M",
            "bin": number,
            "predicted": predicted[part].mean(),
            "observed": truth[part].mean(),
            "num": len(part),
        }
        for number, part in enumerate(order)
    ]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A rendered report of a complete folder: (folder, words of the page)."""
    folder = tmp_path_factory.mktemp("clinical")
    write_report(write_clinical(folder, clinical_scores()))
    return folder, plain((folder / "report.html").read_text())


def claims_of(folder: Path, scores: list[Score]) -> dict[str, Claim]:
    return {claim.topic: claim for claim in clinical_claims(read_results(write_clinical(folder, scores)), MODEL)}


def moved(scores: list[Score], shift: float, model: str = MODEL, metric: str = "r2") -> list[Score]:
    """Return the scores with one model's metric and difference shifted."""
    return [
        replace(s, value=s.value + shift, ci_low=s.ci_low + shift, ci_high=s.ci_high + shift)
        if s.model == model and s.metric.startswith(metric) and s.ci_low is not None and s.ci_high is not None
        else s
        for s in scores
    ]


def test_tasks_that_were_not_run_are_named_at_the_end(complete: tuple[Path, str]) -> None:
    page = (complete[0] / "report.html").read_text()
    assert re.findall(r'<section id="([^"]+)"', page) == ["clinical", "provenance"]
    listed = page[page.index("Not in this report") : page.index("<h3>Data</h3>")]
    assert re.findall(r'<th scope="row">([^<]+)', listed)[-2:] == ["Forecasting", "Functional networks"]
    assert "This task was not run: results.json holds no record of it." in listed


def test_page_holds_every_number_and_every_figure(complete: tuple[Path, str]) -> None:
    folder, text = complete
    for word in ("BrainLM demo, attentive", "each site left out, confounds removed", "0.500 [0.420, 0.580]"):
        assert word in text
    assert "0.590 [0.510, 0.670]" not in text
    saved = {path.name for path in (folder / "figures").glob("clinical-*.svg")}
    assert saved == {
        f"clinical-{name}.svg"
        for name in ("1-age-years-scores", "1-age-years-truth", "1-age-years-reliability", "2-sex-scores",
                     "2-sex-reliability")
    }  # fmt: skip


def test_captions_say_what_was_removed_and_what_chance_is(complete: tuple[Path, str]) -> None:
    assert "Confounds removed: in every fold a linear regression on the confounds" in complete[1]
    assert "0.5 is chance" in complete[1]
    head = "Method random folds, confounds kept random folds, confounds removed each site left out, confounds kept"
    assert head in complete[1]
    assert "Reference, the baseline that is best on validation people: FC, linear." in complete[1]


def test_no_person_is_named(complete: tuple[Path, str]) -> None:
    folder, _ = complete
    page = (folder / "report.html").read_text()
    frame = pd.read_parquet(folder / "clinical_predictions.parquet")
    assert not any(value in page for value in (*frame["group"].unique()[1:], *frame["recording"].unique()[1:]))
    assert "sub-" not in page


def test_groups_of_few_people_are_not_shown(complete: tuple[Path, str]) -> None:
    tables = re.findall(r"age_years, people by site.*?Scanton n = \d+", complete[1])
    assert len(tables) == 1
    assert "Not shown: 1 group of fewer than 5 people." in tables[0]
    assert "Tiny" not in tables[0]


def test_fold_without_a_score_stays_empty(complete: tuple[Path, str]) -> None:
    assert re.search(r"Tiny \d+ / \d+ – – –", complete[1])


@pytest.mark.parametrize("missing", ["predictions", "folds", "groups", "calibration"])
def test_a_missing_table_is_said(tmp_path: Path, missing: str) -> None:
    scores = [s for s in clinical_scores() if s.condition["target"] == "age_years"]
    write_report(write_clinical(tmp_path, scores, without=missing))
    text = plain((tmp_path / "report.html").read_text())
    assert f"clinical_{missing}.parquet is not there" in text
    assert "0.500 [0.420, 0.580]" in text


def test_scores_alone_make_a_section(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), clinical_scores())
    write_report(str(tmp_path))
    text = plain((tmp_path / "report.html").read_text())
    assert text.count(".parquet is not there: ") == 4
    assert "BrainLM demo with a linear readout predicts age_years" in text


def test_a_task_on_other_people_is_not_left_out(tmp_path: Path) -> None:
    write_scores(Store(tmp_path), [*believable_scores(), *clinical_scores()])
    results = read_results(str(tmp_path))
    assert results.left_out == 0
    topics = [claim.topic for claim in make_claims(results)]
    assert topics[-3:] == ["Clinical: age_years", "Clinical: sex", "Functional networks"]


def test_readout_is_chosen_on_validation_not_on_the_test(tmp_path: Path) -> None:
    target = clinical_targets(read_results(write_clinical(tmp_path, clinical_scores())))[0]
    chosen = target.chosen(MODEL)
    assert chosen is not None
    assert chosen.readout == "attentive"
    assert (
        max(target.find("r2", **target.base), key=lambda s: s.value * (s.model == MODEL)).condition["readout"] == "SVR"
    )


@pytest.mark.parametrize(
    ("shift", "tone", "words"),
    [
        (0.2, "ahead", "BrainLM demo is ahead: difference on the same subjects +0.200"),
        (-0.2, "behind", "BrainLM demo is behind: difference on the same subjects \N{MINUS SIGN}0.200"),
        (0.0, "open", "No clear difference"),
        (-0.6, "behind", "That is worse than naming the mean."),
    ],
)
def test_claim_is_what_the_interval_of_the_difference_says(tmp_path: Path, shift: float, tone: str, words: str) -> None:
    claim = claims_of(tmp_path, moved(clinical_scores(), shift))["Clinical: age_years"]
    assert claim.verdict.tone == tone
    assert words in claim.text
    assert "with an attentive readout (the readout with the lowest loss on validation people)" in claim.text


def test_claim_names_controls(tmp_path: Path) -> None:
    claim = claims_of(tmp_path, clinical_scores())["Clinical: age_years"]
    details = " ".join(claim.details)
    for words in (
        "The same network without training, same readout: untrained network, 0.100",
        "any brain: 0.200 [0.120, 0.280]. BrainLM demo is ahead: the intervals do not overlap, so it tells more",
        "With confounds removed from the features: there is no score of this readout.",
        "At sites that were left out of training: 0.400",
        "chance, as it should be",
        "Other readouts: linear 0.450 [0.370, 0.530] and SVR 0.550 [0.470, 0.630].",
    ):
        assert words in details


def test_permuted_targets_above_chance_are_called_a_leak(tmp_path: Path) -> None:
    scores = moved(clinical_scores(), 0.3, f"{MODEL}, permuted targets")
    details = " ".join(claims_of(tmp_path, scores)["Clinical: age_years"].details)
    assert "something leaks" in details


def test_what_confounds_reach_too_is_not_called_more(tmp_path: Path) -> None:
    scores = moved(clinical_scores(), 0.3, "confounds only")
    details = " ".join(claims_of(tmp_path, scores)["Clinical: age_years"].details)
    assert "so site and head motion may explain it." in details


def renamed(name: str) -> list[Score]:
    return [
        replace(s, condition=s.condition | {"target": name})
        for s in clinical_scores()
        if "mse" in s.metric or s.metric == "r2"
    ]


@pytest.mark.parametrize(
    ("column", "meaning"),
    [
        ("age", "age"),
        ("Age_in_Yrs", "age"),
        ("subject_age", "age"),
        ("language_score", ""),
        ("average_sleep", ""),
        ("PCL5_total", "pcl"),
        ("gad7", "gad"),
        ("gadolinium", ""),
        ("neuroticism_score", "neuroticism"),
    ],
)
def test_papers_rows_stand_only_beside_targets_of_that_meaning(tmp_path: Path, column: str, meaning: str) -> None:
    write_scores(Store(tmp_path), renamed(column))
    results = read_results(str(tmp_path))
    assert paper_meaning(results, clinical_targets(results)[0]) == meaning
    if column in ("gad7", "language_score"):
        write_report(str(tmp_path))
        text = plain((tmp_path / "report.html").read_text())
        assert ("poster: BrainLM 111M other data 0.073" in text) == bool(meaning)
        assert ("UK Biobank" in text) == bool(meaning)


def test_target_with_another_transform_is_not_the_papers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_scores(store, renamed("age"))
    store.write_json("run.json", {"config": {"clinical": {"targets": [{"column": "age", "transform": "minmax"}]}}})
    results = read_results(str(tmp_path))
    assert paper_meaning(results, clinical_targets(results)[0]) == ""


def test_plain_summary_marks_what_differs_from_the_reference() -> None:
    text = summary(clinical_scores(half=0.04), 0.95)
    block = text[text.index("age_years (R2") : text.index("sex (area")]
    rows = {line[4:].split("  ")[0]: line for line in block.splitlines()}
    assert "0.600 [0.560, 0.640] *" in rows["FC tangent, linear"]
    assert "0.100 [0.060, 0.140] (*)" in rows["untrained, linear"]
    assert "*" not in rows["FC, linear"]
    assert "*" not in rows["BrainLM demo, attentive"]
    assert "* above, (*) below the reference baseline, FC, linear (p < 0.05" in block
    assert "each site left out, confounds removed" in block
    assert "the reference baseline, FC, SVR" in text[text.index("sex (area") :]


def test_plain_summary_without_p_values_has_no_signs() -> None:
    text = summary(believable_scores(), 0.95)
    assert "*" not in text
    assert "reference" not in text


def test_plain_summary_marks_every_task_once() -> None:
    scores = [
        replace(s, p_value=0.001, p_corrected=0.01) if s.metric.endswith("_minus_reference") else s
        for s in believable_scores()
    ]
    text = summary(scores, 0.95)
    assert text.count("* above, (*) below the reference baseline, gaussian (p < 0.05") == 1
    nothing = summary([replace(s, p_corrected=0.5) if s.p_corrected else s for s in scores], 0.95)
    assert "no difference from the reference baseline, gaussian, is shown" in nothing
