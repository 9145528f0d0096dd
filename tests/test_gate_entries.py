"""The gate on real entries: one that was weakened on purpose is caught, the same one under another seed is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safemed_bench.cli import invoke

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "leaderboards" / "omnimed_ci-phantom"

pytestmark = pytest.mark.slow


def gated(folder: Path, capsys: pytest.CaptureFixture[str], **settings: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of our CI's gate on `safemed-r1`, measured with these settings of the suite."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run = ["run", str(ROOT / "suites" / "omnimed_ci.yaml"), "--quiet", "--output", str(folder), "--workers", "1"]
    assert invoke([*run, *words]) == 0
    capsys.readouterr()
    code = invoke(["gate", str(folder), "--baseline", str(BASELINE), "--model", "safemed-r1", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_fifty_steps_without_adversaries_are_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["train", str(ROOT / "suites" / "train" / "cot.yaml"), "--quiet"]
    changes = ["init=safemed-r1", "data.images=4000", "stages.0.steps=50", f"output={tmp_path / 'weak'}"]
    assert invoke([*config, *(word for change in changes for word in ("--set", change))]) == 0
    entry = f"[{{name: safemed-r1, path: {tmp_path / 'weak' / 'entry'}}}]"
    code, report = gated(tmp_path / "run", capsys, models=entry)
    assert code == 4, report


def test_another_seed_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = gated(tmp_path / "run", capsys, **{"models": "[safemed-r1]", "run.seed": "1"})
    assert code == 0, report
