"""Corruptions all the way: plan, records, mean corruption accuracy, table, report, comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_run import unpacked
from small_runs import write
from toy_run import SIDE, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core.registry import load_plugin_file
from safemed_bench.core.seeds import derive_seed
from safemed_bench.core.types import Question
from safemed_bench.corruptions import build_corruption
from safemed_bench.datasets.base import Dataset
from safemed_bench.datasets.images import load_canvas
from safemed_bench.report.run import write_run_page
from safemed_bench.results import summarise
from safemed_bench.results.compare import compare, pair_up, slices
from safemed_bench.results.corrupted import corrupted
from safemed_bench.results.frames import Condition, Verdicts, load_run
from safemed_bench.results.gate import Rule, gate
from safemed_bench.results.intervals import proportion
from safemed_bench.results.sources import load_measured
from safemed_bench.results.tables import Numbers, corruptions, overall
from safemed_bench.results.terminal import blocks
from safemed_bench.suite.plan import Plan

CORRUPTED = {"corruption": ["jpeg", "rician_noise", "hair"], "severities": [1, 5]}
NOISE = "corruption[rician_noise]@5"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    return toy_plan(dataset, conditions=("clean", "blank", CORRUPTED))


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    toy_execute(plan, folder)
    return folder


def image(question: Question) -> np.ndarray:
    return np.ascontiguousarray(load_canvas(question.image, SIDE).transpose(2, 0, 1))


# --- what is planned ---


def test_a_cell_per_kind_and_severity_with_the_questions_it_happens_to(plan: Plan) -> None:
    names = [cell.condition.name for cell in plan.cells]
    assert names == ["clean", "blank", *(f"corruption[{k}]@{s}" for k in ("jpeg", "rician_noise") for s in (1, 5))]
    asked: dict[str, set[str]] = {}
    for unit in plan.units:
        asked.setdefault(unit.cell, set()).add(plan.questions[unit.question_id].modality)
    assert asked["toy/corruption[jpeg]@1"] == {"CT", "MRI"} and asked[f"toy/{NOISE}"] == {"MRI"}
    assert plan.notes == ("left out, for no question is of a modality they happen to: hair",)


def test_all_is_every_kind_to_every_modality(dataset: Dataset) -> None:
    every = toy_plan(dataset, conditions=({"corruption": "all", "severities": [2]},))
    own = toy_plan(dataset, conditions=({"corruption": "modality", "severities": [2]},))
    assert len(every.cells) == 17 and len(list(every.units)) == 17 * 12 and not every.notes
    assert len(own.cells) == 9 and "hair" in own.notes[0]


def test_a_unit_has_a_key_per_kind_and_severity(plan: Plan, dataset: Dataset, tmp_path: Path) -> None:
    keys = [unit.key for unit in plan.units]
    assert len(set(keys)) == len(keys)
    alone = toy_plan(dataset, conditions=({"corruption": "jpeg", "severities": [5]}, "clean"))
    assert {unit.key for unit in alone.units} < set(keys)
    source = (
        "from safemed_bench.core.registry import corruptions\nfrom safemed_bench.corruptions.base import Corruption\n"
        "@corruptions.register('mine')\nclass Mine(Corruption):\n    levels = (1, 2, 3, 4, {last})\n"
        "    def apply(self, image, level, draw):\n        return image / level\n"
    )
    from safemed_bench.core import registry

    found = []
    for last in (5, 6):
        registry.corruptions._items.pop("mine", None)
        path = tmp_path / str(last) / "mine.py"
        path.parent.mkdir()
        path.write_text(source.format(last=last))
        load_plugin_file(path)
        made = toy_plan(dataset, conditions=({"corruption": "mine", "severities": [1]},))
        found.append({unit.key for unit in made.units})
    registry.corruptions._items.pop("mine")
    assert not found[0] & found[1], "an edited plugin is other work"


# --- what is recorded ---


def test_the_model_is_shown_the_corrupted_canvas(plan: Plan, finished: Path) -> None:
    units = {(unit.cell, unit.question_id): unit for unit in plan.units}
    moved = 0
    for record in records(finished):
        if not record["condition"].startswith("corruption"):
            continue
        condition, question = Condition.parse(record["condition"]), plan.questions[record["question_id"]]
        assert condition.objective and condition.severity and not condition.is_attack
        seed = derive_seed(units[record["cell"], question.id].seed, "corruption", condition.objective)
        shown = build_corruption(condition.objective)(image(question), condition.severity, seed)
        change = (shown.astype(float) - image(question)) / 255
        assert record["linf"] == pytest.approx(np.abs(change).max())
        assert record["l2"] == pytest.approx(np.sqrt((change**2).sum()))
        moved += record["linf"] > 0
    assert moved == 2 * 12 + 2 * 6


def test_batch_size_changes_no_record(dataset: Dataset, finished: Path, tmp_path: Path) -> None:
    one = toy_plan(dataset, conditions=("clean", "blank", CORRUPTED), batch_size=1)
    toy_execute(one, tmp_path / "one")
    whole, single = records(finished), records(tmp_path / "one")
    for a, b in zip(whole, single, strict=True):
        assert a.pop("option_logprobs") == pytest.approx(b.pop("option_logprobs"), abs=1e-5) and a == b


# --- what is estimated ---


def table(
    correct: dict[str, list[float]], modality: list[str], images: list[int], asked: dict[str, list[int]]
) -> Verdicts:
    index = pd.Index([f"q{i}" for i in range(len(modality))])
    frame = pd.DataFrame(correct, index=index)
    questions = pd.DataFrame({"modality": modality, "image_sha256": [f"i{i}" for i in images]}, index=index)
    told = {name: frozenset(index[places]) for name, places in asked.items()}
    return Verdicts("m", questions, frame, frame, frame, frame["clean"], asked=told)


def test_mca_is_the_mean_of_the_kinds_that_happen_to_a_question() -> None:
    nan = float("nan")
    verdicts = table(
        {
            "clean": [1, 1, 1, 0],
            "corruption[jpeg]@1": [1, 0, 1, 1],
            "corruption[jpeg]@2": [0, 0, 1, nan],
            "corruption[hair]@1": [nan, nan, 1, 1],
            "corruption[hair]@2": [nan, nan, 0, 0],
        },
        ["CT", "CT", "Dermoscopy", "Dermoscopy"],
        [0, 1, 2, 3],
        {"corruption[hair]@1": [2, 3], "corruption[hair]@2": [2, 3]},
    )
    found = {(m.condition, m.metric, m.modality): m.estimate for m in corrupted(verdicts)}
    mean = "mean_corruption_accuracy"
    assert found["corruption", mean, "CT"].value == 0.25 and found["corruption", mean, "CT"].n == 2
    assert found["corruption", mean, "Dermoscopy"].value == 0.75, "q3 has no verdict under one of them: not counted"
    assert found["corruption", mean, "all"].value == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert found["corruption", mean, "all"].n == 3 and found["corruption", mean, "all"].method == "wilson-weighted"
    assert found["corruption[hair]", mean, "all"].value == 0.5 and found["corruption[hair]", mean, "all"].n == 2
    assert ("corruption[hair]", mean, "CT") not in found
    assert found["corruption@1", mean, "all"].value == pytest.approx((1 + 0 + 1 + 1) / 4)
    assert found["corruption[hair]", "clean_accuracy", "all"].value == 0.5
    assert found["corruption", "clean_accuracy", "all"].value == 1.0


def test_more_severities_of_the_same_verdicts_are_no_more_evidence() -> None:
    draw = np.random.default_rng(0)
    right = draw.integers(0, 2, 40).astype(float).tolist()
    columns = {"clean": right} | {f"corruption[jpeg]@{s}": right for s in (1, 2, 3, 4, 5)}

    def interval(images: list[int]) -> tuple[float, float]:
        (found, *_) = corrupted(table(columns, ["CT"] * 40, images, {}))
        return found.estimate.low, found.estimate.high

    plain = proportion(np.array(right), np.arange(40))
    assert interval(list(range(40))) == pytest.approx((plain.low, plain.high), abs=0.01)
    shared = interval([i // 8 for i in range(40)])
    pairs = proportion(np.array(right), np.arange(40) // 8)
    assert shared[1] - shared[0] >= pairs.high - pairs.low - 0.01, "by image, where questions share one"


def test_a_summary_with_its_tables(plan: Plan, finished: Path) -> None:
    summary = summarise(finished)
    rows = {(r["condition"], r["metric"], r["modality"]): r for r in summary["estimates"]}
    right = pd.DataFrame(records(finished)).query(f"condition == '{NOISE}'")["correct"]
    for modality in ("all", "MRI"):
        assert rows[NOISE, "accuracy", modality]["value"] == pytest.approx(right.mean(), abs=1e-6)
        assert rows[NOISE, "accuracy", modality]["n"] == 6 and rows[NOISE, "error_rate", modality]["value"] == 0
    assert not any(key[0] == NOISE and key[2] == "CT" for key in rows), "nothing is said of what is not asked"
    assert summary["coverage"]["planned"] == summary["coverage"]["done"] == 2 * 12 + 2 * 12 + 2 * 6
    assert summary["threat"]["labels"] == [] and all(d["status"] != "fail" for d in summary["diagnostics"])
    numbers = Numbers(summary)
    shown = corruptions(numbers)
    assert [row.keys[1] for row in shown.rows] == ["all", "jpeg", "rician_noise"]
    assert [c.label for c in shown.columns] == ["n", "clean", "severity 1", "severity 5", "mean"]
    assert "mCA" in [c.label for c in overall(numbers).columns]
    words = [line[0] for block in blocks(summary) for line in block.lines]
    assert words.count("mCA") == 1 and not any("severity" in word or "corruption" in word for word in words)
    for suffix in ("csv", "md", "tex"):
        assert (finished / "tables" / f"corruptions.{suffix}").stat().st_size > 100


def test_the_report_has_a_section_with_a_table_and_figures(plan: Plan, finished: Path) -> None:
    page = write_run_page(finished).read_text()
    assert '<section id="corruptions">' in page and 'id="table-corruptions"' in page
    for name in ("severity-all", "severity-jpeg", "severity-rician-noise"):
        assert f'id="{name}"' in page
    cells = {cell["condition"]: cell["marks"] for cell in unpacked(page)["cells"]}
    asked = [plan.questions[id].modality == "MRI" for id in plan.questions]
    assert [mark != " " for mark in cells[NOISE]] == asked and " " not in cells["clean"]
    assert f"{2 * 12 + 2 * 12 + 2 * 6} verdicts" in page


def test_a_run_without_corruptions_says_nothing_of_them(dataset: Dataset, tmp_path: Path) -> None:
    toy_execute(toy_plan(dataset), tmp_path / "run")
    page = write_run_page(tmp_path / "run").read_text()
    assert (
        'id="corruptions"' not in page
        and "mCA" not in page
        and not (tmp_path / "run" / "tables" / "corruptions.csv").exists()
    )


# --- what is compared ---


def corrupted_run(folder: Path, noise: str, modalities: list[str] | None = None) -> Path:
    """Eight questions, CT then MRI, of which the corruption asks the last four."""
    cells = [{"model": "m", "condition": "clean"}, {"model": "m", "condition": NOISE}]
    cells[1]["corruption"] = {"name": "rician_noise", "severity": 5, "modalities": modalities or ["MRI"]}  # type: ignore[assignment]
    return write(folder, {"clean": "11111111", NOISE: noise}, info={"cells": cells})


def test_a_comparison_is_of_the_questions_that_are_asked(tmp_path: Path) -> None:
    a, b = (load_measured(corrupted_run(tmp_path / n, w)) for n, w in (("a", "....1111"), ("b", "....1100")))
    (pair,) = pair_up(a, b)
    rows = {(row.condition, row.slice): row for row in compare([pair])}
    assert rows[NOISE, "all"].lost == 2 and rows[NOISE, "all"].missing == 0 and rows["clean", "all"].missing == 0
    assert rows[NOISE, "MRI"].difference.n == 4 and (NOISE, "CT") not in rows
    (test,) = gate([pair], [Rule(condition=NOISE, allowed_drop=90)]).tests
    assert test.n == 4 and test.drop == 0.5
    assert {s.name: s.planned for s in slices(pair.a.verdicts, pair.b.verdicts, NOISE)} == {"all": 4, "MRI": 4}


def test_what_is_missing_is_still_missing(tmp_path: Path) -> None:
    run = load_run(corrupted_run(tmp_path / "run", "....1e.1"))
    assert run.verdicts[0].asked[NOISE] == {"q4", "q5", "q6", "q7"}
    summary = summarise(run.folder)
    cell = next(c for c in summary["coverage"]["cells"] if c["condition"] == NOISE)
    assert (cell["planned"], cell["done"], cell["errors"], cell["missing"]) == (4, 2, 1, 1)
    numbers = {(r["condition"], r["metric"], r["modality"]): r for r in summary["estimates"]}
    assert numbers["corruption", "mean_corruption_accuracy", "all"]["n"] == 2
    assert numbers[NOISE, "error_rate", "all"]["value"] == 0.5
    json.dumps(summary)


def test_the_plan_is_the_same_whatever_else_is_asked(plan: Plan, dataset: Dataset) -> None:
    few = replace(dataset, questions=dataset.questions[:4])
    fewer = toy_plan(few, conditions=("clean", "blank", CORRUPTED))
    assert {unit.key for unit in fewer.units} < {unit.key for unit in plan.units}
