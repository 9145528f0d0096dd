"""A leaderboard with one good entry, and ways to spoil it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import CLEAN, PGD, write

from safemed_bench.core.errors import DataError
from safemed_bench.results.board_checks import check_board
from safemed_bench.results.boards import add

N = 60
BASE = {CLEAN: "1" * 54 + "0" * 6, "blank": "10" * 30, "shuffled": "1000" * 15, PGD: "1" * 40 + "0" * 20}
AGAIN = {**BASE, PGD: "0" + "1" * 40 + "0" * 19}
SEED = {"run": {"seed": 1}}
Entry = dict[str, Any]


def with_one_entry(folder: Path) -> Path:
    """A folder of boards with one good entry, `m`."""
    add(write(folder / "run", BASE), folder / "boards", standard="pgd")
    return folder / "boards"


def board(root: Path) -> Path:
    return root / "small-phantom"


def problems(root: Path, name: str = "m.json") -> str:
    return "\n".join(check_board(board(root))[name])


def edit(root: Path, change: Callable[[Entry], Any]) -> None:
    path = board(root) / "entries" / "m.json"
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def edit_records(root: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None], *, seal: bool = True) -> None:
    """Change or drop records; with `seal` the entry's digest is forged to fit."""
    path = board(root) / "entries" / "m.records.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    kept = [json.dumps(new) for line in lines if (new := change(line)) is not None]
    path.write_bytes(gzip.compress("\n".join(kept).encode()))
    if seal:
        edit(root, lambda entry: entry.update(records_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def refused(root: Path, run: Path, **options: Any) -> str:
    before = sorted(root.rglob("*"))
    with pytest.raises(DataError) as caught:
        add(run, root, **options)
    assert sorted(root.rglob("*")) == before, "nothing is written where anything is wrong"
    return str(caught.value)
