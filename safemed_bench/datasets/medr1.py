"""Med-R1's split files: JSON lists of {"image", "problem", "solution"}, by modality and by question type.

Layout of github.com/Yuxiang-Lai117/Med-R1: Splits/modality/{train,test}/<modality>_<split>.json and
Splits/question_type/{train,test}/<type>_<split>.json, the same questions twice. A problem reads
"What ...? A) x, B) y, C) z, D) w", a solution "<answer> A </answer>".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..core.errors import DataError, Problem
from ..core.types import LETTERS

_SOLUTION = re.compile(r"<answer>\s*([A-D])\b[^<]*</answer>", re.IGNORECASE)
_FILE = re.compile(r"(?P<name>.+)_(?P<split>train|test|validation|val)$")


class Row(Protocol):
    @property
    def file(self) -> str: ...

    @property
    def record(self) -> Mapping[str, Any]: ...

    def problem(self, message: str) -> Problem: ...


R = TypeVar("R", bound=Row)


def parse_problem(text: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of a problem text. ValueError where it has no `A)` followed by `, B)`.

    The letters are found in their order, and a letter after the first counts only behind a comma: options may hold
    commas, brackets and one another's text.
    """
    second = re.search(r",\s+B\)\s", text)
    first = None if second is None else _last(re.finditer(r"(?:^|\s)A\)\s", text[: second.start()]))
    if first is None or second is None:
        raise ValueError("no options found: expected `... A) first, B) second`")
    marks = [(first.start(), first.end()), (second.start(), second.end())]
    for letter in LETTERS[2:]:
        found = re.compile(rf",\s+{letter}\)\s").search(text, marks[-1][1])
        if found is None:
            break
        marks.append((found.start(), found.end()))
    ends = [start for start, _ in marks[1:]] + [len(text)]
    options = tuple(text[start:end].strip() for (_, start), end in zip(marks, ends, strict=True))
    return text[: marks[0][0]].strip(), options


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for match in matches:
        last = match
    return last


def parse_solution(text: str) -> str:
    """The letter between the answer tags, upper case. ValueError where there is none."""
    match = _SOLUTION.search(text)
    if match is None:
        raise ValueError(f"no letter in the solution {text!r}: expected `<answer> A </answer>`")
    return match.group(1).upper()


def split_files(root: Path) -> list[Path]:
    """Med-R1's modality files below `root` (or its question_type files, or any such lists in `root` itself)."""
    for folder in (root / "Splits" / "modality", root / "modality", root / "Splits", root):
        files = sorted({*folder.glob("*/*.json"), *folder.glob("*.json")}) if folder.is_dir() else []
        if files := [file for file in files if _FILE.match(file.stem)]:
            return files
    return []


def side_files(root: Path) -> list[Path]:
    """The files that are looked into beside those with the questions: marks of the split, and question types."""
    folders = ("Splits/modality", "Splits/question_type", "question_type")
    return sorted(file for folder in folders for file in (root / folder).glob("**/*.json"))


def to_omnimed(root: Path, rows: Iterable[R], problems: list[Problem]) -> Iterator[tuple[R, dict[str, Any]]]:
    """Med-R1's records in OmniMedVQA's keys; the question type is looked up in the question_type files."""
    types = _question_types(root)
    for row in rows:
        problem, image = str(row.record.get("problem", "")), str(row.record.get("image", ""))
        try:
            question, options = parse_problem(problem)
            letter = parse_solution(str(row.record.get("solution", "")))
        except ValueError as error:
            problems.append(row.problem(str(error)))
            continue
        name, split = _name_and_split(Path(row.file))
        record: dict[str, Any] = {f"option_{x}": o for x, o in zip(LETTERS, options, strict=False)}
        yield (
            row,
            record
            | {
                "question": question,
                "image_path": image,
                "gt_letter": letter,
                "modality_type": name,
                "question_type": types.get((image_key(image), problem)),
                "dataset": _source(image),
                "medr1_split": split,
            },
        )


def mark_splits(root: Path, rows: Iterable[R]) -> Iterator[tuple[R, Mapping[str, Any]]]:
    """OmniMedVQA's records with Med-R1's split added, where its `Splits` folder lies in the same root."""
    held = {}
    if (root / "Splits" / "modality").is_dir():
        for file in split_files(root):
            for record in _records(file):
                held[image_key(str(record.get("image"))), _question(record)] = _name_and_split(file)[1]
    for row in rows:
        key = (image_key(str(row.record.get("image_path"))), str(row.record.get("question", "")).strip())
        yield row, {**row.record, "medr1_split": held[key]} if key in held else row.record


def _question_types(root: Path) -> dict[tuple[str, str], str]:
    types = {}
    for folder in (root / "Splits" / "question_type", root / "question_type"):
        for file in sorted(folder.glob("*/*.json")):
            for record in _records(file):
                types[image_key(str(record.get("image"))), str(record.get("problem"))] = _name_and_split(file)[0]
    return types


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}") from error
    return [r for r in value if isinstance(r, dict)] if isinstance(value, list) else []


def _question(record: Mapping[str, Any]) -> str:
    try:
        return parse_problem(str(record.get("problem", "")))[0]
    except ValueError:
        return ""


def _name_and_split(file: Path) -> tuple[str, str]:
    match = _FILE.match(file.stem)
    return (match["name"], match["split"]) if match else (file.stem, file.parent.name)


def image_key(image: str) -> str:
    """An image's path below the root of the set; another machine's absolute path is cut before `Images/`."""
    path = Path(image)
    if path.is_absolute() and not path.exists() and "Images" in path.parts:
        return "/".join(path.parts[path.parts.index("Images") :])
    return path.as_posix()


def _source(image: str) -> str:
    parts = Path(image_key(image)).parts
    return parts[1] if len(parts) > 2 and parts[0] == "Images" else "unknown"
