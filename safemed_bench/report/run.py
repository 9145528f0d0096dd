"""The report of a run: `report.html` in its folder, one file that opens from disk without a network."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..core.journal import write_atomic
from ..results.tables import Numbers, clinical, condition_label, transfer
from .curves import RunFigure, as_panel, certified_figures, eps_figures, severity_figures
from .evidence import audit, diagnostics, provenance, trainings
from .figures import save
from .gallery import NO_PICTURES, examples
from .headline import banners, stamp_of, threat_sentence, threat_words, tiles, verdict
from .jinja import TEMPLATES, template
from .matrices import corruption_grid, grid_if_any, modality_grid, objective_grid, overlap_grids
from .packing import pack
from .page import shown
from .source import Source, attacks_at, read_source

PAGE = "report.html"
FIGURES = "figures"


def write_run_page(folder: Path | str) -> Path:
    """Read the run in `folder` and write its report into it; returns its path. Raises what `read_source` raises."""
    return write_page(read_source(folder))


def write_page(source: Source) -> Path:
    """Write the report of a run into its folder; returns its path."""
    path = source.folder / PAGE
    write_atomic(path, run_page(source).encode())
    return path


def run_page(source: Source) -> str:
    """The report as HTML. The same files give the same bytes."""
    numbers, summary = source.numbers, source.summary
    script = Markup((TEMPLATES / "run.js").read_text(encoding="utf-8"))
    stamp = stamp_of(summary)
    return template("run.html.j2").render(
        title=summary["title"] or summary["suite"],
        suite=summary["suite"],
        stamp=stamp,
        banners=banners(summary),
        verdict=verdict(numbers),
        threat=threat_sentence(source),
        headline=threat_words(numbers.headline) if numbers.robust else "",
        tiles=tiles(source),
        modalities=modality_grid(numbers),
        eps=[_panel(figure) for figure in eps_figures(numbers)],
        certified=[_panel(figure) for figure in certified_figures(numbers)],
        corruptions=corruption_grid(numbers),
        severities=[_panel(figure) for figure in severity_figures(numbers)],
        objectives=objective_grid(source),
        overlaps=overlap_grids(source),
        clinical=grid_if_any(clinical(numbers)),
        transfers=grid_if_any(transfer(numbers)),
        diagnostics=diagnostics(summary),
        gallery=examples(source),
        no_pictures=NO_PICTURES if numbers.robust else "",
        browser=_browser(source, numbers),
        packed=pack(source),
        audit=audit(source),
        trainings=trainings(source),
        provenance=provenance(source),
        script=script,
        script_hash=_hash(f"\n{script}\n"),
    )


def write_figures(source: Source) -> list[Path]:
    """The figures as SVG and PDF files in `figures/` of the run folder, with legend and stamp; returns the paths."""
    summary = source.summary
    marks = "bands: 95% intervals; dotted: blind; dashed: chance"
    written = []
    numbers = source.numbers
    for figure in (*eps_figures(numbers), *certified_figures(numbers), *severity_figures(numbers)):
        title = f"{figure.group}: {figure.title}"
        small = " · ".join((summary["data"]["stamp"], *summary["notices"], *figure.notes, marks))
        written += save(figure.chart, source.folder / FIGURES / figure.key, title, small)
    return written


def _panel(figure: RunFigure) -> dict[str, Any]:
    return shown(figure.chart, figure.data, **as_panel(figure))


def _browser(source: Source, numbers: Numbers) -> dict[str, Any]:
    """What can be chosen in the question browser; it is a part of the page, so that no script has to make it."""
    conditions = dict.fromkeys(c.name for v in source.run.verdicts for c in v.conditions)
    rows = source.questions.values()
    return {
        "models": _pairs(numbers.models),
        "conditions": [(name, condition_label(name)) for name in conditions],
        "modalities": _pairs(dict.fromkeys(str(row.get("modality")) for row in rows)),
        "types": _pairs(sorted({str(row.get("question_type")) for row in rows})),
        "chosen": _most_told(source),
        "units": source.summary["coverage"]["planned"],
        "questions": len(source.questions),
    }


def _most_told(source: Source) -> str:
    """The condition that the browser begins with: the attack at the headline threat that most models were put under."""
    counts = Counter(c.name for v in source.run.verdicts for c in attacks_at(v, source.numbers.headline))
    strongest = [name for name in counts if not name.startswith("fgsm")] or list(counts)
    return max(strongest, key=counts.__getitem__, default="")


def _pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    return [(word, word) for word in words]


def _hash(script: str) -> str:
    """What the page's own policy lets run: this script, and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
