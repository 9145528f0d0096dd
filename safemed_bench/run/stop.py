"""How a run is asked to stop: Ctrl-C, and SIGTERM as schedulers send it."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from ..core.errors import IncompleteError


class RunInterruptedError(IncompleteError):
    """Ctrl-C. What is done is on disk."""

    exit_code = 130


class StopSignals:
    """Notes the first SIGINT or SIGTERM in `received`, for the run to look at; a second Ctrl-C stops at once.

    Outside the main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def error(self, folder: Path, safe: int, total: int) -> IncompleteError:
        """What to raise: 130 for Ctrl-C, 3 for SIGTERM; the message says how to go on."""
        kind, word = (
            (RunInterruptedError, "interrupted") if self.received == signal.SIGINT else (IncompleteError, "terminated")
        )
        return kind(f"{word}: {safe_message(folder, safe, total)}")


def safe_message(folder: Path, safe: int, total: int) -> str:
    """What a run that stops has kept, and the command that goes on with it."""
    return f"{safe} of {total} units are safe in {folder}; go on with\n  {resume_command(sys.argv)}"


def resume_command(argv: list[str]) -> str:
    """The command that goes on with this run: the same one, but never with --no-resume."""
    program = Path(argv[0])
    start = [sys.executable, "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *(word for word in argv[1:] if word != "--no-resume")])
