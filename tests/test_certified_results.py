"""Certificates in results: every number worked out by hand, and none of them among empirical L∞ numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.proportion import proportion_confint
from test_results import record, value, write_run

from safemed_bench.core.types import Record
from safemed_bench.results import load_run, summarise
from safemed_bench.results.diagnostics import Diagnostic, certified_below_empirical
from safemed_bench.results.tables import Numbers, build

NEAR, FAR = "certify[sigma=0.25]", "certify[sigma=0.5]"
CERTIFIED, REFUTED, OPEN = "certified", "refuted", "abstain"


def proof(
    question: str,
    words: tuple[str, ...],
    *,
    radius: float = 0.0,
    candidate: int = 0,
    answer: int | None = 0,
    samples: int = 100,
    condition: str = NEAR,
    radii: tuple[float, ...] = (0.25, 0.5),
) -> Record:
    """A certificate's record; `words` are the verdicts at the radii. The right answer is 0."""
    decisions = [[r, word, samples - 20] for r, word in zip(radii, words, strict=True)]
    return replace(
        record("cot", condition, question, answer == 0),
        answer=answer,
        status="abstain" if answer is None else "valid",
        radius=radius,
        abstain=answer is None,
        samples=samples,
        extra={"candidate": candidate, "decisions": decisions, "p_low": 0.9, "counts": {}},
    )


PROOFS = [
    proof("q0", (CERTIFIED, CERTIFIED), radius=0.6, samples=80),
    proof("q1", (CERTIFIED, REFUTED), radius=0.3, samples=120),
    proof("q2", (REFUTED, REFUTED), radius=0.1, samples=60),
    proof("q3", (CERTIFIED, OPEN), radius=0.4, candidate=1, answer=1, samples=2020),  # proven, and wrong
    proof("q4", (OPEN, OPEN), answer=None, samples=2020),
    proof("q5", (CERTIFIED, CERTIFIED), radius=0.7, samples=90),
]
FEW = [
    proof(q, (word,), radius=radius, answer=answer, condition=FAR, radii=(1.0,))
    for q, word, radius, answer in (("q0", CERTIFIED, 1.2, 0), ("q4", REFUTED, 0.0, None))
]
EMPIRICAL = [record("cot", c, f"q{i}", i < 4) for c in ("clean", "blank", "pgd[answer]@linf:4/255") for i in range(6)]
VALUES = 3 * 64 * 64


def info(**more: Any) -> dict[str, Any]:
    facts = {"name": "sequential", "values": VALUES}
    cells: list[dict[str, Any]] = [
        {"model": "cot", "condition": c} for c in dict.fromkeys(r.condition for r in EMPIRICAL)
    ]
    cells.append({"model": "cot", "condition": NEAR, "certifier": {**facts, "sigma": 0.25, "alpha": 0.001}})
    cells.append({"model": "cot", "condition": FAR, "certifier": {**facts, "sigma": 0.5}, "questions": ["q0", "q4"]})
    questions = [{"id": f"q{i}", "modality": "CT" if i < 4 else "MRI", "n_options": 4} for i in range(6)]
    return {"models": [{"name": "cot"}], "cells": cells, "questions": questions, **more}


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    return summarise(write_run(tmp_path, [*EMPIRICAL, *PROOFS, *FEW], info()))


def test_the_curve_of_each_sigma_begins_at_what_that_smoothed_model_answers(summary: dict[str, Any]) -> None:
    numbers = Numbers(summary)
    found = [numbers.smoothed("cot", sigma) for sigma in (None, "sigma=0.25", "sigma=0.5", "sigma=1")]
    assert [e and round(e.value, 6) for e in found] == [round(4 / 6, 6), round(4 / 6, 6), 0.5, None]
    assert numbers.smoothed("sft", None) is None


