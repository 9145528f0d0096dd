"""Summary -> tables: what stands in which row and column. How a table is written is in formats.py.

Everything here reads the summary alone, so that a table can be made again without records, model or data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..core.journal import write_atomic
from ..core.types import Estimate
from .frames import CORRUPTION, Condition

ALL = "all"
MCA = "mean_corruption_accuracy"
Style = Literal["percent", "points", "bare", "count", "number"]
"""percent: `95.0 [91.1, 97.3]`; points: the same with a sign; bare: percent without interval; count: n alone; number:
three significant digits."""


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    style: Style = "percent"


@dataclass(frozen=True, slots=True)
class Row:
    """keys: one word per key column of the table. cells: one estimate per column, None where there is none."""

    keys: tuple[str, ...]
    cells: tuple[Estimate | None, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """name: of the files. stamp: what data it is. notices: what a reader must know (limited, partial)."""

    name: str
    title: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    stamp: str
    notices: tuple[str, ...] = ()


class Numbers:
    """The estimates of a summary by (model, condition, metric, modality)."""

    def __init__(self, summary: Mapping[str, Any]) -> None:
        self.summary = summary
        self.models: list[str] = [model["name"] for model in summary["models"]]
        self.headline: str | None = summary["threat"]["headline"]
        self._rows = {
            (r["model"], r["condition"], r["metric"], r["modality"]): estimate_of(r) for r in summary["estimates"]
        }
        names = dict.fromkeys(r["condition"] for r in summary["estimates"])
        parsed = [Condition.parse(name) for name in names]
        cells = [c for c in parsed if c.kind != CORRUPTION or (c.objective and c.severity)]
        self.conditions = [c for c in cells if c.kind not in ("certify", "certified")]
        self.corruptions = list(dict.fromkeys(c.objective for c in cells if c.kind == CORRUPTION and c.objective))
        self.severities = sorted({c.severity for c in cells if c.severity})
        self.certificates = [c for c in parsed if c.kind == "certified"]
        worst = f"worst@{self.headline}"
        self.robust: str | None = worst if worst in names else None

    def get(self, model: str, condition: str, metric: str = "accuracy", modality: str = ALL) -> Estimate | None:
        return self._rows.get((model, condition, metric, modality))

    def modalities(self, model: str) -> list[str]:
        return list(dict.fromkeys(modality for name, _, _, modality in self._rows if name == model))

    @property
    def aggregates(self) -> list[Condition]:
        """Noise, each attack (worst of its objectives) and the worst of all, each at every eps, the smallest first.

        Images made against another entry have a table of their own (`transfer`)."""
        order = {"noise": 0, "fgsm": 1, "worst": 3}
        found = [c for c in self.conditions if c.threat and c.objective is None and not c.source]
        return sorted(found, key=lambda c: (order.get(c.kind, 2), c.kind, c.eps))

    @property
    def main(self) -> list[Condition]:
        """The aggregates without those that only say a little more."""
        attacks = {c.kind for c in self.aggregates if c.is_attack} - {"worst"}
        minor = {"fgsm"} if len(attacks) > 1 else set()
        return [c for c in self.aggregates if c.kind not in minor and (c.kind != "noise" or c.threat == self.headline)]

    def blind(self, model: str, modality: str) -> Estimate | None:
        """The higher of blank and shuffled accuracy."""
        found = [e for name in ("blank", "shuffled") if (e := self.get(model, name, "accuracy", modality)) and e.n]
        return max(found, key=lambda e: e.value, default=None)

    def smoothed(self, model: str, sigma: str | None, modality: str = ALL) -> Estimate | None:
        """Certified accuracy at radius 0 of the certificates with this objective, None for the model's first."""
        own = dict.fromkeys(name for m, name, *_ in self._rows if m == model and name.startswith("certify"))
        names = [name for name in own if sigma in (None, Condition.parse(name).objective)]
        return self.get(model, names[0], "certified_accuracy", modality) if names else None

    def corrupted(
        self, model: str, kind: str = "", severity: int | None = None, modality: str = ALL
    ) -> Estimate | None:
        """Mean accuracy over the kinds and severities that are not named; of one kind at one severity its accuracy."""
        name = f"{CORRUPTION}{f'[{kind}]' if kind else ''}{f'@{severity}' if severity else ''}"
        return self.get(model, name, "accuracy" if kind and severity else MCA, modality)

    def reasons(self, model: str) -> bool:
        return any(m["name"] == model and m["reasons"] for m in self.summary["models"])


