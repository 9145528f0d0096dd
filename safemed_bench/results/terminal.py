"""The tables of a summary on the terminal: at most 100 columns, models side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from .formats import texts
from .tables import (
    ALL,
    MCA,
    Numbers,
    Row,
    Table,
    certified,
    clinical,
    condition_label,
    modalities,
    objectives,
    overall,
    transfer,
)

WIDTH = 100
GAP = 2
LEGEND = (
    "95% intervals in brackets. text prior: a table of question and option texts learnt on train, without any image."
    " blind: the higher of blank and shuffled image. worst: per question, over every attack of that size and clean."
    " invalid, truncated: answers that could not be read, or were cut off; both count as wrong; under worst, questions"
    " lost by that alone."
)
LEGEND_MCA = " mCA: mean accuracy over corruptions and severities."


@dataclass(frozen=True, slots=True)
class Block:
    """What is printed as one table: a title, a header and lines of words, the first word of a line its key."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    @property
    def widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.header, *self.lines, strict=True)]


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print stamp, notices and tables to `console`; without styles, boxes or wrapping where it is no terminal."""
    draw = _draw_rich if console.is_terminal else _draw_plain
    _banner(summary, console)
    for block in blocks(summary):
        draw(block, console)
    _footer(summary, console)


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The tables, cut into blocks that are at most WIDTH wide where words allow it."""
    numbers = Numbers(summary)
    yield from _side_by_side(overall(numbers))
    yield from _per_model(modalities(numbers), numbers)
    for table in (_whole(certified(numbers)), objectives(numbers), _aimed(numbers), transfer(numbers)):
        if table.rows:
            yield from _side_by_side(table)


def _whole(table: Table) -> Table:
    """Only the rows over all modalities; the files have the others."""
    rows = tuple(Row(row.keys[:1], row.cells) for row in table.rows if row.keys[1] == ALL)
    return replace(table, keys=table.keys[:1], rows=rows)


def _aimed(numbers: Numbers) -> Table:
    """The clinical errors of attacks that were aimed at them; the files have every attack's."""
    kinds = {c.kind for c in numbers.conditions if c.objective == "directed"}
    aimed = {condition_label(c.name) for c in numbers.aggregates if c.kind in kinds}
    table = clinical(numbers)
    return replace(table, rows=tuple(row for row in table.rows if row.keys[1] in aimed))


def _side_by_side(table: Table) -> Iterator[Block]:
    """The table turned: its columns as lines, its rows (models) side by side, as many as fit."""
    labels = [column.label for column in table.columns]
    words = texts(table)
    columns = [(" ".join(row.keys), *cells) for row, cells in zip(table.rows, words, strict=True)]
    for group in _fit(max(map(len, ("", *labels))), columns):
        lines = tuple(zip(labels, *(column[1:] for column in group), strict=True))
        yield Block(table.title, ("", *(column[0] for column in group)), lines)


def _fit(first: int, columns: Sequence[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Groups of neighbouring columns that fit beside a first column of that width; at least one each."""
    group: list[tuple[str, ...]] = []
    used = first
    for column in columns:
        width = GAP + max(map(len, column))
        if group and used + width > WIDTH:
            yield group
            group, used = [], first
        group.append(column)
        used += width
    if group:
        yield group


def _per_model(table: Table, numbers: Numbers) -> Iterator[Block]:
    """One block per model: clean, blind and the worst case at the headline threat per modality."""
    robust = condition_label(numbers.robust) if numbers.robust else ""
    wanted = ("n", "chance", "clean", "blind", robust)
    kept = [i for i, column in enumerate(table.columns) if column.label in wanted]
    header = ("", *(table.columns[i].label for i in kept))
    body = texts(table)
    for model in dict.fromkeys(row.keys[0] for row in table.rows):
        lines = tuple(
            (row.keys[1], *(words[i] for i in kept))
            for row, words in zip(table.rows, body, strict=True)
            if row.keys[0] == model and row.keys[1] != ALL
        )
        if len(lines) > 1:
            yield Block(f"{model}: accuracy per imaging modality, %", header, lines)


def _banner(summary: Mapping[str, Any], console: Console) -> None:
    lines = [summary["data"]["stamp"], *summary["notices"]]
    if console.is_terminal:
        console.print(
            Panel(Text("\n".join(lines), style="bold"), border_style="yellow", width=min(WIDTH, console.width))
        )
        return
    for line in lines:
        console.out(f"*** {line} ***", highlight=False)


def _footer(summary: Mapping[str, Any], console: Console) -> None:
    errors = summary["coverage"]["named_errors"][:3]
    legend = LEGEND + LEGEND_MCA * any(row["metric"] == MCA for row in summary["estimates"])
    notes = [legend, *(f"error in {e['cell']}, question {e['question_id']}: {e['error']}" for e in errors)]
    console.out("", highlight=False)
    for note in notes:
        console.out(textwrap.fill(note, WIDTH), highlight=False)
    for line in checks(summary):
        console.out(textwrap.fill(line, WIDTH), highlight=False)


def checks(summary: Mapping[str, Any]) -> Iterator[str]:
    """One line per diagnostic that did not pass, the failures first, and how many did."""
    found = summary.get("diagnostics", ())
    for status in ("fail", "warn"):
        for row in found:
            if row["status"] == status:
                yield f"{status.upper()} {row['model']}: {row['id']}: {row['evidence']}"
    if found:
        passed = sum(row["status"] == "pass" for row in found)
        yield f"diagnostics: {passed} of {len(found)} checks passed (docs/diagnostics.md)"


def _draw_rich(block: Block, console: Console) -> None:
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(block.header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for line in block.lines:
        table.add_row(*map(Text, line))
    console.print(Text(block.title, style="bold"))
    console.print(table)


def _draw_plain(block: Block, console: Console) -> None:
    console.out("", highlight=False)
    console.out(block.title, highlight=False)
    widths = block.widths
    for line in (block.header, *block.lines):
        cells = [word.rjust(w) if i else word.ljust(w) for i, (word, w) in enumerate(zip(line, widths, strict=True))]
        console.out((" " * GAP).join(cells).rstrip(), highlight=False)
