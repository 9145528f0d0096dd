"""The jobs of a run that wait for a worker, in an order that saves work. Imports no torch.

With thousands of chunks and tens of workers the next job must be found without looking at them all: the queue of a cell
is looked through only for questions that the worker has seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from .messages import Job


@dataclass(slots=True, eq=False)
class Task:
    """A job and how often it was tried. `whole`: as the plan has it, not a part of a job that failed. `asked`: a number
    that jobs on the same questions share. `promised`: a worker reads its images already. `doubtful`: one that read them
    died."""

    job: Job
    asked: int
    tries: int = 0
    whole: bool = True
    promised: bool = False
    doubtful: bool = False


Cells = dict[str, deque[Task]]
"""Cell -> its tasks, in the order of the plan; no queue is empty."""


@dataclass(slots=True)
class Waiting:
    """Cells come one after the other, so that a stopped run has whole ones; those that show another entry's images come
    last, when that entry's own cells have made them."""

    _own: Cells = field(default_factory=dict)
    _shown: Cells = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)
    _numbers: dict[tuple[str, ...], int] = field(default_factory=dict)
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    def add(self, jobs: Iterable[Job]) -> None:
        """Behind all that wait."""
        for job in jobs:
            self._places.setdefault(job.cell, len(self._places))
            self._cells(job).setdefault(job.cell, deque()).append(self.task(job))
            self._count += 1

    def task(self, job: Job, tries: int = 0, whole: bool = True) -> Task:
        questions = tuple(q.id for q in job.questions)
        return Task(job, self._numbers.setdefault(questions, len(self._numbers)), tries, whole)

    def put_back(self, tasks: Iterable[Task]) -> None:
        """Before all else of their cell, in this order; all of one cell."""
        back = list(tasks)
        for task in back:
            task.promised = False
        cells, cell = self._cells(back[0].job), back[0].job.cell
        if cell not in cells:
            cells[cell] = deque()
            order = sorted(cells, key=self._places.__getitem__)
            queues = [cells.pop(name) for name in order]
            cells.update(zip(order, queues, strict=True))
        cells[cell].extendleft(reversed(back))
        self._count += len(back)

    def take(self, model: str, seen: Set[int], promised: Task | None = None) -> Task:
        """The task that saves a worker most: what it was promised, or else of the model it holds, of the earliest cell,
        on questions it has seen and that nobody else was promised.

        The clean answers of these are at hand. Raises IndexError where nothing waits.
        """
        if not self._count:
            raise IndexError("nothing waits")
        task = promised if promised is not None and self._holds(promised) else self._best(model, seen)
        if task is None:  # all that waits was promised to others
            task = next(self._queues_for(model))[0]
        cells, cell = self._cells(task.job), task.job.cell
        cells[cell].remove(task)
        if not cells[cell]:
            del cells[cell]
        self._count -= 1
        return task

    def promise(self, model: str, seen: Set[int]) -> Task | None:
        """What a worker will be given next, unless all else is gone sooner; None where there is nothing to promise.

        Nothing that may have killed a worker: its images must be read by the job that shows them, and nobody else's.
        """
        task = self._best(model, seen)
        if task is None or task.doubtful or task.tries:
            return None
        task.promised = True
        return task

    def _best(self, model: str, seen: Set[int]) -> Task | None:
        """The unpromised task that saves most, None where all that waits is promised."""
        for tasks in self._queues_for(model):
            first = next((task for task in tasks if not task.promised), None)
            if first:
                return next((task for task in tasks if task.asked in seen and not task.promised), first)
        return None

    def _queues_for(self, model: str) -> Iterator[deque[Task]]:
        """Those of the model first, then all, each in the order of the plan."""
        cells = self._own or self._shown
        yield from (tasks for tasks in cells.values() if tasks[0].job.model.name == model)
        yield from cells.values()

    def _holds(self, task: Task) -> bool:
        return task in self._cells(task.job).get(task.job.cell, ())

    def remove_model(self, name: str) -> None:
        """All tasks of a model that cannot be loaded."""
        for cell in [tasks[0].job.cell for tasks in self._queues() if tasks[0].job.model.name == name]:
            self.remove_cell(cell)

    def remove_cell(self, cell: str) -> list[Task]:
        """All tasks of a cell, which are returned."""
        tasks = [*self._own.pop(cell, ()), *self._shown.pop(cell, ())]
        self._count -= len(tasks)
        return tasks

    def _queues(self) -> Iterator[deque[Task]]:
        yield from self._own.values()
        yield from self._shown.values()

    def _cells(self, job: Job) -> Cells:
        return self._shown if job.source else self._own
