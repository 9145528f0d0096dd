"""Reading: layouts, odd records, images, and `load`."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.core.types import LETTERS, MODALITIES
from safemed_bench.datasets import load, medr1, omnimedvqa
from safemed_bench.datasets.base import fingerprint
from safemed_bench.datasets.images import inspect_files
from safemed_bench.datasets.modalities import normalise
from safemed_bench.run.provenance import describe
from safemed_bench.suite.schema import DiagnosticsSpec


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A record of the official layout; a value None takes the key away."""
    row = {
        "dataset": "Toy",
        "question_id": f"Toy_{number:04d}",
        "question_type": "Disease Diagnosis",
        "question": "What is shown?",
        "gt_answer": "a cyst, simple",
        "image_path": f"Images/Toy/{number}.png",
        "option_A": "nothing",
        "option_B": "a cyst, simple",
        "option_C": "a stone",
        "option_D": "a scar",
        "modality_type": "CT(Computed Tomography)",
    } | changes
    return {k: v for k, v in row.items() if v is not None}


def write_root(root: Path, records: list[dict[str, Any]], *, images: bool = True) -> Path:
    folder = root / "QA_information" / "Open-access"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Toy.json").write_text(json.dumps(records, indent=1))
    for n, row in enumerate(records if images else []):
        path = root / row.get("image_path", f"Images/Toy/none{n}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(n).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def spec(root: Path | None, **changes: Any) -> SimpleNamespace:
    plain = dict(name="auto", split="test", scheme="auto", per_modality="all", resolution=32, fit="pad", phantom={})
    return SimpleNamespace(**(plain | {"root": None if root is None else str(root)} | changes))


@pytest.mark.parametrize(
    ("spelling", "modality"),
    [
        ("CT(Computed Tomography)", "CT"),
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("Magnetic Resonance Imaging (MRI)", "MRI"),
        ("ultrasound", "Ultrasound"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("Optical Coherence Tomography (OCT)", "OCT"),
        ("Microscopy Images", "Microscopy"),
        ("X-Ray", "X-Ray"),
        ("x_ray", "X-Ray"),
        ("Fundus Photography", "Fundus Photography"),
        ("Dermoscopy", "Dermoscopy"),
        ("Thermography", "Thermography"),
    ],
)
def test_modalities_are_normalised(spelling: str, modality: str) -> None:
    assert normalise(spelling) == modality


def test_every_modality_is_its_own_normal_form() -> None:
    assert [normalise(m) for m in MODALITIES] == list(MODALITIES)
    assert [normalise(m.lower()) for m in MODALITIES] == list(MODALITIES)


def test_official_record(tmp_path: Path) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(1)], images=False))
    question = contents.entries[0].question
    assert contents.layout == "omnimedvqa" and not contents.problems
    assert question.id == "Toy_0001" and question.modality == "CT" and question.source == "Toy"
    assert question.options == ("nothing", "a cyst, simple", "a stone", "a scar") and question.answer == 1
    assert question.image == str(tmp_path / "Images/Toy/1.png")


def test_both_modality_keys_and_restricted_access(tmp_path: Path) -> None:
    write_root(tmp_path, [record(1, modality_type=None, modality="ultrasound")], images=False)
    other = tmp_path / "QA_information" / "Restricted-access"
    other.mkdir()
    (other / "More.json").write_text(json.dumps([record(2, option_C=None, option_D=None)]))
    first, second = omnimedvqa.read(tmp_path).entries
    assert first.question.modality == "Ultrasound" and first.modality_key == "modality"
    assert len(second.question.options) == 2


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"gt_answer": " A CYST, simple "}, 1),
        ({"gt_answer": None, "gt_letter": "D"}, 3),
        ({"option_A": "a cyst, simple", "gt_letter": "B"}, 1),
        ({"option_A": "A Cyst, Simple"}, 1),
        ({"option_C": "a scar"}, 1),
        ({"option_A": None}, 0),
        ({"option_A": " "}, 0),
        ({"option_A": None, "gt_answer": None, "gt_letter": "B"}, 0),
    ],
)
def test_the_answer_is_found(tmp_path: Path, changes: dict[str, Any], answer: int) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(1, **changes)], images=False))
    assert not contents.problems
    assert contents.entries[0].question.answer == answer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gt_answer": "a tumour"}, "none of the options"),
        ({"gt_answer": None}, "no answer"),
        ({"option_A": "a cyst, simple"}, "several of the options"),
        ({"question": "  "}, "no question"),
        ({"image_path": None}, "no image_path"),
        ({"option_B": None, "option_C": None, "option_D": None}, "1 options"),
    ],
)
def test_a_record_that_is_no_question_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(1), record(2, **changes)], images=False))
    assert [e.question.id for e in contents.entries] == ["Toy_0001"] and contents.records == 2
    (problem,) = contents.problems
    assert words in problem.message and problem.key == "Toy_0002" and problem.file.endswith("Toy.json")


