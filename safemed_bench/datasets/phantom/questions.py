"""Questions about a case, as records of OmniMedVQA's own layout, and the rationale that answers each.

No answer can be told from the words: regions are offered in pairs of one modality, so that neither pair nor member
stands out; a disease question offers the conditions of the region, which are equally frequent; letters are balanced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...core.seeds import derive_seed
from ...core.types import LETTERS
from .catalogue import DISEASES, GRADES, MODALITIES, NORMAL, SIZES, conditions_of
from .design import Slot, slot

WORD_PATTERN = r"[\w-]+|[^\w\s]"
"""How the phantom's text falls into words: `X-ray` is one, a question mark is one."""

WORDINGS = {
    "Modality Recognition": (
        "Which modality does this image show?",
        "What is the modality of this image?",
        "Which modality is shown in this image?",
    ),
    "Anatomy Identification": (
        "Which body part does this image show?",
        "What part of the body is this?",
        "Which body part is shown in this image?",
    ),
    "Disease Diagnosis": (
        "Which disease does this image show?",
        "What disease is shown in this image?",
        "Which condition does this image show?",
    ),
    "Lesion Grading": (
        "Which grade does this image show?",
        "What is the grade of this disease?",
        "What grade is shown in this image?",
    ),
}


def image_path(split: str, index: int) -> str:
    """Path of an image below the data root."""
    name = MODALITIES[index % len(MODALITIES)].name
    return f"Images/Phantom-{name}/{split}/{index:06d}.png"


def questions_for(seed: int, split: str, index: int) -> list[dict[str, Any]]:
    """The three (normal) or four records of image `index`; `facts` holds what is true of it, in words."""
    case = slot(seed, split, index)
    rng = np.random.default_rng(derive_seed("phantom questions", seed, split, index))
    asked = [
        ("Modality Recognition", _modalities(case, rng)),
        ("Anatomy Identification", _regions(case, rng)),
        ("Disease Diagnosis", _conditions(case, rng)),
    ]
    if case.grade is not None:
        asked.append(("Lesion Grading", _grades(case, rng)))
    return [_record(case, split, index, kind, *options, rng) for kind, options in asked]


def _modalities(case: Slot, rng: np.random.Generator) -> tuple[list[str], int]:
    others = [m.name for m in MODALITIES if m != case.modality]
    return _place(case.modality.name, _draw(others, 3, rng), case.modality_position)


def _regions(case: Slot, rng: np.random.Generator) -> tuple[list[str], int]:
    other = MODALITIES[int(rng.choice([i for i, m in enumerate(MODALITIES) if m != case.modality]))]
    rest = [*other.regions, *(r for r in case.modality.regions if r != case.region)]
    return _place(case.region, _draw(rest, 3, rng), case.region_position)


def _conditions(case: Slot, rng: np.random.Generator) -> tuple[list[str], int]:
    rest = [c for c in conditions_of(case.region) if c != case.condition]
    rest = _draw(rest, 3, rng) if case.rival is None else [case.rival]
    return _place(case.condition, rest, case.disease_position)


def _grades(case: Slot, rng: np.random.Generator) -> tuple[list[str], int]:
    assert case.grade is not None
    rest = [g for g in GRADES if g != case.grade]
    return _place(case.grade, _draw(rest, 2, rng), case.grade_position)


def _draw(pool: list[str], n: int, rng: np.random.Generator) -> list[str]:
    return [pool[i] for i in rng.permutation(len(pool))[:n]]


def _place(truth: str, rest: list[str], position: int) -> tuple[list[str], int]:
    return [*rest[:position], truth, *rest[position:]], position


def _record(
    case: Slot, split: str, index: int, kind: str, options: list[str], answer: int, rng: np.random.Generator
) -> dict[str, Any]:
    wordings = WORDINGS[kind]
    return {
        "dataset": f"Phantom-{case.modality.name}",
        "question_id": f"phantom_{split}_{index:06d}_{kind.split()[0].lower()}",
        "question_type": kind,
        "question": wordings[int(rng.integers(len(wordings)))],
        "gt_answer": options[answer],
        "gt_letter": LETTERS[answer],
        "image_path": image_path(split, index),
        **{f"option_{letter}": text for letter, text in zip(LETTERS, options, strict=False)},
        "modality_type": case.modality.on_disk,
        "split": split,
        "facts": {
            "modality": case.modality.name,
            "region": case.region,
            "condition": case.condition,
            "grade": case.grade,
        },
    }


def rationale(facts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Template chain of thought: what is seen, no more of it than the question needs, then answer and letter.

    `this image is CT of the liver with a large bright ring . so abscess B`
    """
    text = f"this image is {facts['modality']}"
    if record["question_type"] != "Modality Recognition":
        text += f" of the {facts['region']}"
    if record["question_type"] in ("Disease Diagnosis", "Lesion Grading"):
        text += f" with {_finding(facts)}"
    return f"{text} . so {record['gt_answer']} {record['gt_letter']}"


def _finding(facts: Mapping[str, Any]) -> str:
    if facts["condition"] == NORMAL:
        return "no sign"
    sign = DISEASES[facts["region"]][facts["condition"]]
    return f"a {SIZES[facts['grade']]} {sign.polarity} {sign.shape}"


def words_of(text: str) -> list[str]:
    """The words of a text, as WORD_PATTERN parts it; case is kept."""
    return re.findall(WORD_PATTERN, text)


def _all_words() -> tuple[str, ...]:
    found = [w for wordings in WORDINGS.values() for text in wordings for w in words_of(text)]
    found += words_of("this image is of the with a no sign . so")
    found += ["bright", "dark", "spot", "ring", "streak", "cluster", *SIZES.values(), *GRADES, *LETTERS]
    for modality in MODALITIES:
        found += [modality.name, *modality.regions]
        found += [c for region in modality.regions for c in conditions_of(region)]
    return tuple(sorted(set(found)))


WORDS: tuple[str, ...] = _all_words()
"""Every word of the phantom's questions, options and rationales."""
