"""What a run says while it works, on stderr: a bar with ETA on a terminal, a line now and then off it, or nothing."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self


class Reporter(Protocol):
    """The runner's audience. `work` is in units of one forward pass, so that an ETA does not take PGD for a glance."""

    def start(self, title: str, total: int, done: int, work: float) -> None:
        """A run of `total` units begins; `done` of them are in the journal; the rest costs `work`."""

    def advance(self, label: str, units: int, errors: int, work: float) -> None:
        """`units` more are in the journal, `errors` of them without a verdict."""

    def tick(self) -> None:
        """Called a few times a second."""

    def say(self, message: str) -> None: ...

    def stop(self) -> None: ...


@dataclass
class QuietReporter:
    """Says nothing at all."""

    def start(self, title: str, total: int, done: int, work: float) -> None:
        return

    def advance(self, label: str, units: int, errors: int, work: float) -> None:
        return

    def tick(self) -> None:
        return

    def say(self, message: str) -> None:
        return

    def stop(self) -> None:
        return


@dataclass
class PlainReporter:
    """One line every `every` seconds, without control codes; the first and the last always."""

    every: float = 5.0
    total: int = 0
    done: int = 0
    errors: int = 0
    label: str = ""
    work: float = 0.0
    worked: float = 0.0
    began: float = 0.0
    spoke: float = 0.0
    changed: bool = False

    def start(self, title: str, total: int, done: int, work: float) -> None:
        self.total, self.done, self.work = total, done, work
        self.spoke = time.monotonic()
        self.say(f"{title}: {total} units, {done} already in the journal")

    def advance(self, label: str, units: int, errors: int, work: float) -> None:
        self.label, self.changed = label, True
        self.done += units
        self.errors += errors
        if self.began:
            self.worked += work
        else:
            # the clock starts with the first results: loading says nothing about speed
            self.began, self.work = time.monotonic(), self.work - work

    def tick(self) -> None:
        if self.changed and time.monotonic() - self.spoke >= self.every:
            self._line()

    def _line(self) -> None:
        self.spoke, self.changed = time.monotonic(), False
        left = self.work - self.worked
        seconds = (self.spoke - self.began) * left / self.worked if self.worked else 0.0
        parts = [f"{self.done}/{self.total} units"]
        if left > 0 and self.worked:
            parts.append(f"about {clock(seconds)} left")
        if self.errors:
            parts.append(f"{self.errors} errors")
        self.say(", ".join([*parts, self.label]))

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.changed:
            self._line()


@dataclass
class RichReporter:
    """A progress bar on stderr whose share and ETA follow work, not units."""

    _bar: Any = None
    _task: Any = None
    _done: int = 0
    _total: int = 0
    _errors: int = 0
    _label: str = field(default="starting", repr=False)

    def start(self, title: str, total: int, done: int, work: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._done, self._total = done, total
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[units]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # chunks take a while: estimate over minutes, not over rich's default 30 seconds
            speed_estimate_period=600,
            transient=False,
        )
        self._task = self._bar.add_task(self._label, total=max(work, 1e-9), units=self._units())
        self._bar.start()
        self.say(f"{title}: {total} units, {done} already in the journal")

    def _units(self) -> str:
        errors = f", {self._errors} errors" if self._errors else ""
        return f"{self._done}/{self._total}{errors}"

    def advance(self, label: str, units: int, errors: int, work: float) -> None:
        self._done += units
        self._errors += errors
        self._label = label
        self._bar.update(self._task, advance=work, description=label, units=self._units())

    def tick(self) -> None:
        return

    def say(self, message: str) -> None:
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_reporter(*, quiet: bool = False) -> Reporter:
    """The reporter that suits where stderr goes."""
    if quiet:
        return QuietReporter()
    return RichReporter() if sys.stderr.isatty() else PlainReporter()


@dataclass
class Reporting:
    """Stops a reporter however the run ends, so that a terminal is left as it was."""

    reporter: Reporter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.stop()


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
