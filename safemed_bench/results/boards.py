"""Putting a run on a leaderboard: one folder a board, one JSON file an entry, its records beside it."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UsageError, did_you_mean
from ..core.journal import write_atomic
from .board_checks import check_entry, check_reproduction, disagreements
from .entries import REPRODUCED, dump, make_board, make_entry, pack
from .frames import frame_of, read_records
from .sources import (
    BOARD,
    ENTRIES,
    Measured,
    load_board,
    load_entry,
    load_measured,
    load_packed,
    measured_entry,
)
from .standards import CASCADE, check_standard, standard_of

REAL = "omnimedvqa"
PARTS = ("records", "records_sha256", "run", "settings", "numbers", "best_known_attack", "flags")
"""What a reproduction keeps of the entry that it would be."""


def board_name(info: Mapping[str, Any]) -> str:
    """The folder of a run's board: its suite and, where the data is not OmniMedVQA, the data's name behind it."""
    data = info["data"]["name"]
    return info["suite"] if data == REAL else f"{info['suite']}-{data}"


def add(
    run: Path,
    root: Path,
    models: tuple[str, ...] = (),
    *,
    adaptive: str = "",
    replace: bool = False,
    reproduces: bool = False,
    standard: str = "",
) -> list[Path]:
    """Put the models of a run (all, or those named) on the board of their suite and data; returns the entries' paths.

    reproduces: the run measures models again that are on the board; they are then marked so. standard: the least that
    entries of a new board are attacked with, by default safemed-attack; that of a board which is there stays. Nothing
    is written where anything is wrong: raises DataError with all of it, UsageError for an unknown model or standard,
    and for a standard that is not the board's.
    """
    measured = load_measured(run)
    for name in models:
        if name not in measured:
            raise UsageError(f"--model: {run} has no model '{name}'.{did_you_mean(name, list(measured))}")
    chosen = [measured[name] for name in models or measured]
    for one in chosen:
        if not one.info.get("suite") or not one.info.get("headline") or not one.settings:
            raise DataError(f"{run}: without run.json and suite.yaml nobody can tell how it was measured")
    folder = root / board_name(chosen[0].info)
    board = _board(folder, chosen[0], check_standard(standard) if standard else "")
    files: dict[Path, bytes] = {folder / BOARD: dump(board)}
    problems: list[str] = []
    for one in chosen:
        path = folder / ENTRIES / f"{one.model}.json"
        if reproduces and not path.is_file():
            found = ["is not on the board, so that nothing is there to be reproduced"]
        elif reproduces:
            found = _reproduce(one, run, path, board, files, adaptive)
        elif path.is_file() and not replace:
            found = [f"stands on the board already ({path}); --replace, or --reproduces for a second measurement"]
        else:
            found = _enter(one, run, path, board, files, adaptive)
        problems += [f"{one.model}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{run} cannot go on the board {folder.name}:\n  " + "\n  ".join(problems))
    for path, data in files.items():
        write_atomic(path, data)
    return [folder / ENTRIES / f"{one.model}.json" for one in chosen]


def _board(folder: Path, first: Measured, standard: str) -> dict[str, Any]:
    """The terms that are there, or new ones."""
    if not (folder / BOARD).is_file():
        return make_board(first, standard or CASCADE)
    board = load_board(folder)
    if standard and standard != standard_of(board):
        raise UsageError(
            f"--standard {standard}: the board {folder.name} has {standard_of(board)}, for all its entries"
        )
    return board


def _enter(
    one: Measured, run: Path, path: Path, board: Mapping[str, Any], files: dict[Path, bytes], adaptive: str
) -> list[str]:
    """Adds an entry and its records to `files`; returns what is wrong with it."""
    entry, frame, packed = _made(one, run, f"{one.model}.records.jsonl.gz", adaptive)
    files |= {path: dump(entry), path.parent / entry["records"]: packed}
    return check_entry(entry, frame, board)


def _reproduce(
    one: Measured, run: Path, path: Path, board: Mapping[str, Any], files: dict[Path, bytes], adaptive: str
) -> list[str]:
    """The same for an entry that is there, with a second measurement of its model."""
    entry = load_entry(path)
    said = adaptive or entry.get("adaptive", "")
    second, frame, packed = _made(one, run, f"{one.model}.again.records.jsonl.gz", said)
    marked = {**entry, "status": REPRODUCED, "reproduction": {key: second[key] for key in PARTS}}
    files |= {path: dump(marked), path.parent / second["records"]: packed}
    if problems := check_reproduction(entry, second, frame, board):
        return problems
    first = measured_entry(entry, load_packed(path.parent / entry["records"]), board)
    return disagreements(first, measured_entry(second, frame, board))


def _made(one: Measured, run: Path, name: str, adaptive: str) -> tuple[dict[str, Any], Any, bytes]:
    """An entry, its records as a frame, and packed."""
    records = [record for record in read_records(run) if record.model == one.model]
    packed = pack(records)
    return make_entry(one, name, sha256(packed).hexdigest(), adaptive), frame_of(records), packed
