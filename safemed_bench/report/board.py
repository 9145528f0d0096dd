"""Leaderboards as people read them: `README.md` for a browser of the repository, `index.html` as one static page.

Both are made from the entries' JSON files alone; the same entries give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.journal import write_atomic
from ..results.board_checks import check_file
from ..results.sources import BOARD, entry_files, load_board, load_entry
from ..results.standards import STANDARDS, standard_of
from ..results.summary import threat_order
from .jinja import template

README, PAGE = "README.md", "index.html"
NOTE = (
    "robust: per question the worst over every attack of that size and the clean image. 95% intervals in brackets. "
    "blind: the higher accuracy with a blank or another question's image. image gain: clean minus blind. best-known "
    "attack: the single attack that leaves the least. Every number is made again from the entry's records by "
    "`safemed-bench leaderboard check`."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """text: what is shown. detail: its interval or small print. order: what sorts it, None for text."""

    text: str
    detail: str = ""
    order: float | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """A board ready to be set: `rows` have one cell per column, the most robust entry first."""

    name: str
    title: str
    stamp: str
    kind: str
    facts: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def build(root: Path) -> list[Path]:
    """Write README.md and index.html into `root`, the folder of all boards; returns their paths. Raises DataError."""
    boards = [read_board(path.parent) for path in sorted(root.glob(f"*/{BOARD}"))]
    pages = {root / README: to_markdown(boards), root / PAGE: to_html(boards)}
    for path, text in pages.items():
        write_atomic(path, text.encode())
    return list(pages)


def read_board(folder: Path) -> Board:
    """One board with its entries. Raises DataError."""
    terms = load_board(folder)
    entries = [(load_entry(path), check_file(path, terms)) for path in entry_files(folder)]
    robust = [f"worst@{label}" for label in _sizes([entry for entry, _ in entries])]
    headline = f"worst@{terms['headline']}"
    sized = [headline, *(name for name in robust if name != headline)]
    rows = sorted((_row(entry, problems, sized) for entry, problems in entries), key=_rank)
    columns = ("#", "entry", "clean", *(f"robust {name.partition(':')[2]}" for name in sized), "chance", "blind")
    return Board(
        folder.name,
        terms["title"] or terms["suite"],
        terms["data"]["stamp"],
        {"phantom": "phantom", "omnimedvqa": "real"}.get(terms["data"]["name"], "unknown"),
        (
            f"{len(terms['questions']):,} questions",
            f"threat: {terms['terms']['threat']}",
            terms["terms"]["canvas"],
            f"standard attack: {STANDARDS.get(standard_of(terms), standard_of(terms))}",
        ),
        (*columns, "image gain", "invalid", "best-known attack", "status"),
        tuple((Cell(f"{i}", order=float(i)), *row) for i, row in enumerate(rows, 1)),
    )


def _sizes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {row["condition"] for entry in entries for row in entry.get("numbers", ())}
    return sorted((n.removeprefix("worst@") for n in names if n.startswith("worst@")), key=threat_order)


def _rank(row: Sequence[Cell]) -> tuple[float, float, str]:
    """By robust accuracy at the headline, then clean accuracy."""
    return -(row[2].order or 0.0), -(row[1].order or 0.0), row[0].text


def _row(entry: Mapping[str, Any], problems: Sequence[str], sized: Sequence[str]) -> tuple[Cell, ...]:
    numbers = {(r["condition"], r["metric"]): r for r in entry.get("numbers", ()) if r["modality"] == "all"}
    blind = [numbers[name, "accuracy"] for name in ("blank", "shuffled") if (name, "accuracy") in numbers]
    attack = entry.get("best_known_attack") or {}
    return (
        Cell(entry["model"], " ".join(filter(None, (entry.get("description", ""), _adaptive(entry))))),
        _percent(numbers.get(("clean", "accuracy"))),
        *(_percent(numbers.get((name, "accuracy"))) for name in sized),
        Cell(_percent(numbers.get(("clean", "chance"))).text),
        _percent(max(blind, key=lambda r: r["value"] or 0.0, default=None)),
        _percent(numbers.get(("clean", "image_gain")), sign="+"),
        _percent(numbers.get(("clean", "invalid_rate"))),
        Cell(attack.get("condition", "–"), attack.get("attack", "")),
        _status(entry, problems),
    )


def _adaptive(entry: Mapping[str, Any]) -> str:
    return f"Adaptive attack: {entry['adaptive']}" if entry.get("adaptive") else ""


def _status(entry: Mapping[str, Any], problems: Sequence[str]) -> Cell:
    """How far an entry can be trusted: what the check rejects, then unreliable, then who measured it."""
    if problems:
        return Cell("rejected by check", problems[0])
    words = [str(entry.get("status", ""))]
    if entry.get("flags"):
        words.insert(0, "unreliable")
    return Cell(", ".join(words), "; ".join(flag["why"] for flag in entry.get("flags", ())))


def _percent(row: Mapping[str, Any] | None, sign: str = "") -> Cell:
    if row is None or row["value"] is None:
        return Cell("–")
    low, high = 100 * row["low"], 100 * row["high"]
    return Cell(f"{100 * row['value']:{sign}.1f}", f"[{low:{sign}.1f}, {high:{sign}.1f}]", row["value"])


def to_markdown(boards: Sequence[Board]) -> str:
    lines = ["# Leaderboards", "", "Built by `safemed-bench leaderboard build`; do not edit. See docs/ci.md.", ""]
    if not boards:
        lines += ["No entry stands here yet. `safemed-bench leaderboard add RUN` makes one.", ""]
    for board in boards:
        lines += [f"## {board.title}: {board.name}", "", f"**{board.stamp}** · {' · '.join(board.facts)}", ""]
        lines += [f"| {' | '.join(board.columns)} |", f"|{'---|' * len(board.columns)}"]
        lines += [f"| {' | '.join(map(_markdown, row))} |" for row in board.rows]
        lines += [""]
    return "\n".join([*lines, NOTE, ""])


def _markdown(cell: Cell) -> str:
    text = " ".join(filter(None, (cell.text, cell.detail)))
    for mark in "\\|<>*_`":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def to_html(boards: Sequence[Board]) -> str:
    """One page without a network; the tables can be read, and stand in order, with scripts off."""
    return template("board.html.j2").render(boards=boards, note=NOTE.replace("`", ""))
