"""Tables of a run's report: modality × condition, objective × model, attack × attack."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..core.types import Estimate
from ..results.formats import cell_parts
from ..results.frames import Condition, Verdicts
from ..results.intervals import proportion
from ..results.tables import (
    ALL,
    Column,
    Numbers,
    Row,
    Table,
    condition_label,
    corruptions,
    modalities,
)
from .source import Source, attacks_at

MICRO, MACRO = "all (micro)", "all (macro)"


@dataclass(frozen=True, slots=True)
class Cell:
    """An entry of a table: words, and for numbers what they are sorted by and how wide their bar is.

    sort: a number as text, "" for nothing. tint: 0 to 100, or None.
    """

    value: str
    interval: str = ""
    sort: str = ""
    tint: float | None = None


@dataclass(frozen=True)
class Grid:
    """A table of the page. keys: leading columns of words. total: rows that sum up others. caption: what it shows."""

    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Cell, ...]], ...]
    caption: str = ""
    totals: frozenset[int] = frozenset()


def modality_grid(numbers: Numbers) -> Grid:
    """Every modality and model under every main condition; first the mean over questions and that over modalities."""
    table = modalities(numbers)
    micro = {row.keys[0]: row for row in table.rows if row.keys[1] == ALL}
    names = [m for m in dict.fromkeys(row.keys[1] for row in table.rows) if m != ALL]
    rows = [(MICRO, model, row) for model, row in micro.items()]
    if len(names) > 1:
        rows += [(MACRO, model, _macro(numbers, row, table)) for model, row in micro.items()]
    totals = frozenset(range(len(rows)))
    rows += [(name, row.keys[0], row) for name in names for row in table.rows if row.keys[1] == name]
    body = tuple(((name, model), _cells(row, table.columns)) for name, model, row in rows)
    return Grid(("modality", "model"), tuple(c.label for c in table.columns), body, table.title, totals)


def _macro(numbers: Numbers, row: Row, table: Table) -> Row:
    """The mean over modalities, where a column is the accuracy under one condition; the number of questions stays."""
    conditions = {condition_label(c.name): c.name for c in numbers.conditions}
    cells = list[Estimate | None]()
    for column, estimate in zip(table.columns, row.cells, strict=True):
        name = conditions.get(column.label)
        if column.style != "count":
            estimate = numbers.get(row.keys[0], name, "accuracy_macro") if name else None
        cells.append(estimate)
    return Row(row.keys, tuple(cells))


def _cells(row: Row, columns: tuple[Column, ...]) -> tuple[Cell, ...]:
    counts = [e.n for e, c in zip(row.cells, columns, strict=True) if e and c.style == "count"]
    return tuple(cell(e, c, counts[0] if counts else None) for e, c in zip(row.cells, columns, strict=True))


def cell(estimate: Estimate | None, column: Column, n: int | None = None) -> Cell:
    """An estimate as a cell; tinted where it is a share."""
    value, interval = cell_parts(estimate, column, n)
    if estimate is None or (math.isnan(estimate.value) and column.style != "count"):
        return Cell(value)
    sort = estimate.n if column.style == "count" else estimate.value
    tint = round(100 * estimate.value, 1) if column.style == "percent" else None
    return Cell(value, interval, f"{sort:.6g}", tint)


def grid_of(table: Table) -> Grid:
    """A paper table as one of the page."""
    rows = tuple((row.keys, _cells(row, table.columns)) for row in table.rows)
    return Grid(table.keys, tuple(c.label for c in table.columns), rows, table.title)


def grid_if_any(table: Table) -> Grid | None:
    """The same, None where the run has nothing for it."""
    return grid_of(table) if table.rows else None


def corruption_grid(numbers: Numbers) -> Grid | None:
    """Every model and kind of corruption by severity; None where there are none."""
    grid = grid_of(corruptions(numbers))
    means = frozenset(i for i, (keys, _) in enumerate(grid.rows) if keys[1] == ALL)
    return replace(grid, totals=means) if grid.rows else None


def objective_grid(source: Source) -> Grid | None:
    """Every attack and objective at the headline threat by model: each alone, then the worst per question."""
    numbers = source.numbers
    single = [
        c for c in numbers.conditions if c.is_attack and c.threat == numbers.headline and c.objective and not c.source
    ]
    if not single:
        return None
    worst = [c for c in numbers.aggregates if c.threat == numbers.headline and c.kind != "noise"]
    rows = []
    for condition in sorted(single, key=lambda c: (c.kind, c.objective or "")):
        rows.append(((condition.kind.upper(), condition.objective or ""), _across(source, condition)))
    totals = frozenset(range(len(rows), len(rows) + len(worst)))
    for condition in worst:
        kind = "every attack" if condition.kind == "worst" else condition.kind.upper()
        rows.append(((kind, "worst per question"), _across(source, condition)))
    return Grid(("attack", "objective"), tuple(numbers.models), tuple(rows), totals=totals)


def _across(source: Source, condition: Condition) -> tuple[Cell, ...]:
    numbers, n = source.numbers, len(source.questions)
    return tuple(cell(numbers.get(model, condition.name), Column(model), n) for model in numbers.models)


def overlap_grids(source: Source) -> list[tuple[str, Grid]]:
    """(model, attack × attack): accuracy where both attacks must be withstood; on the diagonal, one alone."""
    headline = source.numbers.headline
    found = []
    for verdicts in source.run.verdicts:
        attacks = attacks_at(verdicts, headline)
        if len(attacks) > 1:
            found.append((verdicts.model, _overlap(verdicts, attacks)))
    return found


def _overlap(verdicts: Verdicts, attacks: list[Condition]) -> Grid:
    names = [f"{c.words} {(c.objective or '').replace('_', ' ')}".strip() for c in attacks]
    rows, n = [], len(verdicts.questions)
    for i, first in enumerate(attacks):
        cells = [cell(_both(verdicts, first.name, second.name), Column(""), n) for second in attacks[: i + 1]]
        rows.append(((names[i],), (*cells, *[Cell("")] * (len(attacks) - i - 1))))
    return Grid(("",), tuple(names), tuple(rows))


def _both(verdicts: Verdicts, first: str, second: str) -> Estimate:
    """Share of questions right under both; a question is missing where one verdict is and the other is not wrong."""
    a, b = (verdicts.correct[name].to_numpy(dtype=float) for name in (first, second))
    least = np.fmin(a, b)
    known = ~(np.isnan(a) | np.isnan(b)) | (least == 0)
    return proportion((least[known] == 1).astype(float), verdicts.images[known])
