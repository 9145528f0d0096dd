"""The leaderboard: what the check rejects, which entries are doubted, and which are reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_boards import AGAIN, BASE, SEED, N, board, edit, edit_records, problems, refused, with_one_entry
from small_runs import CLEAN, PGD, write

from safemed_bench.report import board as pages
from safemed_bench.results.boards import add


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return with_one_entry(tmp_path)


# --- what the check rejects ---


@pytest.mark.parametrize(
    ("field", "to"),
    [("value", 0.95), ("low", 0.9), ("n", 600), ("method", "wilson-clustered"), ("condition", "cleaner")],
)
def test_an_edited_number(root: Path, field: str, to: Any) -> None:
    edit(root, lambda entry: entry["numbers"][0].update({field: to}))
    assert "edited number: clean accuracy all" in problems(root)


def test_a_dropped_number_and_an_edited_flag(root: Path) -> None:
    edit(root, lambda entry: entry["numbers"].pop())
    edit(root, lambda entry: entry.update(best_known_attack=None))
    assert "edited number" in problems(root) and "edited best known attack" in problems(root)


def test_edited_records(root: Path) -> None:
    """With the numbers left alone, with the digest forged, and with verdicts that their own answers deny."""
    edit_records(root, lambda r: {**r, "text": "other"}, seal=False)
    assert "is not the file that the entry was made from" in problems(root)
    edit_records(root, lambda r: {**r, "correct": True} if r["condition"] == PGD else r)
    assert "20 records call an answer right or wrong that is not" in problems(root)
    assert f"edited number: {PGD.replace('[answer]', '')} accuracy all" in problems(root)


def test_missing_questions(root: Path) -> None:
    """Also where the numbers were made from the questions that are left."""
    from safemed_bench.results.entries import findings
    from safemed_bench.results.sources import load_board, load_entry, load_packed, measured_entry

    edit_records(root, lambda r: None if r["question_id"] in ("q58", "q59") else r)
    path = board(root) / "entries" / "m.json"
    left = load_packed(path.parent / "m.records.jsonl.gz")
    edit(root, lambda entry: entry.update(findings(measured_entry(load_entry(path), left, load_board(board(root))))))
    assert problems(root).splitlines() == [
        f"missing questions: 2 of 60 have no verdict under {name}" for name in (CLEAN, "blank", "shuffled", PGD)
    ]


def test_a_corruption_is_asked_of_the_modalities_it_happens_to_and_no_fewer(tmp_path: Path) -> None:
    name = "corruption[shot_noise]@3"
    outcomes = {**BASE, name: "10" * 15 + "." * 30}
    facts = {"name": "shot_noise", "severity": 3, "modalities": ["CT", "X-Ray", "Microscopy"]}
    cells = [{"model": "m", "condition": c} | ({"corruption": facts} if c == name else {}) for c in outcomes]
    run = write(tmp_path / "run", outcomes, info={"cells": cells, "code": {"attack": 1, "corruption": 1}})
    root = tmp_path / "boards"
    add(run, root, standard="pgd")
    assert problems(root) == "", "MRI, the other half, is not missing"
    edit_records(root, lambda r: None if r["condition"] == name and r["question_id"] == "q0" else r)
    assert problems(root) == f"missing questions: 1 of 30 have no verdict under {name}"
    edit(root, lambda entry: entry["run"]["cells"][-1]["corruption"].update(modalities=["X-Ray"]))
    assert f"{name} leaves out modalities that it happens to" in problems(root)


def test_a_part_of_the_code_that_the_board_has_not_met_changes_nothing_on_it(tmp_path: Path, root: Path) -> None:
    newer = {"code": {"attack": 1, "corruption": 1}}
    add(write(tmp_path / "n", BASE, model="n", info=newer), root)
    assert problems(root, "n.json") == ""
    assert "other versions of the code" in refused(root, write(tmp_path / "o", BASE, model="o", info={"code": {}}))


def test_another_threat_model(root: Path) -> None:
    edit_records(root, lambda r: {**r, "linf": 8 / 255} if r["condition"] == PGD else r)
    assert problems(root) == f"another threat model: 60 images under {PGD} are outside its ball"
    edit(root, lambda entry: entry["settings"]["threat"].update(norm="l2"))
    assert "another threat model: l2 at 4/255, the board has linf at 4/255" in problems(root)


def test_a_weaker_attack(root: Path) -> None:
    edit(root, lambda entry: entry["settings"]["conditions"][1].update(steps=5))
    assert "weaker attack: pgd[answer]@linf:4/255 has 5 steps" in problems(root)
    edit(root, lambda entry: entry["settings"]["conditions"][1].update(steps=20))
    assert problems(root) == ""
    edit_records(root, lambda r: {**r, "steps": 5} if r["condition"] == PGD else r)
    assert problems(root) == "weaker attack: 40 answers stood after fewer than 20 steps"


def test_an_attack_whose_cell_was_taken_out(root: Path) -> None:
    edit_records(root, lambda r: None if r["condition"] == PGD else r)
    edit(root, lambda entry: entry["run"].update(cells=[c for c in entry["run"]["cells"] if c["condition"] != PGD]))
    assert "weaker attack: pgd[answer]@linf:4/255 is missing" in problems(root)


def test_mixed_data(root: Path) -> None:
    edit(root, lambda entry: entry["run"]["data"].update(fingerprint="another"))
    assert "mixed data: measured on phantom (small)" in problems(root)
    edit(root, lambda entry: entry["run"]["data"].update(fingerprint="f00d"))
    edit_records(root, lambda r: {**r, "image_sha256": "other"} if r["question_id"] == "q3" else r)
    assert problems(root).startswith("mixed data: image_sha256 of q3 and 3 more records differs")
    edit_records(
        root, lambda r: {**r, "image_sha256": "image-3", "question_id": "x1"} if r["question_id"] == "q3" else r
    )
    assert "mixed data: 1 questions are not of this board, such as x1" in problems(root)


def test_a_broken_entry_is_named_not_raised(root: Path) -> None:
    (board(root) / "entries" / "n.json").write_text("{}")
    (board(root) / "entries" / "m.records.jsonl.gz").write_bytes(b"no gzip")
    assert "not an entry of a leaderboard" in problems(root, "n.json") and "cannot be read" in problems(root)


# --- flags and status ---


@pytest.mark.parametrize(
    ("outcomes", "name"),
    [
        ({**BASE, "noise@linf:4/255": "0" * N}, "attack-too-weak"),
        ({**BASE, "fgsm[answer]@linf:4/255": "0" * N}, "attack-too-weak"),
        ({**BASE, "shuffled": BASE[CLEAN]}, "image-not-needed"),
        ({**BASE, CLEAN: "1" * 50 + "i" * 10}, "often-unreadable"),
        ({**BASE, "pgd[answer]@linf:8/255": BASE[CLEAN]}, "not-monotone"),
    ],
)
def test_reasons_to_doubt_make_an_entry_unreliable(tmp_path: Path, outcomes: dict[str, str], name: str) -> None:
    (path,) = add(write(tmp_path / "run", outcomes), tmp_path / "boards", standard="pgd")
    assert [flag["id"] for flag in json.loads(path.read_text())["flags"]] == [name]
    assert "unreliable, self-reported" in pages.to_markdown([pages.read_board(path.parents[1])])


def test_a_second_measurement_with_another_seed_reproduces(tmp_path: Path, root: Path) -> None:
    add(write(tmp_path / "again", AGAIN, settings=SEED), root, reproduces=True)
    entry = json.loads((board(root) / "entries" / "m.json").read_text())
    assert entry["status"] == "reproduced" and problems(root) == ""
    edit(root, lambda e: e.update(reproduction=None))
    assert "without the records that would show it" in problems(root)


@pytest.mark.parametrize(
    ("outcomes", "options", "words"),
    [
        ({**BASE, PGD: "1" * 20 + "0" * 40}, {"settings": SEED}, "worst@linf:4/255 differs by -33.3%"),
        (AGAIN, {}, "it has the same seed"),
        (AGAIN, {"settings": SEED, "card": {"fingerprint": "other"}}, "it is of another model"),
        ({**AGAIN, CLEAN: "." * N}, {"settings": SEED}, "missing questions"),
        (AGAIN, {"settings": SEED, "model": "n"}, "n: is not on the board"),
    ],
)
def test_what_does_not_reproduce(
    tmp_path: Path, root: Path, outcomes: dict[str, str], options: dict[str, Any], words: str
) -> None:
    if "settings" not in options:
        options = {**options, "settings": {"run": {}}}
    assert words in refused(root, write(tmp_path / "again", outcomes, **options), reproduces=True)
