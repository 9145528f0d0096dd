"""What the cells of a plan took in an earlier run: measured seconds are better than a probe's. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..core.journal import written
from .estimate import Rate, Sample, rate_of
from .provenance import RUN, cell_facts, model_facts

if TYPE_CHECKING:
    from ..suite.plan import Plan

QUESTIONS = 5000
"""Of a cell that are looked at; more would say nothing new."""


def earlier(folder: Path, plan: Plan, kind: str, costs: Mapping[str, float]) -> dict[str, Rate]:
    """Rates of the cells that `folder` holds records of: same entry, condition, canvas, dtype and kind of device.

    The questions may be others, as with another `data.per_modality`. kind: cpu or cuda. costs: cells that are asked
    about -> passes of a question that stands. Raises DataError for a broken journal.
    """
    samples = {name: dict[str, Sample]() for name in _alike(folder, plan, kind) if name in costs}
    for record in written(folder) if samples else ():
        held = samples.get(record.cell)
        if held is None or record.error or (len(held) >= QUESTIONS and record.question_id not in held):
            continue
        held[record.question_id] = Sample.of(record)  # the last one: of the plan that run.json tells of
    return {
        name: rate_of([*held.values()], f"records in {folder}", costs[name]) for name, held in samples.items() if held
    }


def _alike(folder: Path, plan: Plan, kind: str) -> list[str]:
    """Cells that the folder describes as this plan would."""
    info, suite = _read(folder / RUN), _read(folder / "suite.yaml")
    sessions = info.get("provenance", {}).get("sessions", ())
    devices = {str(name).partition(":")[0] for session in sessions for name in session.get("workers", ())}
    if devices != {kind} or _setting(suite) != _setting(plan.suite.to_dict()):
        return []
    cells = {(cell["model"], cell["condition"]): _but_questions(cell) for cell in info.get("cells", ())}
    models = {model["name"]: model for model in info.get("models", ())}
    return [
        cell.name
        for cell in plan.cells
        if cells.get((cell.model.name, cell.condition.name)) == _as_json(_but_questions(cell_facts(cell, plan)))
        and models.get(cell.card.name) == _as_json(model_facts(plan, cell.card))
    ]


def _setting(suite: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a suite, beside its cells, changes how long a question takes."""
    data, run = suite.get("data", {}), suite.get("run", {})
    return data.get("resolution"), data.get("fit"), run.get("dtype"), run.get("batch_size")


def _but_questions(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cell.items() if name != "questions"}


def _as_json(value: Any) -> Any:
    """As it reads after it was written: tuples are lists then."""
    return json.loads(json.dumps(value))


def _read(path: Path) -> dict[str, Any]:
    """An object in JSON or YAML, {} where there is none: what cannot be read was measured by nobody."""
    try:
        found = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
