"""Where words go: results and JSON to stdout, all else to stderr. NO_COLOR is honoured, pipes get plain text."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 160
"""Columns where stdout is no terminal, so that a table is not folded for a screen that is not there."""


def results() -> Console:
    """The console of results."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(value: Any) -> None:
    """One JSON value on stdout, and nothing else."""
    print(json.dumps(value, ensure_ascii=False, indent=1, default=str))


def note(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr)


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; numbers to the right. Cells are plain text, brackets and all."""
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    console.print(table)