def test_an_unknown_modality_stays_and_is_told(tmp_path: Path) -> None:
    contents = omnimedvqa.read(write_root(tmp_path, [record(1, modality_type="Thermography")], images=False))
    assert contents.entries[0].question.modality == "Thermography"
    assert "Thermography" in contents.problems[0].message


def test_ids_are_made_distinct_whatever_the_order(tmp_path: Path) -> None:
    rows = [record(1), record(2, question_id="Toy_0001"), record(3, question_id=None), record(4)]
    names = {}
    for turn, order in enumerate((rows, rows[::-1])):
        root = write_root(tmp_path / str(turn), order, images=False)
        names[turn] = {e.question.image[-5]: e.question.id for e in omnimedvqa.read(root).entries}
    assert names[0] == names[1] and len(set(names[0].values())) == 4
    assert names[0]["4"] == "Toy_0004" and names[0]["1"].startswith("Toy_0001#")


@pytest.mark.parametrize("cut", [25, 40, 180, -3])
def test_truncated_json_names_file_line_and_column(tmp_path: Path, cut: int) -> None:
    root = write_root(tmp_path, [record(1), record(2)], images=False)
    file = root / "QA_information" / "Open-access" / "Toy.json"
    file.write_text(file.read_text()[:cut])
    with pytest.raises(DataError, match=r"Toy\.json:\d+:\d+ .*truncated") as caught:
        omnimedvqa.read(root)
    assert caught.value.exit_code == 2
    (problem,) = omnimedvqa.read(root, strict=False).problems
    assert problem.line > 0 and problem.column > 0


def test_a_file_that_is_no_list_and_one_that_is_no_text(tmp_path: Path) -> None:
    file = write_root(tmp_path, [record(1)], images=False) / "QA_information" / "Open-access" / "Toy.json"
    file.write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a list of records, found a mapping"):
        omnimedvqa.read(tmp_path)
    file.write_bytes(b"[\n\xff\xfe]")
    with pytest.raises(DataError, match="not UTF-8"):
        omnimedvqa.read(tmp_path)


def test_a_missing_or_empty_root_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*QA_information/Open-access"):
        omnimedvqa.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no questions found"):
        omnimedvqa.read(tmp_path)


def test_text_folder(tmp_path: Path) -> None:
    (tmp_path / "ct.jsonl.gz").write_bytes(gzip.compress(json.dumps(record(1)).encode() + b"\n\n"))
    (tmp_path / "mr.jsonl").write_text(json.dumps(record(2)) + "\n{\n")
    with pytest.raises(DataError, match=r"mr\.jsonl:2:"):
        omnimedvqa.read(tmp_path)
    contents = omnimedvqa.read(tmp_path, strict=False)
    assert contents.layout == "text" and len(contents.entries) == 2
    (tmp_path / "ct.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"ct\.jsonl\.gz"):
        omnimedvqa.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("What is it? A) x, B) y, C) z, D) w", "What is it?", ("x", "y", "z", "w")),
        ("Is it so? A) Yes, B) No", "Is it so?", ("Yes", "No")),
        ("Which? A) No, fine, B) Yes, a mass, C) a, b, and c", "Which?", ("No, fine", "Yes, a mass", "a, b, and c")),
        ("Type (A) or B)? A) COPD (A), B) T (B) cell", "Type (A) or B)?", ("COPD (A)", "T (B) cell")),
        ("Same? A) a, B) a, C) a", "Same?", ("a", "a", "a")),
    ],
)  # fmt: skip
def test_medr1_problem(text: str, question: str, options: tuple[str, ...]) -> None:
    assert medr1.parse_problem(text) == (question, options)


@pytest.mark.parametrize("text", ["", "What is it?", "What? A) x", "What? B) x, A) y"])
def test_medr1_problem_without_options(text: str) -> None:
    with pytest.raises(ValueError, match="no options"):
        medr1.parse_problem(text)


def medr1_text(row: dict[str, Any]) -> str:
    options = [f"{x}) {row[f'option_{x}']}" for x in LETTERS if f"option_{x}" in row]
    return f"{row['question']} {', '.join(options)}"


