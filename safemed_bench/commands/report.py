"""report: the HTML page of what is in a folder."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import UsageError, did_you_mean
from . import output as out

RUN, TRAINING = "summary.json", "metrics.jsonl"
"""The file that tells a folder of measurements, and that of a training."""


def report(folder: str, *, as_json: bool) -> None:
    """Write the page of a training folder, and print where it is."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder.{_neighbours(path)}")
    if not (path / TRAINING).is_file():
        raise UsageError(_refusal(path))
    from ..report.training import write_training_page

    page = write_training_page(path)
    if as_json:
        out.print_json({"kind": "training", "page": str(page)})
    else:
        print(page)


def _refusal(path: Path) -> str:
    """Why there is no page of this folder."""
    if (path / RUN).is_file():
        return (
            f"{path} is the folder of a run, and the HTML report of a run is not there yet: "
            f"{path / RUN} and {path / 'tables'} hold its results"
        )
    return f"{path} holds neither {TRAINING} (a training) nor {RUN} (a run): there is nothing to report"


def _neighbours(path: Path) -> str:
    """What may have been meant: folders beside the one that is not there."""
    if not path.parent.is_dir():
        return ""
    beside = [f for f in path.parent.iterdir() if (f / TRAINING).is_file() or (f / RUN).is_file()]
    return did_you_mean(str(path), sorted(map(str, beside)))