@pytest.mark.parametrize(
    ("condition", "metric", "modality", "expected", "n"),
    [
        ("certified@l2:0.25", "certified_accuracy", "all", 3 / 6, 6),
        ("certified@l2:0.25", "certified_accuracy", "CT", 2 / 4, 4),
        ("certified@l2:0.25", "certified_accuracy", "MRI", 1 / 2, 2),
        ("certified@l2:0.5", "certified_accuracy", "all", 2 / 6, 6),
        ("certified@l2:0.25", "abstain_rate", "all", 1 / 6, 6),
        ("certified@l2:0.5", "abstain_rate", "all", 2 / 6, 6),
        ("certified@l2:0.25", "refuted_rate", "all", 1 / 6, 6),
        ("certified@l2:0.5", "refuted_rate", "CT", 2 / 4, 4),
        ("certified@l2:0.25", "acr", "all", (0.6 + 0.3 + 0.1 + 0 + 0 + 0.7) / 6, 6),
        ("certified@l2:0.25", "acr", "MRI", 0.7 / 2, 2),
        ("certified@l2:0.25", "samples", "all", (80 + 120 + 60 + 2020 + 2020 + 90) / 6, 6),
        ("certified@l2:0.25", "samples_median", "all", (90 + 120) / 2, 6),
        ("certified@l2:0.25", "linf_equivalent", "all", 0.25 / math.sqrt(VALUES), 6),
        (NEAR, "certified_accuracy", "all", 4 / 6, 6),
        (NEAR, "abstain_rate", "MRI", 1 / 2, 2),
        ("certified[sigma=0.5]@l2:1", "certified_accuracy", "all", 1 / 2, 2),
        ("certified[sigma=0.5]@l2:1", "certified_accuracy", "MRI", 0.0, 1),
        ("certified[sigma=0.5]@l2:1", "refuted_rate", "all", 1 / 2, 2),
        ("certified[sigma=0.5]@l2:1", "linf_equivalent", "CT", 1 / math.sqrt(VALUES), 1),
        (FAR, "abstain_rate", "all", 1 / 2, 2),
    ],
)
def test_each_number_by_hand(
    summary: dict[str, Any], condition: str, metric: str, modality: str, expected: float, n: int
) -> None:
    row = value(summary, condition, metric, modality)
    assert (row["value"], row["n"]) == (round(expected, 6), n)
    if metric.endswith(("accuracy", "rate")):
        low, high = proportion_confint(round(expected * n), n, method="wilson")
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_no_number_of_a_certificate_is_of_another_kind(summary: dict[str, Any]) -> None:
    metrics: dict[str, set[str]] = {}
    for row in summary["estimates"]:
        metrics.setdefault(row["condition"], set()).add(row["metric"])
    ball = {"certified_accuracy", "abstain_rate", "refuted_rate", "acr", "samples", "samples_median", "linf_equivalent"}
    assert metrics["certified@l2:0.25"] == ball
    assert metrics[NEAR] == ball - {"refuted_rate", "linf_equivalent"}
    assert "accuracy" in metrics["clean"] and not metrics["clean"] & ball
    assert summary["threat"]["labels"] == ["linf:4/255"]


def test_an_error_is_missing_and_a_cell_of_a_few_questions_is_whole(tmp_path: Path) -> None:
    lost = record("cot", NEAR, "q5", None)
    found = summarise(write_run(tmp_path, [*EMPIRICAL, *PROOFS[:5], lost, *FEW], info()))
    assert value(found, "certified@l2:0.25", "certified_accuracy")["n"] == 5
    cells = {c["condition"]: c for c in found["coverage"]["cells"]}
    assert {k: cells[NEAR][k] for k in ("planned", "done", "errors", "missing")} == {
        "planned": 6,
        "done": 5,
        "errors": 1,
        "missing": 0,
    }
    assert (cells[FAR]["planned"], cells[FAR]["done"], cells[FAR]["missing"]) == (2, 2, 0)
    assert found["coverage"]["planned"] == 18 + 6 + 2
    assert sum("PARTIAL" in notice for notice in found["notices"]) == 1


