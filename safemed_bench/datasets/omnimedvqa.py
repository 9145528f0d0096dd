"""OmniMedVQA on disk: its official layout, Med-R1's split files, tables of Hugging Face `datasets`, question text."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import DataError, Problem
from ..core.types import LETTERS, Question
from . import arrow, medr1, modalities
from .base import Contents, Entry, Layout

EXPECTED = (
    "QA_information/Open-access/*.json with Images/ (OmniMedVQA), Splits/modality/*/*.json (Med-R1), "
    "*.parquet or a folder of `datasets.save_to_disk`, or *.jsonl[.gz] question text"
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One record of a file, with its place: `line` 0 where the file is one JSON list, `number` counts from 1."""

    file: str
    line: int
    number: int
    record: Mapping[str, Any]

    def problem(self, message: str) -> Problem:
        name = self.record.get("question_id") or f"record {self.number}"
        return Problem(self.file, self.line, 1 if self.line else 0, str(name), message)


@dataclass
class _Reader:
    """Collects rows and problems; with `strict` a file that cannot be parsed ends the reading."""

    strict: bool
    problems: list[Problem] = field(default_factory=list)
    failed: bool = False

    def table(self, path: Path) -> Iterator[_Row]:
        try:
            for number, record in enumerate(arrow.records(path), 1):
                yield _Row(str(path), 0, number, record)
        except DataError as error:
            self._fail(Problem(str(path), 0, 0, "", str(error)))

    def rows(self, path: Path) -> Iterator[_Row]:
        text = _text(path)
        if ".jsonl" in path.name:
            for line, content in enumerate(text.split("\n"), 1):
                if content.strip():
                    yield from self._parse(path, content, line)
        else:
            yield from self._parse(path, text, 0)

    def _parse(self, path: Path, text: str, line: int) -> Iterator[_Row]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            place = (line or error.lineno, error.colno)
            return self._fail(Problem(str(path), *place, "", f"not valid JSON: {error.msg}{_cut_off(text, error)}"))
        records = [value] if line else value
        if not isinstance(records, list):
            return self._fail(Problem(str(path), 1, 1, "", f"expected a list of records, found {_kind(value)}"))
        for number, record in enumerate(records, line or 1):
            if isinstance(record, dict):
                yield _Row(str(path), line, number, record)
            else:
                self.problems.append(
                    Problem(str(path), line, 0, f"record {number}", f"expected a mapping, found {_kind(record)}")
                )

    def _fail(self, problem: Problem) -> None:
        self.failed = True
        if self.strict:
            raise DataError(str(problem))
        self.problems.append(problem)


def read(root: str | Path, *, strict: bool = True) -> Contents:
    """Read every question below `root`, whichever of the four layouts it has.

    The files are parsed once: what they hold is kept as a memory-mapped `datasets.Dataset` in the cache folder until
    one of them changes. With `strict` a file that cannot be parsed raises DataError with its line and column; otherwise
    it is a Problem. A record that makes no question (no options, an answer that is none of them) is always a Problem by
    name.
    """
    root = Path(root).expanduser().absolute()
    layout, files = _find(root)
    kept = arrow.kept_at(root, [*files, *medr1.side_files(root)], code=(medr1, modalities, sys.modules[__name__]))
    if (contents := arrow.recall(kept)) is not None:
        return contents
    reader = _Reader(strict)
    contents = _parse(root, layout, files, reader)
    if not reader.failed:
        arrow.keep(contents, kept)
    return contents


def _parse(root: Path, layout: Layout, files: list[Path], reader: _Reader) -> Contents:
    rows = [row for file in files for row in (reader.table(file) if layout == "table" else reader.rows(file))]
    if layout == "medr1":
        rows = [replace(row, record=record) for row, record in medr1.to_omnimed(root, rows, reader.problems)]
    elif layout == "omnimedvqa":
        rows = [replace(row, record=record) for row, record in medr1.mark_splits(root, rows)]
    entries = tuple(_distinct_ids(_entries(root, rows, reader.problems)))
    names = tuple(str(file.relative_to(root)) for file in files)
    return Contents(root, layout, entries, tuple(reader.problems), names, len(rows))


