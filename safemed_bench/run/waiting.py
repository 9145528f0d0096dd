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
    that jobs on the same questions share."""

    job: Job
    asked: int
    tries: int = 0
    whole: bool = True


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
        cells, cell = self._cells(back[0].job), back[0].job.cell
        if cell not in cells:
            cells[cell] = deque()
            order = sorted(cells, key=self._places.__getitem__)
            queues = [cells.pop(name) for name in order]
            cells.update(zip(order, queues, strict=True))
        cells[cell].extendleft(reversed(back))
        self._count += len(back)

    def take(self, model: str, seen: Set[int]) -> Task:
        """The task that saves a worker most: of the model it holds, of the earliest cell, on questions it has seen.

        The clean answers of these are at hand. Raises IndexError where nothing waits.
        """
        if not self._count:
            raise IndexError("nothing waits")
        cells = self._own or self._shown
        cell = next((name for name, tasks in cells.items() if tasks[0].job.model.name == model), next(iter(cells)))
        tasks = cells[cell]
        place = next((i for i, task in enumerate(tasks) if task.asked in seen), 0)
        task = tasks[place]
        del tasks[place]
        if not tasks:
            del cells[cell]
        self._count -= 1
        return task

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