def test_medr1_text_of_every_public_question_reads_back(shared_data: Path) -> None:
    rows = [
        json.loads(line)
        for file in sorted((shared_data / "omnimedvqa_questions").glob("*.gz"))
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    assert len(rows) == 70888
    for row in rows:
        options = tuple(row[f"option_{x}"] for x in LETTERS if f"option_{x}" in row)
        question, found = medr1.parse_problem(medr1_text(row))
        assert (question, found) == (row["question"].strip(), tuple(o.strip() for o in options)), row


def write_splits(root: Path, rows: list[dict[str, Any]]) -> None:
    for kind, names in (("modality", ("CT(Computed Tomography)",) * 2), ("question_type", ("Disease Diagnosis",) * 2)):
        for split, name, row in zip(("train", "test"), names, rows, strict=True):
            folder = root / "Splits" / kind / split
            folder.mkdir(parents=True)
            item = {"image": row["image_path"], "problem": medr1_text(row), "solution": "<answer> B </answer>"}
            (folder / f"{name}_{split}.json").write_text(json.dumps([item]))


def test_medr1_layout_alone_and_beside_the_official_one(tmp_path: Path) -> None:
    rows = [record(1), record(2, question="What else?")]
    write_splits(tmp_path, rows)
    contents = omnimedvqa.read(tmp_path)
    first, second = (entry.question for entry in contents.entries)
    assert contents.layout == "medr1" and not contents.problems
    assert {e.medr1 for e in contents.entries} == {"train", "test"}
    assert first.question_type == second.question_type == "Disease Diagnosis" and first.source == "Toy"
    assert first.modality == "CT" and first.answer == 1 and first.id.startswith("Toy#")
    marks = {e.question.id: e.medr1 for e in omnimedvqa.read(write_root(tmp_path, rows, images=False)).entries}
    assert marks == {"Toy_0001": "train", "Toy_0002": "test"}


def test_medr1_bad_solution_is_named(tmp_path: Path) -> None:
    item = {"image": "Images/a.png", "problem": "What? A) x, B) y", "solution": "A"}
    outside = item | {"solution": "<answer> D </answer>"}
    (tmp_path / "CT_test.json").write_text(json.dumps([item, outside]))
    contents = omnimedvqa.read(tmp_path)
    assert not contents.entries and len(contents.problems) == 2
    assert "no letter in the solution" in contents.problems[0].message


def test_load_names_bad_images_and_keeps_their_questions(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(n, split="test") for n in range(5)])
    (root / "Images/Toy/1.png").unlink()
    broken = root / "Images/Toy/2.png"
    broken.write_bytes(broken.read_bytes()[:120])
    (root / "Images/Toy/3.png").write_text("no image")
    data = load(spec(root))
    errors = {q.id[-1]: q.image_error for q in data.questions}
    assert sorted(k for k, v in errors.items() if v) == ["1", "2", "3"]
    assert "not found" in errors["1"] and "cannot be read" in errors["2"] and "cannot be read" in errors["3"]
    assert sorted(Path(p.file).name for p in data.problems) == ["1.png", "2.png", "3.png"]
    assert {q.id[-1] for q in data.questions if not q.image_sha256} == {"1"}
    assert data.stamp == f"OmniMedVQA at {tmp_path.name}, split test (record)"
    assert load(spec(root)) == data, "the cache gives the same"


def test_a_changed_image_is_seen_past_the_cache(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(1, split="test")])
    before = load(spec(root))
    Image.new("RGB", (4, 4)).save(root / "Images/Toy/1.png")
    after = load(spec(root))
    assert before.fingerprint != after.fingerprint
    cache = tmp_path / "cache.json"
    cache.write_text("[1, 2")
    path = str(root / "Images/Toy/1.png")
    assert inspect_files([path], cache=cache)[path].sha256 == after.questions[0].image_sha256
    assert path in json.loads(cache.read_text())


def test_load_refuses_what_cannot_be_run(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(1, split="test")], images=False)
    with pytest.raises(DataError, match="none of 1 images is there"):
        load(spec(root))
    with pytest.raises(DataError, match="no question in split 'train'"):
        load(spec(root, split="train"))
    with pytest.raises(DataError, match=r"data\.root"):
        load(spec(None, name="omnimedvqa"))
    with pytest.raises(DataError, match="data root not found"):
        load(spec(tmp_path / "gone"))
    with pytest.raises(UsageError, match="omnimedvqa"):
        load(spec(root, name="omnimedvqq"))
    with pytest.raises(UsageError, match="image_disjoint"):
        load(spec(root, scheme="image_disjoin"))


