"""Tables as CSV, Markdown and LaTeX text. Each carries the data's stamp and the run's notices."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass

from ..core.types import Estimate
from .tables import Column, Table

ABSENT = "–"
WIDE = 15
"""More columns of numbers than this do not fit a page."""
_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
    "×": r"$\times$",
}


def cell_parts(estimate: Estimate | None, column: Column, n: int | None = None) -> tuple[str, str]:
    """A cell's number and its interval: `95.0`, `[91.1, 97.3]`; the latter "" where the column has none.

    Where the estimate rests on fewer questions than the row's `n`, that stands behind the interval.
    """
    if estimate is None:
        return ABSENT, ""
    if column.style == "count":
        return f"{estimate.n}", ""
    if not estimate.n:
        return "missing", ""
    if column.style == "number":
        return f"{estimate.value:.3g}" if estimate.value < 1000 else f"{estimate.value:,.0f}", ""
    sign = "+" if column.style == "points" else ""
    value = f"{100 * estimate.value:{sign}.1f}"
    if column.style == "bare":
        return value, ""
    fewer = f" (n={estimate.n})" if n is not None and estimate.n != n else ""
    return value, f"[{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]{fewer}"


def texts(table: Table) -> list[list[str]]:
    """The body of a table as words, without its keys: `95.0 [91.1, 97.3]`."""
    return [[" ".join(filter(None, parts)) for parts in row] for row in _parts(table)]


def _parts(table: Table) -> list[list[tuple[str, str]]]:
    body = []
    for row in table.rows:
        counts = [e.n for e, c in zip(row.cells, table.columns, strict=True) if e and c.style == "count"]
        n = counts[0] if counts else None
        body.append([cell_parts(e, c, n) for e, c in zip(row.cells, table.columns, strict=True)])
    return body


def to_csv(table: Table) -> str:
    """Shares in [0, 1] with low, high and n of each; stamp and notices as `#` lines before the header."""
    out = io.StringIO()
    for line in (table.stamp, table.title, *table.notices):
        out.write(f"# {_one_line(line)}\n")
    writer = csv.writer(out, lineterminator="\n")
    header = [*table.keys]
    for column in table.columns:
        name = column.label.replace(" ", "_")
        header += [name] if column.style == "count" else [name, f"{name}_low", f"{name}_high", f"{name}_n"]
    writer.writerow(["data", *header])
    for row in table.rows:
        cells: list[object] = []
        for estimate, column in zip(row.cells, table.columns, strict=True):
            cells += _numbers(estimate, column)
        writer.writerow([_one_line(table.stamp), *row.keys, *cells])
    return out.getvalue()


def _numbers(estimate: Estimate | None, column: Column) -> list[object]:
    if column.style == "count":
        return ["" if estimate is None else estimate.n]
    if estimate is None:
        return ["", "", "", ""]
    if not estimate.n:
        return ["", "", "", 0]
    return [*(f"{v:.6g}" for v in (estimate.value, estimate.low, estimate.high)), estimate.n]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Words ready to be set: `keys` leading columns of the head and of every line are text, the others numbers."""

    keys: int
    head: list[str]
    lines: list[tuple[list[str], list[tuple[str, str]]]]


def _layout(table: Table) -> _Layout:
    """As the table stands, or turned where it would be too wide for a page and turning makes it narrower."""
    body = _parts(table)
    labels = [column.label for column in table.columns]
    if len(labels) <= WIDE or len(table.rows) >= len(labels):
        lines = [([*row.keys], parts) for row, parts in zip(table.rows, body, strict=True)]
        return _Layout(len(table.keys), [*table.keys, *labels], lines)
    head = ["", *(" ".join(row.keys) for row in table.rows)]
    return _Layout(1, head, [([label], [parts[i] for parts in body]) for i, label in enumerate(labels)])


def to_markdown(table: Table) -> str:
    layout = _layout(table)
    rule = ["---"] * layout.keys + ["---:"] * (len(layout.head) - layout.keys)
    rows = [[*keys, *(" ".join(filter(None, parts)) for parts in cells)] for keys, cells in layout.lines]
    lines = [f"> **{_one_line(table.stamp)}**"]
    for notice in table.notices:
        lines += [">", f"> **{_one_line(notice)}**"]
    lines += ["", f"**{_one_line(table.title)}** (95% intervals in brackets)", ""]
    lines += ["| " + " | ".join(_bar(word) for word in line) + " |" for line in (layout.head, rule, *rows)]
    return "\n".join(lines) + "\n"


def _bar(word: str) -> str:
    return word.replace("|", r"\|")


def to_latex(table: Table) -> str:
    """A booktabs `table*`; needs `\\usepackage{booktabs}` and nothing else."""
    layout = _layout(table)
    body = [[*map(escape_latex, keys), *(_tex_cell(*parts) for parts in cells)] for keys, cells in layout.lines]
    align = "l" * layout.keys + "r" * (len(layout.head) - layout.keys)
    caption = ". ".join(escape_latex(_one_line(s)) for s in (table.title, "95% intervals in brackets", *table.notices))
    lines = [
        *(f"% {_one_line(s)}" for s in (table.stamp, *table.notices)),
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{\textbf{{{escape_latex(_one_line(table.stamp))}.}} {caption}.}}",
        rf"\label{{tab:{re.sub(r'[^a-z0-9-]', '-', table.name.lower())}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(map(escape_latex, layout.head)) + r" \\",
        r"\midrule",
        *(" & ".join(line) + r" \\" for line in body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _tex_cell(value: str, interval: str) -> str:
    value = escape_latex(value)
    # The inner braces keep `[` from being read as the optional argument of the line break.
    return rf"\shortstack[r]{{{value}\\{{\tiny {escape_latex(interval)}}}}}" if interval else value


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_TEX.get(character, character) for character in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
