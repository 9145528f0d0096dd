"""plan: what a run would do, what of it is done, how long the rest will take, and what of it fits in a budget."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelError, UsageError
from . import output as out
from .prepare import Request, data_problems, output_of, plans_of, suites_of

if TYPE_CHECKING:
    from ..core.journal import Index
    from ..run.estimate import Crew, Rate
    from ..run.messages import Job
    from ..suite.plan import Plan

PROBE = 8
"""Questions of each cell that a probe asks: one of each modality of OmniMedVQA."""

BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True)
class Wish:
    """How a plan's time is to be estimated. probe: questions of each cell, None is PROBE. earlier: folders of runs.
    budget: as written, such as 8h. price: of a worker's hour."""

    probe: int | None = None
    earlier: tuple[str, ...] = ()
    budget: str | None = None
    price: float | None = None

    @property
    def seconds(self) -> float | None:
        """The budget. Raises UsageError."""
        return None if self.budget is None else parse_budget(self.budget)

    def __bool__(self) -> bool:
        return self != Wish()


def parse_budget(text: str) -> float:
    """Seconds of `8h`, `90m` or `1d12h`. Raises UsageError."""
    found = BUDGET.fullmatch(text.strip().lower())
    parts = zip(found.groups(), (86400, 3600, 60, 1), strict=True) if found else ()
    if seconds := sum(float(number) * unit for number, unit in parts if number):
        return seconds
    raise UsageError(f"--budget {text}: a time with its unit was meant, such as 8h, 90m or 1d12h")


def plan(references: Sequence[str], request: Request, wish: Wish, *, output: str | None, as_json: bool) -> None:
    """What a run would do, and what of it is done; with a wish, also the time of what is left.

    Raises ModelError at the end where entries are absent, UsageError for a budget that is no time, or an earlier run
    that is none.
    """
    _ = wish.seconds
    for name in wish.earlier:
        if not (Path(name) / "run.json").is_file():
            raise UsageError(f"--earlier {name}: not the folder of a run, for it has no run.json")
    suites = suites_of(references, request)
    plans, absent = plans_of(suites, request)
    described = []
    for work in plans:
        folder = output_of(work.suite, output, len(suites) > 1)
        described.append(_described(work, folder, request, wish))
        if not as_json:
            _print_plan(described[-1])
    if as_json:
        out.print_json({"plans": described})
    if absent:
        raise ModelError("\n".join(absent))


def _described(work: Plan, folder: Path, request: Request, wish: Wish) -> dict[str, Any]:
    from ..core.journal import scan
    from ..models.api_calls import sent
    from ..run.artefacts import slug

    index, asked = scan(folder).index, sent(folder)
    units: Counter[str] = Counter()
    done: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for unit in work.units:
        units[unit.cell] += 1
        if unit.key in index:
            (errors if index.failed(unit.key) else done)[unit.cell] += 1
    cells = [
        {
            "cell": cell.name,
            "model": cell.card.name,
            "condition": cell.condition.name,
            "params": dict(cell.condition.params),
            "units": units[cell.name],
            "done": done[cell.name],
            "errors": errors[cell.name],
        }
        for cell in work.cells
    ]
    data = work.dataset
    total = {"units": units.total(), "done": done.total(), "errors": errors.total(), "chunks": len(work.chunks)}
    return {
        "suite": work.suite.name,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "stamp": data.stamp},
        "questions": dict(Counter(q.modality for q in data.questions)),
        "models": [card.to_dict() for card in work.cards],
        "dtype": work.dtype,
        "output": str(folder),
        "cells": cells,
        "total": total,
        "requests": {
            name: asdict(count) | {"sent": asked.get(slug(name), {}).get("requests", 0)}
            for name, count in work.requests.items()
        },
        "estimate": _estimate(work, folder, index, request, wish) if wish else None,
        "notes": [*work.notes, *data_problems(work), *(_cluster(work) if wish else ())],
    }


def _cluster(work: Plan) -> list[str]:
    unsaid = work.suite.run.engine == "ray" and work.suite.run.workers == "auto"
    return ["the time is that of this machine's workers; --workers says how many a cluster has"] if unsaid else []


# -- time


