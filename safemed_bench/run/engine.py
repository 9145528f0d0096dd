"""The local engine: worker processes, one job each at a time, dealt as they come free. It never imports torch.

A worker that dies is replaced. Its job is tried once more as it was; if it fails again it is halved until the
question that kills it stands alone and gets an error record. So one poisonous question costs one question; a fault
that hits every question of a cell costs a few, since the rest of the cell is then given up.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Self

from . import worker
from .messages import Done, Failed, Fatal, Job, ModelFailed, Note, Ready, Settings

Event = Done | Note | Ready | ModelFailed | Fatal | None
"""What the engine reports; None a few times a second, so that the caller can look up."""

TICK = 0.25
PATIENCE = 2.0
"""Seconds a worker gets to end before it is killed."""

START_FAILURES = 3
"""Workers that die before they are up, one after the other, until the run is given up."""

FAULTS_IN_A_ROW = 5
"""Single questions of a cell that fail with the same error, none having worked between, until it is given up."""


@dataclass(slots=True)
class Task:
    """A job and how often it was tried. `whole`: as the plan has it, not a part of a job that failed."""

    job: Job
    tries: int = 0
    whole: bool = True


@dataclass(slots=True)
class Crew:
    """One worker process as the parent sees it. `seen`: sets of questions whose clean answers it has at hand."""

    process: SpawnProcess
    pipe: Connection
    device: str
    ready: bool = False
    task: Task | None = None
    model: str = ""
    seen: set[tuple[str, ...]] = field(default_factory=set)


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


class LocalEngine:
    """Workers on the given devices, as a context manager: leaving it ends them all."""

    def __init__(self, settings: Settings, devices: Sequence[str]) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("spawn")
        self._crew: list[Crew] = []
        self._devices = tuple(devices)
        self._failed_starts = 0
        self._brake = Brake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._crew:
            if kind is not None:
                member.process.terminate()  # it may be in the middle of a job that nobody waits for
            member.pipe.close()
        for member in self._crew:
            self._end(member)
        self._crew.clear()

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """Do all jobs, in about this order; every job ends as one or more `Done`, or with its model's `ModelFailed`.

        After `Fatal` nothing more comes.
        """
        waiting = deque(Task(job) for job in jobs)
        self._crew = [self._hire(device) for device in self._devices[: len(waiting)]]
        while waiting or any(member.task for member in self._crew):
            for member in self._crew:
                self._deal(member, waiting)
            events = [event for member in self._heard() for event in self._listen(member, waiting)]
            yield from events or (None,)
            if any(isinstance(event, Fatal) for event in events):
                return

    def _heard(self) -> list[Crew]:
        pipes = {member.pipe: member for member in self._crew}
        return [pipes[pipe] for pipe in wait(list(pipes), TICK) if isinstance(pipe, Connection)]

    def _deal(self, member: Crew, waiting: deque[Task]) -> None:
        """The next job for a free worker."""
        if not member.ready or member.task or not waiting:
            return
        task = _choose(member, waiting)
        waiting.remove(task)
        task.tries += 1
        if member.model != task.job.model.name:
            member.model, member.seen = task.job.model.name, set()
        member.task = task
        member.seen.add(_questions(task.job))
        try:
            member.pipe.send(task.job)
        except OSError:
            return  # it just died; `_listen` will meet the end of its pipe

    def _listen(self, member: Crew, waiting: deque[Task]) -> list[Event]:
        try:
            message = member.pipe.recv()
        except (EOFError, OSError):
            return self._bury(member, waiting)
        task = member.task
        match message:
            case Ready():
                member.ready, self._failed_starts = True, 0
            case Failed(error=error) if task:
                member.task = None
                return self._again(task, error, waiting)
            case Done(job=job, records=records):
                member.task = None
                if not all(record.error for record in records):
                    self._brake.worked(job.cell)
                self._deal(member, waiting)  # before its records are written, so that it need not wait for the disk
            case ModelFailed(model=name):
                member.task = None
                for other in [t for t in waiting if t.job.model.name == name]:
                    waiting.remove(other)
        return [message]

    def _bury(self, member: Crew, waiting: deque[Task]) -> list[Event]:
        """A worker is gone: another takes its place, and its job goes back to the queue."""
        code = self._end(member)
        self._crew.remove(member)
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                return [Fatal(f"worker processes die as soon as they start ({_cause(code)}); see {worker.LOG}")]
        self._crew.append(self._hire(member.device))
        text = f"a worker died ({_cause(code)}) and was replaced"
        if not member.task:
            return [Note(text)]
        where = f"{member.task.job.cell}, {len(member.task.job.units)} questions"
        return [Note(f"{text}; it was at {where}"), *self._again(member.task, f"worker died: {_cause(code)}", waiting)]

    def _again(self, task: Task, error: str, waiting: deque[Task]) -> list[Event]:
        """Once more, then in halves; a single question that failed again is given up, by name."""
        job = task.job
        if fault := self._brake.fault(job.cell):  # another worker was still at it when the cell was given up
            return [_given_up(job, fault)]
        if task.tries < 2:
            waiting.appendleft(task)
            return []
        if len(job.units) == 1:
            self._brake.failed(job.cell, error)
            done = Done(job, (job.record(0, error=f"question {job.questions[0].id}: {error}"),))
            return [done, *self._give_up(job.cell, waiting)]
        middle = len(job.units) // 2
        halves = (job.part(0, middle), job.part(middle, len(job.units)))
        # one try each is enough: the whole has failed twice, so that this is not bad luck
        waiting.extendleft(Task(half, tries=1, whole=False) for half in reversed(halves))
        if not task.whole:
            return []
        return [Note(f"{job.cell}: {len(job.units)} questions failed twice ({error}); trying them in halves")]

    def _give_up(self, cell: str, waiting: deque[Task]) -> list[Event]:
        """Error records for all that is left of a cell whose questions all meet the same fault."""
        fault = self._brake.fault(cell)
        rest = [task for task in waiting if task.job.cell == cell] if fault else []
        if not rest:
            return []
        for task in rest:
            waiting.remove(task)
        left = sum(len(task.job.units) for task in rest)
        return [Note(f"{cell}: {left} questions {fault}"), *(_given_up(task.job, fault) for task in rest)]

    def _hire(self, device: str) -> Crew:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=worker.main, args=(theirs, self._settings, device), daemon=True)
        # blocked until the worker ignores it: Ctrl-C while it starts would print its traceback
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # so that the pipe ends with its worker
        return Crew(process, mine, device)

    @staticmethod
    def _end(member: Crew) -> int | None:
        """Close the pipe and wait for the process, at most PATIENCE; its exit code."""
        member.pipe.close()
        member.process.join(PATIENCE)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        return member.process.exitcode


def _questions(job: Job) -> tuple[str, ...]:
    return tuple(q.id for q in job.questions)


def _given_up(job: Job, fault: str) -> Done:
    return Done(job, tuple(job.record(i, error=f"question {q.id}: {fault}") for i, q in enumerate(job.questions)))


def _choose(member: Crew, waiting: Iterable[Task]) -> Task:
    """The job that saves a worker most: of the model it holds, of the earliest cell, on questions it has seen.

    The clean answers of these are at hand. Cells come one after the other, so that a stopped run has whole ones; those
    that show another entry's images come last, when that entry's own cells have made them.
    """
    able = [task for task in waiting if task.job.source is None] or list(waiting)
    tasks = [task for task in able if task.job.model.name == member.model] or able
    cell = [task for task in tasks if task.job.cell == tasks[0].job.cell]
    return next((task for task in cell if _questions(task.job) in member.seen), cell[0])


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
    return f"{name}, perhaps out of memory" if -code == signal.SIGKILL else name
