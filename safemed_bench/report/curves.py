"""Figures of a run: accuracy against eps, one panel per modality, against severity, certified against radius."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.types import Estimate
from ..results.frames import CORRUPTION, Condition
from ..results.summary import threat_order
from ..results.tables import ALL, Numbers
from .figures import CYCLE, DASHES, MARKERS, Chart, Curve, Level
from .panels import Data
from .words import share

NORMS = {"linf": "L∞", "l2": "L2"}


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run. key: its id and file name. group, title: what it shows, of which questions. unit: the norm."""

    key: str
    group: str
    title: str
    unit: str
    chart: Chart
    data: Data
    notes: tuple[str, ...] = ()


def eps_figures(numbers: Numbers) -> list[RunFigure]:
    """Accuracy under the worst of all attacks against eps: all modalities first, then each; apart for each norm."""
    worst = [c for c in numbers.conditions if c.kind == "worst" and c.threat]
    figures = []
    for norm in NORMS:
        threats = sorted((c for c in worst if (c.threat or "").startswith(norm + ":")), key=_size)
        if threats:
            figures += [_eps_figure(numbers, norm, threats, m) for m in _modalities(numbers)]
    return figures


def certified_figures(numbers: Numbers) -> list[RunFigure]:
    """Certified accuracy against the radius, per modality where there is a curve to see. Empty where the run certified
    nothing."""
    radii = {_size(c) for c in numbers.certificates}
    shown = _modalities(numbers) if len(radii) > 1 else [ALL] * len(radii)
    return [_radius_figure(numbers, modality) for modality in shown]


def severity_figures(numbers: Numbers) -> list[RunFigure]:
    """Accuracy against the severity of corruptions: the mean over the kinds, then each kind, where there are several
    severities; 0 is the clean image."""
    kinds = ("", *numbers.corruptions)
    return [_severity_figure(numbers, kind) for kind in kinds] if len(numbers.severities) > 1 else []


def _severity_figure(numbers: Numbers, kind: str) -> RunFigure:
    """Chance and the floors are those of all questions, so that they stand in the figure of all kinds alone."""
    places = [0, *numbers.severities]
    base = f"{CORRUPTION}[{kind}]" if kind else CORRUPTION
    measured = {
        model: [
            numbers.get(model, base, "clean_accuracy"),
            *(numbers.corrupted(model, kind, s) for s in places[1:]),
        ]
        for model in numbers.models
    }
    rows: Rows = {model: cells for model, cells in measured.items() if any(e is not None and e.n for e in cells)}
    floors = {} if kind else {model: e for model in rows if (e := numbers.blind(model, ALL))}
    key = f"severity-{_slug(kind or ALL)}"
    chart = Chart(
        key,
        tuple(_curve(model, i, places, cells) for i, (model, cells) in enumerate(rows.items())),
        places[-1],
        "share",
        levels=() if kind else _levels(numbers, ALL, list(rows), floors, places[-1]),
        x_label="severity",
        ticks=tuple((float(place), str(place) if place else "clean") for place in places),
    )
    body = tuple((model, f"{cells[-1].n:,}" if cells[-1] else "–", *map(share, cells)) for model, cells in rows.items())
    data = Data(("model", "n", "clean", *(f"severity {s}" for s in places[1:])), body, words=(0,))
    return RunFigure(key, "Corruptions", kind or "All kinds, mean", "", chart, data, _asked(rows))


def _modalities(numbers: Numbers) -> list[str]:
    names = dict.fromkeys(m for model in numbers.models for m in numbers.modalities(model))
    return [ALL, *(name for name in names if name != ALL)] if len(names) > 2 else [ALL]


def _size(condition: Condition) -> float:
    return threat_order(condition.threat or "")[1]


def _word(condition: Condition) -> str:
    return (condition.threat or "").partition(":")[2]


def _eps_figure(numbers: Numbers, norm: str, threats: Sequence[Condition], modality: str) -> RunFigure:
    scale = 255.0 if norm == "linf" else 1.0
    places = [0.0, *(_size(c) * scale for c in threats)]
    names = ["clean", *(c.name for c in threats)]
    measured = _measured(numbers, names, modality)
    rows = {model: cells for model, cells in measured.items() if any(e is not None and e.n for e in cells[1:])}
    floors = {model: e for model in rows if (e := numbers.blind(model, modality))}
    key = f"eps-{norm}-{_slug(modality)}"
    # The words of many eps would run into each other; the axis then has plain numbers.
    ticks = tuple(zip(places, ("0", *(_word(c).removesuffix("/255") for c in threats)), strict=True))
    chart = Chart(
        key,
        tuple(_curve(model, i, places, cells) for i, (model, cells) in enumerate(rows.items())),
        places[-1],
        "share",
        levels=_levels(numbers, modality, list(rows), floors, places[-1]),
        x_label=f"eps, {NORMS[norm]}{', 1/255 of the pixel range' if norm == 'linf' else ''}",
        ticks=ticks if len(ticks) <= 8 else (),
    )
    data = _table(numbers, modality, ("clean", *(f"worst {_word(c)}" for c in threats)), rows, floors)
    return RunFigure(key, "Accuracy, worst attack", _title(modality), NORMS[norm], chart, data, _asked(rows))


