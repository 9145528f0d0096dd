"""Images made elsewhere as an attack: what is taken, what is refused, and that nothing is believed unchecked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_run import PGD, SIDE, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.attacks.supplied import open_supplied
from safemed_bench.core.errors import DataError, SuiteError
from safemed_bench.run import artefacts
from safemed_bench.suite import load_suite

COUNT = 16
CELL = "external@linf:8/255"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory):
    """A run of our own PGD: its data set, folder, records and adversarial images by question id."""
    folder = tmp_path_factory.mktemp("attacked")
    dataset = toy_dataset(folder / "images", COUNT)
    made = toy_plan(dataset, conditions=("clean", PGD))
    toy_execute(made, folder / "run")
    found = [r for r in records(folder / "run") if r["artefact"]]
    images = {}
    for record, question in zip(found, dataset.questions, strict=True):
        assert record["question_id"] == question.id
        canvas = np.asarray(Image.open(question.image).convert("RGB")).transpose(2, 0, 1)
        images[question.id] = artefacts.load(folder / "run", record["artefact"], canvas).astype(np.uint8)
    assert sum(r["clean_correct"] and not r["correct"] for r in found) >= 1
    return dataset, folder / "run", found, images


def run_external(dataset, path: Path, output: Path):
    made = toy_plan(dataset, conditions=("clean", {"attack": "external", "params": {"path": str(path)}}))
    toy_execute(made, output)
    return made, [r for r in records(output) if r["condition"] == CELL]


def pictures(folder: Path, images: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for name, image in images.items():
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{name}.png")
    return folder


def stacked(path: Path, images: dict[str, np.ndarray], *, last: bool = False) -> Path:
    stack = np.stack([*images.values()])
    np.savez(path, question_ids=np.array([*images]), images=stack.transpose(0, 2, 3, 1) if last else stack)
    return path


@pytest.mark.parametrize("form", ["artefacts", "pictures", "npz", "npz, channels last"])
def test_our_own_images_handed_in_have_our_own_verdicts(attacked, tmp_path: Path, form: str) -> None:
    dataset, run, ours, images = attacked
    path = {
        "artefacts": lambda: (run / ours[0]["artefact"]).parent,
        "pictures": lambda: pictures(tmp_path / "pictures", images),
        "npz": lambda: stacked(tmp_path / "images.npz", images),
        "npz, channels last": lambda: stacked(tmp_path / "images.npz", images, last=True),
    }[form]()
    made, found = run_external(dataset, path, tmp_path / "run")
    assert not made.notes and len(found) == COUNT
    for mine, theirs in zip(ours, found, strict=True):
        for name in ("question_id", "answer", "correct", "clean_correct", "linf", "l2", "error"):
            assert theirs[name] == mine[name], name
        assert theirs["steps"] == 0 and theirs["extra"] == ({"verdicts": 1} if mine["linf"] else {})


def test_what_cannot_be_believed_is_an_error_that_says_why(attacked, tmp_path: Path) -> None:
    dataset, _, ours, images = attacked
    right = [r["question_id"] for r in ours if r["clean_correct"]]
    far, small, missing, fine = right[:4]
    changed = dict(images)
    far_image = changed[far].copy()
    far_image[0, 0, 0] = 255 - far_image[0, 0, 0] if abs(255 - 2 * int(far_image[0, 0, 0])) > 40 else 255
    changed[far], changed[small] = far_image, images[small][:, : SIDE // 2]
    del changed[missing]
    made, found = run_external(dataset, pictures(tmp_path / "pictures", changed), tmp_path / "run")
    assert [note for note in made.notes if f"no image for 1 of {COUNT} questions: {missing}" in note]
    told = {r["question_id"]: r for r in found}
    assert "leaves the linf:8/255 ball" in told[far]["error"]
    assert f"shape (3, {SIDE // 2}, {SIDE})" in told[small]["error"]
    assert f"no image for question {missing}" in told[missing]["error"]
    assert {q for q, r in told.items() if r["error"]} == {far, small, missing} and not told[fine]["error"]
    assert all(told[q]["correct"] is None and told[q]["answer"] is None for q in (far, small, missing))


def test_a_question_answered_wrongly_needs_no_image(attacked, tmp_path: Path) -> None:
    dataset, _, ours, images = attacked
    right = {r["question_id"] for r in ours if r["clean_correct"]}
    assert len(right) < COUNT
    some = {name: image for name, image in images.items() if name in right}
    _, found = run_external(dataset, stacked(tmp_path / "some.npz", some), tmp_path / "run")
    assert not any(r["error"] for r in found)
    assert [r["correct"] for r in found] == [r["correct"] for r in ours]


def test_other_images_in_the_same_place_are_other_work(attacked, tmp_path: Path) -> None:
    dataset, _, _, images = attacked
    condition = {"attack": "external", "params": {"path": str(tmp_path / "images.npz")}}
    keys = []
    for level in (0, 0, 1):
        images = {name: image ^ np.uint8(level) for name, image in images.items()}
        stacked(tmp_path / "images.npz", images)
        keys.append([unit.key for unit in toy_plan(dataset, conditions=(condition,)).units])
    assert keys[0] == keys[1] and not {*keys[1]} & {*keys[2]}


def test_differences_that_leave_the_range_are_named(tmp_path: Path) -> None:
    delta = np.full((1, 3, SIDE, SIDE), 3, np.int8)
    np.savez(tmp_path / "delta.npz", question_ids=np.array(["a/b c"]), delta=delta)
    supplied = open_supplied(tmp_path / "delta.npz")
    assert (supplied.image("a/b c", np.full((3, SIDE, SIDE), 9, np.uint8)) == 12).all()
    with pytest.raises(DataError, match="levels 256 to 256 leave the range"):
        supplied.image("a/b c", np.full((3, SIDE, SIDE), 253, np.uint8))


def test_an_id_that_is_no_file_name(tmp_path: Path) -> None:
    black = np.zeros((3, SIDE, SIDE), np.uint8)
    supplied = open_supplied(pictures(tmp_path / "pictures", {"scan_7_1": black, "plain.v2": black}))
    assert "scan:7 1" in supplied and "plain.v2" in supplied and "scan" not in supplied


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such folder or .npz file"),
        (lambda path: path.mkdir(), "holds no picture"),
        (lambda path: path.with_suffix(".npz").write_bytes(b"PK no"), "needs `question_ids` and `images` or `delta`"),
        (lambda path: np.savez(path, question_ids=["a"]), "needs `question_ids` and `images` or `delta`"),
        (
            lambda path: np.savez(path, question_ids=["a"], images=np.zeros((1, 3, 4, 4))),
            r"must be .N, 3, H, W., uint8 levels 0 to 255; it is float64",
        ),
        (
            lambda path: np.savez(path, question_ids=["a", "b"], images=np.zeros((1, 3, 4, 4), np.uint8)),
            "2 question_ids for 1 images",
        ),
        (
            lambda path: np.savez(path, question_ids=["a", "a"], images=np.zeros((2, 3, 4, 4), np.uint8)),
            "two images for question a",
        ),
    ],
)
def test_what_cannot_be_used_is_said_before_the_run(tmp_path: Path, make, words: str) -> None:
    place = tmp_path / "given"
    make(place)
    path = place if place.is_dir() or not place.with_suffix(".npz").exists() else place.with_suffix(".npz")
    with pytest.raises(DataError, match=words):
        open_supplied(path)
    (tmp_path / "suite.yaml").write_text(
        f"models: [{{name: m, path: /weights}}]\nconditions:\n  - attack: external\n    params: {{path: {path}}}\n"
    )
    with pytest.raises(SuiteError) as caught:
        load_suite(tmp_path / "suite.yaml", (), {})
    (problem,) = caught.value.problems
    assert problem.key == "conditions.0.params.path" and problem.line == 4


def test_a_path_is_needed(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("models: [{name: m, path: /weights}]\nconditions: [{attack: external}]\n")
    with pytest.raises(SuiteError, match="needs `params"):
        load_suite(tmp_path / "suite.yaml", (), {})
