"""How long a plan will take: measured seconds a unit of each cell, dealt by the real dispatcher to simulated workers.

An attack stops at the first success, so what a question takes depends on whether it stands. The seconds of a cell are
those of the questions that were measured; the interval says how many more, or fewer, may stand among the others. What
another load of the machine does to them is not in it. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..core.types import Record
from ..datasets.splits import stratified
from ..suite.conditions import asked
from .messages import Job
from .simulate import SimulatedEngine

if TYPE_CHECKING:
    from ..suite.plan import Plan

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured question. seconds: a unit's, mean of its chunk. passes: through the model, a backward pass being
    two. stood: whether an attack failed on it, None for other conditions and where the clean answer was wrong."""

    seconds: float
    passes: float
    stood: bool | None = None

    @classmethod
    def of(cls, record: Record) -> Sample:
        passes = 1 + record.forwards + 2 * record.backwards + (record.samples or 0)
        return cls(record.seconds, passes, bool(record.correct) if record.clean_correct else None)


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds a unit of a cell takes one worker; low, high: 95% interval of the mean over questions.

    n: questions measured. basis: what measured them. once: seconds more for the first chunk, as for fitting a
    perturbation.
    """

    seconds: float
    low: float
    high: float
    n: int
    basis: str
    once: float = 0.0


def rate_of(samples: Sequence[Sample], basis: str, full: float, once: float = 0.0) -> Rate:
    """full: passes of a question on which the attack never succeeds, for where none was seen."""
    seconds = statistics.fmean(sample.seconds for sample in samples)
    passes = statistics.fmean(sample.passes for sample in samples)
    attacked = any(sample.stood is not None for sample in samples)
    low, high = _of_attack(samples, full) if attacked else _of_mean([sample.passes for sample in samples])
    return Rate(seconds, seconds * min(low / passes, 1.0), seconds * max(high / passes, 1.0), len(samples), basis, once)


def _of_attack(samples: Sequence[Sample], full: float) -> tuple[float, float]:
    """Mean passes if the share that stands is as low, or as high, as these questions allow (Clopper-Pearson)."""
    from scipy.stats import binomtest

    standing = [sample.passes for sample in samples if sample.stood]
    others = [sample.passes for sample in samples if not sample.stood]
    most = statistics.fmean(standing) if standing else max(full, *others)
    least = statistics.fmean(others) if others else 1.0
    share = binomtest(len(standing), len(samples)).proportion_ci(CONFIDENCE, method="exact")
    return least + (most - least) * float(share.low), least + (most - least) * float(share.high)


def _of_mean(passes: Sequence[float]) -> tuple[float, float]:
    """Student's interval; as wide as nothing where all questions take the same."""
    mean = statistics.fmean(passes)
    if len(set(passes)) < 2:
        return mean, mean
    from scipy.stats import t

    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(passes) - 1)) * statistics.stdev(passes) / math.sqrt(len(passes))
    return max(min(passes), mean - reach), min(max(passes), mean + reach)


@dataclass(frozen=True, slots=True)
class Schedule:
    """seconds: until the last job is done. done: cell -> second at which its last job was. utilisation: in [0, 1]."""

    seconds: float
    done: Mapping[str, float]
    utilisation: float


@dataclass(frozen=True, slots=True)
class Crew:
    """Workers of a run; load: seconds that each takes to load another model."""

    workers: int
    load: float = 0.0

    def schedule(self, jobs: Iterable[Job], rates: Mapping[str, Rate]) -> Schedule:
        """The jobs of all cells that have a rate, dealt as a run deals them."""
        first = dict[str, Job]()
        known = [job for job in jobs if job.cell in rates]
        for job in known:
            first.setdefault(job.cell, job)

        def seconds(job: Job) -> float:
            rate = rates[job.cell]
            return rate.seconds * len(job.units) + (rate.once if job is first[job.cell] else 0.0)

        with SimulatedEngine(self.workers, seconds, self.load) as engine:
            for _ in engine.run(known):
                pass
        return Schedule(engine.now, engine.finished, engine.utilisation)

    def largest_sample(self, plan: Plan, jobs: Sequence[Job], rates: Mapping[str, Rate], budget: float) -> int:
        """Questions per modality with which all cells that have a rate are done in `budget` seconds, 0 where not even
        one is. jobs: all of the plan."""

        def too_many(count: int) -> bool:
            return self.schedule(sampled(jobs, units_of_sample(plan, count)), rates).seconds > budget

        most = max(Counter(question.modality for question in plan.dataset.questions).values())
        return bisect_left(range(1, most + 1), True, key=too_many)


def at_low(rates: Mapping[str, Rate]) -> dict[str, Rate]:
    """As fast as the measured questions allow, in every cell at once."""
    return {name: replace(rate, seconds=rate.low) for name, rate in rates.items()}


def at_high(rates: Mapping[str, Rate]) -> dict[str, Rate]:
    """As slow."""
    return {name: replace(rate, seconds=rate.high) for name, rate in rates.items()}


def units_of_sample(plan: Plan, per_modality: int) -> Counter[str]:
    """Cell -> its units, were the plan's questions cut down to so many of each modality."""
    questions = stratified(plan.dataset.questions, per_modality)
    return Counter({cell.name: len(asked(questions, cell.condition)) for cell in plan.cells})


def sampled(jobs: Iterable[Job], units: Mapping[str, int]) -> Iterator[Job]:
    """Jobs of the same sizes as the smaller plan's: of each cell its first `units`."""
    left = Counter(units)
    for job in jobs:
        if (count := min(left[job.cell], len(job.units))) > 0:
            left[job.cell] -= count
            yield job.part(0, count)
