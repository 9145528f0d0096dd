"""Which job goes to which worker, and what becomes of jobs that fail; the same for every engine. Imports no torch.

A job whose worker died, or that failed, is tried once more as it was; if it fails again it is halved until the question
that kills it stands alone and gets an error record. So one poisonous question costs one question; a fault that hits
every question of a cell costs a few, since the rest of the cell is then given up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .messages import Done, Failed, Fatal, Job, ModelFailed, Note, Order, Ready
from .waiting import Task, Waiting

Event = Done | Note | Ready | ModelFailed | Fatal | None
"""What an engine reports; None a few times a second, so that the caller can look up."""

FAULTS_IN_A_ROW = 5
"""Single questions of a cell that fail with the same error, none having worked between, until it is given up."""


@dataclass(slots=True)
class Member:
    """A worker as its engine sees it. `seen`: numbers of the sets of questions whose clean answers it has at hand.
    `promised`: what it was told to expect next."""

    device: str
    ready: bool = False
    task: Task | None = None
    promised: Task | None = None
    model: str = ""
    seen: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Brake:
    """Tells a fault that hits every question of a cell from one that hits a few."""

    _rows: dict[str, tuple[str, int]] = field(default_factory=dict)

    def failed(self, cell: str, error: str) -> None:
        """One question of `cell` alone ended in `error`."""
        before, count = self._rows.get(cell, (error, 0))
        self._rows[cell] = (error, count + 1 if before == error else 1)

    def worked(self, cell: str) -> None:
        if not self.fault(cell):
            self._rows.pop(cell, None)

    def fault(self, cell: str) -> str:
        """Why the rest of `cell` is given up, "" while it is not."""
        error, count = self._rows.get(cell, ("", 0))
        return f"not tried: {count} questions in a row failed with: {error}" if count >= FAULTS_IN_A_ROW else ""


class Dispatch:
    """The jobs that wait, and those that workers are at."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.waiting = Waiting()
        self.waiting.add(jobs)
        self._brake = Brake()

    def deal(self, member: Member) -> Order | None:
        """The next job for a worker; None where it is busy, not up, or nothing waits."""
        if not member.ready or member.task or not self.waiting:
            return None
        task = self.waiting.take(member.model, member.seen, member.promised)
        task.tries += 1
        if member.model != task.job.model.name:
            member.model, member.seen = task.job.model.name, set()
        member.task = task
        member.seen.add(task.asked)
        # a second try is alone, so that it is not blamed for another job's images
        member.promised = self.waiting.promise(member.model, member.seen) if task.tries == 1 else None
        return Order(task.job, member.promised.job.outline() if member.promised else None)

    def heard(self, member: Member, message: Done | Failed | ModelFailed | Fatal | Ready | Note) -> list[Event]:
        """What a worker's message means for the run."""
        task = member.task
        match message:
            case Ready():
                member.ready = True
            case Failed(error=error) if task:
                member.task = None
                return self._again(task, error)
            case Done(job=job, records=records):
                member.task = None
                if not all(record.error for record in records):
                    self._brake.worked(job.cell)
            case ModelFailed(model=name):
                member.task = None
                self.waiting.remove_model(name)
        return [] if isinstance(message, Failed) else [message]

    def lost(self, member: Member, cause: str) -> list[Event]:
        """A worker is gone and a new member takes its place: its job goes back to the queue."""
        task, text = member.task, f"a worker died ({cause}) and was replaced"
        if member.promised:  # reading its images may be what killed the worker
            member.promised.promised, member.promised.doubtful = False, True
        if not task:
            return [Note(text)]
        where = f"{task.job.cell}, {len(task.job.units)} questions"
        return [Note(f"{text}; it was at {where}"), *self._again(task, f"worker died: {cause}")]

    def _again(self, task: Task, error: str) -> list[Event]:
        """Once more, then in halves; a single question that failed again is given up, by name."""
        job = task.job
        if fault := self._brake.fault(job.cell):  # another worker was still at it when the cell was given up
            return [_given_up(job, fault)]
        if task.tries < 2:
            self.waiting.put_back([task])
            return []
        if len(job.units) == 1:
            self._brake.failed(job.cell, error)
            done = Done(job, (job.record(0, error=f"question {job.questions[0].id}: {error}"),))
            return [done, *self._give_up(job.cell)]
        middle = len(job.units) // 2
        halves = (job.part(0, middle), job.part(middle, len(job.units)))
        # one try each is enough: the whole has failed twice, so that this is not bad luck
        self.waiting.put_back(self.waiting.task(half, tries=1, whole=False) for half in halves)
        if not task.whole:
            return []
        return [Note(f"{job.cell}: {len(job.units)} questions failed twice ({error}); trying them in halves")]

    def _give_up(self, cell: str) -> list[Event]:
        """Error records for all that is left of a cell whose questions all meet the same fault."""
        fault = self._brake.fault(cell)
        rest = self.waiting.remove_cell(cell) if fault else []
        if not rest:
            return []
        left = sum(len(task.job.units) for task in rest)
        return [Note(f"{cell}: {left} questions {fault}"), *(_given_up(task.job, fault) for task in rest)]


def _given_up(job: Job, fault: str) -> Done:
    return Done(job, tuple(job.record(i, error=f"question {q.id}: {fault}") for i, q in enumerate(job.questions)))
