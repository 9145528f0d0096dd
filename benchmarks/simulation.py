"""Large runs without a model: the real plan, dispatcher, journal and export, on workers that only keep time.

What a unit takes is what it took in a measured run; what the coordinator takes is measured here, and while it is busy
no simulated worker is handed anything. Messages are pickled as through a worker's pipe.
"""

from __future__ import annotations

import json
import pickle
import random
import statistics
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from safemed_bench.commands.prepare import cards_of
from safemed_bench.core.journal import JOURNAL, Journal, scan, to_line
from safemed_bench.core.types import Question, Record
from safemed_bench.datasets.base import Dataset
from safemed_bench.run import Work
from safemed_bench.run.messages import Done, Job, Order
from safemed_bench.run.plans import jobs_of
from safemed_bench.run.progress import QuietReporter
from safemed_bench.run.simulate import SimulatedEngine
from safemed_bench.suite.loader import load_suites
from safemed_bench.suite.plan import Plan, build_plan

QUESTIONS = 17_662
"""Of OmniMedVQA's test split."""

SHARES = {
    "CT": 15_808,
    "MRI": 31_877,
    "X-Ray": 7_916,
    "Ultrasound": 10_991,
    "Dermoscopy": 6_679,
    "Fundus Photography": 5_398,
    "OCT": 4_646,
    "Microscopy": 5_680,
}
"""Questions of the open-access part of OmniMedVQA, by modality."""

SMOOTHED = {"name": "safemed-r1-smoothed", "entry": "safemed-r1-smooth", "smooth": {"sigma": 0.25, "n": 20}}
ENTRIES: tuple[Any, ...] = ("sft", "instruct", "cot", "warm", "safemed-r1", SMOOTHED)
"""Those of the default suite, and the one that safemed-r1 starts from."""

LETTERS_ONLY = {"clean": 0.0044, "blank": 0.0041, "shuffled": 0.004, "noise": 0.0045, "fgsm": 0.0115, "pgd": 0.056}
REASONING = {"clean": 0.0068, "blank": 0.0063, "shuffled": 0.0068, "noise": 0.007, "fgsm": 0.0164, "pgd": 0.115}
WITH_VOTES = {"clean": 0.26, "certify": 1.16}
SPREAD = 0.1
"""Seconds a unit of the default suite's run on phantom images, one core of a Xeon with AVX-512, and by how much the
means of chunks of 50 differ; by entries that answer with a letter, that reason, that vote."""

LOAD = 1.5
"""Seconds a worker takes to load another of these entries."""

T = TypeVar("T")
Clock = Callable[[], float]
Rates = Mapping[tuple[str, str], tuple[float, ...]]
"""(model, condition) -> seconds a unit, of each chunk that was measured."""


def apart(work: Callable[..., T], *arguments: Any) -> T:
    """The same in a process of its own, so that its memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_bytes() -> int:
    """The most memory this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- what is asked, and what it takes


def synthetic(count: int) -> Dataset:
    """Questions in OmniMedVQA's proportions and of its length; their images are names."""
    draw, total = random.Random(0), sum(SHARES.values())
    names = [name for name, share in SHARES.items() for _ in range(round(count * share / total) + 1)][:count]
    questions = tuple(
        Question(
            id=f"{name}_{place:06d}",
            image=f"/data/OmniMedVQA/Images/{name}/{place:06d}.png",
            image_sha256=f"{draw.getrandbits(256):064x}",
            question=f"What is the most likely finding in this {name} image of patient {place}?",
            options=("No abnormality", "Benign lesion", "Malignant lesion", "Inflammation")[: 2 + place % 3],
            answer=place % 2,
            modality=name,
            question_type="Disease Diagnosis",
            source="synthetic",
            split="test",
        )
        for place, name in enumerate(names)
    )
    return Dataset("synthetic", "SYNTHETIC QUESTIONS", "0" * 32, questions)


def plan_of(count: int, entries: Iterable[Any] = ENTRIES) -> Plan:
    """The default suite on that many questions."""
    (suite,) = load_suites("omnimed_pgd", [f"models={json.dumps(list(entries))}"])
    return build_plan(suite, synthetic(count), cards_of(suite)[0], dtype="fp32")


def measured(path: Path) -> Rates:
    """Seconds a unit of the chunks of a run's records.jsonl: all units of a chunk carry the same."""
    found: dict[tuple[str, str], dict[float, None]] = defaultdict(dict)
    for line in path.open():
        record = json.loads(line)
        if not record["error"]:
            found[record["model"], record["condition"]][record["seconds"]] = None
    return {cell: tuple(seconds) for cell, seconds in found.items()}


def default_rates(plan: Plan) -> Rates:
    found = {}
    for cell in plan.cells:
        voting = cell.model.smooth is not None
        table = WITH_VOTES if voting else REASONING if cell.card.reasons else LETTERS_ONLY
        mean = table[cell.condition.attack or cell.condition.kind]
        found[cell.card.name, cell.condition.name] = (mean * (1 - SPREAD), mean, mean * (1 + SPREAD))
    return found


def complete(rates: Rates, plan: Plan) -> Rates:
    """Cells that were not measured take what the slowest of other entries took under their condition."""
    found = dict(rates)
    for cell in plan.cells:
        if (cell.card.name, cell.condition.name) in found:
            continue
        alike = [seconds for (_, condition), seconds in rates.items() if condition == cell.condition.name]
        if not alike:
            raise SystemExit(f"no measured seconds of {cell.name}: the records are of another suite")
        found[cell.card.name, cell.condition.name] = max(alike, key=statistics.fmean)
    return found


