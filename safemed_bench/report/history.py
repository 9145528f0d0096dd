"""What a training left on disk, as the training page needs it: metrics.jsonl, and the config in the finished entry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError
from ..training.log import METRICS

ENTRY = Path("entry") / "entry.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps `begin` + 1 to `end` of a training. config: its part of the training file, {} where that is unknown."""

    name: str
    begin: int
    end: int
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adversary(self) -> Mapping[str, Any]:
        return self.config.get("adversary") or {}

    @property
    def grpo(self) -> Mapping[str, Any]:
        return self.config.get("grpo") or {}


@dataclass(frozen=True, slots=True)
class Line:
    """Values at a step: means since the line before, or those of an `event` ("validation", "robustness")."""

    step: int
    stage: str
    event: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """A training. entry: entry.json as it is, {} where the training has not finished.

    notes: what a reader has to know of the files themselves.
    """

    folder: Path
    lines: tuple[Line, ...]
    stages: tuple[Stage, ...]
    entry: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.entry.get("training") or {}

    @property
    def steps(self) -> int:
        """Steps that are told of."""
        return max((line.step for line in self.lines), default=0)

    @property
    def planned(self) -> int:
        return max(self.steps, self.stages[-1].end if self.stages else 0)

    def of(self, event: str) -> list[Line]:
        """The lines of an event; "" for those of the training steps."""
        return [line for line in self.lines if line.event == event]

    def stage_at(self, step: int) -> int:
        """Index of the stage that a step belongs to."""
        return next((i for i, stage in enumerate(self.stages) if step <= stage.end), len(self.stages) - 1)


def read_history(folder: Path) -> History:
    """Read what a training left in `folder`.

    A last line that is cut off is left out: the training was stopped while it wrote. Raises UsageError where there is
    no metrics.jsonl, DataError with file and line where one is broken otherwise.
    """
    if not (folder / METRICS).is_file():
        raise UsageError(f"{folder} holds no {METRICS}: it is not the folder of a training")
    lines, notes = _lines(folder / METRICS)
    entry = _entry(folder / ENTRY)
    stages = _planned(entry, lines)
    if entry and not stages:
        notes.append(
            f"{ENTRY} is of another training than {METRICS}: it names other stages, so that nothing is told of it here."
        )
        entry = {}
    elif not entry:
        notes.append(
            f"There is no {ENTRY} yet: the training is running, or was stopped. Its config and its data are not known."
        )
    history = History(folder, tuple(lines), stages or _seen(lines), entry, tuple(notes))
    if history.steps < history.planned:
        unseen = f"{METRICS} ends at step {history.steps:,} of {history.planned:,}."
        return History(folder, history.lines, history.stages, entry, (*notes, unseen))
    return history


def _lines(path: Path) -> tuple[list[Line], list[str]]:
    # A cut may go through a character, so that bytes are no UTF-8 there.
    texts = [(n, text) for n, text in enumerate(path.read_bytes().split(b"\n"), 1) if text.strip()]
    lines, notes = list[Line](), list[str]()
    for number, text in texts:
        try:
            lines.append(_line(json.loads(text)))
        except ValueError as error:
            if number != texts[-1][0]:
                raise DataError(f"{path}:{number}  {_why(error)}") from error
            notes.append(f"The last line of {METRICS} is cut off and left out: the training was stopped as it wrote.")
    return sorted(lines, key=lambda line: line.step), notes


def _why(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _line(found: Any) -> Line:
    """Raises ValueError for what no training writes."""
    if not isinstance(found, dict) or type(found.get("step")) is not int or found["step"] < 0:
        raise ValueError("not a line of metrics: an object with a whole number `step` was expected")
    stage, event = found.get("stage", ""), found.get("event", "")
    if not isinstance(stage, str) or not isinstance(event, str) or not (stage or event):
        raise ValueError("not a line of metrics: neither `stage` nor `event` names what it is of")
    values = {k: float(v) for k, v in found.items() if k != "step" and isinstance(v, int | float)}
    return Line(found["step"], stage, event, values)


def _entry(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        entry = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', 1)}  {_why(error)}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{path}:1  not an entry: an object was expected")
    return entry


def _planned(entry: Mapping[str, Any], lines: Sequence[Line]) -> tuple[Stage, ...]:
    """The stages of the entry's config; none where the lines tell of others."""
    stages = list[Stage]()
    for config in (entry.get("training") or {}).get("stages", ()):
        begin = stages[-1].end if stages else 0
        stages.append(Stage(str(config["name"]), begin, begin + int(config["steps"]), config))
    told = [line for line in lines if not line.event]
    fits = all(any(s.name == line.stage and s.begin < line.step <= s.end for s in stages) for line in told)
    return tuple(stages) if fits else ()


def _seen(lines: Sequence[Line]) -> tuple[Stage, ...]:
    """The stages that the lines tell of. One begins where the last line of the one before ends: a guess, as a line is
    a mean over several steps."""
    stages = list[Stage]()
    for line in lines:
        if line.event:
            continue
        if stages and stages[-1].name == line.stage:
            stages[-1] = Stage(line.stage, stages[-1].begin, line.step)
        else:
            stages.append(Stage(line.stage, stages[-1].end if stages else 0, line.step))
    return tuple(stages)


def seconds(history: History) -> float:
    """Time of the training steps, without validation; 0 where no line tells the speed."""
    return sum(steps / rate for steps, rate in _speeds(history) if rate > 0 and math.isfinite(rate))


def _speeds(history: History) -> Iterator[tuple[int, float]]:
    """(steps, steps per second) of each line of the training steps."""
    before = 0
    for line in history.of(""):
        yield line.step - before, line.values.get("steps_per_second", 0.0)
        before = line.step
