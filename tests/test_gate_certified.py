"""Gate rules on certified accuracy: what is paired, what compares, and what a suite may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import CLEAN, questions, record, write

from safemed_bench.core.errors import DataError, IncompleteError, SuiteError, UsageError
from safemed_bench.core.journal import to_line
from safemed_bench.results.compare import pair_up, slices
from safemed_bench.results.gate import Rule, gate
from safemed_bench.results.gate_formats import rule_text
from safemed_bench.results.sources import load_measured
from safemed_bench.suite import load_suite

CERTIFY, FAR = "certify[sigma=0.25]", "certify[sigma=0.5]"
PARAMETERS = {"name": "sequential", "values": 12288, "sigma": 0.25, "n": 1000, "n0": 32, "radii": [0.25, 0.5]}
RULE = Rule("certified_accuracy", condition="certified@l2:0.25", allowed_drop=5)
WORDS = {"1": "certified", "w": "certified", "0": "refuted", "a": "abstain"}


def run(folder: Path, near: str, *, per_image: int = 1, count: int = 0, **parameters: Any) -> Path:
    """Certificates at radius 0.25, a letter a question: 1 proven and right, w proven and wrong, 0 refuted, a abstained,
    . none. At 0.5 nothing is proven. count: questions of the suite, of which the first are certified."""
    count = count or len(near)
    cell = {"model": "m", "condition": CERTIFY, "certifier": PARAMETERS | parameters}
    if count > len(near):
        cell["questions"] = [f"q{i}" for i in range(len(near))]
    cells = [{"model": "m", "condition": CLEAN}, cell]
    write(folder, {CLEAN: "1" * count}, per_image=per_image, info={"cells": cells})
    lines = [
        to_line(proof(question, letter))
        for question, letter in zip(questions(count, per_image), near, strict=False)
        if letter != "."
    ]
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b"".join(lines))
    return folder


def proof(question: dict[str, Any], letter: str) -> Any:
    extra = {"candidate": int(letter == "w"), "decisions": [[0.25, WORDS[letter], 50], [0.5, "refuted", 60]]}
    plain = record("m", CERTIFY, question, "1" if letter == "1" else "0")
    return replace(plain, radius=0.3, abstain=letter == "a", samples=100, extra=extra)


def outcome(baseline: Path, candidate: Path, rule: Rule = RULE) -> Any:
    names = ("the baseline", "the run")
    return gate(pair_up(load_measured(baseline), load_measured(candidate), names=names), [rule])


@pytest.mark.parametrize(
    ("after", "verdict", "share"),
    [
        ("1" * 90 + "0" * 30, "pass", 0.75),
        ("1" * 60 + "0" * 60, "regressed", 0.5),
        ("1" * 60 + "w" * 30 + "0" * 30, "regressed", 0.5),
        ("1" * 60 + "a" * 30 + "0" * 30, "regressed", 0.5),
        ("1" * 116 + "0" * 4, "improved", 116 / 120),
        ("1" * 86 + "0" * 34, "inconclusive", 86 / 120),
    ],
)
def test_what_is_proven_and_right_is_held_question_by_question(
    tmp_path: Path, after: str, verdict: str, share: float
) -> None:
    found = outcome(run(tmp_path / "a", "1" * 90 + "0" * 30), run(tmp_path / "b", after))
    (test,) = found.tests
    assert (test.verdict, test.n, test.before, test.after) == (verdict, 120, 0.75, pytest.approx(share))
    assert test.drop == pytest.approx(0.75 - share) and test.condition == "certified@l2:0.25"
    assert rule_text(RULE) == (
        "certified_accuracy of all models, certified@l2:0.25, all questions: may drop 5 pp (alpha 0.05)"
    )


def test_every_radius_is_a_condition_of_its_own_and_every_modality_a_slice(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", "1" * 200), run(tmp_path / "b", "0" * 100 + "1" * 100)
    still = outcome(before, after, replace(RULE, condition="certified@l2:0.5"))
    assert [(t.verdict, t.before, t.after) for t in still.tests] == [("pass", 0.0, 0.0)]
    parts = outcome(before, after, replace(RULE, slice="each"))
    assert {t.slice: t.verdict for t in parts.tests} == {"CT": "regressed", "MRI": "pass"}


def test_only_the_questions_that_were_to_be_certified_count(tmp_path: Path) -> None:
    before, after = (run(tmp_path / name, "1" * 60, count=100) for name in "ab")
    (test,) = outcome(before, after).tests
    assert (test.n, test.verdict) == (60, "pass")
    sides = [load_measured(folder)["m"].verdicts for folder in (before, after)]
    assert slices(*sides, CERTIFY)[0].planned == 60 and slices(*sides, CLEAN)[0].planned == 100


def test_shared_images_count_as_what_they_are(tmp_path: Path) -> None:
    lost = "0" * 16 + "1" * 84
    alone = outcome(run(tmp_path / "a", "1" * 100), run(tmp_path / "b", lost)).tests[0]
    shared = outcome(run(tmp_path / "c", "1" * 100, per_image=4), run(tmp_path / "d", lost, per_image=4)).tests[0]
    assert alone.images == 100 and shared.images == 25 and shared.p_regressed > 2 * alone.p_regressed


def test_a_certificate_that_is_missing_does_not_pass(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="2 of 80 questions have no verdict"):
        outcome(run(tmp_path / "a", "1" * 80), run(tmp_path / "b", "1" * 78 + ".."))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0.5}, "sigma 0.25), all questions in the baseline, sequential (n 1000, n0 32, sigma 0.5)"),
        ({"n": 100}, "certificates: certified: sequential (n 1000, n0 32"),
        ({"alpha": 0.01}, "sequential (alpha 0.01, n 1000"),
        ({"name": "cohen"}, "cohen (n 1000"),
        ({"count": 90}, "80 questions in the run"),
    ],
)
def test_certificates_that_were_made_otherwise_do_not_compare(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    before, after = run(tmp_path / "a", "1" * 80, count=90 if "count" in change else 0), tmp_path / "b"
    if "count" in change:  # the same questions in the suite, fewer of them certified
        before = run(tmp_path / "a", "1" * 90)
    run(after, "1" * 80, **change)
    with pytest.raises(DataError) as caught:
        outcome(before, after)
    assert words in str(caught.value)
    assert pair_up(load_measured(before), load_measured(after), allow=["certificates"])[0].waived


def test_radii_that_were_asked_beside_it_change_nothing(tmp_path: Path) -> None:
    before, after = run(tmp_path / "a", "1" * 80), run(tmp_path / "b", "1" * 80, radii=[0.25, 0.5, 1.0])
    assert outcome(before, after).verdict == "pass"


def test_a_radius_that_was_not_certified_is_no_pass(tmp_path: Path) -> None:
    before, after = (run(tmp_path / name, "1" * 80) for name in "ab")
    with pytest.raises(UsageError, match=r"'certified@l2:1' was not measured. Did you mean 'certified@l2"):
        outcome(before, after, replace(RULE, condition="certified@l2:1"))
    bare = write(tmp_path / "c", {CLEAN: "1" * 80})
    with pytest.raises(DataError, match=r"the run has no certified@l2:0\.25, which the baseline has"):
        outcome(before, bare)


SUITE = """\
name: certified
models: [sft]
conditions: [clean, {certify: sequential, sigma: 0.25, radii: [0.25]}]
gate:
  - {metric: certified_accuracy, condition: certified@l2:0.25, allowed_drop: 3}
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "certified@l2:0.25",
            "certified@l2:0.5",
            "no radius that the suite certifies. Did you mean 'certified@l2:0.25'?",
        ),
        (", condition: certified@l2:0.25", "", "'worst@headline' is no radius that the suite certifies"),
        ("metric: certified_accuracy, ", "", "is of the metric certified_accuracy"),
    ],
)
def test_a_suite_names_a_radius_that_it_certifies(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    assert Rule(**load_suite(path, env={}).gate[0].model_dump()) == replace(RULE, allowed_drop=3)
    path.write_text(SUITE.replace(old, new))
    with pytest.raises(SuiteError) as caught:
        load_suite(path, env={})
    (problem,) = caught.value.problems
    assert words in problem.message and problem.key == "gate.0.condition"