def build(summary: Mapping[str, Any]) -> list[Table]:
    """All tables that the run has numbers for."""
    numbers = Numbers(summary)
    made = (overall, modalities, certified, corruptions, objectives, clinical, transfer, validity)
    return [table for table in (make(numbers) for make in made) if table.rows]


def write(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every table as `<name>.csv`, `.md` and `.tex` in `folder`; returns the paths."""
    from .formats import to_csv, to_latex, to_markdown

    written = []
    for table in build(summary):
        for suffix, text in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
            path = folder / f"{table.name}.{suffix}"
            write_atomic(path, text(table).encode())
            written.append(path)
    return written


def render(summary: Mapping[str, Any], console: Console) -> None:
    """The tables on the terminal, within 100 columns; plain aligned text where `console` is none."""
    from .terminal import show

    show(summary, console)


def overall(numbers: Numbers) -> Table:
    """One row per model: everything, over all modalities."""
    pairs = [(model, ALL) for model in numbers.models]
    judged = ("clean", numbers.robust) if numbers.robust else ("clean",)
    columns, rows = _measured(numbers, numbers.aggregates, judged, pairs)
    return _table(numbers, "overall", "Accuracy, %", ("model",), columns, [Row(r.keys[:1], r.cells) for r in rows])


def modalities(numbers: Numbers) -> Table:
    """One row per model and modality: noise at the headline threat alone, FGSM only where nothing stronger was run."""
    pairs = [(model, modality) for model in numbers.models for modality in numbers.modalities(model)]
    columns, rows = _measured(numbers, numbers.main, (numbers.robust or "clean",), pairs)
    return _table(
        numbers,
        "modalities",
        "Accuracy per imaging modality, %",
        ("model", "modality"),
        columns,
        rows,
    )


Cells = tuple[Estimate | None, ...]


def _measured(
    numbers: Numbers, varied: Sequence[Condition], judged: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[tuple[Column, ...], list[Row]]:
    """The columns every accuracy table has, and a row of cells per (model, modality); all-empty columns left out.

    varied: conditions whose accuracy is shown. judged: conditions whose unreadable answers are; in a worst case these
    are the questions lost in no other way (frames.with_worst_cases). The `validity` table has them for every condition.
    """
    columns = [Column("n", "count"), Column("chance", "bare"), Column("text prior"), Column("clean"), Column("blind")]
    columns += [Column("image gain", "points")]
    columns += [Column("mCA")]
    columns += [Column(condition_label(c.name)) for c in varied]
    unread = [(name, status) for name in judged for status in ("invalid", "truncated")]
    columns += [Column(f"{status} {condition_label(name)}", "bare") for name, status in unread]

    def cells(model: str, modality: str) -> Cells:
        base = "clean" if numbers.get(model, "clean") else next((c.name for c in numbers.conditions), "clean")
        return (
            numbers.get(model, base, "accuracy", modality),
            numbers.get(model, "clean", "chance", modality),
            numbers.get(model, "clean", "text_prior", modality),
            numbers.get(model, "clean", "accuracy", modality),
            numbers.blind(model, modality),
            numbers.get(model, "clean", "image_gain", modality),
            numbers.corrupted(model, modality=modality),
            *(numbers.get(model, c.name, "accuracy", modality) for c in varied),
            *(numbers.get(model, name, f"{status}_rate", modality) for name, status in unread),
        )

    return _used(columns, [Row(pair, cells(*pair)) for pair in pairs])


def _used(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[tuple[Column, ...], list[Row]]:
    """The same without the columns that no row has a number for."""
    kept = [i for i in range(len(columns)) if any(row.cells[i] is not None for row in rows)]
    return tuple(columns[i] for i in kept), [Row(row.keys, tuple(row.cells[i] for i in kept)) for row in rows]


def objectives(numbers: Numbers) -> Table:
    """Reasoning models at the headline threat: each objective alone, the weakest of them, and the per-sample worst."""
    own = [c for c in numbers.conditions if c.is_attack and not c.source]
    single = [c for c in own if c.threat == numbers.headline and c.objective]
    names = list(dict.fromkeys(c.objective for c in single if c.objective))
    rows = []
    for model in filter(numbers.reasons, numbers.models):
        for kind in dict.fromkeys(c.kind for c in single):
            cells = [numbers.get(model, f"{kind}[{name}]@{numbers.headline}") for name in names]
            known = [e for e in cells if e is not None and e.n]
            if len(known) > 1:
                weakest = max(known, key=lambda e: e.value)
                worst = numbers.get(model, f"{kind}@{numbers.headline}")
                rows.append(Row((model, kind), (*cells, weakest, worst)))
    columns, rows = _used([*map(Column, names), Column("weakest alone"), Column("worst of all")], rows)
    title = f"Accuracy under attack at {numbers.headline} by the attack's objective, %"
    return _table(numbers, "objectives", title, ("model", "attack"), columns, rows)


def clinical(numbers: Numbers) -> Table:
    """Per model and attack at the headline threat: diseases that were answered normal, and the other way round.

    Of the clean-correct questions that have such options; `n` is the number of diseases.
    """
    rows = []
    for model in numbers.models:
        for condition in numbers.aggregates:
            rates = [numbers.get(model, condition.name, f"false_{kind}_rate") for kind in ("reassurance", "alarm")]
            if condition.threat == numbers.headline and condition.is_attack and any(rates):
                rows.append(Row((model, condition_label(condition.name)), (rates[0], *rates)))
    columns = (Column("n", "count"), Column("false reassurance"), Column("false alarm"))
    title = f"Clinical direction of the errors under attack at {numbers.headline}, %"
    return _table(numbers, "clinical", title, ("model", "attack"), columns, rows)


def transfer(numbers: Numbers) -> Table:
    """Per attack and threat a source by target matrix; a target's own attack of that name stands on the diagonal."""
    shown = [c for c in numbers.conditions if c.source and c.objective is None]
    rows = [Row(("clean", ""), tuple(numbers.get(model, "clean") for model in numbers.models))] if shown else []
    place = {name: i for i, name in enumerate(numbers.models)}
    for condition in sorted(shown, key=lambda c: (c.attack, c.norm, c.eps, place.get(c.source, len(place)))):
        own = f"{condition.attack}@{condition.threat}"
        cells = tuple(numbers.get(m, own if m == condition.source else condition.name) for m in numbers.models)
        rows.append(Row((condition_label(own), condition.source), cells))
    title = "Accuracy by the entry (row) that the images were made against and the one (column) that is shown them, %"
    return _table(numbers, "transfer", title, ("attack", "made against"), map(Column, numbers.models), rows)


def certified(numbers: Numbers) -> Table:
    """Accuracy that is proven inside an L2 ball, per model and modality; never beside an empirical L∞ number."""
    radii = sorted(numbers.certificates, key=lambda c: (c.objective or "", c.eps))
    rows = []
    for model in numbers.models:
        for modality in numbers.modalities(model):
            found = [[numbers.get(model, c.name, metric, modality) for c in radii] for metric in _CERTIFIED]
            if any(found[0]):
                facts = [next(filter(None, cells), None) for cells in found[2:]]
                rows.append(Row((model, modality), (facts[0], *found[0], *found[1], *facts)))
    proven = [Column(f"certified {_ball(numbers, c)}") for c in radii]
    abstained = [Column(f"abstain {_ball(numbers, c)}", "bare") for c in radii]
    numbers_ = [Column("ACR", "number"), Column("samples, mean", "number"), Column("samples, median", "number")]
    title = "Certified accuracy by L2 radius (in brackets its L∞ equivalent R/√d), %"
    return _table(
        numbers,
        "certified",
        title,
        ("model", "modality"),
        [Column("n", "count"), *proven, *abstained, *numbers_],
        rows,
    )


def corruptions(numbers: Numbers) -> Table:
    """Accuracy per model and kind of corruption against severity; first the means over the kinds, per question."""
    columns = [Column("n", "count"), Column("clean"), *(Column(f"severity {s}") for s in numbers.severities)]
    rows = []
    for model in numbers.models:
        for kind in ("", *numbers.corruptions):
            mean = numbers.corrupted(model, kind)
            if mean is not None:
                clean = numbers.get(model, f"{CORRUPTION}[{kind}]" if kind else CORRUPTION, "clean_accuracy")
                at = [numbers.corrupted(model, kind, severity) for severity in numbers.severities]
                rows.append(Row((model, kind or ALL), (mean, clean, *at, mean)))
    title = "Accuracy under corruptions by severity, on the modalities that they happen to, %"
    return _table(numbers, "corruptions", title, ("model", "corruption"), [*columns, Column("mean")], rows)


_CERTIFIED = ("certified_accuracy", "abstain_rate", "acr", "samples", "samples_median")


def _ball(numbers: Numbers, condition: Condition) -> str:
    """`L2 0.25 (0.58/255)`, with the sigma where there are several."""
    cells = (numbers.get(model, condition.name, "linf_equivalent") for model in numbers.models)
    same = next(filter(None, cells), None)
    inside = f" ({same.value * 255:.2g}/255)" if same else ""
    which = f" {condition.objective}" if condition.objective else ""
    return f"L2 {condition.eps:g}{inside}{which}"


def validity(numbers: Numbers) -> Table:
    """Per model and condition: answers that could not be read, texts cut off, questions lost."""
    metrics = ("invalid_rate", "truncated_rate", "error_rate")
    columns = [Column("n", "count"), Column("invalid"), Column("truncated"), Column("missing")]
    rows = []
    for model in numbers.models:
        for condition in numbers.conditions:
            cells = tuple(numbers.get(model, condition.name, metric) for metric in metrics)
            if any(cells):
                rows.append(Row((model, condition.name), (cells[2], *cells)))
    return _table(numbers, "validity", "Unreadable and missing answers, %", ("model", "condition"), columns, rows)


def _table(
    numbers: Numbers, name: str, title: str, keys: tuple[str, ...], columns: Iterable[Column], rows: Iterable[Row]
) -> Table:
    summary = numbers.summary
    title = f"{summary['title'] or summary['suite']}: {title}"
    return Table(name, title, keys, tuple(columns), tuple(rows), summary["data"]["stamp"], tuple(summary["notices"]))


def condition_label(name: str) -> str:
    """`pgd@linf:4/255` as `PGD 4/255`; the norm is named where it is not L∞."""
    condition = Condition.parse(name)
    if condition.threat is None:
        return name
    kind = condition.kind if condition.kind in ("noise", "worst") else condition.words
    objective = f"[{condition.objective}]" if condition.objective else ""
    norm, _, eps = condition.threat.partition(":")
    return f"{kind}{objective} {eps}" if norm == "linf" else f"{kind}{objective} {norm.upper()} {eps}"


def estimate_of(row: Mapping[str, Any]) -> Estimate:
    """The Estimate of one row of `summary["estimates"]`; null is NaN."""
    value, low, high = (math.nan if row[key] is None else row[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, row["n"], row["method"])
