"""Splits, selection and redrawn distractors."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_omnimedvqa import record, spec, write_root

from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.core.types import Question
from safemed_bench.datasets import load, omnimedvqa, splits
from safemed_bench.datasets.base import SPLITS
from safemed_bench.datasets.prior import Lookup, letter_hits, lookup_hits
from safemed_bench.datasets.rebalance import MODALITY_TYPE, meaning, rebalance
from safemed_bench.datasets.splits import stratified


def question(number: int, **changes: Any) -> Question:
    plain = Question(
        id=f"q{number}",
        image=f"/images/{number}.png",
        image_sha256="",
        question="What is shown?",
        options=("a", "b"),
        answer=0,
        modality="CT",
        question_type="Disease Diagnosis",
        source="Toy",
        split="test",
    )
    return replace(plain, **changes)


def by_id(contents: omnimedvqa.Contents, scheme: str, **more: Any) -> dict[str, str]:
    questions, _ = splits.assign(contents, scheme, **more)
    return {q.id: q.split for q in questions}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 questions on 150 images, two per image, of which the first ten are there twice under another name."""
    root = tmp_path_factory.mktemp("many")
    rows = [record(n, image_path=f"Images/Toy/{n // 2}.png") for n in range(280)]
    write_root(root, rows)
    for n in range(10):
        shutil.copy(root / f"Images/Toy/{n}.png", root / f"Images/Toy/copy{n}.png")
        rows += [record(280 + 2 * n + k, image_path=f"Images/Toy/copy{n}.png") for k in range(2)]
    return write_root(root, rows, images=False)


def test_image_disjoint_never_shares_an_image_or_its_copy(many: Path) -> None:
    questions, problems = splits.assign(omnimedvqa.read(many), "image_disjoint")
    assert not problems
    where: dict[bytes, set[str]] = {}
    for q in questions:
        where.setdefault(Path(q.image).read_bytes(), set()).add(q.split)
    assert all(len(held) == 1 for held in where.values())
    counts = Counter(q.split for q in questions)
    assert set(counts) == set(SPLITS) and 0.1 < counts["test"] / 300 < 0.3 and counts["validation"] < counts["test"]


def test_split_does_not_depend_on_the_folder_or_the_order(many: Path, tmp_path: Path) -> None:
    moved = tmp_path / "Images" / "moved"
    shutil.copytree(many, moved)
    file = moved / "QA_information/Open-access/Toy.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    for scheme in ("image_disjoint", "medr1"):
        assert by_id(omnimedvqa.read(moved), scheme) == by_id(omnimedvqa.read(many), scheme)


def test_without_files_the_path_is_the_image(tmp_path: Path) -> None:
    rows = [record(n, image_path=f"Images/Toy/{n // 3}.png") for n in range(300)]
    questions, _ = splits.assign(omnimedvqa.read(write_root(tmp_path, rows, images=False)), "image_disjoint")
    train, test = ({q.image for q in questions if q.split == s} for s in ("train", "test"))
    assert train and test and not train & test


def test_record_scheme_and_the_validation_it_lacks(tmp_path: Path) -> None:
    rows = [record(n, split=("train", "test")[n % 4 == 0]) for n in range(200)]
    contents = omnimedvqa.read(write_root(tmp_path, rows, images=False))
    assert splits.resolve(contents, "auto") == "record"
    found = by_id(contents, "auto")
    assert all((found[r["question_id"]] == "test") == (r["split"] == "test") for r in rows)
    assert 4 <= Counter(found.values())["validation"] <= 30
    assert "validation" not in by_id(contents, "auto", wanted="test").values()
    rows[1]["split"] = "val"
    own = by_id(omnimedvqa.read(write_root(tmp_path, rows, images=False)), "auto")
    assert [name for name, split in own.items() if split == "validation"] == ["Toy_0001"]


def test_medr1_marks_lead_and_an_unmarked_question_is_left_out(tmp_path: Path) -> None:
    rows = [record(n, medr1_split=("train", "test", None)[n % 3]) for n in range(300)]
    contents = omnimedvqa.read(write_root(tmp_path, rows, images=False))
    found = by_id(contents, "medr1")
    for row in rows:
        mark, split = row.get("medr1_split", ""), found[row["question_id"]]
        assert split == mark or (mark, split) == ("train", "validation")
    (problem,) = splits.assign(contents, "medr1")[1]
    assert problem.message.startswith("100 questions have no mark of Med-R1's split and are left out")