def test_certified_numbers_have_a_table_of_their_own(summary: dict[str, Any]) -> None:
    tables = {table.name: table for table in build(summary)}
    for name in ("overall", "modalities"):
        labels = [column.label for column in tables[name].columns]
        assert any("4/255" in label for label in labels)
        assert not any(
            word in label.lower() for label in labels for word in ("certif", "l2", "acr", "abstain", "samples")
        )
    assert all("certif" not in row.keys[1] for row in tables["validity"].rows)
    own = tables["certified"]
    labels = [column.label for column in own.columns]
    assert labels[:4] == [
        "n",
        "certified L2 0.25 (0.58/255)",
        "certified L2 0.5 (1.2/255)",
        "certified L2 1 (2.3/255) sigma=0.5",
    ]
    assert not any("linf" in label.lower() for label in labels)
    assert [row.keys for row in own.rows] == [("cot", "all"), ("cot", "CT"), ("cot", "MRI")]
    first = dict(zip(labels, own.rows[0].cells, strict=True))
    near = first["certified L2 0.25 (0.58/255)"]
    assert near is not None and (near.value, near.n) == (0.5, 6)


# -- the diagnostic


def attacked(outcomes: str, condition: str = "pgd[answer]@l2:0.25") -> list[Record]:
    """1 right, 0 wrong, a abstained."""
    made = [record("cot", condition, f"q{i}", letter == "1") for i, letter in enumerate(outcomes)]
    return [
        replace(r, status="abstain", answer=None) if letter == "a" else r
        for r, letter in zip(made, outcomes, strict=True)
    ]


def said(folder: Path, records: list[Record], *, smooth: bool = True) -> Diagnostic | None:
    models = [{"name": "cot"} | ({"smooth": {"sigma": 0.25, "n": 100, "alpha": 0.001}} if smooth else {})]
    facts = {"name": "sequential", "values": VALUES, "sigma": 0.25, "alpha": 0.001}
    cells: list[dict[str, Any]] = [{"model": "cot", "condition": NEAR, "certifier": facts}]
    cells += [{"model": "cot", "condition": name} for name in dict.fromkeys(r.condition for r in records)]
    run = load_run(write_run(folder, [*PROOFS, *records], info(models=models, cells=cells)))
    return certified_below_empirical(run.verdicts[0])


@pytest.mark.parametrize(
    ("outcomes", "status", "words"),
    [
        ("110011", "pass", "accuracy 0.667, certified at L2 0.25 0.500, n = 6; of 3 proven answers 0 changed, 0 abst"),
        ("110001", "pass", "accuracy 0.500"),
        ("1a0001", "warn", "of 3 proven answers 0 changed, 1 abstained"),
        ("101111", "warn", "of 3 proven answers 1 changed"),
        ("001110", "fail", "of 3 proven answers 3 changed"),
    ],
)
def test_certified_accuracy_is_a_floor(tmp_path: Path, outcomes: str, status: str, words: str) -> None:
    found = said(tmp_path, attacked(outcomes))
    assert found is not None and (found.id, found.status) == ("certified-below-empirical", status)
    assert words in found.evidence and "pgd[answer]@l2:0.25" in found.evidence


def test_an_attack_meets_the_certificates_whose_ball_holds_its_own(tmp_path: Path) -> None:
    # at 0.4 only what is certified at 0.5 (q0, q5) is proven
    found = said(tmp_path / "a", attacked("100001", "smoothadv[answer]@l2:0.4"))
    assert found is not None and found.status == "pass" and "certified at L2 0.5 0.333" in found.evidence
    assert said(tmp_path / "b", attacked("000000", "pgd[answer]@l2:0.6")) is None, "no certificate reaches so far"
    assert said(tmp_path / "c", attacked("000000", "pgd[answer]@linf:4/255")) is None
    assert said(tmp_path / "d", attacked("000000"), smooth=False) is None, "a bare entry is not what is certified"
    both = said(tmp_path / "e", [*attacked("111111"), *attacked("000000", "smoothadv[answer]@l2:0.25")])
    assert both is not None and both.status == "fail" and "smoothadv" in both.evidence and "2 comp" in both.evidence


def test_what_the_checks_say_is_in_the_summary(tmp_path: Path) -> None:
    models = [{"name": "cot", "smooth": {"sigma": 0.25}}]
    found = summarise(write_run(tmp_path, [*PROOFS, *attacked("110011")], {"models": models}))
    (row,) = (r for r in found["diagnostics"] if r["id"] == "certified-below-empirical")
    assert list(row) == ["model", "id", "status", "rule", "evidence"] and row["status"] == "pass"
    assert json.loads((tmp_path / "summary.json").read_text())["diagnostics"] == found["diagnostics"]