def _radius_figure(numbers: Numbers, modality: str) -> RunFigure:
    """A curve per model, and per sigma where a model has several; at 0 what the smoothed model answers at all."""
    words = {0.0: "0"} | {_size(c): _word(c) for c in numbers.certificates}
    places = sorted(words)
    rows: Rows = {}
    for which in dict.fromkeys(c.objective for c in numbers.certificates):
        names = {_size(c): c.name for c in numbers.certificates if c.objective == which}
        found = _measured(numbers, [names.get(place, "") for place in places[1:]], modality, "certified_accuracy")
        rows |= {
            f"{model} {which}" if which else model: [numbers.smoothed(model, which, modality), *cells]
            for model, cells in found.items()
        }
    key = f"radius-{_slug(modality)}"
    chart = Chart(
        key,
        tuple(_curve(model, i, places, cells) for i, (model, cells) in enumerate(rows.items())),
        places[-1],
        "share",
        levels=_levels(numbers, modality, list(rows), {}, places[-1]),
        x_label="certified radius, L2",
        ticks=tuple(words.items()) if len(words) <= 8 else (),
    )
    heads = [f"L2 {words[place]}{_inside(numbers, place)}" for place in places]
    floors = {row: e for row in rows if (e := numbers.blind(_model_of(numbers, row), modality))}
    data = _table(numbers, modality, heads, rows, floors)
    return RunFigure(key, "Certified accuracy", _title(modality), "L2", chart, data, _asked(rows))


def _model_of(numbers: Numbers, row: str) -> str:
    """The model of a row that may also name a sigma."""
    return row if row in numbers.models else row.rpartition(" ")[0]


def _inside(numbers: Numbers, radius: float) -> str:
    """` (L∞ 0.58/255)`: the largest L∞ ball inside the L2 ball, where all certificates agree on it."""
    names = [c.name for c in numbers.certificates if _size(c) == radius]
    found = {e.value for m in numbers.models for n in names if (e := numbers.get(m, n, "linf_equivalent")) and e.n}
    return f" (L∞ {found.pop() * 255:.2g}/255)" if len(found) == 1 else ""


Rows = dict[str, list[Estimate | None]]


def _measured(numbers: Numbers, names: Sequence[str], modality: str, metric: str = "accuracy") -> Rows:
    """model -> its accuracies under these conditions; models without any are left out."""
    rows = {model: [numbers.get(model, name, metric, modality) for name in names] for model in numbers.models}
    return {model: cells for model, cells in rows.items() if any(e is not None and e.n for e in cells)}


def _table(numbers: Numbers, modality: str, names: Sequence[str], rows: Rows, floors: Mapping[str, Estimate]) -> Data:
    """The numbers of a figure, and beside them n, what is right blind, and chance."""
    body = []
    for model, cells in rows.items():
        n = max(e.n for e in cells if e is not None)
        chance = numbers.get(_model_of(numbers, model), "clean", "chance", modality)
        body.append(
            (
                model,
                f"{n:,}",
                *(share(e, n=n) for e in cells),
                share(floors.get(model), n=n),
                share(chance, "bare"),
            )
        )
    return Data(("model", "n", *names, "blind", "chance"), tuple(body), words=(0,))


def _asked(rows: Rows) -> tuple[str, ...]:
    """How many questions the points rest on."""
    counts = sorted({e.n for cells in rows.values() for e in cells if e is not None and e.n})
    return (f"n = {' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))}",) if counts else ()


def _curve(model: str, place: int, x: Sequence[float], cells: Sequence[Estimate | None]) -> Curve:
    points = tuple((at, e.value if e is not None and e.n else math.nan) for at, e in zip(x, cells, strict=True))
    band = tuple((at, e.low, e.high) for at, e in zip(x, cells, strict=True) if e is not None and e.n)
    dash = list(DASHES)[place // len(CYCLE) % len(DASHES)]
    return Curve(model, points, colour_of(place), dash, marked=True, band=band, marker=MARKERS[place % len(MARKERS)])


def colour_of(place: int) -> str:
    """The colour of the model at this place of the run, the same in every figure."""
    return CYCLE[place % len(CYCLE)]


def _levels(
    numbers: Numbers, modality: str, models: Sequence[str], floors: Mapping[str, Estimate], end: float
) -> tuple[Level, ...]:
    """Chance, which is the questions' own, and what each model gets right blind, in its colour."""
    chance = [e.value for m in models if (e := numbers.get(m, "clean", "chance", modality)) and e.n]
    levels = [Level("chance", chance[0], 0, end)] if chance else []
    places: dict[str, int] = {model: i for i, model in enumerate(models)}
    return (*levels, *(Level("", e.value, 0, end, colour_of(places[m]), "dotted") for m, e in floors.items() if e.n))


def _title(modality: str) -> str:
    return "All modalities" if modality == ALL else modality


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def as_panel(figure: RunFigure) -> dict[str, Any]:
    """What `page.shown` needs beside chart and data."""
    return {
        "key": figure.key,
        "section": figure.group,
        "title": figure.title,
        "unit": figure.unit,
        "notes": figure.notes,
    }