def test_medr1_without_any_mark_is_a_fifth_by_hash(tmp_path: Path) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(n) for n in range(300)], images=False))
    assert 35 <= list(by_id(contents, "medr1").values()).count("test") <= 90
    assert not splits.assign(contents, "medr1")[1]


def test_file_scheme(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(n) for n in range(4)], images=False)
    lists = {"note": "x", "train": ["Toy_0000"], "val": ["Toy_0001"], "test": ["Toy_0002", "Toy_0009"]}
    (root / "splits.json").write_text(json.dumps(lists))
    contents = omnimedvqa.read(root)
    questions, problems = splits.assign(contents, "auto")
    assert [q.split for q in questions] == ["train", "validation", "test", ""]
    assert problems[0].key == "Toy_0009" and "1 questions are in no split" in problems[1].message


def test_another_split_file(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(n) for n in range(3)])
    (root / "splits.json").write_text(json.dumps({"train": ["Toy_0000"], "test": ["Toy_0001", "Toy_0002"]}))
    (root / "strict.json").write_text(json.dumps({"train": ["Toy_0000"], "test": ["Toy_0002"]}))
    contents = omnimedvqa.read(root)
    for scheme in ("file", "auto", "rebalanced"):
        assert by_id(contents, scheme, split_file="strict.json")["Toy_0001"] == ""
    assert by_id(contents, "file")["Toy_0001"] == "test"
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        splits.assign(contents, "file", split_file="gone.json")
    data = load(spec(root, scheme="file", split_file="strict.json"))
    assert [q.id for q in data.questions] == ["Toy_0002"] and data.stamp.endswith("split test (file, strict.json)")
    with pytest.raises(UsageError, match=r"split_file 'strict.json' does not fit the phantom set"):
        load(spec(None, split_file="strict.json"))


def test_mini_strict_split_leaves_train_groups_out(shared_data: Path) -> None:
    root = shared_data / "omnimed_mini"
    found = Counter(by_id(omnimedvqa.read(root), "file", split_file="splits_strict.json").values())
    assert found["test"] == 1241 and found["train"] + found["validation"] == 1585 and found[""] == 512


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": [', r"splits\.json:1:12"),
        ('{"dev": ["a"]}', "expected lists"),
        ('{"train": "a", "test": []}', "expected lists"),
        ('{"train": ["Toy_0000"], "test": ["Toy_0000"]}', "in two splits"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_splits_file(tmp_path: Path, text: str | None, words: str) -> None:
    root = write_root(tmp_path, [record(0)], images=False)
    if text is not None:
        (root / "splits.json").write_text(text)
    with pytest.raises(DataError, match=words):
        splits.assign(omnimedvqa.read(root), "file")


def test_unknown_scheme_says_what_was_meant(tmp_path: Path) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(0)], images=False))
    with pytest.raises(UsageError, match="rebalanced"):
        splits.assign(contents, "rebalance")
    with pytest.raises(UsageError, match="validation"):
        splits.of_split((), "validatoin")


def test_mini_splits_as_its_file_says(shared_data: Path) -> None:
    root = shared_data / "omnimed_mini"
    questions, problems = splits.assign(omnimedvqa.read(root), "auto")
    lists = json.loads((root / "splits.json").read_text())
    assert not problems
    assert {q.id for q in questions if q.split == "test"} == set(lists["test"])
    assert {q.id for q in questions if q.split in ("train", "validation")} == set(lists["train"])
    images = {s: {Path(q.image).read_bytes() for q in questions if q.split == s} for s in ("train", "validation")}
    assert images["validation"] and not images["train"] & images["validation"]


def strata() -> list[Question]:
    kinds = ["Disease Diagnosis"] * 60 + ["Anatomy Identification"] * 30 + ["Lesion Grading"] * 10
    return [
        question(n, modality=modality, question_type=kind, id=f"{modality}{n}")
        for modality in ("MRI", "CT", "Odd")
        for n, kind in enumerate(kinds)
    ]


def test_stratified_keeps_proportions_and_nests() -> None:
    chosen = stratified(strata(), 20)
    assert Counter(q.modality for q in chosen) == {"CT": 20, "MRI": 20, "Odd": 20}
    assert Counter(q.question_type for q in chosen if q.modality == "CT") == {
        "Disease Diagnosis": 12,
        "Anatomy Identification": 6,
        "Lesion Grading": 2,
    }
    assert chosen == stratified(strata()[::-1], 20), "the order of the input does not matter"
    assert stratified(strata(), 35)[: len(chosen)] == chosen
    assert [q.modality for q in chosen[:6]] == ["CT", "MRI", "Odd"] * 2
    assert len(stratified(strata(), 1000)) == 300 and stratified(strata(), 0) == ()
    assert stratified(strata(), 20, seed=1) != chosen


