"""What the parent process and its workers say to each other; plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import SafeMedError
from ..core.types import FitSet, Question, Record, ThreatModel, Unit


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for every job of a run.

    resolution: side of the square canvas in pixels, where the entry names no other. batch_size: questions per batch to
    begin with, None = the chunk, or what fits on a GPU. seed: of the suite; a unit has its own.
    """

    folder: Path
    resolution: int
    fit: str
    dtype: str
    batch_size: int | None
    plugins: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One chunk of one cell, or the part of it that is left after a failure.

    model: the suite's entry (models.card.Spec). kind: clean, blank, shuffled, noise, attack, certify, corruption,
    or a probe's: repeat, gradient. donors: for `shuffled` the questions whose images are shown. chunk: the chunk's
    name within its cell. cost: estimated passes per question. source: where the images were made against another
    entry, the job that makes them. fit: what the attack is fitted on, for each modality of the questions.
    """

    model: Any
    cell: str
    condition: str
    kind: str
    chunk: str
    units: tuple[Unit, ...]
    questions: tuple[Question, ...]
    donors: tuple[Question, ...] = ()
    attack: str = ""
    objective: str = ""
    params: tuple[tuple[str, Any], ...] = ()
    threat: ThreatModel | None = None
    certifier: str = ""
    corruption: str = ""
    severity: int = 0
    cost: float = 1.0
    source: Job | None = None
    fit: tuple[FitSet, ...] = ()

    def part(self, start: int, stop: int) -> Job:
        """The same for the questions in [start, stop)."""
        here = slice(start, stop)
        return replace(
            self,
            units=self.units[here],
            questions=self.questions[here],
            donors=self.donors[here] if self.donors else (),
            source=self.source.part(start, stop) if self.source else None,
        )

    def outline(self) -> Job:
        """What is enough to know which images it shows."""
        return replace(self, units=(), source=None, fit=())

    def record(self, index: int, **values: Any) -> Record:
        """The record of one unit: who and what it is, then `values`."""
        unit, question = self.units[index], self.questions[index]
        return Record(
            key=unit.key,
            cell=self.cell,
            model=self.model.name,
            condition=self.condition,
            question_id=question.id,
            modality=question.modality,
            question_type=question.question_type,
            image_sha256=question.image_sha256,
            n_options=len(question.options),
            target=question.answer,
            **values,
        )


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do, and `ahead` the outline of what it will probably do next, whose images it may read."""

    job: Job
    ahead: Job | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker is up. `hardware` says on what, for the run's provenance."""

    hardware: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know, such as a smaller batch."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The records of a job, in the order of its units."""

    job: Job
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole job raised; the worker is still good."""

    error: str


@dataclass(frozen=True, slots=True)
class ModelFailed:
    """The job's model cannot be loaded, so none of its cells can be measured."""

    model: str
    error: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """Nothing can go on: `disk_full`, a worker that cannot even start, or a server that gives no more answers; `kind`
    is the error that the run ends with."""

    error: str
    disk_full: bool = False
    kind: type[SafeMedError] = SafeMedError