def _estimate(work: Plan, folder: Path, index: Index, request: Request, wish: Wish) -> dict[str, Any]:
    """Seconds and cost of what is left, by cell and in all, and what of it a budget allows."""
    from ..run.estimate import Crew
    from ..run.plans import jobs_of, units_left

    jobs = jobs_of(work)
    left = [job for job in jobs if units_left(job, index)]
    kind, workers, here = _workers(work, len(left))
    units = (PROBE if wish.probe is None else wish.probe) if here else 0
    rates, load, missing = _rates(work, left, kind, [*wish.earlier, folder], units, request.plugins)
    crew = Crew(workers, load)
    found = {"workers": workers, "device": kind, "load_s": load, "missing": missing}
    found |= _times(crew, left, rates, wish.price)
    return found | {"budget": _budget(work, crew, jobs, left, rates, wish.seconds) if wish.seconds else None}


def _workers(work: Plan, jobs: int) -> tuple[str, int, bool]:
    """Kind and number of the workers that a run would have, and whether this machine has one to probe on."""
    from ..run.devices import choose_devices, gpu_count

    run = work.suite.run
    if run.device.startswith("cuda") and not gpu_count():  # as on the login node of a cluster
        return "cuda", 1 if run.workers == "auto" else int(run.workers), False
    devices = choose_devices(run.device, run.workers, max(1, jobs))
    return devices[0].partition(":")[0], len(devices), True


def _rates(
    work: Plan,
    left: Iterable[Job],
    kind: str,
    folders: Iterable[str | Path],
    units: int,
    plugins: Sequence[str],
) -> tuple[dict[str, Rate], float, dict[str, str]]:
    """What each cell with work left takes: by the first of the folders that tells, else by a probe of `units`; the
    seconds of loading a model, 0 without a probe; and why some cells have no rate."""
    from ..run.earlier import earlier
    from ..run.probe import probe

    costs = {job.cell: job.cost for job in left}
    rates: dict[str, Rate] = {}
    for folder in folders:
        rates = earlier(Path(folder), work, kind, costs) | rates
    unknown = [name for name in costs if name not in rates]
    if not unknown or not units:
        return rates, 0.0, dict.fromkeys(unknown, "no earlier run tells of it, and nothing was probed")
    out.note(f"probe: {units} questions of each of {len(unknown)} cells, on one worker ({kind})")
    began = time.monotonic()
    found = probe(work, unknown, units, plugins)
    out.note(f"probe: done in {time.monotonic() - began:.0f} s")
    return rates | dict(found.rates), found.load, dict(found.missing)


def _times(crew: Crew, left: Sequence[Job], rates: Mapping[str, Rate], price: float | None) -> dict[str, Any]:
    """Seconds until all is done, and of each cell; `cost` is that of all workers from the first job to the last."""
    from ..run.estimate import at_high, at_low

    likely, low, high = (crew.schedule(left, each) for each in (rates, at_low(rates), at_high(rates)))
    units: Counter[str] = Counter()
    for job in left:
        units[job.cell] += len(job.units)
    cells = []
    for name, rate in ((name, rates[name]) for name in units if name in rates):
        spent = rate.seconds * units[name] + rate.once
        cells.append(
            {
                "cell": name,
                "units": units[name],
                "seconds_a_unit": {"value": rate.seconds, "low": rate.low, "high": rate.high, "n": rate.n},
                "basis": rate.basis,
                "worker_s": spent,
                "cost": None if price is None else spent / 3600 * price,
                "done_after_s": likely.done[name],
            }
        )
    hours = crew.workers * likely.seconds / 3600
    return {
        "seconds": {"value": likely.seconds, "low": low.seconds, "high": high.seconds},
        "utilisation": likely.utilisation,
        "cost": None if price is None else hours * price,
        "cells": cells,
    }


def _budget(
    work: Plan, crew: Crew, jobs: Sequence[Job], left: Sequence[Job], rates: Mapping[str, Rate], seconds: float
) -> dict[str, Any]:
    """Cells that are done in time, at the slow end of all intervals and as is likely; and the `--limit` that fits."""
    from ..run.estimate import at_high

    slow = at_high(rates)
    likely, sure = (crew.schedule(left, each) for each in (rates, slow))
    fits = [name for name, at in sure.done.items() if at <= seconds]
    return {
        "seconds": seconds,
        "fits": fits,
        "may_fit": [name for name, at in likely.done.items() if at <= seconds and name not in fits],
        "limit": crew.largest_sample(work, jobs, rates, seconds),
        "limit_slow": crew.largest_sample(work, jobs, slow, seconds),
    }