def skewed() -> list[Question]:
    """Distractors that are never true, as in the original: the options give the answer away."""
    answers = ("cyst", "stone", "scar", "mass", "clot")
    return [
        question(
            n,
            options=(f"never {n % 7}", answers[n % 5], f"never {n % 3 + 10}"),
            answer=1,
            split="train" if n % 2 else "test",
        )
        for n in range(1000)
    ]


def test_rebalanced_takes_the_text_prior_away() -> None:
    before, after = skewed(), rebalance(skewed())
    accuracy = {}
    for name, questions in (("before", before), ("after", after)):
        halves = ([q for q in questions if q.split == s] for s in ("train", "test"))
        hits = lookup_hits(*halves)
        accuracy[name] = sum(hits) / len(hits)
    assert accuracy["before"] == 1 and accuracy["after"] < 0.42
    assert all(len(q.options) == 3 == len(set(q.options)) for q in after)
    assert [q.options[q.answer] for q in after] == [q.options[q.answer] for q in before]
    assert [(q.id, q.split, q.image) for q in after] == [(q.id, q.split, q.image) for q in before]
    letters = Counter(q.answer for q in after)
    assert min(letters.values()) > 280


def test_rebalanced_is_deterministic_per_question_and_seed() -> None:
    assert rebalance(skewed()) == rebalance(skewed())
    assert rebalance(skewed()[::-1]) == rebalance(skewed())[::-1]
    assert rebalance(skewed(), seed=1) != rebalance(skewed())


def test_rebalanced_never_offers_what_is_also_true() -> None:
    rows = [
        question(1, options=("Lung", "x"), image="/one.png"),
        question(2, options=("lungs.", "x"), image="/two.png"),
        question(3, options=("Chest", "x"), image="/one.png"),
        question(4, options=("liver", "x"), image="/three.png"),
    ]
    for seed in range(20):
        first, second, third, _ = rebalance(rows, seed)
        assert set(first.options) == set(third.options) ^ {"Lung", "Chest"} == {"Lung", "liver"}
        assert len({meaning(o) for o in second.options}) == 2


def test_rebalanced_modality_questions_offer_other_modalities() -> None:
    names = {"CT": ("CT scan", "Computed tomography"), "MRI": ("MRI",), "OCT": ("OCT",)}
    rows = [
        question(f"{m}{n}", options=(name, "a photo", "a drawing"), modality=m, question_type=MODALITY_TYPE)  # type: ignore[arg-type]
        for m, held in names.items()
        for n, name in enumerate(held)
    ]
    for q in rebalance(rows):
        assert not set(q.options) & (set(names[q.modality]) - {q.options[q.answer]})


def test_rebalanced_keeps_options_where_no_other_answer_exists() -> None:
    rows = [question(1), question(2)]
    assert list(rebalance(rows)) == rows


def test_splits_and_selection_are_the_ones_that_were_published(tmp_path: Path) -> None:
    """Fixed once and for all: another hash or order would silently change every reported number."""
    contents = omnimedvqa.read(write_root(tmp_path, [record(n) for n in range(60)], images=False))
    found = by_id(contents, "image_disjoint")
    assert [name[-2:] for name, split in found.items() if split == "test"] == (
        ["03", "05", "08", "12", "16", "21", "24", "29", "31", "36", "39", "42", "44"]
    )
    assert [q.id for q in stratified(strata(), 2)] == ["CT30", "MRI51", "Odd38", "CT65", "MRI80", "Odd63"]


def test_lookup_and_letter_priors() -> None:
    train = [question(n, options=("no", "yes", "maybe"), answer=1) for n in range(5)]
    asked = question(9, options=("yes", "no", "never"))
    assert Lookup.learn(train).guess(asked) == 0
    assert Lookup.learn(train).guess(replace(asked, modality="MRI", question="Else?")) == 0, "falls back"
    told = [question(n, options=("x", "y"), answer=n % 2, modality=("CT", "MRI")[n % 2]) for n in range(10)]
    assert sum(lookup_hits(told, told, modality=True)) == 10 and sum(lookup_hits(told, told)) == 5
    assert letter_hits(train, [asked, replace(asked, answer=1), question(1)]) == [False, True, True]
