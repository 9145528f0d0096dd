"""The audit, on made-up folders and against the READMEs of the shared data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from test_omnimedvqa import record, write_root

from safemed_bench.core.errors import DataError
from safemed_bench.core.types import MODALITIES
from safemed_bench.datasets.audit import Audit, audit, render


def text(result: Audit) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(render(result))
    return capture.get()


def test_counts_of_a_small_folder(tmp_path: Path) -> None:
    rows = [
        record(0, split="train", image_path="Images/Toy/a.png"),
        record(1, split="test", image_path="Images/Toy/a.png", option_D=None),
        record(2, split="test", modality_type=None, modality="ultrasound", option_C="nothing"),
        record(3, split="test", gt_answer="?"),
        record(4, split="test", modality_type="Thermography"),
        record(5, split="test"),
    ]
    root = write_root(tmp_path, rows)
    (root / "Images/Toy/5.png").write_text("no image")
    (root / "Images/Toy/4.png").write_bytes((root / "Images/Toy/2.png").read_bytes())
    result = audit(root)
    assert (result.records, result.questions, result.images, result.images_found) == (6, 5, 4, 4)
    assert result.by_modality == {"CT": 3, "Ultrasound": 1, "Thermography": 1}
    assert result.by_options == {"4": 4, "3": 1}
    assert result.types_by_modality["CT"] == {"Disease Diagnosis": 3}
    assert result.options_by_modality["CT"] == {"3": 1, "4": 2} and result.options_by_modality["Ultrasound"]["3"] == 0
    assert result.chance == pytest.approx((4 / 4 + 1 / 3) / 5)
    assert (result.repeated_options, result.comma_options, result.modality_key) == (1, 5, 1)
    assert (result.duplicate_images, result.images_broken) == (1, 1)
    assert result.unknown_modalities == {"Thermography": 1} and result.auto == "record"
    scheme = result.scheme("record")
    assert (scheme.shared_by_path, scheme.shared_by_content) == (1, 1)
    assert result.scheme("image_disjoint").shared_by_content == 0
    messages = " | ".join(map(str, result.problems))
    assert not result.usable and len(result.problems) == 3
    assert "none of the options" in messages and "5.png" in messages and "Thermography" in messages
    assert json.loads(json.dumps(result.to_dict()))["questions"] == 5
    shown = text(result)
    assert "3 problems" in shown and "5.png" in shown


def test_a_clean_folder_says_so(tmp_path: Path) -> None:
    result = audit(write_root(tmp_path, [record(n) for n in range(40)]))
    assert result.usable and "No broken file, record or image." in text(result)


def test_a_scheme_that_leaves_questions_out_says_how_many(tmp_path: Path) -> None:
    rows = [record(n, split=("train", "test")[n % 2], medr1_split=(None, "test")[n % 2]) for n in range(40)]
    result = audit(write_root(tmp_path, rows))
    assert (result.scheme("medr1").left_out, result.scheme("record").left_out) == (20, 0)
    assert result.usable, "a scheme nobody asked for is no fault of the data"
    assert "left out" in text(result)


def test_a_broken_file_is_a_problem_and_the_rest_is_counted(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(1)])
    (root / "QA_information/Open-access/Bad.json").write_text('[{"dataset": ')
    result = audit(root)
    assert result.questions == 1 and "Bad.json:1:" in str(result.problems[0])


def test_many_problems_are_cut_on_the_terminal_only(tmp_path: Path) -> None:
    root = write_root(tmp_path, [record(n) for n in range(30)])
    for n in range(25):
        (root / f"Images/Toy/{n}.png").unlink()
    result = audit(root)
    assert len(result.to_dict()["problems"]) == 25
    assert "15 more" in text(result) and len(text(result).splitlines()) < 60


def test_absent_images_are_one_line(tmp_path: Path) -> None:
    result = audit(write_root(tmp_path, [record(n) for n in range(30)], images=False))
    assert result.images_absent and not result.problems and not result.usable
    assert "No image is there: none of 30" in text(result)


def test_nothing_to_audit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions found"):
        audit(tmp_path)


def test_mini_agrees_with_its_readme(shared_data: Path) -> None:
    seen = []
    result = audit(shared_data / "omnimed_mini", progress=lambda done, total: seen.append((done, total)))
    assert (result.records, result.questions, result.images) == (3338, 3338, 2442)
    assert result.usable and result.auto == "file" and seen[-1] == (2442, 2442)
    assert result.by_source == {
        "BUSI": 812,
        "OCT & X-Ray 2017": 512,
        "CoronaHack": 510,
        "Blood Cell": 502,
        "ISBI2016": 449,
        "Brain MRI Tumor Detection": 328,
        "Chest X-Ray PA": 225,
    }
    assert result.types_by_modality["Ultrasound"] == {
        "Disease Diagnosis": 488,
        "Anatomy Identification": 158,
        "Modality Recognition": 166,
    }
    assert result.options_by_modality["MRI"] == {"2": 196, "3": 0, "4": 132}
    assert result.scheme("medr1").left_out == 812 + 328, "the derived questions of BUSI and Brain MRI"
    assert result.images_by_modality["X-Ray"] == 999 and result.duplicate_images == 999 - 776
    scheme = result.scheme("file")
    assert scheme.questions["test"] == 1241 and scheme.questions["train"] + scheme.questions["validation"] == 2097
    assert scheme.shared_by_content == 0
    assert scheme.blind is not None and scheme.blind > 0.75


@pytest.fixture(scope="module")
def public(shared_data: Path) -> Audit:
    return audit(shared_data / "omnimedvqa_questions")


def test_public_questions_agree_with_their_readme(public: Audit) -> None:
    assert public.layout == "text" and public.images_absent and not public.problems
    assert (public.questions, public.images, public.repeated_options) == (70888, 64426, 44)
    assert public.by_modality == dict(zip(MODALITIES, (15809, 13769, 7916, 10991, 6679, 5398, 4646, 5680), strict=True))
    assert public.images_by_modality == dict(
        zip(MODALITIES, (14430, 13503, 6251, 10855, 5897, 5034, 3791, 4665), strict=True)
    )
    assert public.by_type == {
        "Disease Diagnosis": 37279,
        "Anatomy Identification": 16448,
        "Modality Recognition": 11565,
        "Other Biological Attributes": 3498,
        "Lesion Grading": 2098,
    }
    assert public.by_options == {"4": 63974, "2": 6792, "3": 122}
    for total, crossed in (
        (public.by_type, public.types_by_modality),
        (public.by_options, public.options_by_modality),
    ):
        assert {row: sum(held.values()) for row, held in crossed.items()} == public.by_modality
        assert {name: sum(held[name] for held in crossed.values()) for name in total} == total
    printed = text(public)
    row = next(line for line in printed.splitlines() if "Fundus" in line and "122" in line)
    assert [w.strip() for w in row.strip("│ ").split("│")][1:] == [
        *("769", "439", "1,190", "1,170", "1,830"),
        *("439", "122", "4,837"),
    ]
    assert len(public.by_source) == 42 and public.by_source["RadImageNet"] == 38589 and public.by_source["MIAS"] == 142


def test_public_medr1_split_and_its_leak(public: Audit) -> None:
    medr1 = public.scheme("medr1")
    test = {name: held["test"] for name, held in medr1.by_modality.items()}
    assert test == dict(zip(MODALITIES, (3241, 6370, 1615, 2074, 1306, 1098, 848, 1110), strict=True))
    assert medr1.questions["test"] == 17662 and medr1.questions["train"] + medr1.questions["validation"] == 53226
    assert medr1.shared_by_path == medr1.shared_by_content == 1978
    assert public.scheme("image_disjoint").shared_by_content == 0


def test_public_blind_prior_and_its_rebalanced_rest(public: Audit) -> None:
    medr1, rebalanced = public.scheme("medr1"), public.scheme("rebalanced")
    assert medr1.blind is not None and rebalanced.blind is not None
    assert medr1.blind > 0.95 and 0.25 < medr1.chance < 0.28
    assert 0.45 < rebalanced.blind < 0.6
    assert medr1.blind_told is not None and medr1.blind_told >= medr1.blind
    assert medr1.blind_letter is not None and medr1.blind_letter < 0.3
