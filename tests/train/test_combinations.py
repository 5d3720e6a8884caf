"""Every combination of engine settings that is offered trains the same model; every other one is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from brainlm.errors import ConfigError
from tests.train.conftest import ROOT, environment, run
from train.combinations import TESTED, Combination, check_combination
from train.settings import EngineSettings


def losses(dataset_url: str, chosen: list[Combination]) -> list[list[float]]:
    command = [sys.executable, str(ROOT / "tests/train/combination_losses.py"), dataset_url, json.dumps(chosen)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("losses ")]
    found: list[list[float]] = json.loads(line.removeprefix("losses "))
    return found


def check_same_losses(dataset_url: str, chosen: list[Combination]) -> None:
    """float32: to the order of summation. bf16: 8 bits of mantissa in every product."""
    reference, *found = losses(dataset_url, [Combination("fp32", 1), *chosen])
    assert reference[-1] < 0.95 * reference[0]
    for combination, ours in zip(chosen, found, strict=True):
        tolerance = 1e-4 if combination.precision == "fp32" else 2e-2
        assert ours == pytest.approx(reference, rel=tolerance), combination


def test_every_tested_combination_trains_the_same_model(dataset_url: str) -> None:
    check_same_losses(dataset_url, [c for c in TESTED if not c.compile])


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(dataset_url: str) -> None:
    check_same_losses(dataset_url, [c for c in TESTED if c.compile])


def test_all_others_are_refused_with_what_is_tested() -> None:
    for values in product(("fp32", "bf16"), range(4), *[(False, True)] * 3):
        asked = Combination(*values)
        engine = EngineSettings(**asked._asdict())
        if asked in TESTED:
            check_combination(engine)
        else:
            with pytest.raises(ConfigError, match=f"not tested: precision={asked.precision}, zero_stage="):
                check_combination(engine)
    with pytest.raises(ConfigError, match=re.escape("engine.zero_stage=1")) as refused:
        check_combination(EngineSettings(precision="bf16", zero_stage=0))
    assert "DeepSpeed's first update" in str(refused.value)


def test_an_untested_combination_is_refused_before_anything_is_written(
    tmp_path: Path, write_config: Callable[[Path], Path]
) -> None:
    out = tmp_path / "out"
    for more in ((), ("--dry-run",)):
        result = run(write_config(out), "engine.compile=true", "engine.zero_stage=3", *more)
        assert result.returncode == 1
        assert "this combination is not tested" in result.stderr
    assert not out.exists()


def test_the_documented_table_is_the_tested_one() -> None:
    text = (ROOT / "docs/training.md").read_text()
    rows = re.findall(r"^\| (fp32|bf16) \| ([0-3, ]+) \|([a-z_, ]*)\|", text, re.MULTILINE)
    documented = {
        Combination(precision, int(stage), **dict.fromkeys(filter(None, names.replace(" ", "").split(",")), True))
        for precision, stages, names in rows
        for stage in stages.split(",")
    }
    assert documented == set(TESTED)
