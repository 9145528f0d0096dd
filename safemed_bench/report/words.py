"""Small words of the report: estimates as text, and which words of a reply changed."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..core.types import LETTERS, Estimate, Record
from ..results.formats import cell_parts
from ..results.tables import Column, Style

_PIECES = re.compile(r"\w+|[^\w\s]|\s+")


def share(estimate: Estimate | None, style: Style = "percent", n: int | None = None) -> str:
    """`95.0 [91.1, 97.3]`, in percent; with its n where that is not the `n` that is told beside it."""
    return " ".join(filter(None, cell_parts(estimate, Column("", style), n)))


def sentence(estimate: Estimate) -> str:
    """`53.0% [46.1, 59.8]`: an estimate in running text; its n stands once for all beside it."""
    value, interval = cell_parts(estimate, Column(""))
    return f"{value}% {interval}" if estimate.n else value


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a reply; `changed` where the other reply has something else."""

    text: str
    changed: bool


def compare(before: str, after: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts cut where they differ, word by word; put together again the pieces are the texts."""
    old, new = _PIECES.findall(before), _PIECES.findall(after)
    first, second = list[Piece](), list[Piece]()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        for pieces, words in ((first, old[a:b]), (second, new[c:d])):
            if words:
                pieces.append(Piece("".join(words), tag != "equal"))
    return first, second


def verdict(record: Record | None, options: list[str] | tuple[str, ...] = ()) -> str:
    """`B) mass`, `no answer could be read`, `cut off`: what a record says was answered."""
    if record is None:
        return "not measured"
    if record.error:
        return "error"
    if record.status != "valid" or record.answer is None:
        return "cut off before an answer" if record.status == "truncated" else "no answer could be read"
    return option(record.answer, options)


def option(index: int, options: list[str] | tuple[str, ...]) -> str:
    """`B) mass`, or `B` where the words of the options are not known."""
    return f"{LETTERS[index]}) {options[index]}" if index < len(options) else LETTERS[index]
