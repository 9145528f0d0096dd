"""A run folder -> `summary.json` and the tables. Equal records give byte-equal estimates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.journal import write_atomic
from ..core.types import PROBE
from . import tables
from .certified import certified
from .corrupted import corrupted
from .diagnostics import diagnose
from .frames import Condition, Run, Verdicts, load_run, with_worst_cases
from .metrics import Measure, measures

SUMMARY = "summary.json"
SCHEMA = 1
DIGITS = 6
NAMED_ERRORS = 20
"""How many errors the summary names; all of them are in the journal."""

UNSTAMPED = "UNKNOWN DATA – the run folder does not say what was measured"


def summarise(folder: Path | str, run: Run | None = None) -> dict[str, Any]:
    """Compute all estimates of a run folder; write `summary.json` and `tables/` into it; return the summary.

    run: the folder's own, where it was loaded already. A run that is not finished is summarised as far as it got, with
    a notice that says so. Raises DataError where the folder holds no records.
    """
    folder = Path(folder)
    summary = summary_of(load_run(folder) if run is None else run)
    text = json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_atomic(folder / SUMMARY, text.encode())
    tables.write(summary, folder / "tables")
    return summary


def summary_of(run: Run) -> dict[str, Any]:
    """The summary as plain JSON data (see docs/results.md for its fields)."""
    info = run.info
    all_verdicts = [with_worst_cases(v) for v in run.verdicts]
    coverage = _coverage(run.verdicts)
    return {
        "schema": SCHEMA,
        "suite": info.get("suite", run.folder.name),
        "title": info.get("title", ""),
        "data": _data(info.get("data", {})),
        "notices": [*info.get("notices", ()), *_partial(coverage)],
        "threat": _threat(info, all_verdicts),
        "models": [{"name": v.model, "reasons": _reasons(info, v.model)} for v in all_verdicts],
        "coverage": coverage,
        "estimates": [row_of(measure) for verdicts in all_verdicts for measure in _all(verdicts)],
        "diagnostics": [row for verdicts in run.verdicts for row in diagnose(verdicts)] if _checked(info) else [],
        "probes": _probes(run.verdicts),
        "provenance": info.get("provenance", {}),
    }


def _all(verdicts: Verdicts) -> Iterator[Measure]:
    yield from measures(verdicts)
    yield from corrupted(verdicts)
    yield from certified(verdicts)


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": data.get("name", "unknown"),
        "fingerprint": data.get("fingerprint", ""),
        "stamp": data.get("stamp") or UNSTAMPED,
    }


def row_of(measure: Measure) -> dict[str, Any]:
    """An estimate as plain JSON data, as it stands in `summary["estimates"]`."""
    row = asdict(measure)
    estimate = row.pop("estimate")
    return row | {key: _plain(value) for key, value in estimate.items()}


def _plain(value: Any) -> Any:
    """Floats rounded, so that the last bits of a sum's order never show; NaN as null, -0 as 0."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, DIGITS) + 0.0


def _threat(info: Mapping[str, Any], verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """The threats met in the run, weakest first, and the one that headlines; labels such as `linf:4/255`."""
    labels = {c.threat for v in verdicts for c in v.conditions if c.threat}
    order = sorted(labels, key=threat_order)
    headline = info.get("headline")
    if headline not in labels:
        attacked = {c.threat for v in verdicts for c in v.conditions if c.is_attack}
        candidates = [label for label in order if label in attacked] or order
        headline = candidates[len(candidates) // 2] if candidates else None
    return {"labels": order, "headline": headline}


def threat_order(label: str) -> tuple[str, float]:
    """Norm, then eps as a number: `linf:10/255` comes after `linf:4/255`."""
    norm, _, eps = label.partition(":")
    over, _, under = eps.partition("/")
    try:
        return norm, float(over) / float(under or 1)
    except ValueError:
        return label, 0.0


def _checked(info: Mapping[str, Any]) -> bool:
    return bool(info.get("diagnostics", {}).get("level") != "off")


def _probes(verdicts: Sequence[Verdicts]) -> dict[str, Any] | None:
    """What the probes of the diagnostics took: records, and their part of the seconds of all. None without any."""
    records = pd.concat([v.records for v in verdicts])
    of_probes = records["condition"].str.startswith(PROBE)
    if not of_probes.any():
        return None
    seconds = records["seconds"].astype(float)
    share = float(seconds[of_probes].sum() / seconds.sum()) if seconds.sum() > 0 else math.nan
    return {"records": int(of_probes.sum()), "share_of_seconds": _plain(share)}


def _reasons(info: Mapping[str, Any], model: str) -> bool:
    return any(card.get("name") == model and card.get("reasons") for card in info.get("models", ()))


def _coverage(verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """Planned units against what they gave, in all and per cell; `done` have a verdict, `missing` not even an error."""
    cells = [_cell_coverage(v, c) for v in verdicts for c in v.conditions]
    total = {key: sum(cell[key] for cell in cells) for key in ("planned", "done", "errors", "missing")}
    named = [
        {"cell": f"{v.model}/{condition}", "question_id": question, "error": message}
        for v in verdicts
        for condition, question, message in sorted(v.errors)
    ]
    return total | {"cells": cells, "named_errors": named[:NAMED_ERRORS]}


def _cell_coverage(verdicts: Verdicts, condition: Condition) -> dict[str, Any]:
    asked = verdicts.asked.get(condition.name)
    planned = len(verdicts.correct) if asked is None else len(asked)
    done = int(verdicts.correct[condition.name].notna().sum())
    failed = pd.Index([q for c, q, _ in verdicts.errors if c == condition.name])
    errors = int(failed.isin(verdicts.correct.index).sum())
    cell = {"model": verdicts.model, "condition": condition.name}
    return cell | {"planned": planned, "done": done, "errors": errors, "missing": planned - done - errors}


def _partial(coverage: Mapping[str, Any]) -> list[str]:
    lost = coverage["planned"] - coverage["done"]
    if not lost:
        return []
    return [
        f"PARTIAL: {lost:,} of {coverage['planned']:,} units have no verdict"
        f" ({coverage['errors']:,} errors, {coverage['missing']:,} not run); they count as missing, not as wrong"
    ]
