"""Diagnostics on records written by hand: what trips them, and what just does not. Faulty runs: test_planted_faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_results import cell, write_run

from safemed_bench.core.types import Record
from safemed_bench.results import summarise

RIGHT, WRONG = "1" * 16, "0" * 16
SMALL, LARGE = "pgd[answer]@linf:2/255", "pgd[answer]@linf:8/255"


def attacked(condition: str, outcomes: str, **more: Any) -> list[Record]:
    facts: dict[str, Any] = {"clean_correct": True, "steps": 4, "linf": 2 / 255, "extra": {"suspected": 1}}
    return [replace(r, **(facts | more)) for r in cell("m", condition, outcomes)]


def said(
    folder: Path, check: str, records: list[Record], attacks: dict[str, dict[str, Any]] | None = None, **info: Any
) -> str | None:
    """The status of one check; `attacks` is what run.json says of the attacks' settings, by condition."""
    names = dict.fromkeys(r.condition for r in records)
    told = {name: {"attack": facts} for name, facts in (attacks or {}).items()}
    cells = [{"model": "m", "condition": name} | told.get(name, {}) for name in names]
    found = summarise(write_run(folder, records, {"cells": cells, **info}))["diagnostics"]
    return next((row["status"] for row in found if row["id"] == check), None)


@pytest.mark.parametrize(
    ("at_large", "expected"), [(WRONG, "pass"), ("1" + "0" * 15, "warn"), ("1111" + "0" * 12, "warn"), (RIGHT, "fail")]
)
def test_a_larger_ball_must_not_help_the_model(tmp_path: Path, at_large: str, expected: str) -> None:
    assert said(tmp_path, "monotone-in-eps", [*attacked(SMALL, WRONG), *attacked(LARGE, at_large)]) == expected


def test_only_equal_attacks_are_compared_over_eps(tmp_path: Path) -> None:
    records = [*attacked(SMALL, WRONG), *attacked(LARGE, RIGHT)]
    settings = {SMALL: {"name": "pgd", "steps": 40}, LARGE: {"name": "pgd", "steps": 4}}
    assert said(tmp_path, "monotone-in-eps", records, settings) is None
    one_step = [replace(r, condition=r.condition.replace("pgd", "fgsm")) for r in records]
    assert said(tmp_path / "fgsm", "monotone-in-eps", one_step) is None


@pytest.mark.parametrize(("more", "expected"), [(WRONG, "pass"), (RIGHT, "fail")])
def test_more_steps_must_not_help_the_model(tmp_path: Path, more: str, expected: str) -> None:
    long = SMALL.replace("pgd", "long")
    records = [*attacked(SMALL, "1" + "0" * 15), *attacked(long, more)]
    settings = {SMALL: {"name": "pgd", "steps": 4}, long: {"name": "pgd", "steps": 40}}
    assert said(tmp_path, "monotone-in-effort", records, settings) == expected
    settings[SMALL]["restarts"] = 2
    assert said(tmp_path / "no order", "monotone-in-effort", records, settings) is None


@pytest.mark.parametrize("black", ["noise", "square", "pgd<-other[answer]"])
def test_what_needs_no_gradient_must_not_win(tmp_path: Path, black: str) -> None:
    other = f"{black}@linf:2/255"
    assert said(tmp_path, "white-box-not-weaker", [*attacked(SMALL, RIGHT), *attacked(other, WRONG)]) == "fail"
    assert said(tmp_path, "white-box-not-weaker", [*attacked(SMALL, WRONG), *attacked(other, RIGHT)]) == "pass"


@pytest.mark.parametrize(("stage", "expected"), [("square", "fail"), ("pgd[answer]", "pass")])
def test_of_a_cascade_the_stages_are_compared(tmp_path: Path, stage: str, expected: str) -> None:
    records = attacked("safemed-attack@linf:2/255", WRONG, extra={"stage": stage})
    assert said(tmp_path, "white-box-not-weaker", records) == expected


@pytest.mark.parametrize(
    ("trace", "expected"),
    [((0.0, 1.0, 2.0, 3.0, 4.0), "warn"), ((0.0, 3.0, 3.9, 4.0, 4.0), "pass"), ((2.0, 1.0, 1.0, 1.0, 1.0), None)],
)
def test_a_loss_that_still_rises_is_told(tmp_path: Path, trace: tuple[float, ...], expected: str | None) -> None:
    assert said(tmp_path, "convergence", attacked(SMALL, RIGHT, loss_trace=trace)) == expected


@pytest.mark.parametrize(
    ("outcomes", "expected"), [(RIGHT, "pass"), ("e" + "0" * 7 + "1" * 8, "warn"), ("eeeeee.." + "1" * 8, "fail")]
)
def test_lost_verdicts_are_held_against_the_interval(tmp_path: Path, outcomes: str, expected: str) -> None:
    questions = [{"id": f"q{i}", "modality": "CT", "n_options": 4} for i in range(16)]
    assert said(tmp_path, "coverage", cell("m", "clean", outcomes), questions=questions) == expected


def test_an_image_outside_the_ball_is_found_in_the_records(tmp_path: Path) -> None:
    saved = attacked(SMALL, RIGHT, artefact="artefacts/x.npz#0")
    assert said(tmp_path, "constraint-audit", saved) == "pass"
    assert said(tmp_path, "constraint-audit", [replace(saved[0], linf=3 / 255), *saved[1:]]) == "fail"
    refused = replace(saved[0], error="leaves the ball", correct=None, linf=None)
    assert said(tmp_path, "constraint-audit", [refused, *saved[1:]]) == "fail"


def test_off_is_off(tmp_path: Path) -> None:
    records = [*attacked(SMALL, WRONG), *attacked(LARGE, RIGHT)]
    assert summarise(write_run(tmp_path, records, {"diagnostics": {"level": "off"}}))["diagnostics"] == []
