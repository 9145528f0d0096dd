"""What the engine costs, and how far it carries: `python benchmarks/engine.py [--quick] [--json]`.

**Overhead.** One worker, an entry that answers at once: the time between answers beside what the worker itself took,
which it notes in its records; dealing, pickling and the journal's fsync are in it. Target: under 5 ms a unit.

**Throughput.** Two workers against one, local and through Ray, on an entry that keeps its core busy for a known time.
Target: 1.8 times. Wants two idle cores.

**64 workers.** A dry run of the default suite's conditions on all 17,662 questions of OmniMedVQA's test split, with six
entries: real plan, dispatcher, messages, journal and export, simulated workers (benchmarks/simulation.py). Targets: 95%
utilisation, the journal merged in under a minute, a coordinator of less than 1 GB. `--records` takes the seconds of a
unit from a run of one's own.

**100,000 units.** Targets: planned in 10 s, resumed in 5 s; a scan of twice as many keeps the same bytes a unit, and
needs no more memory beside them.

`--json`: `cases` as every benchmark has them (`peer`: the work alone, or one worker), `targets`, `details`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import reporting
import simulation
from PIL import Image

from safemed_bench.core.journal import Journal
from safemed_bench.core.registry import load_plugin_file
from safemed_bench.core.types import Question
from safemed_bench.datasets.base import Dataset
from safemed_bench.models.card import resolve
from safemed_bench.run.engines import Means, open_engine
from safemed_bench.run.messages import Done, Fatal, Job, ModelFailed, Ready, Settings
from safemed_bench.run.plans import jobs_of
from safemed_bench.suite.plan import build_plan
from safemed_bench.suite.schema import Suite

PLUGIN = Path(__file__).with_name("engine_plugin.py")
SIDE = 64
PARTS = ("overhead", "throughput", "workers", "units")


@dataclass(frozen=True)
class Size:
    """idle: units of the overhead. busy: units of the throughput, of `seconds` each. questions, workers: of the dry
    run. units: of the last part."""

    idle: int
    busy: int
    seconds: float
    questions: int
    workers: int
    units: int


FULL = Size(2000, 600, 0.05, simulation.QUESTIONS, 64, 100_000)
QUICK = Size(400, 120, 0.02, 1000, 8, 10_000)


@dataclass(frozen=True)
class Figure:
    """A number with its target: at most, or at least where it says so."""

    name: str
    value: float
    target: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.least else self.value < self.target

    def row(self, quick: bool) -> dict[str, Any]:
        """`met` is None where the size is not that of the target."""
        target = f"{'>=' if self.least else '<'} {self.target:g}"
        return {"name": self.name, "value": self.value, "target": target, "met": None if quick else self.met}


@dataclass(frozen=True)
class Drive:
    """A run's answers in the order they came: (second, units, seconds that the worker took for them)."""

    ready: float
    answers: tuple[tuple[float, int, float], ...]
    verdicts: tuple[tuple[str, bool | None], ...]

    @property
    def after(self) -> tuple[float, int, float]:
        """Wall seconds, units and work seconds after the first answer that found all workers up."""
        late = [answer for answer in self.answers if answer[0] > self.ready]
        if 2 * len(late) < len(self.answers):
            raise SystemExit("half of the work was done before all workers were up: too little of it, or too few cores")
        return late[-1][0] - late[0][0], sum(a[1] for a in late[1:]), sum(a[2] for a in late[1:])


def jobs_for(entry: str, units: int, chunk: int, folder: Path) -> tuple[Job, ...]:
    path = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    questions = tuple(
        Question(f"q{i}", str(path), "0", "What is shown?", ("a", "b"), i % 2, "CT", "type", "bench", "test")
        for i in range(units)
    )
    run = {"chunk": chunk, "device": "cpu"}
    suite = Suite.model_validate({"name": "bench", "models": [entry], "conditions": ["clean"], "run": run})
    plan = build_plan(suite, Dataset("bench", "BENCH", "0", questions), [resolve(m) for m in suite.models])
    return jobs_of(plan)


