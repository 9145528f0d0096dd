"""The local engine: worker processes, one job each at a time, dealt as they come free. It never imports torch.

A worker that dies is replaced; what becomes of its job is dispatch.py's.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Self

from . import worker
from .dispatch import Dispatch, Event, Member
from .messages import Fatal, Job, Ready, Settings

TICK = 0.25
PATIENCE = 2.0
"""Seconds a worker gets to end before it is killed."""

START_FAILURES = 3
"""Workers that die before they are up, one after the other, until the run is given up."""


@dataclass(slots=True, kw_only=True)
class Crew(Member):
    """One worker process."""

    process: SpawnProcess
    pipe: Connection


class LocalEngine:
    """Workers on the given devices, as a context manager: leaving it ends them all."""

    def __init__(self, settings: Settings, devices: Sequence[str]) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("spawn")
        self._crew: list[Crew] = []
        self.devices = tuple(devices)
        self._failed_starts = 0

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
        dispatch = Dispatch(jobs)
        self._crew = [self._hire(device) for device in self.devices[: len(dispatch.waiting)]]
        while dispatch.waiting or any(member.task for member in self._crew):
            for member in self._crew:
                self._deal(member, dispatch)
            events = [event for member in self._heard() for event in self._listen(member, dispatch)]
            yield from events or (None,)
            if any(isinstance(event, Fatal) for event in events):
                return

    def _heard(self) -> list[Crew]:
        pipes = {member.pipe: member for member in self._crew}
        return [pipes[pipe] for pipe in wait(list(pipes), TICK) if isinstance(pipe, Connection)]

    def _deal(self, member: Crew, dispatch: Dispatch) -> None:
        if (order := dispatch.deal(member)) is None:
            return
        try:
            member.pipe.send(order)
        except OSError:
            return  # it just died; `_listen` will meet the end of its pipe

    def _listen(self, member: Crew, dispatch: Dispatch) -> list[Event]:
        try:
            message = member.pipe.recv()
        except (EOFError, OSError):
            return self._bury(member, dispatch)
        events = dispatch.heard(member, message)
        if isinstance(message, Ready):
            self._failed_starts = 0
        self._deal(member, dispatch)  # before its records are written, so that it need not wait for the disk
        return events

    def _bury(self, member: Crew, dispatch: Dispatch) -> list[Event]:
        """A worker is gone: another takes its place."""
        code = self._end(member)
        self._crew.remove(member)
        if not member.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                return [Fatal(f"worker processes die as soon as they start ({_cause(code)}); see {worker.LOG}")]
        self._crew.append(self._hire(member.device))
        return dispatch.lost(member, _cause(code))

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
        return Crew(device, process=process, pipe=mine)

    @staticmethod
    def _end(member: Crew) -> int | None:
        """Close the pipe and wait for the process, at most PATIENCE; its exit code."""
        member.pipe.close()
        member.process.join(PATIENCE)
        if member.process.is_alive():
            member.process.kill()
            member.process.join()
        return member.process.exitcode


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
    return f"{name}, perhaps out of memory" if -code == signal.SIGKILL else name
