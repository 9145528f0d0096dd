"""What the pages of this package share: the stamp of the data, a figure with its words and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import Chart, draw, inline, swatch
from .panels import Data

Stamp = tuple[str, str, str]
"""(kind, name, words) of the data that a page is about; the kind is a class of page.css."""

PHANTOM = "generated images, no patients: nothing here is about medical images"


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
