"""Executes a Plan: deals its chunks to workers and writes what they find into the journal. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..core.errors import IncompleteError, ModelError, UsageError
from ..core.journal import Journal, disk_full, full_message, scan, write_atomic
from ..models.api_calls import move_aside
from . import artefacts, partial
from .dispatch import Event
from .engines import Engine, Means, open_engine
from .messages import Done, Fatal, Job, ModelFailed, Note, Ready
from .plans import jobs_of, settings_of, units_left
from .progress import Reporter, Reporting, make_reporter
from .provenance import RunFile
from .stop import RunInterruptedError, StopSignals, safe_message

if TYPE_CHECKING:
    from ..suite.plan import Plan

RECORDS = "records.jsonl"
SUITE = "suite.yaml"

__all__ = ["ModelsFailedError", "RunInterruptedError", "RunOutcome", "execute"]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """Units of the plan: all, with a verdict, with an error, without a record; and how long it took."""

    total: int
    done: int
    errors: int
    missing: int
    seconds: float


class ModelsFailedError(ModelError):
    """Some models could not be loaded. All the rest is done, as `outcome` tells."""

    def __init__(self, errors: Sequence[str], outcome: RunOutcome) -> None:
        super().__init__("\n".join(errors))
        self.outcome = outcome


def execute(
    plan: Plan,
    output: Path | str,
    *,
    resume: bool = True,
    retry_errors: bool = False,
    reporter: Reporter | None = None,
    workers: int | str | None = None,
    batch_size: int | str | None = None,
    device: str | None = None,
    engine: str | None = None,
    address: str | None = None,
    plugins: Sequence[str | Path] = (),
) -> RunOutcome:
    """Measure every unit of `plan` that `output` holds no record of; returns when all are there.

    None takes the suite's own word for `workers`, `batch_size`, `device`, `engine` (local or ray) and `address` (of a
    Ray cluster); none of them changes a verdict.
    resume=False moves an old journal aside first. retry_errors measures units again whose record is an error.
    Writes suite.yaml, run.json, journal.jsonl, artefacts/ and, at the end, records.jsonl in the order of the plan.

    Raises UsageError where the folder is in use or cannot be written, DataError for a broken journal, IncompleteError
    (on Ctrl-C its kind RunInterruptedError) where the run had to stop, ModelsFailedError where a model could not be
    loaded (after the cells of all other models). Whatever was measured by then is in the journal.
    """
    output, run = Path(output), plan.suite.run
    settings = settings_of(plan, output, plugins, batch_size)
    with _disk_errors(output), Journal(output, resume=resume) as journal:
        if not resume:
            move_aside(output)
        work = Work(plan, journal, reporter or make_reporter(), retry_errors)
        means = Means(engine or run.engine, address or run.address, workers or run.workers, device or run.device)
        return work.run(open_engine(settings, means, len(work.jobs)) if work.jobs else None)


class Work:
    """One session of a run: what is left to do, and the loop that does it. settled: units that are done."""

    def __init__(self, plan: Plan, journal: Journal, reporter: Reporter, retry_errors: bool) -> None:
        self.plan, self.journal, self.reporter = plan, journal, reporter
        self._retry_errors = retry_errors
        jobs = jobs_of(plan)
        self.total = sum(len(job.units) for job in jobs)
        # A chunk is computed whole or not at all: its composition never depends on where a run was cut.
        self.jobs = tuple(job for job in jobs if self._open(job))
        self.settled = self.total - sum(map(self._open, self.jobs))
        self.began = time.monotonic()
        self.failed_models: dict[str, str] = {}

    def _open(self, job: Job) -> int:
        """Units of a job that this session is to measure."""
        return units_left(job, self.journal.index, self._retry_errors)

    def run(self, engine: Engine | None) -> RunOutcome:
        """None where nothing is left to do."""
        folder = self.journal.folder
        _sweep(folder)
        write_atomic(folder / SUITE, yaml.safe_dump(self.plan.suite.to_dict(), sort_keys=False).encode())
        run_file = RunFile(folder, self.plan, engine.devices if engine else ())
        try:
            with Reporting(self.reporter), StopSignals() as stop:
                self._announce()
                if engine:
                    self._loop(engine, run_file, stop)
        except BaseException as error:
            run_file.finish(type(error).__name__)
            raise
        partial.sweep(folder, self.journal.index)
        self._export()
        outcome = self.outcome()
        run_file.finish("complete" if not outcome.missing else "incomplete", units=outcome.total, errors=outcome.errors)
        if self.failed_models:
            raise ModelsFailedError(tuple(self.failed_models.values()), outcome)
        return outcome

    def _announce(self) -> None:
        say, journal = self.reporter.say, self.journal
        work = sum(job.cost * len(job.units) for job in self.jobs)
        self.reporter.start(self.plan.suite.name, self.total, self.settled, work)
        if journal.aside:
            say(f"the old journal was moved to {journal.aside}")
        if journal.repaired:
            say(f"the journal ended in a torn line, as after a crash; {journal.repaired} bytes were cut off")
        if strangers := len(journal.index) - sum(unit.key in journal.index for unit in self.plan.units):
            say(f"{strangers} records of another plan stay in {journal.path} and are not used")

    def _loop(self, engine: Engine, run_file: RunFile, stop: StopSignals) -> None:
        with engine:
            for event in engine.run(self.jobs):
                self._take(event, run_file)
                self.reporter.tick()
                if stop.received:
                    raise stop.error(self.journal.folder, self.settled, self.total)

    def _take(self, event: Event, run_file: RunFile) -> None:
        match event:
            case Done(job=job, records=records):
                new = self._open(job)
                self.journal.append(records)
                partial.discard(self.journal.folder, job)
                self.settled += new
                errors = sum(bool(record.error) for record in records)
                self.reporter.advance(job.cell, new, errors, job.cost * len(job.units))
            case Ready(hardware=hardware):
                run_file.met(hardware)
            case Note(text=text):
                self.reporter.say(text)
            case ModelFailed(model=name, error=error):
                self.failed_models[name] = error
                self.reporter.say(f"{error}; its cells are left out")
            case Fatal(disk_full=True):
                raise IncompleteError(full_message(self.journal.folder, len(self.journal.index)))
            case Fatal(error=error, kind=kind) if issubclass(kind, IncompleteError):
                raise kind(f"{error}\n{safe_message(self.journal.folder, self.settled, self.total)}")
            case Fatal(error=error, kind=kind):
                raise kind(error)

    def _export(self) -> None:
        """records.jsonl: the records of this plan in its own order, which no timing can change."""
        lines = self.journal.lines(unit.key for unit in self.plan.units)
        write_atomic(self.journal.folder / RECORDS, lines)

    def outcome(self) -> RunOutcome:
        index = self.journal.index
        found = [index.failed(unit.key) for unit in self.plan.units if unit.key in index]
        seconds = time.monotonic() - self.began
        return RunOutcome(self.total, found.count(False), found.count(True), self.total - len(found), seconds)


def _sweep(folder: Path) -> None:
    """Remove the halves of files that a killed run left; the lock says that nobody is writing them."""
    for leftover in [*folder.glob(".*.tmp"), *(folder / artefacts.FOLDER).glob("*/.*.tmp")]:
        leftover.unlink(missing_ok=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written, in words and with the right exit code."""
    try:
        yield
    except PermissionError as error:
        raise UsageError(f"cannot write into {folder}: {error}") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UsageError(f"cannot make the folder {folder}: {error}") from error
    except OSError as error:
        if not disk_full(error):
            raise
        raise IncompleteError(full_message(folder, len(scan(folder).index))) from error
