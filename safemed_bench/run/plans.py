"""A plan's chunks as jobs that a worker can do without the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UsageError
from .messages import Job, Settings

if TYPE_CHECKING:
    from ..core.journal import Index
    from ..suite.conditions import Condition
    from ..suite.plan import Cell, Chunk, Plan, PlannedUnit

STEP_COST = 3.0
"""One step of an attack (forward and backward) in forward passes, for the ETA alone."""

USUAL_STEPS = {
    "pgd": 20,
    "mim": 20,
    "apgd": 50,
    "fab": 40,
    "square": 170,
    "safemed-attack": 100,
    "smoothadv": 80,
    "eot": 80,
}
PROBE_COST = {"repeat": 2.0, "gradient": 11.0}
USUAL_SAMPLES = 400
"""What a sequential certificate takes."""


def settings_of(
    plan: Plan, folder: Path, plugins: Sequence[str | Path], batch_size: int | str | None = None
) -> Settings:
    """What the workers of a plan share; batch_size None is the suite's."""
    size = plan.suite.run.batch_size if batch_size is None else batch_size
    return Settings(
        folder=folder.resolve(),
        resolution=plan.suite.data.resolution,
        fit=plan.suite.data.fit,
        dtype=plan.dtype,
        batch_size=None if size == "auto" else int(size),
        plugins=tuple(str(Path(plugin).resolve()) for plugin in plugins),
        seed=plan.suite.run.seed,
    )


def units_left(job: Job, index: Index, retry_errors: bool = False) -> int:
    """Units of a job that have no record that counts, or an error where these are to be tried again."""
    return sum(unit.key not in index or (retry_errors and index.failed(unit.key)) for unit in job.units)


def jobs_of(plan: Plan) -> tuple[Job, ...]:
    """A job per chunk, in the order of the plan. Raises UsageError where two cells are the same work."""
    jobs = tuple(job_of(plan, chunk) for chunk in plan.chunks)
    owner: dict[str, str] = {}
    for job in jobs:
        for unit in job.units:
            if owner.setdefault(unit.key, job.cell) != job.cell:
                raise UsageError(f"cells {owner[unit.key]} and {job.cell} are the same work; leave one of them out")
    return jobs


def job_of(plan: Plan, chunk: Chunk) -> Job:
    """One chunk with all that a worker needs for it."""
    cell = plan.cells_by_name[chunk.cell]
    job = _job_of(plan, cell, chunk.index, chunk.units)
    return replace(job, source=_job_of(plan, cell.source, chunk.index, chunk.sources)) if cell.source else job


def _job_of(plan: Plan, cell: Cell, index: int, units: tuple[PlannedUnit, ...]) -> Job:
    condition, questions = cell.condition, plan.questions
    modalities = dict.fromkeys(questions[unit.question_id].modality for unit in units)
    return Job(
        model=cell.model,
        cell=cell.name,
        condition=condition.name,
        kind=condition.kind,
        chunk=f"{index:04d}",
        units=units,
        questions=tuple(questions[unit.question_id] for unit in units),
        donors=tuple(questions[unit.donor] for unit in units if unit.donor),
        attack=condition.attack,
        objective=condition.objective,
        params=condition.params,
        threat=condition.threat,
        certifier=condition.certifier,
        fit=tuple(cell.fit[name] for name in modalities if name in cell.fit),
        corruption=condition.corruption,
        severity=condition.severity,
        cost=_cost(condition, cell.model.smooth.n if cell.model.smooth else 1),
    )


def _cost(condition: Condition, votes: int) -> float:
    """Estimated passes per question; `votes` is the number of noisy copies behind an answer."""
    params = dict(condition.params)
    if condition.kind == "certify":
        return float(min(params.get("n", USUAL_SAMPLES), USUAL_SAMPLES))
    if condition.source:
        return 2.0 * votes
    if condition.kind != "attack":
        return PROBE_COST.get(condition.kind, 1.0) * votes
    if condition.attack == "universal":  # its steps are taken once, by whoever comes first
        return 2.0 * votes
    steps = params.get("steps", USUAL_STEPS.get(condition.attack, 1)) * params.get("restarts", 1)
    return votes + STEP_COST * steps
