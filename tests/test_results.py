"""Golden miniature records whose estimates can be worked out by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from safemed_bench.core.errors import DataError
from safemed_bench.core.journal import to_line
from safemed_bench.core.types import Record
from safemed_bench.results import load_records, load_run, summarise
from safemed_bench.results.formats import texts
from safemed_bench.results.frames import Condition, with_worst_cases
from safemed_bench.results.intervals import design_effect, paired_difference, proportion
from safemed_bench.results.summary import threat_order
from safemed_bench.results.tables import build
from safemed_bench.results.terminal import blocks

Outcome = bool | None
MODALITY = {f"q{i}": "CT" if i < 4 else "MRI" for i in range(6)}


def record(model: str, condition: str, question: str, correct: Outcome, **more: Any) -> Record:
    """A record of the miniature run; `correct` None is an error record."""
    base = Record(
        key=f"{model}|{condition}|{question}",
        cell=f"{model}/{condition}",
        model=model,
        condition=condition,
        question_id=question,
        modality=MODALITY.get(question, "CT"),
        question_type="diagnosis",
        image_sha256=f"sha-{question}",
        n_options=2 if MODALITY.get(question) == "MRI" else 4,
        target=0,
        answer=None if correct is None else int(not correct),
        status=None if correct is None else "valid",
        correct=correct,
        error="out of memory" if correct is None else "",
    )
    return replace(base, **more)


def cell(model: str, condition: str, outcomes: str) -> list[Record]:
    """One record per letter: 1 right, 0 wrong, e error, i wrong as invalid, t wrong as truncated, . none at all."""
    records = []
    for i, letter in enumerate(outcomes):
        if letter == ".":
            continue
        made = record(model, condition, f"q{i}", {"1": True, "e": None}.get(letter, False))
        status = {"i": "invalid", "t": "truncated"}.get(letter)
        records.append(replace(made, status=status, answer=None) if status else made)
    return records


def write_run(folder: Path, records: list[Record], info: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_bytes(b"".join(map(to_line, records)))
    if info is not None:
        (folder / "run.json").write_text(json.dumps(info))
    return folder


def value(summary: dict[str, Any], condition: str, metric: str, modality: str = "all", model: str = "cot") -> dict:
    wanted = (model, condition, metric, modality)
    found = [r for r in summary["estimates"] if (r["model"], r["condition"], r["metric"], r["modality"]) == wanted]
    assert len(found) == 1, f"{wanted}: {len(found)} rows"
    return found[0]


def has(summary: dict[str, Any], condition: str, metric: str) -> bool:
    return any(r["condition"] == condition and r["metric"] == metric for r in summary["estimates"])


MINI = [
    *cell("cot", "clean", "111101"),
    *cell("cot", "blank", "100001"),
    *cell("cot", "shuffled", "110001"),
    *cell("cot", "noise@linf:4/255", "111001"),
    *cell("cot", "pgd[answer]@linf:4/255", "110i01"),
    *cell("cot", "pgd[decision_slot]@linf:4/255", "100t00"),
    *cell("cot", "fgsm[answer]@linf:4/255", "011101"),
]


@pytest.fixture
def mini(tmp_path: Path) -> dict[str, Any]:
    return summarise(write_run(tmp_path / "run", MINI))


def test_plain_accuracies(mini: dict[str, Any]) -> None:
    clean = value(mini, "clean", "accuracy")
    low, high = proportion_confint(5, 6, method="wilson")
    assert (clean["value"], clean["n"], clean["method"]) == (round(5 / 6, 6), 6, "wilson")
    assert (clean["low"], clean["high"]) == (round(low, 6), round(high, 6))
    assert value(mini, "clean", "accuracy", "CT")["value"] == 1.0
    assert value(mini, "clean", "accuracy", "MRI")["value"] == 0.5
    assert value(mini, "clean", "accuracy_macro")["value"] == 0.75
    assert value(mini, "noise@linf:4/255", "accuracy")["value"] == round(4 / 6, 6)


def test_chance_and_image_gain(mini: dict[str, Any]) -> None:
    chance = value(mini, "clean", "chance")
    assert chance["value"] == round((4 * 0.25 + 2 * 0.5) / 6, 6) == chance["low"] == chance["high"]
    assert value(mini, "clean", "image_gain")["value"] == round(5 / 6 - 3 / 6, 6)
    assert not has(mini, "blank", "chance") and not has(mini, "pgd@linf:4/255", "image_gain")


def test_text_prior_is_of_the_questions_with_a_clean_verdict(tmp_path: Path) -> None:
    hits = (True, False, True, None, True, True)
    questions = [{"id": f"q{i}", "modality": MODALITY[f"q{i}"], "text_prior": hit} for i, hit in enumerate(hits)]
    records = [*cell("cot", "clean", "11111e"), *cell("cot", "blank", "000000")]
    summary = summarise(write_run(tmp_path, records, {"questions": questions}))
    prior = value(summary, "clean", "text_prior")
    assert (prior["value"], prior["n"], prior["method"]) == (0.75, 4, "wilson")  # q3 has no hit, q5 no verdict
    assert value(summary, "clean", "text_prior", "CT")["value"] == round(2 / 3, 6)
    assert not has(summary, "blank", "text_prior")


def test_no_text_prior_where_none_is_known(mini: dict[str, Any]) -> None:
    assert has(mini, "clean", "chance") and not has(mini, "clean", "text_prior")


def test_worst_cases(mini: dict[str, Any]) -> None:
    assert value(mini, "pgd[answer]@linf:4/255", "accuracy")["value"] == 0.5
    assert value(mini, "pgd@linf:4/255", "accuracy")["value"] == round(1 / 6, 6)
    assert value(mini, "fgsm@linf:4/255", "accuracy")["value"] == round(4 / 6, 6)
    assert value(mini, "worst@linf:4/255", "accuracy")["value"] == 0.0


def test_success_is_counted_among_clean_correct_questions(mini: dict[str, Any]) -> None:
    rate = value(mini, "pgd[answer]@linf:4/255", "attack_success_rate")
    assert (rate["value"], rate["n"]) == (0.4, 5)
    assert value(mini, "worst@linf:4/255", "attack_success_rate")["value"] == 1.0
    assert not has(mini, "clean", "attack_success_rate") and not has(mini, "noise@linf:4/255", "attack_success_rate")


def test_invalid_and_truncated_are_told_apart(mini: dict[str, Any]) -> None:
    one = round(1 / 6, 6)
    assert value(mini, "pgd[answer]@linf:4/255", "invalid_rate")["value"] == one
    assert value(mini, "pgd[answer]@linf:4/255", "truncated_rate")["value"] == 0
    assert value(mini, "pgd[decision_slot]@linf:4/255", "truncated_rate")["value"] == one
    # q3 was lost through unreadable answers alone; a single verdict keeps one status.
    assert value(mini, "pgd@linf:4/255", "invalid_rate")["value"] == one
    assert value(mini, "pgd@linf:4/255", "truncated_rate")["value"] == 0


def test_a_valid_wrong_answer_outweighs_an_unreadable_one(tmp_path: Path) -> None:
    records = [*cell("cot", "pgd[answer]@linf:1", "i0i"), *cell("cot", "pgd[no_think]@linf:1", "001")]
    summary = summarise(write_run(tmp_path, records))
    assert value(summary, "pgd@linf:1", "invalid_rate")["value"] == round(1 / 3, 6)


def test_missing_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    records = [
        *cell("cot", "clean", "111e.0"),
        *cell("cot", "pgd[answer]@linf:4/255", "1e0.10"),
        *cell("cot", "pgd[no_think]@linf:4/255", "111111"),
    ]
    summary = summarise(write_run(tmp_path, records))
    clean = value(summary, "clean", "accuracy")
    assert (clean["value"], clean["n"]) == (0.75, 4)
    assert value(summary, "clean", "error_rate")["value"] == round(2 / 6, 6)
    # q0 right, q1 missing, q2 wrong, q3 missing, q4 right, q5 wrong
    pgd = value(summary, "pgd@linf:4/255", "accuracy")
    assert (pgd["value"], pgd["n"]) == (0.5, 4)
    worst = value(summary, "worst@linf:4/255", "accuracy")
    assert (worst["value"], worst["n"]) == (round(1 / 3, 6), 3)
    cover = summary["coverage"]
    assert (cover["planned"], cover["done"], cover["errors"], cover["missing"]) == (18, 14, 2, 2)
    assert cover["named_errors"][0] == {"cell": "cot/clean", "question_id": "q3", "error": "out of memory"}
    assert any("PARTIAL" in notice and "4 of 18" in notice for notice in summary["notices"])


def test_missing_stays_missing_unless_already_wrong(tmp_path: Path) -> None:
    records = [*cell("cot", "pgd[answer]@linf:4/255", "0e.1"), *cell("cot", "pgd[no_think]@linf:4/255", "e011")]
    (verdicts,) = load_run(write_run(tmp_path, records)).verdicts
    worst = with_worst_cases(verdicts).correct["pgd@linf:4/255"]
    assert worst["q0"] == worst["q1"] == 0.0 and math.isnan(worst["q2"]) and worst["q3"] == 1.0


def test_a_cell_and_a_question_without_any_record_are_missing(tmp_path: Path) -> None:
    info = {
        "cells": [{"model": "cot", "condition": c} for c in ("clean", "blank")],
        "questions": [
            {"id": f"q{i}", "modality": "CT", "question_type": "", "image_sha256": "", "n_options": 4} for i in range(3)
        ],
    }
    summary = summarise(write_run(tmp_path, cell("cot", "clean", "10."), info))
    assert value(summary, "clean", "error_rate")["value"] == round(1 / 3, 6)
    blank = value(summary, "blank", "accuracy")
    assert (blank["value"], blank["low"], blank["n"], blank["method"]) == (None, None, 0, "none")
    assert summary["coverage"]["missing"] == 4


def test_clean_correct_comes_from_attack_records_where_there_is_no_clean_cell(tmp_path: Path) -> None:
    records = [replace(r, clean_correct=i != 0) for i, r in enumerate(cell("cot", "pgd[answer]@linf:4/255", "0011"))]
    summary = summarise(write_run(tmp_path, records))
    rate = value(summary, "pgd[answer]@linf:4/255", "attack_success_rate")
    assert (rate["value"], rate["n"]) == (round(1 / 3, 6), 3)


def test_questions_of_one_image_are_not_independent(tmp_path: Path) -> None:
    outcomes = "110011"
    records = [replace(r, image_sha256=f"image-{i // 2}") for i, r in enumerate(cell("cot", "clean", outcomes))]
    summary = summarise(write_run(tmp_path, records))
    clean = value(summary, "clean", "accuracy")
    low, high = proportion_confint(2, 3, method="wilson")  # pairs agree fully: three images, not six questions
    assert clean["method"] == "wilson-clustered" and clean["n"] == 6
    assert (clean["low"], clean["high"]) == (round(low, 6), round(high, 6))


def test_unknown_images_stand_alone(tmp_path: Path) -> None:
    records = [replace(r, image_sha256="") for r in cell("cot", "clean", "1101")]
    assert value(summarise(write_run(tmp_path, records)), "clean", "accuracy")["method"] == "wilson"


def test_design_effect_agrees_with_a_cluster_robust_regression() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 5)
    values = (rng.random(300) < np.repeat(rng.random(60), 5)).astype(float)
    fit = sm.OLS(values, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    expected = fit.bse[0] ** 2 / (values.mean() * (1 - values.mean()) / 300)
    effect = design_effect(values, clusters)
    assert 1 < effect == pytest.approx(expected)
    estimate = proportion(values, clusters)
    size = 300 / effect
    assert (estimate.low, estimate.high) == pytest.approx(
        proportion_confint(values.mean() * size, size, method="wilson")
    )


@pytest.mark.parametrize("values", [[1.0] * 8, [0.0] * 8, [1.0, 0.0] * 4])
def test_intervals_hold_at_the_edges(values: list[float]) -> None:
    """All equal: full dependence, two images. Opposite verdicts within an image are no bonus."""
    array, clusters = np.array(values), np.repeat([0, 1], 4)
    estimate = proportion(array, clusters)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    size = 2 if np.ptp(array) == 0 else 8
    assert (estimate.low, estimate.high) == pytest.approx(
        proportion_confint(array.mean() * size, size, method="wilson"), abs=1e-12
    )


def test_paired_difference_is_a_paired_t_interval() -> None:
    first = np.array([1, 1, 1, 1, 0, 1, 1, 1.0])
    second = np.array([0, 1, 0, 1, 0, 0, 0, 1.0])
    estimate = paired_difference(first, second, np.arange(8))
    assert estimate.method == "paired-t"
    assert (estimate.low, estimate.high) == pytest.approx(
        sm.stats.DescrStatsW(first - second).tconfint_mean(), rel=1e-9
    )
    certain = paired_difference(np.ones(8), np.zeros(8), np.arange(8))
    assert certain.method == "newcombe" and certain.low < 0.9
    assert certain.low == pytest.approx(confint_proportions_2indep(8, 8, 0, 8, method="newcomb", compare="diff")[0])


def test_macro_interval_is_of_the_mean_of_means() -> None:
    values = np.array([1.0] * 90 + [0.0] * 5 + [1.0] * 5)
    weights = np.array([1 / 90] * 90 + [1 / 10] * 10)
    estimate = proportion(values, np.arange(100), weights)
    assert estimate.value == pytest.approx(0.75) and estimate.method == "wilson-weighted"
    assert estimate.high - estimate.low > np.ptp(proportion_confint(75, 100, method="wilson"))


def test_equal_records_in_any_order_give_equal_bytes(tmp_path: Path) -> None:
    cells = [("cot", c) for c in dict.fromkeys(r.condition for r in MINI)]
    info = {
        "suite": "mini",
        "cells": [{"model": m, "condition": c} for m, c in cells],
        "questions": [{"id": q, "modality": MODALITY[q]} for q in MODALITY],
    }
    timed = [replace(r, seconds=9.0) for r in reversed(MINI)]
    first = write_run(tmp_path / "a", MINI, info)
    second = tmp_path / "b"
    second.mkdir()
    (second / "journal.jsonl").write_bytes(b"".join(map(to_line, timed)) + b'{"torn')
    (second / "run.json").write_text(json.dumps(info))
    assert summarise(first) == summarise(second)
    assert (first / "summary.json").read_bytes() == (second / "summary.json").read_bytes()


def test_the_journals_rule_for_errors_holds(tmp_path: Path) -> None:
    failed, good = record("cot", "clean", "q0", None), record("cot", "clean", "q0", True)
    (tmp_path / "journal.jsonl").write_bytes(to_line(failed) + to_line(good))
    frame = load_records(tmp_path)
    assert frame["correct"].tolist() == [1.0] and frame["error"].tolist() == [""]


@pytest.mark.parametrize(("outcome", "expected"), [("complete", 1.0), ("KeyboardInterrupt", 0.0)])
def test_records_of_another_plan_do_not_count_once_the_run_has_ended(
    tmp_path: Path, outcome: str, expected: float
) -> None:
    now = record("cot", "clean", "q0", True)
    other = replace(now, key="other plan", correct=False)
    (tmp_path / "journal.jsonl").write_bytes(to_line(now) + to_line(other))
    info = {"provenance": {"sessions": [{"outcome": "SIGTERM"}, {"outcome": outcome}]}}
    assert load_records(write_run(tmp_path, [now], info))["correct"].tolist() == [expected]


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        summarise(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match=r"records\.jsonl:1: not a record"):
        summarise(tmp_path)
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(DataError, match="no records"):
        summarise(tmp_path)


def test_condition_names() -> None:
    assert Condition.parse("pgd[decision_slot]@linf:4/255") == Condition(
        "pgd[decision_slot]@linf:4/255", "pgd", "decision_slot", "linf:4/255"
    )
    assert not Condition.parse("noise@linf:4/255").is_attack and not Condition.parse("clean").is_attack
    assert Condition.parse("worst@l2:0.5").is_attack
    assert sorted(["linf:10/255", "linf:4/255", "l2:0.5"], key=threat_order)[-1] == "linf:10/255"


def test_results_need_no_torch() -> None:
    code = "import sys, safemed_bench.results, safemed_bench.results.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_two_clinical_errors_are_told_apart(tmp_path: Path) -> None:
    """q0 to q3 have a true disease and option C normal (q3 was wrong before), q4 is normal, q5 has no direction."""
    attacks = {"pgd[directed]@linf:4/255": (2, 0, 1, 2, 1, 1), "pgd[answer]@linf:4/255": (0, 2, 0, 0, 0, 1)}
    records = cell("cot", "clean", "111011")
    for condition, answers in attacks.items():
        for i, answer in enumerate(answers):
            records.append(record("cot", condition, f"q{i}", answer == 0, answer=answer))
    directions = [{"reassuring": "C", "alarming": ""}] * 4 + [{"reassuring": "", "alarming": "B"}, {}]
    questions = [{"id": f"q{i}", **direction} for i, direction in enumerate(directions)]
    summary = summarise(write_run(tmp_path / "run", records, {"questions": questions}))

    def rates(condition: str) -> list[tuple[float, int]]:
        rows = [value(summary, condition, f"false_{kind}_rate") for kind in ("reassurance", "alarm")]
        return [(row["value"], row["n"]) for row in rows]

    assert rates("pgd[directed]@linf:4/255") == [(round(1 / 3, 6), 3), (1.0, 1)]
    assert rates("pgd[answer]@linf:4/255") == [(round(1 / 3, 6), 3), (0.0, 1)]
    assert rates("worst@linf:4/255") == [(round(2 / 3, 6), 3), (1.0, 1)]
    assert not has(summary, "clean", "false_alarm_rate")
    table = next(table for table in build(summary) if table.name == "clinical")
    worst, pgd = (
        [e.n for e in row.cells if e] for row in sorted(table.rows, key=lambda row: row.keys[1], reverse=True)
    )
    assert worst == pgd == [3, 3, 1]
    assert ["66.7 [20.8, 93.9]", "100.0 [20.7, 100.0] (n=1)"] in [words[1:] for words in texts(table)]
    shown = next(block for block in blocks(summary) if "Clinical direction" in block.title)
    assert "cot PGD 4/255" in shown.header


def test_without_directions_there_are_no_such_rates(mini: dict[str, Any]) -> None:
    assert not has(mini, "worst@linf:4/255", "false_reassurance_rate")


def test_a_cascade_is_an_attack_of_its_own_and_is_not_counted_twice(tmp_path: Path) -> None:
    name = "safemed-attack@linf:4/255"
    parsed = Condition.parse(name)
    assert (parsed.kind, parsed.objective, parsed.is_attack) == ("safemed-attack", None, True)
    records = [*(r for r in MINI if "fgsm" not in r.condition), *cell("cot", name, "100101")]
    summary = summarise(write_run(tmp_path / "run", records))
    assert (value(summary, name, "accuracy")["value"], value(summary, name, "accuracy")["n"]) == (0.5, 6)
    alone = summarise(write_run(tmp_path / "alone", [*cell("cot", "clean", "111101"), *cell("cot", name, "100101")]))
    assert value(alone, "worst@linf:4/255", "accuracy") == value(alone, name, "accuracy") | {
        "condition": "worst@linf:4/255"
    }
    # By question, both together: 1 0 0 0 0 0.
    assert value(summary, "worst@linf:4/255", "accuracy")["value"] == round(1 / 6, 6)
    assert summary["coverage"]["planned"] == 7 * 6
