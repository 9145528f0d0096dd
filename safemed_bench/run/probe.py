"""A few units of each cell, really measured, to see how long they take. Nothing of it goes into a run's folder."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..core.seeds import derive_seed
from ..core.types import Record
from ..suite.plan import Chunk, PlannedUnit
from .engines import Engine, Means, open_engine
from .estimate import Rate, Sample, rate_of
from .messages import Done, Fatal, Job, ModelFailed
from .plans import job_of, settings_of

if TYPE_CHECKING:
    from ..suite.plan import Cell, Plan

WARM, FIRST, TIMED = "warm-up", "first", "timed"
"""Names of the chunks of a probe."""

BASIS = "a probe"


@dataclass(frozen=True)
class Measured:
    """rates: cell -> what it takes. load: seconds to load a model, the mean. missing: cell -> why it has no rate."""

    rates: Mapping[str, Rate] = field(default_factory=dict)
    load: float = 0.0
    missing: Mapping[str, str] = field(default_factory=dict)


def probe(plan: Plan, names: Collection[str], units: int, plugins: Sequence[str | Path]) -> Measured:
    """Ask `units` questions of each named cell, spread over its modalities, on one worker of this machine.

    Entries that a server answers for are left out: their requests may cost money. Raises SafeMedError where no worker
    can start.
    """
    cells = [cell for cell in plan.cells if cell.name in names]
    missing = {cell.name: "its server is not asked for a probe" for cell in cells if cell.model.api is not None}
    jobs = [job for cell in cells if cell.name not in missing for job in _jobs(plan, cell, units)]
    if not jobs:
        return Measured(missing=missing)
    with TemporaryDirectory(prefix="safemed-probe-") as folder:
        settings = settings_of(plan, Path(folder), plugins)
        heard = Heard()
        heard.listen(_warmed(jobs), open_engine(settings, Means("local", None, 1, plan.suite.run.device), 1))
    missing |= {cell.name: heard.failed[cell.model.name] for cell in cells if cell.model.name in heard.failed}
    rates = dict[str, Rate]()
    for job in (job for job in jobs if job.chunk == TIMED and job.cell not in missing):
        records = heard.timed[job.cell]
        if good := [Sample.of(record) for record in records if not record.error]:
            once = heard.first.get(job.cell, 0.0) - sum(record.seconds for record in records)
            rates[job.cell] = rate_of(good, BASIS, job.cost, max(0.0, once) if job.fit else 0.0)
        else:
            missing[job.cell] = records[0].error
    return Measured(rates, statistics.fmean(heard.loads) if heard.loads else 0.0, missing)


def _jobs(plan: Plan, cell: Cell, units: int) -> Iterator[Job]:
    job = job_of(plan, _few(plan, cell, units))
    if cell.fit:  # what is fitted once must not be taken for a part of every question
        yield _named(job, FIRST)
    yield _named(job, TIMED)


def _warmed(jobs: Iterable[Job]) -> Iterator[Job]:
    """Of each model one clean question before all else: loading it and its first pass are not in the seconds."""
    warm = set[str]()
    for job in jobs:
        if job.model.name not in warm:
            warm.add(job.model.name)
            yield replace(job.part(0, 1), chunk=WARM, kind="clean", donors=(), source=None, fit=())
        yield job


def _named(job: Job, name: str) -> Job:
    return replace(job, chunk=name, source=replace(job.source, chunk=name) if job.source else None)


def _few(plan: Plan, cell: Cell, count: int) -> Chunk:
    """Questions of all modalities in turn, drawn by their ids: the same ones in every cell that asks them."""
    pairs = [pair for chunk in plan.chunks if chunk.cell == cell.name for pair in _paired(chunk)]
    by_modality = defaultdict[str, list[tuple[PlannedUnit, PlannedUnit | None]]](list)
    for pair in sorted(pairs, key=lambda pair: derive_seed("probe", pair[0].question_id)):
        by_modality[plan.questions[pair[0].question_id].modality].append(pair)
    turns = [(turn, name, pair) for name, held in by_modality.items() for turn, pair in enumerate(held)]
    chosen = [pair for _, _, pair in sorted(turns, key=lambda one: one[:2])][:count]
    sources = tuple(source for _, source in chosen if source is not None)
    return Chunk(f"{cell.name}#probe", cell.name, 0, tuple(unit for unit, _ in chosen), sources)


def _paired(chunk: Chunk) -> Iterator[tuple[PlannedUnit, PlannedUnit | None]]:
    sources: Sequence[PlannedUnit | None] = chunk.sources or (None,) * len(chunk.units)
    return zip(chunk.units, sources, strict=True)


@dataclass
class Heard:
    """What the worker said. timed: cell -> its records, which come in parts where some failed. first: cell -> seconds
    of its first chunk. loads: seconds that loading a model took. failed: model -> why it cannot be loaded."""

    timed: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    first: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    loads: list[float] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def listen(self, jobs: Iterable[Job], engine: Engine) -> None:
        before = time.monotonic()
        with engine:
            for event in engine.run(jobs):
                match event:
                    case Done(job=job, records=records):
                        self._take(job, records, time.monotonic() - before)
                    case ModelFailed(model=name, error=error):
                        self.failed[name] = error
                    case Fatal(error=error, kind=kind):
                        raise kind(error)
                before = time.monotonic() if event is not None else before

    def _take(self, job: Job, records: Sequence[Record], passed: float) -> None:
        spent = sum(record.seconds for record in records)
        if job.chunk == WARM:
            self.loads.append(max(0.0, passed - spent))
        elif job.chunk == FIRST:
            self.first[job.cell] += spent
        else:
            self.timed[job.cell] += records
