"""Attacks without objectives, and the L1 ball, all the way to the records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_run import records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core.types import ThreatModel
from safemed_bench.results import summarise
from safemed_bench.run import artefacts

SMALL = {"attack": "safemed-attack", "steps": 2, "params": {"apgd_steps": 3, "queries": 3}}


def test_a_cascade_and_a_black_box_leave_records_like_any_attack(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "images", 8)
    made = toy_plan(dataset, conditions=("clean", {"attack": "square", "params": {"queries": 5}}, SMALL))
    toy_execute(made, tmp_path / "run")
    found = records(tmp_path / "run")
    assert {r["condition"] for r in found} == {"clean", "square@linf:8/255", "safemed-attack@linf:8/255"}
    by_name = {(r["condition"], r["question_id"]): r for r in found}
    won = 0
    for question in dataset.questions:
        clean = by_name["clean", question.id]["correct"]
        square, whole = (by_name[f"{name}@linf:8/255", question.id] for name in ("square", "safemed-attack"))
        assert square["clean_correct"] == whole["clean_correct"] == clean and not square["error"] + whole["error"]
        assert square["steps"] == 0 and square["loss_trace"] == []
        assert square["extra"].get("verdicts", 0) in (range(1, 6) if clean else [0])
        assert ("stage" in whole["extra"]) == (clean and not whole["correct"])
        won += "stage" in whole["extra"]
    assert won
    summary = summarise(tmp_path / "run")
    accuracy = {r["condition"]: r["value"] for r in summary["estimates"] if r["metric"] == "accuracy"}
    assert accuracy["worst@linf:8/255"] <= accuracy["safemed-attack@linf:8/255"] < accuracy["clean"]


def test_the_l1_norm_is_measured_on_the_saved_image(tmp_path: Path) -> None:
    made = toy_plan(toy_dataset(tmp_path / "images", 6), conditions=("clean", {"attack": "pgd", "steps": 3}))
    threat = ThreatModel("l1", 2.0)
    cells = tuple(replace(c, condition=replace(c.condition, threat=c.condition.threat and threat)) for c in made.cells)
    toy_execute(replace(made, cells=cells), tmp_path / "run")
    attacked = [r for r in records(tmp_path / "run") if r["artefact"] and r["clean_correct"]]
    assert attacked
    for record in attacked:
        name, _, index = record["artefact"].partition("#")
        delta = artefacts.read(tmp_path / "run", name)[int(index)]
        assert record["extra"]["l1"] == pytest.approx(np.abs(delta).sum() / 255) and 0 < record["extra"]["l1"] <= 2.0


def test_an_image_outside_the_l1_ball_is_found() -> None:
    canvas, delta = np.full((3, 2, 2), 100, np.uint8), np.zeros((3, 2, 2), np.int16)
    delta[0], delta[1, 0, 0] = 2, -2
    assert artefacts.measure(canvas, delta, ThreatModel("l1", 10 / 255)) == (
        artefacts.Measured(2 / 255, 20**0.5 / 255, 10 / 255, "")
    )
    outside = artefacts.measure(canvas, delta, ThreatModel("l1", 9 / 255))
    assert outside.problem == f"a perturbation of {10 / 255:.6g} leaves the l1:{9 / 255:g} ball"
