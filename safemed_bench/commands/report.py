"""report: the HTML page of what is in a folder, its tables, its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..core.errors import UsageError, did_you_mean
from ..core.journal import JOURNAL
from . import output as out

RECORDS, TRAINING = "records.jsonl", "metrics.jsonl"
"""The file that tells a folder of measurements (or its journal, where it was stopped), and that of a training."""

Format = Literal["latex", "markdown", "csv"]


def report(folder: str, *, tables: list[Format], figures: bool, as_json: bool) -> None:
    """Write the page of a run or of a training and print where it is; with `tables`, print the run's tables instead.

    figures: also those of a run as SVG and PDF files.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.{_neighbours(path)}")
    if not is_run(path) and not (path / TRAINING).is_file():
        raise UsageError(f"{path} holds neither {TRAINING} (a training) nor {RECORDS} (a run)")
    if len(tables) > 1 or (tables and (figures or as_json)):
        raise UsageError("one of --latex, --markdown, --csv at a time, without --figures and --json")
    if is_run(path):
        return _tables(path, tables[0]) if tables else _run(path, figures, as_json)
    if tables or figures:
        raise UsageError(f"{path} is the folder of a training; tables and figures for papers are made of a run")
    from ..report.training import write_training_page

    _told({"kind": "training", "page": str(write_training_page(path))}, as_json)


def is_run(path: Path) -> bool:
    return (path / RECORDS).is_file() or (path / JOURNAL).is_file()


def _run(path: Path, figures: bool, as_json: bool) -> None:
    from ..report.run import PAGE, write_figures, write_page
    from ..report.source import read_source

    source = read_source(path)
    write_page(source)
    told: dict[str, Any] = {"kind": "run", "page": str(path / PAGE)}
    if figures:
        told["figures"] = [str(figure) for figure in write_figures(source)]
    _told(told, as_json)


def _tables(path: Path, format: Format) -> None:
    from ..results.formats import to_csv, to_latex, to_markdown
    from ..results.frames import load_run
    from ..results.summary import summary_of
    from ..results.tables import build

    write = {"latex": to_latex, "markdown": to_markdown, "csv": to_csv}[format]
    print("\n".join(write(table) for table in build(summary_of(load_run(path)))), end="")


def _told(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        out.print_json(told)
    else:
        print("\n".join([*told.get("figures", ()), told["page"]]))


def _neighbours(path: Path) -> str:
    """What may have been meant: folders beside the one that is not there."""
    if not path.parent.is_dir():
        return ""
    beside = [f for f in path.parent.iterdir() if (f / TRAINING).is_file() or is_run(f)]
    return did_you_mean(str(path), sorted(map(str, beside)))
