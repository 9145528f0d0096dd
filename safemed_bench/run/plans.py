"""A plan's chunks as jobs that a worker can do without the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError
from .messages import Job

if TYPE_CHECKING:
    from ..suite.plan import Chunk, Plan

STEP_COST = 3.0
"""One step of an attack (forward and backward) in forward passes, for the ETA alone."""

USUAL_STEPS = {"pgd": 20, "mim": 20, "apgd": 50, "square": 170, "safemed-attack": 100}


def jobs_of(plan: Plan) -> tuple[Job, ...]:
    """A job per chunk, in the order of the plan. Raises UsageError where two cells are the same work."""
    jobs = tuple(_job(plan, chunk) for chunk in plan.chunks)
    owner: dict[str, str] = {}
    for job in jobs:
        for unit in job.units:
            if owner.setdefault(unit.key, job.cell) != job.cell:
                raise UsageError(f"cells {owner[unit.key]} and {job.cell} are the same work; leave one of them out")
    return jobs


def _job(plan: Plan, chunk: Chunk) -> Job:
    cell = plan.cells_by_name[chunk.cell]
    condition, questions = cell.condition, plan.questions
    return Job(
        model=cell.model,
        cell=cell.name,
        condition=condition.name,
        kind=condition.kind,
        chunk=f"{chunk.index:04d}",
        units=chunk.units,
        questions=tuple(questions[unit.question_id] for unit in chunk.units),
        donors=tuple(questions[unit.donor] for unit in chunk.units if unit.donor),
        attack=condition.attack,
        objective=condition.objective,
        params=condition.params,
        threat=condition.threat,
        cost=_cost(condition.attack, dict(condition.params)),
    )


def _cost(attack: str, params: dict[str, Any]) -> float:
    """Estimated passes per question."""
    if not attack:
        return 1.0
    return 1.0 + STEP_COST * params.get("steps", USUAL_STEPS.get(attack, 1)) * params.get("restarts", 1)