class Coordinator(SimulatedEngine):
    """Simulated workers of a real coordinator."""

    def __init__(self, workers: int, rates: Rates, load: float, clock: Clock) -> None:
        super().__init__(workers, self.takes, load)
        self._rates, self._clock = rates, clock

    def takes(self, job: Job) -> float:
        chunk = random.Random(f"{job.cell} {job.chunk}").choice(self._rates[job.model.name, job.condition])
        return chunk * len(job.units)

    def clock(self) -> float:
        return self._clock()

    def send(self, order: Order) -> None:
        pickle.dumps(order)

    def work(self, job: Job) -> bytes:
        return pickle.dumps(Done(job, records(job)))

    def receive(self, sent: bytes) -> Done:
        done: Done = pickle.loads(sent)
        return done


def records(job: Job) -> tuple[Record, ...]:
    """As long as real ones."""
    attack: dict[str, Any] = {}
    if job.kind == "attack":
        steps = 20 if job.attack == "pgd" else 1
        trace = tuple(-1.2345678901234567 + step / 7 for step in range(steps))
        name = f"artefacts/{job.cell}/{job.chunk}-01234567.npz#0"
        attack = {"linf": 4 / 255, "l2": 1.2345678901234567, "steps": steps, "loss_trace": trace, "artefact": name}
        attack |= {"clean_correct": True, "forwards": steps + 1, "backwards": steps, "extra": {"verdicts": 3}}
    scores = (-8.246657371520996, -0.0009801351698115468, -7.706492900848389, -8.301139831542969)
    return tuple(
        job.record(
            place,
            answer=1,
            status="valid",
            correct=question.answer == 1,
            text="<think>The lesion has an irregular border.</think><answer>B</answer>",
            letter=1,
            option_logprobs=scores[: len(question.options)],
            seconds=0.123456,
            **attack,
        )
        for place, question in enumerate(job.questions)
    )


# -- the figures


def dry_run(folder: Path, count: int, workers: int, path: Path | None, clock: Clock, entries: Any = ENTRIES) -> Any:
    """A whole run on simulated workers, its journal written for real; facts of it."""
    began = clock()
    plan = plan_of(count, entries)
    planned = clock() - began
    rates = complete(measured(path), plan) if path else default_rates(plan)
    with Journal(folder) as journal:
        work = Work(plan, journal, QuietReporter(), False)
        engine = Coordinator(workers, rates, LOAD, clock)
        outcome = work.run(engine)
    return {
        "workers": workers,
        "cells": len(plan.cells),
        "units": outcome.total,
        "without_a_verdict": outcome.total - outcome.done,
        "plan_s": round(planned, 2),
        "simulated_s": round(engine.now, 1),
        "utilisation": round(engine.utilisation, 4),
        "coordinator_peak_mb": round(peak_bytes() / 2**20, 1),
        "journal_mb": round((folder / JOURNAL).stat().st_size / 2**20, 1),
    }


def merge(folder: Path, count: int, clock: Clock, entries: Any = ENTRIES) -> dict[str, Any]:
    """The finished run is resumed: the journal is read, and the records are written in the order of the plan."""
    plan = plan_of(count, entries)
    began = clock()
    with Journal(folder) as journal:
        read = clock() - began
        work = Work(plan, journal, QuietReporter(), False)
        opened = clock() - began
        outcome = work.run(None)
    seconds = clock() - began
    return {
        "units": outcome.total,
        "read_s": round(read, 2),
        "resume_scan_s": round(opened, 2),
        "merge_s": round(seconds, 2),
        "missing": outcome.missing,
        "peak_mb": round(peak_bytes() / 2**20, 1),
    }


@dataclass(frozen=True)
class Scanned:
    """Bytes a key that the index of a scan keeps, and the most that the scan needed beside it."""

    keys: int
    kept: float
    transient: int


def scanned(folder: Path) -> Scanned:
    tracemalloc.start()
    try:
        found = scan(folder)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Scanned(len(found.index), kept / max(1, len(found.index)), peak - kept)


def memory(folder: Path, units: int) -> tuple[Scanned, Scanned]:
    """A journal of that many units, and one of twice as many."""
    found = []
    for times in (1, 2):
        place = folder / f"x{times}"
        place.mkdir()
        jobs = jobs_of(plan_of(max(8, units * times // 20), ("cot",)))
        with (place / JOURNAL).open("wb") as file:
            for job in jobs:
                file.writelines(map(to_line, records(job)))
        found.append(apart(scanned, place))
    return found[0], found[1]


def many_units(folder: Path, units: int, clock: Clock) -> dict[str, Any]:
    """Plan, resume and memory of so many units; every number from a process of its own."""
    count = units // 20  # `cot` has twenty conditions
    run = apart(dry_run, folder / "run", count, 8, None, clock, ("cot",))
    found = apart(merge, folder / "run", count, clock, ("cot",))
    small, large = memory(folder, units)
    return {
        "units": run["units"],
        "plan_s": run["plan_s"],
        "resume_scan_s": found["resume_scan_s"],
        "index_bytes_a_unit": [round(small.kept), round(large.kept)],
        "scan_transient_mb": [round(small.transient / 2**20, 2), round(large.transient / 2**20, 2)],
        "peak_mb": found["peak_mb"],
    }


CLOCKS: Mapping[bool, Clock] = {False: time.perf_counter, True: time.process_time}
"""By whether processor seconds are asked for."""
