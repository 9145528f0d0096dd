"""What the pages of this package share: the templates, the stamp of the data, a figure with its words and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from .figures import Chart, draw, inline, swatch
from .panels import Data

TEMPLATES = Path(__file__).parent / "templates"

Stamp = tuple[str, str, str]
"""(kind, name, words) of the data that a page is about; the kind is a class of page.css."""

PHANTOM = "generated images, no patients: nothing here is about medical images"


def template(name: str) -> Template:
    """A template that escapes what it is given and knows no undefined name."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def shown(
    chart: Chart, data: Data, *, key: str, section: str, title: str, unit: str = "", notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A figure as templates/panel.html.j2 needs it. `key` becomes its id; `unit` stands beside its section."""
    curves = chart.curves
    return {
        "key": key,
        "section": section,
        "title": title,
        "unit": unit,
        "notes": list(notes),
        "svg": inline(draw(chart), f"{title}: {', '.join(curve.label for curve in curves)}"),
        "legend": [(swatch(curve), curve.label) for curve in curves] if len(curves) > 1 else [],
        "data": data,
    }