def test_load_filters_before_it_selects(tmp_path: Path) -> None:
    rows = [record(n, split="test", modality_type=("X-Ray", "ultrasound")[n % 2]) for n in range(8)]
    root = write_root(tmp_path, rows)
    data = load(spec(root, per_modality=3, filter={"modality": ("x-ray",)}))
    assert [q.modality for q in data.questions] == ["X-Ray"] * 3
    with pytest.raises(DataError, match=r"data\.filter"):
        load(spec(root, filter={"source": ("Other",)}))


def test_fingerprint_depends_on_content_not_on_order(tmp_path: Path) -> None:
    data = load(spec(write_root(tmp_path, [record(n, split="test") for n in range(3)])))
    assert fingerprint(data.questions[::-1]) == data.fingerprint
    assert fingerprint(data.questions[:2]) != data.fingerprint


def test_text_prior_is_learnt_on_train_and_changes_no_fingerprint(tmp_path: Path) -> None:
    rows = [record(n, split="train", option_A="a stone", option_C="nothing") for n in range(6)]
    rows += [record(6, split="test"), record(7, split="test", gt_answer="a scar")]
    root = write_root(tmp_path, rows)
    data = load(spec(root))
    assert data.text_prior == {"Toy_0006": True, "Toy_0007": False}
    assert data.fingerprint == fingerprint(data.questions)
    for n in range(6):
        (root / f"Images/Toy/{n}.png").unlink()
    assert load(spec(root)).text_prior == data.text_prior, "no train image is looked at"
    assert load(spec(root, per_modality=1)).text_prior.keys() < data.text_prior.keys()


def test_no_text_prior_without_a_train_split_of_its_own(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(n, split="test") for n in range(3)])
    assert load(spec(root)).text_prior == {}
    write_root(root, [record(n, split="train") for n in range(60)])
    assert load(spec(root, split="train")).text_prior == {}, "its own training questions tell nothing"


def test_mini_text_prior_is_that_of_its_audit(shared_data: Path) -> None:
    data = load(spec(shared_data / "omnimed_mini"))
    assert data.text_prior.keys() == {q.id for q in data.questions}
    assert 0.75 < sum(data.text_prior.values()) / len(data) < 0.85


def test_run_file_holds_the_text_prior_of_each_question(tmp_path: Path) -> None:
    rows = [record(n, split=("test", "train")[n % 2]) for n in range(8)]
    data = load(spec(write_root(tmp_path, rows)))
    threat = SimpleNamespace(norm="linf", headline=None)
    suite = SimpleNamespace(name="s", title="", threat=threat, diagnostics=DiagnosticsSpec())
    plan = SimpleNamespace(suite=suite, dataset=data, notes=(), cards=(), cells=())
    told = {q["id"]: q["text_prior"] for q in describe(plan)["questions"]}  # type: ignore[arg-type]
    assert told == data.text_prior and set(told.values()) == {True}


def test_to_hf_keeps_text_and_images(tmp_path: Path) -> None:
    rows = [record(1, split="test"), record(2, split="test", option_D=None)]
    root = write_root(tmp_path, rows)
    (root / "Images/Toy/2.png").unlink()
    data = load(spec(root))
    table = data.to_hf()
    assert [row["options"] for row in table] == [list(q.options) for q in data.questions]
    sizes = {row["id"]: row["image"] and row["image"].size for row in table}
    assert sizes == {"Toy_0001": (12, 9), "Toy_0002": None}


def test_phantom_is_the_default_and_is_made_once(tmp_path: Path) -> None:
    asked = spec(None, split="validation", per_modality=4, phantom={"validation": 3})
    data = load(asked, tmp_path)
    assert data.name == "phantom" and "phantom (generated images, seed 0)" in data.stamp
    assert {q.modality for q in data.questions} == set(MODALITIES) and len(data) == 32
    assert not data.problems and {q.split for q in data.questions} == {"validation"}
    hits = load(spec(None, split="validation", phantom={"validation": 60}), tmp_path).text_prior
    assert len(hits) > 200 and sum(hits.values()) / len(hits) < 0.45, "its words give little away"
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert load(asked, tmp_path) == data
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="medr1"):
        load(spec(None, scheme="medr1"), tmp_path)


def test_mini_test_split_loads_whole(shared_data: Path) -> None:
    data = load(spec(shared_data / "omnimed_mini"))
    assert len(data) == 1241 and not data.problems
    assert data.stamp == "OmniMedVQA at omnimed_mini, split test (file)"
    assert all(len(q.image_sha256) == 64 for q in data.questions)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; import safemed_bench.datasets.audit, safemed_bench.datasets.splits, safemed_bench.datasets; "
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
