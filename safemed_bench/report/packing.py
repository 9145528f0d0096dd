"""All questions, models and conditions as one string that a page can carry: columns, deduplicated, gzip, base64.

Read by templates/run.js:

questions   id, and places in `strings`: modality, type, question; options: lists of such places; target
cells       model, condition, label; marks: a character per question, `ABCD` an answer, `i` unreadable, `t` cut off,
            `e` error, `-` nothing, ` ` not asked; texts: a place in `strings` per question, -1 where no text is carried
strings     every text once
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.types import LETTERS, Record
from ..results.frames import Condition
from ..results.tables import condition_label
from .source import Source

BUDGET = 7_000_000
"""Most characters of the packed records."""
CUT = 240
"""Length to which replies are shortened where there is no room for them whole."""


@dataclass(frozen=True, slots=True)
class Packed:
    """data: what the page carries. note: what was left out for the sake of the page's size, "" for nothing."""

    data: str
    note: str


Keep = Callable[[Condition, str], str | None]
"""(condition, reply) -> what is carried of the reply; None for nothing."""


def pack(source: Source, budget: int = BUDGET) -> Packed:
    """The records, with as much of the replies as fits into `budget` characters."""
    headline = source.numbers.headline

    def main(condition: Condition, text: str) -> str | None:
        return text if condition.name == "clean" or (condition.is_attack and condition.threat == headline) else None

    def short(condition: Condition, text: str) -> str | None:
        return _cut(text) if main(condition, text) is not None else None

    most = f"Only replies under clean and {headline} are carried here"
    steps: tuple[tuple[str, Keep], ...] = (
        ("", lambda _, text: text),
        (most, main),
        (f"{most}, shortened to {CUT} characters", short),
        ("No replies are carried here", lambda _, text: None),
    )
    for note, keep in steps:
        data = encode(columns(source, keep))
        if len(data) <= budget:
            return Packed(
                data, note and f"{note}, for the sake of the page's size; records.jsonl has all of them whole."
            )
    return Packed("", "The run is too large for a page: its questions are in records.jsonl.")


def _cut(text: str) -> str:
    return text if len(text) <= CUT else text[: CUT - 1] + "…"


def encode(value: Mapping[str, Any]) -> str:
    """JSON, gzip without a date, base64: the same value gives the same string."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def columns(source: Source, keep: Keep) -> dict[str, Any]:
    """The table that is packed."""
    strings: dict[str, int] = {}

    def place(text: str) -> int:
        return strings.setdefault(text, len(strings))

    rows = list(source.questions.values())
    questions = {
        "id": [row["id"] for row in rows],
        "modality": [place(str(row.get("modality") or "")) for row in rows],
        "type": [place(str(row.get("question_type") or "")) for row in rows],
        "question": [place(row.get("question") or "") for row in rows],
        "options": [[place(text) for text in row.get("options") or ()] for row in rows],
        "target": _targets(source),
    }
    cells = []
    for verdicts in source.run.verdicts:
        for condition in verdicts.conditions:
            records = source.records.get((verdicts.model, condition.name), {})
            asked = verdicts.asked.get(condition.name, source.questions)
            found = [records.get(id) for id in source.questions]
            cells.append(
                {
                    "model": verdicts.model,
                    "condition": condition.name,
                    "label": condition_label(condition.name),
                    "marks": "".join(_mark(records.get(id)) if id in asked else " " for id in source.questions),
                    "texts": [_text(record, condition, keep, place) for record in found],
                }
            )
    return {"questions": questions, "cells": cells, "strings": list(strings)}


def _targets(source: Source) -> list[int]:
    """The place of the right option of each question; -1 where no record tells."""
    known: dict[str, int] = {}
    for records in source.records.values():
        for id, record in records.items():
            known.setdefault(id, record.target)
    return [known.get(id, -1) for id in source.questions]


def _mark(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.error:
        return "e"
    if record.status != "valid" or record.answer is None:
        return "t" if record.status == "truncated" else "i"
    return LETTERS[record.answer]


def _text(record: Record | None, condition: Condition, keep: Keep, place: Callable[[str], int]) -> int:
    text = None if record is None else record.error or keep(condition, record.text)
    return -1 if text is None else place(text)