# -- on the terminal


def _print_plan(described: dict[str, Any]) -> None:
    console = out.results()
    rows = [
        [cell["model"], cell["condition"], cell["units"], cell["done"], cell["errors"]] for cell in described["cells"]
    ]
    console.print(f"data: {described['data']['stamp']}", markup=False)
    counts = ", ".join(f"{name} {count}" for name, count in described["questions"].items())
    console.print(f"questions: {counts}", markup=False, soft_wrap=True)
    out.print_table(console, described["suite"], ("model", "condition", "units", "done", "errors"), rows)
    total = described["total"]
    lines = [
        f"{len(rows)} cells, {total['units']:,} units in {total['chunks']} chunks, {total['done']:,} done in "
        f"{described['output']}"
    ]
    for name, count in described["requests"].items():
        limit = "no max_requests" if count["limit"] is None else f"max_requests {count['limit']:,}"
        lines.append(f"{name}: at most {count['most']:,} requests ({limit}), {count['sent']:,} sent")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    if described["estimate"]:
        _print_estimate(described["estimate"])
    for message in described["notes"]:
        out.note(f"note: {message}")


def _print_estimate(found: dict[str, Any]) -> None:
    from ..run.progress import clock

    console, budget, missing = out.results(), found["budget"], found["missing"]
    if not found["cells"] and not missing:
        console.print("nothing is left to do", markup=False)
        return
    columns = _columns(found["cells"], budget, found["cost"] is not None)
    out.print_table(console, "time", list(columns), list(zip(*columns.values(), strict=True)))
    whole = found["seconds"]
    lines = [f"{count} cells by {name}" for name, count in Counter(cell["basis"] for cell in found["cells"]).items()]
    lines += [
        f"workers: {found['workers']} ({found['device']}), busy {found['utilisation']:.0%} of the time",
        f"time: {clock(whole['value'])}; {clock(whole['low'])} to {clock(whole['high'])} by the questions measured",
    ]
    lines += [] if found["cost"] is None else [f"cost: {found['cost']:,.2f}"]
    lines += [f"not estimated: {name}: {why}" for name, why in missing.items()]
    lines += _budget_lines(budget, len(found["cells"]), len(missing)) if budget else []
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _columns(cells: Sequence[dict[str, Any]], budget: dict[str, Any] | None, priced: bool) -> dict[str, list[object]]:
    """Header -> what stands below it."""
    from ..run.progress import clock

    rates = [cell["seconds_a_unit"] for cell in cells]
    columns: dict[str, list[object]] = {
        "cell": [cell["cell"] for cell in cells],
        "units left": [cell["units"] for cell in cells],
        "measured": [rate["n"] for rate in rates],
        "s a unit": [f"{rate['value']:.3g}" for rate in rates],
        "95%": ["–" if r["low"] == r["high"] else f"{r['low']:.3g} to {r['high']:.3g}" for r in rates],
        "worker time": [clock(cell["worker_s"]) for cell in cells],
    }
    columns |= {"cost": [f"{cell['cost']:,.2f}" for cell in cells]} if priced else {}
    columns |= {"done after": [clock(cell["done_after_s"]) for cell in cells]}
    if budget:
        fits = dict.fromkeys(budget["fits"], "yes") | dict.fromkeys(budget["may_fit"], "maybe")
        columns |= {"fits": [fits.get(cell["cell"], "no") for cell in cells]}
    return columns


def _budget_lines(budget: dict[str, Any], cells: int, missing: int) -> list[str]:
    """cells: with an estimate; missing: without."""
    from ..run.progress import clock

    head = f"in {clock(budget['seconds'])}"
    if len(budget["fits"]) == cells and not missing:
        return [f"{head}: all of it fits"]
    lines = [f"{head}: {len(budget['fits'])} of {cells + missing} cells fit, {len(budget['may_fit'])} more may"]
    every = "every cell" if not missing else "every cell that was estimated"
    if len(budget["fits"]) == cells:
        return lines
    if not budget["limit"]:
        return [*lines, f"{head}: {every} with a single question per modality is too much; leave some cells out"]
    surely = f" (--limit {budget['limit_slow']} at the slow end)" if budget["limit_slow"] else ""
    return [*lines, f"{head}: {every} fits with --limit {budget['limit']}{surely}"]
