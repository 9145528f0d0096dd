"""leaderboard add, check, build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, SuiteError, UsageError
from . import output as out


def add(
    run: str,
    root: str,
    models: Sequence[str],
    *,
    adaptive: str,
    replace: bool,
    reproduces: bool,
    standard: str,
    as_json: bool,
) -> None:
    """Put models of a run on their board, and build the pages. Raises DataError with all that stands against it."""
    from ..report.board import build as build_pages
    from ..results.boards import add as work
    from ..results.sources import load_settings

    if replace and reproduces:
        raise UsageError("--replace puts another entry in its place, --reproduces adds to it: choose one")
    _check_whole(load_settings(Path(run)))
    entries = work(
        Path(run),
        Path(root),
        tuple(models),
        adaptive=adaptive,
        replace=replace,
        reproduces=reproduces,
        standard=standard,
    )
    pages = build_pages(Path(root))
    if as_json:
        out.print_json({"entries": [str(path) for path in entries], "pages": [str(path) for path in pages]})
    else:
        for path in entries:
            print(path)


def _check_whole(settings: dict[str, Any]) -> None:
    """A run of a shipped suite asked all of its questions, under all of its conditions.

    A suite that is not shipped has no other measure than itself: its first entry sets the terms of its board.
    """
    from ..suite import load_suite, shipped_suites

    name = settings.get("name")
    if name not in shipped_suites():
        return
    try:
        shipped = load_suite(str(name), env={}).to_dict()
    except SuiteError:  # its entries' weights may not be on this machine; then nothing can be said
        return
    changed = [
        f"{part}.{key} is {settings.get(part, {}).get(key)!r}, not {shipped[part].get(key)!r}"
        for part, keys in (
            ("data", ("per_modality", "split", "filter", "resolution", "fit")),
            ("threat", ("norm", "eps")),
        )
        for key in keys
        if settings.get(part, {}).get(key) != shipped[part].get(key)
    ]
    if changed:
        raise DataError(f"the run is not of suite '{name}' as it is shipped: {'; '.join(changed)}")


def check(root: str, *, as_json: bool) -> None:
    """Make every number of every entry again from its records. Raises DataError with all that is wrong."""
    from ..results.board_checks import check_board
    from ..results.sources import BOARD

    found = {
        f"{path.parent.name}/{name}": problems
        for path in sorted(Path(root).glob(f"*/{BOARD}"))
        for name, problems in check_board(path.parent).items()
    }
    wrong = {name: problems for name, problems in found.items() if problems}
    if as_json:
        out.print_json({"ok": not wrong, "entries": found})
    else:
        for name, problems in found.items():
            print(f"{'REJECTED' if problems else 'ok'}  {name}")
        if not found:
            out.note(f"note: no entry stands in {root}")
    if wrong:
        raise DataError("\n".join(f"{name}: {problem}" for name, problems in wrong.items() for problem in problems))


def build(root: str, *, as_json: bool) -> None:
    """Write the boards' README.md and index.html."""
    from ..report.board import build as work

    if not Path(root).is_dir():
        raise UsageError(f"{root}: no such folder")
    pages = work(Path(root))
    if as_json:
        out.print_json({"pages": [str(path) for path in pages]})
    else:
        for path in pages:
            print(path)
