"""Fine-tuning finds what was planted in simulated people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.planted_effects import TARGETS, main


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_effects_are_found_in_people_not_seen_before(tmp_path: Path) -> None:
    words = ["--subjects", "400", "--parcels", "60", "--methods", "fine-tuned"]
    assert main([*words, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    found = {(r["case"], r["method"]): r for r in json.loads((tmp_path / "out.json").read_text())}
    for target in TARGETS:
        possible = found[target, "possible"]["r2"]
        assert possible > 0.85  # what was planted can be seen
        # docs/finetuning.md has 0.67 and 0.77 of it; other processors round otherwise, and training magnifies that
        assert found[target, "fine-tuned"]["r2"] > 0.3 * possible
