"""What an installation brings along, and what the Makefile says."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safemed_bench.suite import layers
from safemed_bench.suite.loader import SUITES

ROOT = Path(__file__).resolve().parents[1]


def test_every_suite_and_training_config_is_in_the_wheel() -> None:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    installed = {
        (Path(folder) / file.name, file.relative_to(ROOT))
        for folder, patterns in files.items()
        for pattern in patterns
        for file in ROOT.glob(pattern)
    }
    shipped = {file.relative_to(ROOT) for file in (ROOT / "suites").rglob("*.yaml")}
    assert shipped and installed == {(layers.SHARE / file, file) for file in shipped}


def test_a_shipped_suite_is_found_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "share" / "safemed-bench" / "suites" / "installed.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("title: T\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert SUITES.find("installed") == file
    (file.parent / "omnimed_pgd.yaml").write_text("title: older\n")
    assert SUITES.find("omnimed_pgd").resolve() == ROOT / "suites" / "omnimed_pgd.yaml", "a checkout's own file wins"


def test_make_demo_leaves_the_report_folder_to_the_command() -> None:
    told = ["make", "-n", "demo", "ARGS=--set name=other"]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "safemed-bench run" in done.stdout and "report:" not in done.stdout