def drive(engine: str, workers: int, entry: str, units: int, chunk: int) -> Drive:
    """A run as run/__init__.py has it, but for the reports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = jobs_for(entry, units, chunk, folder)
        settings = Settings(folder, SIDE, "pad", "fp32", None, (str(PLUGIN),))
        ready, answers, verdicts = 0.0, [], {}
        with (
            Journal(folder) as journal,
            open_engine(settings, Means(engine, None, workers, "cpu"), len(jobs)) as opened,
        ):
            for event in opened.run(jobs):
                match event:
                    case Done(records=records):
                        journal.append(records)
                        answers.append((time.perf_counter(), len(records), sum(r.seconds for r in records)))
                        verdicts |= {r.question_id: r.correct for r in records}
                    case Ready():
                        ready = time.perf_counter()
                    case Fatal(error=error) | ModelFailed(error=error):
                        raise SystemExit(error)
        return Drive(ready, tuple(answers), tuple(sorted(verdicts.items())))


def engines() -> Iterator[str]:
    yield "local"
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        print("engine ray is left out: the extra [ray] is not installed", file=sys.stderr)
    else:
        yield "ray"


# -- the parts; each gives cases, figures and details

Found = tuple[list[dict[str, Any]], list[Figure], dict[str, Any]]


def overhead(size: Size) -> Found:
    cases, figures, details = [], [], {}
    for engine in engines():
        for chunk in (50, 4):
            found = drive(engine, 1, "bench_idle", size.idle, chunk)
            wall, units, work = found.after
            name = f"{engine}, chunks of {chunk}"
            cases.append(reporting.row(f"{name}: {units} units", [wall], "the work alone", [work], _right(found)))
            figures.append(Figure(f"overhead of {name}, ms a unit", round((wall - work) / units * 1000, 3), 5))
    return cases, figures, details


def throughput(size: Size) -> Found:
    os.environ["BENCH_SECONDS"] = str(size.seconds)
    cases, figures, details = [], [], {"seconds_a_unit": size.seconds}
    for engine in engines():
        one, two = (drive(engine, workers, "bench_busy", size.busy, 4) for workers in (1, 2))
        each = [wall / units for wall, units, _ in (one.after, two.after)]
        same = one.verdicts == two.verdicts
        cases.append(reporting.row(f"{engine}: two workers, a unit", [each[1]], "one worker", [each[0]], same))
        figures.append(Figure(f"throughput of two workers, {engine}, times", round(each[0] / each[1], 3), 1.8, True))
    return cases, figures, details


def workers(size: Size, given: argparse.Namespace, folder: Path) -> Found:
    clock = simulation.CLOCKS[given.cpu_time]
    run = simulation.apart(simulation.dry_run, folder, size.questions, size.workers, given.records, clock)
    merged = simulation.apart(simulation.merge, folder, size.questions, clock)
    name = f"{size.workers} workers, {run['units']:,} units"
    figures = [
        Figure(f"{name}: utilisation", run["utilisation"], 0.95, True),
        Figure(f"{name}: journal merge, s", merged["merge_s"], 60),
        Figure(f"{name}: coordinator, MB", max(run["coordinator_peak_mb"], merged["peak_mb"]), 1024),
    ]
    return [], figures, {"dry_run": run, "merge": merged}


def units(size: Size, given: argparse.Namespace, folder: Path) -> Found:
    found = simulation.many_units(folder, size.units, simulation.CLOCKS[given.cpu_time])
    name = f"{found['units']:,} units"
    kept, beside = found["index_bytes_a_unit"], found["scan_transient_mb"]
    figures = [
        Figure(f"{name}: plan, s", found["plan_s"], 10),
        Figure(f"{name}: resume scan, s", found["resume_scan_s"], 5),
        Figure(f"{name}: bytes a unit, twice as many", round(kept[1] / kept[0], 2), 1.5),
        Figure(f"{name}: memory of the scan beside, twice as many", round(beside[1] / beside[0], 2), 1.5),
    ]
    return [], figures, {"many_units": found}


def _right(found: Drive) -> bool:
    """Every unit once, with the verdict that an answer of A has."""
    return all(right == (int(name[1:]) % 2 == 0) for name, right in found.verdicts)


def table(cases: list[dict[str, Any]], targets: list[dict[str, Any]]) -> str:
    facts = f"{len(os.sched_getaffinity(0))} core(s), images of {SIDE} px"
    lines = [reporting.table(cases, facts), ""] if cases else []
    said = {None: "(size too small)", True: "met", False: "MISSED"}
    for row in targets:
        lines.append(f"{row['name']:<58}{row['value']:>12,}  {row['target']:<8}{said[row['met']]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="one part, any number of times; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute; no target is judged by them")
    parser.add_argument("--records", type=Path, help="records.jsonl of a run of the default suite: its seconds a unit")
    parser.add_argument("--folder", type=Path, help="where journals are written, some GB; default a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, where these tell: a busy machine")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    load_plugin_file(PLUGIN)
    cases: list[dict[str, Any]] = []
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=given.folder) as name:
        parts: dict[str, Callable[[], Found]] = {
            "overhead": lambda: overhead(size),
            "throughput": lambda: throughput(size),
            "workers": lambda: workers(size, given, Path(name) / "workers"),
            "units": lambda: units(size, given, Path(name) / "units"),
        }
        for part in given.only or PARTS:
            found = parts[part]()
            cases += found[0]
            figures += found[1]
            details |= found[2]
    targets = [figure.row(given.quick) for figure in figures]
    print(table(cases, targets), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps({"cases": cases, "targets": targets, "details": details}))


if __name__ == "__main__":
    main()
