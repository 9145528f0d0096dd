"""What can be compared: run folders, files in them, leaderboard entries, and whole boards, as measured models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..core import journal
from ..core.errors import DataError, UsageError, did_you_mean
from .frames import RECORDS, RUN, Run, Verdicts, assemble, frame_of, load_run, parse_lines, with_worst_cases
from .protocol import Protocol, protocol_of

SETTINGS = "suite.yaml"
BOARD = "board.json"
ENTRIES = "entries"


@dataclass(frozen=True)
class Measured:
    """One model as it was measured. `verdicts` has the worst cases; `settings` is the suite as it was resolved."""

    model: str
    verdicts: Verdicts
    protocol: Protocol
    info: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def conditions(self) -> list[str]:
        return list(self.verdicts.correct.columns)


def load_measured(path: Path | str) -> dict[str, Measured]:
    """Model -> how it was measured. Raises DataError, in plain words where `path` is none of what can be read."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _board(path) if (path / BOARD).is_file() else _run_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.parent.name == ENTRIES and path.suffix == ".json":
        return _entry(path)
    if path.name in (RECORDS, journal.JOURNAL, RUN, "summary.json", SETTINGS) and _has_records(path.parent):
        return _run_folder(path.parent)
    raise DataError(
        f"{path}: a comparison is made question by question and needs to know how they were asked: name a run folder "
        f"({RECORDS} with {RUN} and {SETTINGS}), a leaderboard entry, or the folder of a board"
    )


def load_settings(folder: Path) -> dict[str, Any]:
    """The resolved suite of a run folder as plain values, {} where there is none."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({error})") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: a mapping was expected")
    return settings


def load_entry(path: Path) -> dict[str, Any]:
    """A leaderboard entry, without its records. Raises DataError."""
    return _object(path, ("model", "run", "records", "settings"), "an entry of a leaderboard")


def load_packed(path: Path) -> pd.DataFrame:
    """The records of an entry, packed with gzip, as `frame_of` has them. Raises DataError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            frame = frame_of(parse_lines(lines, path))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if frame.empty:
        raise DataError(f"{path} holds no records")
    return frame


def load_board(folder: Path) -> dict[str, Any]:
    """The terms of a board, its board.json. Raises DataError."""
    return _object(folder / BOARD, ("terms", "questions", "data", "headline"), "the terms of a board")


def _object(path: Path, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    """The JSON object in a file, which has these keys if it is `what` it should be. Raises DataError."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            found[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not {what} ({type(error).__name__}: {error})") from error
    return found


def entry_files(folder: Path) -> list[Path]:
    """The entries of a board, by name."""
    return sorted((folder / ENTRIES).glob("*.json"))


def measured_entry(entry: Mapping[str, Any], frame: pd.DataFrame, board: Mapping[str, Any]) -> Measured:
    """An entry as a measured model; which questions were to be asked is the board's word. Raises DataError."""
    info = {**entry["run"], "questions": board["questions"]}
    found = {m.model: m for m in _measured(assemble(Path(), info, frame), entry["settings"])}
    if list(found) != [entry["model"]]:
        raise DataError(f"the cells of entry {entry['model']} are of {', '.join(found) or 'no model'}")
    return found[entry["model"]]


def pick(
    sides: tuple[Mapping[str, Measured], Mapping[str, Measured]], wanted: str, labels: tuple[str, str] = ("A", "B")
) -> tuple[str, str]:
    """`m` or `m=n` as the names of a model in each of two sides. Raises UsageError for a name that is not there."""
    left, _, right = wanted.partition("=")
    names = (left, right or left)
    for side, name, label in zip(sides, names, labels, strict=True):
        if name not in side:
            raise UsageError(f"--model: {label} has no model '{name}'.{did_you_mean(name, list(side))}")
    return names


def _has_records(folder: Path) -> bool:
    return (folder / RECORDS).is_file() or (folder / journal.JOURNAL).is_file()


def _run_folder(folder: Path) -> dict[str, Measured]:
    return {m.model: m for m in _measured(load_run(folder), load_settings(folder))}


def _entry(path: Path) -> dict[str, Measured]:
    entry = load_entry(path)
    measured = measured_entry(entry, load_packed(path.parent / entry["records"]), load_board(path.parent.parent))
    return {measured.model: measured}


def _board(folder: Path) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for path in entry_files(folder):
        found |= _entry(path)
    if not found:
        raise DataError(f"{folder}: no entry stands on this board")
    return found


def _measured(run: Run, settings: Mapping[str, Any]) -> Iterator[Measured]:
    for verdicts in run.verdicts:
        yield Measured(
            verdicts.model,
            with_worst_cases(verdicts),
            protocol_of(verdicts.model, run.info, settings),
            run.info,
            settings,
        )