def _find(root: Path) -> tuple[Layout, list[Path]]:
    if not root.is_dir():
        raise DataError(f"data root not found: {root}. Expected a folder with {EXPECTED}")
    if files := sorted(root.glob("QA_information/*/*.json")):
        return "omnimedvqa", files
    if files := medr1.split_files(root):
        return "medr1", files
    if files := arrow.tables(root):
        return "table", files
    if files := sorted({*root.glob("*.jsonl"), *root.glob("*.jsonl.gz")}):
        return "text", files
    raise DataError(f"no questions found in {root}. Expected {EXPECTED}")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}, near line {line})") from error


def _cut_off(text: str, error: json.JSONDecodeError) -> str:
    at_end = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
    return " (the file ends here: truncated?)" if at_end else ""


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _entries(root: Path, rows: Iterable[_Row], problems: list[Problem]) -> Iterator[Entry]:
    for row in rows:
        try:
            entry = entry_of(root, row.record)
        except ValueError as error:
            problems.append(row.problem(str(error)))
            continue
        if not modalities.is_known(entry.question.modality):
            problems.append(row.problem(f"unknown modality {entry.raw_modality!r}, kept as it is"))
        yield entry


def entry_of(root: Path, record: Mapping[str, Any]) -> Entry:
    """One record as a question. ValueError says what the record lacks."""
    key = next((k for k in ("modality_type", "modality") if record.get(k)), "modality_type")
    for needed in ("question", "image_path"):
        if not str(record.get(needed) or "").strip():
            raise ValueError(f"no {needed}")
    letters = [x for x in LETTERS if str(_given(record, f"option_{x}")).strip()]
    options = tuple(str(record[f"option_{x}"]).strip() for x in letters)
    if len(options) < 2:
        raise ValueError(f"{len(options)} options, at least 2 are needed")
    raw = str(record.get(key) or "unknown")
    image_key = medr1.image_key(str(record["image_path"]))
    question = Question(
        id=str(_given(record, "question_id")),
        image=str(root / image_key),
        image_sha256="",
        question=str(record["question"]).strip(),
        options=options,
        answer=_answer(record, letters, options),
        modality=modalities.normalise(raw),
        question_type=str(record.get("question_type") or "unknown").strip(),
        source=str(record.get("dataset") or "unknown").strip(),
        split="",
    )
    marks = (record.get("medr1_split"), record.get("medr1_modality_split"))
    return Entry(
        question=question,
        image_key=image_key,
        split=split_word(record.get("split")),
        medr1=next((word for word in map(split_word, marks) if word), ""),
        modality_key=key,
        raw_modality=raw,
    )


def _given(record: Mapping[str, Any], key: str) -> Any:
    value = record.get(key)
    return "" if value is None else value


def _answer(record: Mapping[str, Any], letters: list[str], options: tuple[str, ...]) -> int:
    """Index of the true option: by its text; by `gt_letter` where the text is missing or stands twice."""
    text, letter = str(_given(record, "gt_answer")).strip(), str(_given(record, "gt_letter")).strip().upper()
    lettered = letters.index(letter) if letter in letters else None
    if not text:
        if lettered is None:
            raise ValueError("no answer: neither gt_answer nor a gt_letter of an option")
        return lettered
    same = [i for i, option in enumerate(options) if option.casefold() == text.casefold()]
    exact = [i for i in same if options[i] == text]
    if not same:
        raise ValueError(f"the answer {text!r} is none of the options {list(options)}")
    if lettered in same:
        return lettered
    if len(same) == 1 or len(exact) == 1:
        return (exact or same)[0]
    raise ValueError(f"the answer {text!r} is several of the options, and no gt_letter tells which")


def split_word(value: object) -> str:
    """`train`, `validation` or `test`, from the words in use; "" for anything else."""
    word = str(value or "").strip().lower()
    return {"val": "validation", "valid": "validation", "dev": "validation"}.get(
        word, word if word in ("train", "validation", "test") else ""
    )


def _distinct_ids(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Give every question an id of its own: the record's, with a content hash where that is missing or shared."""
    held = list(entries)
    given = Counter(e.question.id for e in held)
    seen: Counter[str] = Counter()
    for entry in held:
        question = entry.question
        name = question.id
        if not name or given[name] > 1:
            name = f"{name or re.sub(r'[^A-Za-z0-9]+', '_', question.source)}#{_digest(entry)}"
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}.{seen[name]}"
        yield entry if name == question.id else replace(entry, question=replace(question, id=name))


def _digest(entry: Entry) -> str:
    """12 hex digits over what is asked of which image."""
    question = entry.question
    content = json.dumps([entry.image_key, question.question, question.options, question.answer], ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
