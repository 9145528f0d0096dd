"""docs/models.md: its table has every family, none fails, and its suite is valid."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from families import FAMILIES
from measured_family import Measured

from safemed_bench.suite.schema import Suite

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_families", DOCS / "families.py")
assert SPEC and SPEC.loader
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)
GOOD = Measured("llava", 56, 0, 4e-7, 1e-4, 1.0, 1e-6, 6, 5, 1, 3, 3, {"bf16": "", "fp16": ""})


def test_the_table_has_every_family_and_none_fails():
    found = page.PLACE.search(page.PAGE.read_text())
    lines = [line.strip("| ").split(" | ") for line in found[0].splitlines() if line.startswith("|")]
    assert tuple(lines[0]) == page.COLUMNS
    assert [line[0] for line in lines[2:]] == [page.NAMES[family] for family in FAMILIES]
    assert "**" not in found[0] and "transformers" in found[0].splitlines()[-2]


@pytest.mark.parametrize(
    "fault",
    [
        {"map": 2e-5},
        {"gradient": 0.1},
        {"cosine": 0.9},
        {"batching": 1e-3},
        {"fooled": 1},
        {"same_replies": 2},
        {"half": {"bf16": "fails its start-up check", "fp16": ""}},
    ],
    ids=str,
)
def test_what_is_out_of_bounds_would_be_seen(fault):
    assert "**" not in "".join(page.row(GOOD))
    assert "**" in "".join(page.row(replace(GOOD, **fault)))


def test_the_suite_on_the_page_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", page.PAGE.read_text(), re.DOTALL)
    suite = Suite.model_validate(yaml.safe_load(block))
    assert [m.quantize for m in suite.models] == [None, None, "nf4"] and suite.models[1].adapter
