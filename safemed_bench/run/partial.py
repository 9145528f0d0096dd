"""Certificates on their way: the counts so far of each question, so that a killed certificate goes on where it was.

One file per chunk of a cell, `partial/<cell>/<chunk>-<hash of the unit keys>.jsonl`: a line says how far one unit is,
and the last line of a unit counts. Written by the worker, removed by the parent once the chunk's records are safe. A
part of a chunk that failed as a whole has a file of its own and goes on from the whole's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefacts import artefact_name

if TYPE_CHECKING:
    from .messages import Job

FOLDER = "partial"
EVERY = 1.0
"""Seconds between two writes: at most so much work is done again."""


def path_of(folder: Path, job: Job) -> Path:
    name = artefact_name(job.cell, job.chunk, [unit.key for unit in job.units]).partition("/")[2]
    return folder / FOLDER / Path(name).with_suffix(".jsonl")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Unit key -> its furthest state in the files of the chunk that `path` belongs to."""
    chunk = path.name.rpartition("-")[0]
    held: dict[str, dict[str, Any]] = {}
    for file in sorted(path.parent.glob(f"{chunk}-*.jsonl")):
        for key, state in _lines(file):
            if key not in held or _drawn(state) >= _drawn(held[key]):
                held[key] = state
    return held


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(unit key, state) per line. A line that was torn by a crash says nothing: its samples are drawn again."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
            found = entry["key"], entry["state"]
        except (ValueError, KeyError, TypeError):
            continue
        yield found


def _drawn(state: Mapping[str, Any]) -> int:
    return sum(state["selection"].values()) + sum(state["test"].values())


def discard(folder: Path, job: Job) -> None:
    """The job's records are in the journal. The folder stays: a worker may be about to write the next file into it."""
    if job.kind == "certify":
        path_of(folder, job).unlink(missing_ok=True)


def sweep(folder: Path, settled: Collection[str]) -> None:
    """Once no worker is left: remove the files whose units all have records, such as that of a chunk that was done in
    parts in the end, and the folders that are empty."""
    for path in (folder / FOLDER).glob("*/*.jsonl"):
        if all(key in settled for key, _ in _lines(path)):
            path.unlink()
    for parent in (*(folder / FOLDER).glob("*"), folder / FOLDER):
        with contextlib.suppress(OSError):  # not empty, or never made
            parent.rmdir()


class PartialFile:
    """Appends states, the newest of each unit, every second."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._wrote = path, dict[str, Any](), time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        if not data.endswith(b"\n") and data:
            os.truncate(path, data.rfind(b"\n") + 1)

    def note(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        self._waiting |= states
        if time.monotonic() - self._wrote >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Raises OSError, as on a full disk."""
        lines = [json.dumps({"key": key, "state": state}) + "\n" for key, state in self._waiting.items()]
        with self._path.open("ab", buffering=0) as file:
            file.write("".join(lines).encode())
            os.fsync(file.fileno())
        self._waiting.clear()
        self._wrote = time.monotonic()
