"""What a training run writes and shows: metrics.jsonl, and a progress bar on a terminal or plain lines off it."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"


class TrainLog:
    """Means of the values of the last steps, one JSON line each `log_every` steps, and one per validation.

    Lines written after the step that a run resumes from are dropped, so that a step stands in the file once. Of
    several processes only the first, `main`, writes and shows anything.
    """

    def __init__(self, folder: Path, total: int, begun: int, quiet: bool, main: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.total, self.begun, self._main = folder / METRICS, total, begun, main
        quiet = quiet or not main
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._seconds: list[float] = []
        self._quiet, self._said = quiet, time.monotonic()
        self._show = not quiet and sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._show,
        )

    def __enter__(self) -> Self:
        if self._main:
            kept = [line for line in self._lines() if _step(line) <= self.begun]
            self.path.write_text("".join(line + "\n" for line in kept))
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.total, completed=self.begun)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.is_file() else []

    def step(self, number: int, stage: str, values: dict[str, float], every: int, seconds: float) -> None:
        for name, value in values.items():
            self._sums[name].append(value)
        self._seconds.append(seconds)
        done = number + 1
        self._bar.update(self._task, completed=done, description=stage)
        if done % every and done != self.total:
            return
        means = {name: sum(v) / len(v) for name, v in sorted(self._sums.items())}
        rate = len(self._seconds) / sum(self._seconds)
        self._sums.clear()
        self._seconds.clear()
        self._write({"step": done, "stage": stage, **means, "steps_per_second": rate})
        if not self._show and time.monotonic() - self._said > 10:
            losses = "  ".join(f"{k} {v:.3f}" for k, v in means.items() if k.startswith("loss"))
            left = (self.total - done) / rate
            self.say(f"{stage} {done}/{self.total}  {losses}  {left / 60:.1f} min left")

    def event(self, step: int, name: str, values: dict[str, float]) -> None:
        """A validation or another measurement; also shown."""
        self._write({"step": step, "event": name, **values})
        self.say(f"{name} at step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))

    def say(self, text: str) -> None:
        if not self._quiet:
            self._bar.console.print(text, highlight=False) if self._show else print(text, file=sys.stderr, flush=True)
            self._said = time.monotonic()

    def _write(self, line: dict[str, object]) -> None:
        if self._main:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    """The step of a line; infinity for one that a killed run left half-written."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return float("inf")
